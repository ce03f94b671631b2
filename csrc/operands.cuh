// Numbers as the tensor cores take them.
#pragma once
#include "common.cuh"

#ifndef KIND
#define KIND 0
#endif
enum Kind { SIMT = 0, TF32 = 1, FLOAT32 = 3, BFLOAT16 = 4, FLOAT16 = 5 };  // as packing.KINDS

DEVICE float from_bits(unsigned bits)
{
#ifdef FASTCLSTM_EMULATOR
    float x;
    memcpy(&x, &bits, 4);
    return x;
#else
    return __uint_as_float(bits);
#endif
}

DEVICE unsigned as_bits(float x)
{
#ifdef FASTCLSTM_EMULATOR
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
#else
    return __float_as_uint(x);
#endif
}

// Rounded to the 19 bits that a product reads, in a float32 word.
DEVICE unsigned to_tf32(float x)
{
    unsigned bits;
#ifdef FASTCLSTM_EMULATOR
    memcpy(&bits, &x, 4);
    return (bits >> 23 & 255) == 255 ? bits : (bits + 0x1000) & 0xffffe000u;
#else
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
#endif
}

DEVICE unsigned short to_bfloat16(float x)
{
#ifdef FASTCLSTM_EMULATOR
    return emulated_bits(BFLOAT16, x);
#else
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#endif
}

DEVICE unsigned short to_float16(float x)
{
#ifdef FASTCLSTM_EMULATOR
    return emulated_bits(FLOAT16, x);
#else
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#endif
}

// The number that an operand holds.
template <int KIND_OF> DEVICE real get_operand(real x) { return x; }
template <int KIND_OF> DEVICE real get_operand(unsigned short bits)
{
    if constexpr (KIND_OF == BFLOAT16) return from_bits((unsigned)bits << 16);
#ifdef FASTCLSTM_EMULATOR
    return emulated_float16(bits);
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#endif
}

template <int KIND_OF> DEVICE void set_operand(real* to, real x)
{
    if constexpr (KIND_OF == TF32)
        *to = from_bits(to_tf32(float(x)));
    else
        *to = x;
}
template <int KIND_OF> DEVICE void set_operand(unsigned short* to, real x)
{
    if constexpr (KIND_OF == BFLOAT16)
        *to = to_bfloat16(float(x));
    else
        *to = to_float16(float(x));
}

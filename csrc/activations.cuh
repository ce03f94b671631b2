// Activations by the numbers that packing.ACTIVATIONS gives them, and their derivatives at the same input.
#pragma once
#include "common.cuh"

enum Activation {
    TANH, SIGMOID, HARD_SIGMOID, HARD_SIGMOID_KERAS2, RELU, LEAKY_RELU, ELU, SELU, GELU, SILU, SOFTPLUS, SOFTSIGN,
    EXPONENTIAL, LINEAR, RELU6, MISH
};

// The usual cell is compiled in; any other reads its activations from the arguments, and calls them.
#ifndef STANDARD
#define STANDARD 0
#endif
#define ACTIVATION(code, usual) (STANDARD ? (usual) : (code))
#if STANDARD || defined(FASTCLSTM_EMULATOR)
#define ON_DEMAND DEVICE
#else
#define ON_DEMAND static __device__ __noinline__
#endif

#define LEAKY_RELU_SLOPE real(0.2)
#define SELU_SCALE real(1.0507009873554805)
#define SELU_ALPHA real(1.6732632423543772)

// The gates of operands of 16 bits are theirs: off by at most 1e-6, and 5e-5 of the value, where h is rounded to 4e-3
// (bfloat16) or 5e-4 (float16) of it. All others have the digits of their type.
#if defined(KIND) && KIND >= 4
DEVICE float power_of_2(float x)
{
#ifdef FASTCLSTM_EMULATOR
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

DEVICE float reciprocal(float x)
{
#ifdef FASTCLSTM_EMULATOR
    return 1 / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

DEVICE real sigmoid(real x) { return reciprocal(1 + power_of_2(-1.4426950408889634f * x)); }

// By the exponential function, which near 0 has no digits of tanh; but there it is x.
DEVICE real tangent(real x)
{
    real far = 1 - 2 * reciprocal(1 + power_of_2(2.8853900817779268f * x));
    return fabs(x) < real(0.0078125) ? x : far;
}
#else
DEVICE real sigmoid(real x) { return 1 / (1 + exp(-x)); }
DEVICE real tangent(real x) { return tanh(x); }
#endif

// Limits that let NaN pass.
DEVICE real at_least(real x, real low) { return x < low ? low : x; }
DEVICE real clipped(real x, real low, real high) { return x < low ? low : x > high ? high : x; }

DEVICE real normal_cdf(real x) { return real(0.5) * erfc(-x * real(0.7071067811865476)); }

// tanh(softplus(x)) by exp(-|x|), which does not overflow.
DEVICE real mish_gate(real x)
{
    real e = exp(-fabs(x));
    return x < 0 ? e * (e + 2) / (e * (e + 2) + 2) : (1 + 2 * e) / (1 + 2 * e * (1 + e));
}

ON_DEMAND real activate(int code, real x)
{
    switch (code) {
    case TANH: return tangent(x);
    case SIGMOID: return sigmoid(x);
    case HARD_SIGMOID: return clipped(x + 3, 0, 6) / 6;
    case HARD_SIGMOID_KERAS2: return clipped(real(0.2) * x + real(0.5), 0, 1);
    case RELU: return at_least(x, 0);
    case LEAKY_RELU: return x < 0 ? LEAKY_RELU_SLOPE * x : x;
    case ELU: return x < 0 ? expm1(x) : x;
    case SELU: return SELU_SCALE * (x < 0 ? SELU_ALPHA * expm1(x) : x);
    case GELU: return at_least(x, -40) * normal_cdf(x);
    case SILU: return at_least(x, -1000) * sigmoid(x);
    case SOFTPLUS: return at_least(x, 0) + log1p(exp(-fabs(x)));
    case SOFTSIGN: x = clipped(x, real(-1e30), real(1e30)); return x / (1 + fabs(x));
    case EXPONENTIAL: return exp(x);
    case RELU6: return clipped(x, 0, 6);
    case MISH: return at_least(x, -1000) * mish_gate(x);
    default: return x;
    }
}

ON_DEMAND real derivative(int code, real x)
{
    switch (code) {
    case TANH: { real y = tangent(x); return 1 - y * y; }
    case SOFTPLUS: return sigmoid(x);
    case SIGMOID: { real y = sigmoid(x); return y * (1 - y); }
    case HARD_SIGMOID: return x > -3 && x < 3 ? real(1) / 6 : real(0);
    case HARD_SIGMOID_KERAS2: return x > real(-2.5) && x < real(2.5) ? real(0.2) : real(0);
    case RELU: return x > 0 ? real(1) : real(0);
    case LEAKY_RELU: return x > 0 ? real(1) : LEAKY_RELU_SLOPE;
    case ELU: return exp(x > 0 ? real(0) : x);
    case SELU: return SELU_SCALE * (x < 0 ? SELU_ALPHA * exp(x) : x >= 0 ? real(1) : x);
    case GELU: { real near = clipped(x, -40, 40);
                 return normal_cdf(x) + near * exp(-near * near / 2) * real(0.3989422804014327); }
    case SILU: { real y = sigmoid(x); return y + clipped(x, -1000, 1000) * y * (1 - y); }
    case SOFTSIGN: { real y = 1 / (1 + fabs(x)); return y * y; }
    case EXPONENTIAL: return exp(x);
    case RELU6: return x > 0 && x < 6 ? real(1) : real(0);
    case MISH: { real gate = mish_gate(x); return gate + clipped(x, -1000, 1000) * (1 - gate * gate) * sigmoid(x); }
    default: return 1;
    }
}

// The instructions around the tensor cores, from sm_80 on, as functions of a warp; and what they do in the emulator.
#pragma once
#include "operands.cuh"

template <int BYTES> DEVICE void cp_async(void* to, const void* from, bool taken)
{
#ifdef FASTCLSTM_EMULATOR
    emulated_cp_async(to, from, BYTES, taken);
#else
    unsigned address = (unsigned)__cvta_generic_to_shared(to);
    int size = taken ? BYTES : 0;  // what is not read becomes zero
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(size) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(size) : "memory");
#endif
}

DEVICE void cp_async_commit()
{
#ifdef FASTCLSTM_EMULATOR
    emulated_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int NEWEST> DEVICE void cp_async_wait()
{
#ifdef FASTCLSTM_EMULATOR
    emulated_wait(NEWEST);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
#endif
}

DEVICE void ldmatrix(unsigned (&to)[4], const void* row)
{
#ifdef FASTCLSTM_EMULATOR
    emulated_ldmatrix(to, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
#endif
}

// The same of matrices that lie transposed in memory, of 16-bit elements.
DEVICE void ldmatrix_transposed(unsigned (&to)[4], const void* row)
{
#ifdef FASTCLSTM_EMULATOR
    emulated_ldmatrix_transposed(to, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
#endif
}

// sum (16 pixels x 8 columns) += a (16 x 32 bytes) b (32 bytes x 8)
DEVICE void mma(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
#ifdef FASTCLSTM_EMULATOR
#if KIND == 4
    emulated_mma<2>(sum, a, b, [](unsigned w, int e) { return emulated_bfloat16(w >> 16 * e & 0xffff); });
#elif KIND == 5
    emulated_mma<2>(sum, a, b, [](unsigned w, int e) { return emulated_float16(w >> 16 * e & 0xffff); });
#else
    emulated_mma<1>(sum, a, b, [](unsigned w, int) { return emulated_tf32(w); });
#endif
#else
#if KIND == 4
#define SHAPE "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#elif KIND == 5
#define SHAPE "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
#define SHAPE "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
#endif
    asm volatile(SHAPE "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Split float32 words: `high` as tf32, `low` what is left of them (where it is wanted).
template <int N> DEVICE void split(unsigned (&high)[N], unsigned (&low)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        float x = from_bits(high[i]);
        high[i] = to_tf32(x);
        if (KIND == 3) low[i] = to_tf32(x - from_bits(high[i]));
    }
}

// The products of one row of tiles with four columns of tiles. In three parts: the small ones first; and since tensor
// cores cut off their sums where others round, the sum of a slab is added to that of all slabs outside of them.
DEVICE void multiply_split(float (&sum)[4][4], const unsigned (&a)[4], const unsigned (&a_low)[4],
                           const unsigned (&b)[4][2], const unsigned (&b_low)[4][2])
{
    if (KIND == 3) {
        float slab[4][4];
#pragma unroll
        for (int n = 0; n < 4; n++) slab[n][0] = slab[n][1] = slab[n][2] = slab[n][3] = 0;
#pragma unroll
        for (int n = 0; n < 4; n++) mma(slab[n], a_low, b[n]);
#pragma unroll
        for (int n = 0; n < 4; n++) mma(slab[n], a, b_low[n]);
#pragma unroll
        for (int n = 0; n < 4; n++) mma(slab[n], a, b[n]);
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[n][i] += slab[n][i];
    } else {
#pragma unroll
        for (int n = 0; n < 4; n++) mma(sum[n], a, b[n]);
    }
}

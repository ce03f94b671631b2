// The instructions of a warpgroup (128 threads, sm_90a) as functions of it; and what they do in the emulator.
//
// What they rely on, each fact read in two places: PTX ISA 9.0, 9.7.15 (sections and figures in brackets), and CUTLASS
// 4, include/cute/arch/mma_sm90_desc.hpp, arch/mma_sm90_gmma.hpp and atom/mma_traits_sm90_gmma.hpp (names in brackets).
//
// - A descriptor of an operand in shared memory holds, in units of 16 bytes, its address in bits 0 to 13, the leading
//   offset in 16 to 29 and the stride offset in 32 to 45; a base offset in 49 to 51; and the swizzle in 62 and 63,
//   where 1 is that of 128 bytes [5.1.2.2; GmmaDescriptor].
// - With that swizzle and the depth inside (K-major, for A and B alike) a row is 128 bytes, eight rows are an atom,
//   atoms lie the stride offset apart and the leading offset is not used but "assumed 1" [5.1.2.1, table of canonical
//   layouts; make_gmma_desc, Layout_K_SW128_Atom_Bits].
// - Swizzle<3,4,3>: bits 4 to 6 of an address are XORed with its bits 7 to 9, so that 16 bytes number n of row r of an
//   atom stand at n ^ r. The pattern starts at multiples of 1024 bytes; there the base offset is 0 [5.1.2.1.3 and
//   5.1.2.2; cute/swizzle.hpp].
// - Without a swizzle eight rows are an atom of 16 bytes each, one after the other, 128 bytes that start at any multiple
//   of 16. The leading offset leads to the next 16 bytes of depth, the stride offset to the next eight rows [5.1.2, "8x1",
//   and 5.1.2.1; make_gmma_desc, INTERLEAVE: ((8,m),(T,2)):((1T,SBO),(1,LBO))].
// - A product takes 32 bytes of depth; the next one's operands start 32 bytes further [5.2; DescriptorIterator, which
//   adds to the address; so does ThunderKittens' st_descriptor]. The XOR is of the final address.
// - Sums (64 x N): register 4j + 2v + u of thread t is row 16 (t / 32) + t % 32 / 4 + 8v, column 8j + 2 (t % 4) + u
//   [figures 149 and 151; CLayout_64xN]: as those of four mma.sync of 16 rows.
// - A in registers (tf32): register 2v + u of thread t is row 16 (t / 32) + t % 32 / 4 + 8u, depth t % 4 + 4v [figure
//   150; ALayout_64x8]: what ldmatrix gives mma.sync.
// - Products read shared memory in the async proxy: what a thread has written, as which a cp.async of its own is taken
//   here, needs that thread's fence.proxy.async before the barrier after which a product reads it [4, 7.1;
//   fence_view_async_shared]. Once a product has been waited for, its operands may be written again [4].
// - wgmma.fence stands before the first product and wherever a thread has touched registers of one; sums of products of
//   one shape need none between them [7.1; warpgroup_arrive]. Registers of a product belong to it until it has been
//   waited for [7.3; warpgroup_fence_operand, here `pin`, keeps the compiler from moving their use].
#pragma once
#include "tensor_cores.cuh"

DEVICE unsigned shared_address(const void* pointer)
{
#ifdef FASTCLSTM_EMULATOR
    return emulated_shared_address(pointer);
#else
    return (unsigned)__cvta_generic_to_shared(pointer);
#endif
}

// Rows of 128 bytes, swizzled, from an address on: a multiple of 1024 bytes, and 32 a product.
DEVICE unsigned long long descriptor(unsigned address)
{
    return (unsigned long long)(address >> 4) | 1ull << 16 | 1024ull >> 4 << 32 | 1ull << 62;
}

// Rows of 16 bytes, eight of them together, `rows` bytes from eight to the next and `depth` to the other half of a
// product's depth: no swizzle; all multiples of 16.
DEVICE unsigned long long descriptor(unsigned address, int depth, int rows)
{
    return (address >> 4 | (unsigned)depth >> 4 << 16) | (unsigned long long)((unsigned)rows >> 4) << 32;
}

DEVICE void fence_async_proxy()
{
#ifdef FASTCLSTM_EMULATOR
    emulated_fence_async_proxy();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

DEVICE void wgmma_fence()
{
#ifdef FASTCLSTM_EMULATOR
    emulated_wgmma_fence();
#else
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

DEVICE void wgmma_commit()
{
#ifdef FASTCLSTM_EMULATOR
    emulated_wgmma_commit();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int NEWEST> DEVICE void wgmma_wait()
{
#ifdef FASTCLSTM_EMULATOR
    emulated_wgmma_wait(NEWEST);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(NEWEST) : "memory");
#endif
}

// What is done to these registers before stays before, what is done after stays after.
DEVICE void pin(float& x)
{
#ifndef FASTCLSTM_EMULATOR
    asm volatile("" : "+f"(x)::"memory");
#endif
}

DEVICE void pin(unsigned& x)
{
#ifndef FASTCLSTM_EMULATOR
    asm volatile("" : "+r"(x)::"memory");
#endif
}

template <class T, int N> DEVICE void pin(T (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) pin(x[i]);
}

#if KIND == 4
#define WGMMA_KIND "k16.f32.bf16.bf16 "
#define WGMMA_ELEMENT [](const unsigned char* at) { return emulated_bfloat16(*(const unsigned short*)at); }
#elif KIND == 5
#define WGMMA_KIND "k16.f32.f16.f16 "
#define WGMMA_ELEMENT [](const unsigned char* at) { return emulated_float16(*(const unsigned short*)at); }
#else
#define WGMMA_KIND "k8.f32.tf32.tf32 "
#define WGMMA_ELEMENT [](const unsigned char* at) { return emulated_tf32(*(const unsigned*)at); }
#endif
#define SUMS_4(s, j) "+f"(s[j][0]), "+f"(s[j][1]), "+f"(s[j][2]), "+f"(s[j][3])
#define SUMS_16(s, j) SUMS_4(s, j), SUMS_4(s, j + 1), SUMS_4(s, j + 2), SUMS_4(s, j + 3)
#define SUMS_32(s, j) SUMS_16(s, j), SUMS_16(s, j + 4)
#define SUMS_64(s) SUMS_32(s, 0)
#define SUMS_128(s) SUMS_32(s, 0), SUMS_32(s, 8)
#define SUMS_256(s) SUMS_128(s), SUMS_32(s, 16), SUMS_32(s, 24)
#define PLACES_64                                                                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "                                 \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PLACES_128                                                                                                     \
    PLACES_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                     \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PLACES_256                                                                                                     \
    PLACES_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                    \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                                 \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "                                 \
    "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "                             \
    "%124, %125, %126, %127"
#define WGMMA(n, a, b, p, trans)                                                                                       \
    "{ .reg .pred p; setp.ne.b32 p, " p ", 0; wgmma.mma_async.sync.aligned.m64n" #n WGMMA_KIND "{" PLACES_##n "}, "    \
    a ", " b ", p, 1, 1" trans "; }" : SUMS_##n(sum)

// sum (64 x N) = a (64 x 32 bytes) b (32 bytes x N) + (accumulate ? sum : 0), both in shared memory
template <int N> DEVICE void wgmma(float (&sum)[N / 8][4], unsigned long long a, unsigned long long b, int accumulate)
{
    static_assert(N == 64 || N == 128 || N == 256, "");
#ifdef FASTCLSTM_EMULATOR
    emulated_wgmma<N>(sum, nullptr, a, b, accumulate, sizeof(operand), WGMMA_ELEMENT);
#elif KIND >= 4
    if constexpr (N == 64)
        asm volatile(WGMMA(64, "%32", "%33", "%34", ", 0, 0") : "l"(a), "l"(b), "r"(accumulate));
    else if constexpr (N == 128)
        asm volatile(WGMMA(128, "%64", "%65", "%66", ", 0, 0") : "l"(a), "l"(b), "r"(accumulate));
    else
        asm volatile(WGMMA(256, "%128", "%129", "%130", ", 0, 0") : "l"(a), "l"(b), "r"(accumulate));
#endif
}

// The same with a (64 x 8, tf32) in registers.
template <int N>
DEVICE void wgmma(float (&sum)[N / 8][4], const unsigned (&a)[4], unsigned long long b, int accumulate)
{
    static_assert(N == 64 || N == 128 || N == 256, "");
#ifdef FASTCLSTM_EMULATOR
    emulated_wgmma<N>(sum, a, 0, b, accumulate, sizeof(operand), WGMMA_ELEMENT);
#elif KIND < 4
#define IN_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)
    if constexpr (N == 64)
        asm volatile(WGMMA(64, "{%32, %33, %34, %35}", "%36", "%37", "") : IN_REGISTERS);
    else if constexpr (N == 128)
        asm volatile(WGMMA(128, "{%64, %65, %66, %67}", "%68", "%69", "") : IN_REGISTERS);
    else
        asm volatile(WGMMA(256, "{%128, %129, %130, %131}", "%132", "%133", "") : IN_REGISTERS);
#endif
}

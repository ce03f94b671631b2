// What every kernel uses: types, shared memory, loads. NVRTC and nvcc compile it, and g++ for the tests' emulator.
#pragma once

#define DEVICE __device__ __forceinline__

// KERNEL(threads of a block[, blocks that a multiprocessor must hold]), the name on the next line.
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)

#ifdef REAL
typedef REAL real;  // of states, sums and results: float or double
#else
typedef float real;
#endif

#ifdef FASTCLSTM_EMULATOR
DEVICE unsigned char* shared_memory() { return emulated_shared_memory(); }
#else
extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
DEVICE unsigned char* shared_memory() { return dynamic_shared_memory; }
#endif

// Kernels are given addresses, or with this bit where one stands in a table: those of arrays that change from call to
// call (memory.cu). Every kernel resolves its pointers first.
const unsigned long long IN_TABLE = 1ull << 62;

template <class T> DEVICE T* resolved(T* p)
{
    unsigned long long address = (unsigned long long)p;
    if (address & IN_TABLE) address = __ldg((const unsigned long long*)(address ^ IN_TABLE));
#ifdef FASTCLSTM_EMULATOR
    return (T*)address;
#else
    return (T*)__cvta_global_to_generic(address);  // so that the compiler knows which memory it is
#endif
}

template <class... T> DEVICE void resolve(T*&... pointers) { ((pointers = resolved(pointers)), ...); }

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Loads of what no thread of the launch writes; or, `late`, of what another block has written before a barrier of all
// blocks: they see that, as the read-only cache need not.
#ifdef FASTCLSTM_EMULATOR
template <class T> DEVICE T load_late(const T* from) { return emulated_load_late(from); }
#else
#define LATE "ld.relaxed.gpu.global."
DEVICE unsigned load_late(const unsigned* from)
{
    unsigned x;
    asm volatile(LATE "b32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

DEVICE float load_late(const float* from)
{
    float x;
    asm volatile(LATE "f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
    return x;
}

DEVICE double load_late(const double* from)
{
    double x;
    asm volatile(LATE "f64 %0, [%1];" : "=d"(x) : "l"(from) : "memory");
    return x;
}

DEVICE float4 load_late(const float4* from)
{
    float4 v;
    asm volatile(LATE "v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

DEVICE double2 load_late(const double2* from)
{
    double2 v;
    asm volatile(LATE "v2.f64 {%0, %1}, [%2];" : "=d"(v.x), "=d"(v.y) : "l"(from) : "memory");
    return v;
}
#endif

template <class T> DEVICE T load(const T* from, bool late) { return late ? load_late(from) : __ldg(from); }

DEVICE void load4(float (&to)[4], const float* from, bool late = false)
{
    float4 v = load((const float4*)from, late);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

DEVICE void load4(double (&to)[4], const double* from, bool late = false)
{
    double2 a = load((const double2*)from, late), b = load((const double2*)from + 1, late);
    to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
}

// An element of what no thread of the launch writes; 0 where there is nothing.
DEVICE real read(const real* from, long long at) { return from ? __ldg(from + at) : real(0); }

DEVICE void copy4(float* to, const float* from) { *(float4*)to = *(const float4*)from; }

DEVICE void copy4(double* to, const double* from)
{
    ((double2*)to)[0] = ((const double2*)from)[0];
    ((double2*)to)[1] = ((const double2*)from)[1];
}

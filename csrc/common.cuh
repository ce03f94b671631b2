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

DEVICE void load4(float (&to)[4], const float* from)
{
    float4 v = __ldg((const float4*)from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

DEVICE void load4(double (&to)[4], const double* from)
{
    double2 a = __ldg((const double2*)from), b = __ldg((const double2*)from + 1);
    to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
}

DEVICE void copy4(float* to, const float* from) { *(float4*)to = *(const float4*)from; }

DEVICE void copy4(double* to, const double* from)
{
    ((double2*)to)[0] = ((const double2*)from)[0];
    ((double2*)to)[1] = ((const double2*)from)[1];
}

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

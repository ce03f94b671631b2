// The table of addresses that the launches of a recorded call find their arrays in, and memory of zeros.
#include "common.cuh"

#define EIGHT(NAME, first)                                                                                             \
    NAME(first##0), NAME(first##1), NAME(first##2), NAME(first##3), NAME(first##4), NAME(first##5), NAME(first##6),   \
        NAME(first##7)
#if ARRAYS == 16
#define EACH(NAME) EIGHT(NAME, 0), EIGHT(NAME, 1)
#elif ARRAYS == 32
#define EACH(NAME) EIGHT(NAME, 0), EIGHT(NAME, 1), EIGHT(NAME, 2), EIGHT(NAME, 3)
#else
#define EACH(NAME)                                                                                                     \
    EIGHT(NAME, 0), EIGHT(NAME, 1), EIGHT(NAME, 2), EIGHT(NAME, 3), EIGHT(NAME, 4), EIGHT(NAME, 5), EIGHT(NAME, 6),   \
        EIGHT(NAME, 7)
#endif
#define PARAMETER(n) long long array_##n
#define VALUE(n) array_##n

// table [count]: the address of the array at index arrays[n], and offsets[n] bytes.
KERNEL(256)
write_table(long long* table, const int* arrays, const long long* offsets, int count, EACH(PARAMETER))
{
    long long* addresses = (long long*)shared_memory();
    if (threadIdx.x == 0) {
        long long values[] = {EACH(VALUE)};
#pragma unroll
        for (int n = 0; n < ARRAYS; n++) addresses[n] = values[n];
    }
    __syncthreads();
    int n = blockIdx.x * 256 + threadIdx.x;
    if (n < count) table[n] = addresses[__ldg(arrays + n)] + __ldg(offsets + n);
}

// Zeros in `count` bytes from a multiple of 16 on; 16 a thread.
KERNEL(256)
zero(unsigned char* to, long long count)
{
    resolve(to);
    long long first = ((long long)blockIdx.x * 256 + threadIdx.x) * 16;
    if (first + 16 <= count) {
        *(int4*)(to + first) = int4{0, 0, 0, 0};
    } else {
        for (long long n = first; n < count; n++) to[n] = 0;
    }
}

// Elementwise operations on arrays of any strides, over up to five axes: what stands between the engine's operations.
// One element a thread; blocks of 256 threads.
#include "common.cuh"

#ifdef RESULT
typedef RESULT result;  // unsigned char of comparisons
#else
typedef real result;
#endif

enum Operation { COPY, ADD, SUBTRACT, MULTIPLY, DIVIDE, MAXIMUM, WHERE, LEAK, GREATER, NOT_EQUAL };

#define STRIDES(array)                                                                                                 \
    long long array##_0, long long array##_1, long long array##_2, long long array##_3, long long array##_4

template <class N> struct Index {
    N i[5];

    DEVICE Index(N n, int size_1, int size_2, int size_3, int size_4)
    {
        int sizes[5] = {1, size_1, size_2, size_3, size_4};
#pragma unroll
        for (int axis = 4; axis; axis--) {
            if (sizes[axis] == 1) {  // most arrays have one axis or two
                i[axis] = 0;
                continue;
            }
            N rest = n / N(sizes[axis]);
            i[axis] = n - rest * N(sizes[axis]);
            n = rest;
        }
        i[0] = n;
    }

    DEVICE long long at(STRIDES(step)) const
    {
        return (long long)i[0] * step_0 + (long long)i[1] * step_1 + (long long)i[2] * step_2 +
               (long long)i[3] * step_3 + (long long)i[4] * step_4;
    }
};

DEVICE result computed(int operation, real a, real b, bool kept)
{
    switch (operation) {
    case ADD: return result(a + b);
    case SUBTRACT: return result(a - b);
    case MULTIPLY: return result(a * b);
    case DIVIDE: return result(a / b);
    case MAXIMUM: return result(a > b || a != a ? a : b);
    case WHERE: return result(kept ? a : b);
    case LEAK: return result(kept ? a : b * a);
    case GREATER: return result(a > b);
    case NOT_EQUAL: return result(a != b);
    default: return result(a);
    }
}

#define PLACE(array) index.at(array##_0, array##_1, array##_2, array##_3, array##_4)
#define COMPUTE(N)                                                                                                     \
    {                                                                                                                  \
        Index<N> index((N)n, size_1, size_2, size_3, size_4);                                                          \
        to[PLACE(to)] = computed(operation, a ? a[PLACE(a)] : a_value, b ? b[PLACE(b)] : b_value,                      \
                                 kept && kept[PLACE(kept)]);                                                           \
    }

// to = a ∘ b, or a where it is kept and b, or b · a, elsewhere. `count` elements in all, size_1 … size_4 along the last axes; each
// array has its strides, 0 where it is repeated. Where there is no array its value is taken.
KERNEL(256)
elementwise(int operation, long long count, int size_1, int size_2, int size_3, int size_4, result* to, STRIDES(to),
            const real* a, STRIDES(a), real a_value, const real* b, STRIDES(b), real b_value,
            const unsigned char* kept, STRIDES(kept))
{
    resolve(to, a, b, kept);
    long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= count) return;
    if (count <= 0x7fffffff) COMPUTE(unsigned)  // whose division is several times as fast
    else COMPUTE(long long)
}

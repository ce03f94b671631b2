// Activations of whole arrays, and the way back. One element a thread; blocks of 256 threads.
#include "activations.cuh"

KERNEL(256)
activation(const real* x, int code, long long count, real* y)
{
    resolve(x, y);
    long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n < count) y[n] = activate(code, x[n]);
}

// dx of dy and of the x that was activated.
KERNEL(256)
activation_backward(const real* x, const real* dy, int code, long long count, real* dx)
{
    resolve(x, dy, dx);
    long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n < count) dx[n] = dy[n] * derivative(code, x[n]);
}

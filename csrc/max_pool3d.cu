// Max pooling, forward and backward: a thread owns WIDTH neighbouring channels (1, or 4 where they are aligned) of one
// element, so that its loads are wide and coalesced. Blocks are (elements of a frame, frames).
#include "common.cuh"

#define VOLUME                                                                                                         \
    int frames, int T, int H, int W, int C, int TO, int HO, int WO, int pool_t, int pool_h, int pool_w, int step_t,   \
        int step_h, int step_w, int front, int top, int left

template <class T> DEVICE void load(T (&to)[1], const T* from) { to[0] = __ldg(from); }
DEVICE void load(real (&to)[4], const real* from) { load4(to, from); }
DEVICE void load(long long (&to)[4], const long long* from)
{
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = __ldg(from + i);
}

// y (B, TO, HO, WO, C) of x (B, T, H, W, C), and (unless null) where in (T, H, W) each stood: the first NaN of a
// window, else the first of its largest. Frames are those of y.
KERNEL(256)
max_pool3d(const real* x, VOLUME, real* y, long long* indices)
{
    resolve(x, y, indices);
    int n = blockIdx.x * 256 + threadIdx.x, pieces = C / WIDTH;
    if (n >= HO * WO * pieces) return;
    int pixel = n / pieces, channel = (n - pixel * pieces) * WIDTH, ho = pixel / WO, wo = pixel - ho * WO;
    int h0 = ho * step_h - top, w0 = wo * step_w - left, h1 = min(h0 + pool_h, H), w1 = min(w0 + pool_w, W);
    h0 = max(h0, 0), w0 = max(w0, 0);
    for (int frame = blockIdx.y; frame < frames; frame += gridDim.y) {
        int image = frame / TO, t0 = (frame - image * TO) * step_t - front, t1 = min(t0 + pool_t, T);
        t0 = max(t0, 0);
        const real* volume = x + (long long)image * T * H * W * C + channel;
        real best[WIDTH];
        long long where[WIDTH];
        bool first = true;
        for (int t = t0; t < t1; t++)
            for (int h = h0; h < h1; h++)
#pragma unroll 2
                for (int w = w0; w < w1; w++) {
                    long long at = ((long long)t * H + h) * W + w;
                    real value[WIDTH];
                    load(value, volume + at * C);
#pragma unroll
                    for (int i = 0; i < WIDTH; i++)
                        if (first || value[i] > best[i] || (value[i] != value[i] && best[i] == best[i])) {
                            best[i] = value[i];
                            where[i] = at;
                        }
                    first = false;
                }
        long long to = ((long long)frame * HO * WO + pixel) * C + channel;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            y[to + i] = best[i];
            if (indices) indices[to + i] = where[i];
        }
    }
}

// dx (B, T, H, W, C): the sum of dy (B, TO, HO, WO, C) of the windows that an element won, in their order. Frames are
// those of dx.
KERNEL(256)
max_pool3d_backward(const long long* indices, const real* dy, VOLUME, real* dx)
{
    resolve(indices, dy, dx);
    int n = blockIdx.x * 256 + threadIdx.x, pieces = C / WIDTH;
    if (n >= H * W * pieces) return;
    int pixel = n / pieces, channel = (n - pixel * pieces) * WIDTH, h = pixel / W, w = pixel - h * W;
    // Windows o with o · step - before <= position < o · step - before + pool.
    int h1 = min((h + top) / step_h, HO - 1), w1 = min((w + left) / step_w, WO - 1);
    int h0 = h + top < pool_h ? 0 : (h + top - pool_h) / step_h + 1;
    int w0 = w + left < pool_w ? 0 : (w + left - pool_w) / step_w + 1;
    for (int frame = blockIdx.y; frame < frames; frame += gridDim.y) {
        int image = frame / T, t = frame - image * T, t1 = min((t + front) / step_t, TO - 1);
        int t0 = t + front < pool_t ? 0 : (t + front - pool_t) / step_t + 1;
        long long own = ((long long)t * H + h) * W + w;
        real sum[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum[i] = 0;
        for (int to = t0; to <= t1; to++)
            for (int ho = h0; ho <= h1; ho++)
                for (int wo = w0; wo <= w1; wo++) {
                    long long window = ((((long long)image * TO + to) * HO + ho) * WO + wo) * C + channel;
                    long long winner[WIDTH];
                    real value[WIDTH];
                    load(winner, indices + window);
                    load(value, dy + window);
#pragma unroll
                    for (int i = 0; i < WIDTH; i++)
                        if (winner[i] == own) sum[i] += value[i];
                }
        long long to = ((long long)frame * H * W + pixel) * C + channel;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) dx[to + i] = sum[i];
    }
}

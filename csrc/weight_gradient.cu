// Gradients of kernels as a matrix product over pixels: dkernel [tap and channel][filter] = Σ x dy.
//
// Blocks are (tiles of filters, tiles of taps, shares of the pixels): each share writes sums of its own, which
// elementwise.cu's add_products adds in their order. Images come as [outer][inner], those of x with strides of their
// own (the frames' is of an inner one); masked ones of x are not read.
//
// Macros: REAL; KIND 0: TILE (64 or 128), a thread owns EACH x EACH products; KIND 1, 3: WARPS_M, WARPS_N, ROW_TILES,
// a warp owns 16·ROW_TILES taps and 32 filters.
#include "frames.cuh"
#define PARAMETERS                                                                                                     \
    FRAMES(x), int inner, long long outer_stride, const unsigned char *mask, const real *dy, int pixels, int height,  \
        int width, int depth, int filters, int share, real *partial

// Pixel n of dy, none beyond the end or where its image is masked.
DEVICE Pixel pixel_of_x(const Grid& grid, int n, int end, const unsigned char* mask)
{
    if (n >= end) return {-1, 0, 0};
    Pixel pixel = pixel_of(grid, n);
    if (mask && !__ldg(mask + pixel.image)) pixel.image = -1;
    return pixel;
}

// The element of x that a tap meets at a pixel; null for padding.
DEVICE const operand* find_x(const Frames& x, Pixel pixel, const int4& tap, int inner, long long outer_stride)
{
    if (pixel.image < 0) return nullptr;
    int outer = pixel.image / inner;
    pixel.image -= outer * inner;
    const operand* from = find(x, pixel, tap);
    return from ? from + outer * outer_stride : nullptr;
}

#if KIND == 0

#define DEPTH 16
#define THREADS 256
#define EACH (TILE / 16)
#define PITCH (TILE + 4)
#define PIECES (DEPTH * TILE / THREADS)

KERNEL(THREADS, 512 / THREADS)
weight_gradient(PARAMETERS)
{
    resolve(mask, dy);
    Frames x = AS_FRAMES(x);
    Grid grid = {pixels, height, width};
    real* taps_tile = (real*)shared_memory();  // [2][DEPTH][PITCH]
    real* dy_tile = taps_tile + 2 * DEPTH * PITCH;
    Pixel* places = (Pixel*)(dy_tile + 2 * DEPTH * PITCH);  // [3][DEPTH]
    int first_tap = blockIdx.y * TILE, first_filter = blockIdx.x * TILE;
    int begin = blockIdx.z * share, end = min(begin + share, pixels);
    int lane = threadIdx.x % TILE, line = threadIdx.x / TILE;
    int k = first_tap + lane, f = first_filter + lane;
    int4 tap = {0, 0, 0, -1};
    if (k < depth) tap = __ldg(x.taps + k);

    real sum[EACH][EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j++) sum[i][j] = 0;
    int blocks = ceil_div(max(end - begin, 0), DEPTH);
    auto place = [&](int block) {
        if (threadIdx.x < DEPTH && block < blocks) {
            int n = begin + block * DEPTH + threadIdx.x;
            places[block % 3 * DEPTH + threadIdx.x] = pixel_of_x(grid, n, end, mask);
        }
    };
    place(0);
    place(1);
    __syncthreads();
    real from_x[PIECES], from_dy[PIECES];
    for (int block = 0; block <= blocks; block++) {
        if (block < blocks) {
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                int row = line + i * (THREADS / TILE), n = begin + block * DEPTH + row;
                const real* from = find_x(x, places[block % 3 * DEPTH + row], tap, inner, outer_stride);
                from_x[i] = from ? __ldg(from) : real(0);
                from_dy[i] = n < end && f < filters ? __ldg(dy + (long long)n * filters + f) : real(0);
            }
            place(block + 2);
        }
        if (block) {
            const real* a_tile = taps_tile + (block - 1) % 2 * DEPTH * PITCH + threadIdx.x / 16 * 4;
            const real* b_tile = dy_tile + (block - 1) % 2 * DEPTH * PITCH + threadIdx.x % 16 * 4;
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                alignas(16) real a[EACH], b[EACH];
#pragma unroll
                for (int i = 0; i < EACH; i += 4) {
                    copy4(a + i, a_tile + d * PITCH + i * 16);
                    copy4(b + i, b_tile + d * PITCH + i * 16);
                }
#pragma unroll
                for (int i = 0; i < EACH; i++)
#pragma unroll
                    for (int j = 0; j < EACH; j++) sum[i][j] = fma(a[i], b[j], sum[i][j]);
            }
        }
        if (block < blocks) {
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                int at = (block % 2 * DEPTH + line + i * (THREADS / TILE)) * PITCH + lane;
                taps_tile[at] = from_x[i];
                dy_tile[at] = from_dy[i];
            }
            __syncthreads();
        }
    }
    resolve(partial);
    partial += (long long)blockIdx.z * depth * filters;
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int row = first_tap + threadIdx.x / 16 * 4 + i / 4 * 64 + i % 4;
            int column = first_filter + threadIdx.x % 16 * 4 + j / 4 * 64 + j % 4;
            if (row < depth && column < filters) partial[(long long)row * filters + column] = sum[i][j];
        }
}

#else
#include "tensor_cores.cuh"

#define DEPTH 16
#define STAGES 3
#define THREADS (WARPS_M * WARPS_N * 32)
#define TAPS (WARPS_M * ROW_TILES * 16)
#define FILTERS (WARPS_N * 32)
#define TAP_PITCH (TAPS + 8)  // so that 4 pixels and 8 taps meet all banks
#define FILTER_PITCH (FILTERS + 8)
#define STAGE (DEPTH * (TAP_PITCH + FILTER_PITCH))

KERNEL(THREADS, 512 / THREADS)
weight_gradient(PARAMETERS)
{
    resolve(mask, dy);
    Frames x = AS_FRAMES(x);
    Grid grid = {pixels, height, width};
    float* stages = (float*)shared_memory();
    int first_tap = blockIdx.y * TAPS, first_filter = blockIdx.x * FILTERS;
    int begin = blockIdx.z * share, end = min(begin + share, pixels), blocks = ceil_div(max(end - begin, 0), DEPTH);
    bool whole_dy = filters % 4 == 0 && (unsigned long long)dy % 16 == 0;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    auto fetch = [&](int block) {
        if (block < blocks) {
            float* stage = stages + block % STAGES * STAGE;
            for (int n = threadIdx.x; n < DEPTH * TAPS / 4; n += THREADS) {
                int row = n / (TAPS / 4), piece = n % (TAPS / 4) * 4, k = first_tap + piece;
                Pixel pixel = pixel_of_x(grid, begin + block * DEPTH + row, end, mask);
                float* to = stage + row * TAP_PITCH + piece;
                if (x.whole) {
                    const float* from = k < depth ? find_x(x, pixel, __ldg(x.taps + k), inner, outer_stride) : nullptr;
                    cp_async<16>(to, from ? from : x.data, from);
                } else
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const float* from =
                            k + j < depth ? find_x(x, pixel, __ldg(x.taps + k + j), inner, outer_stride) : nullptr;
                        cp_async<4>(to + j, from ? from : x.data, from);
                    }
            }
            for (int n = threadIdx.x; n < DEPTH * FILTERS / 4; n += THREADS) {
                int row = n / (FILTERS / 4), piece = n % (FILTERS / 4) * 4, f = first_filter + piece;
                int p = begin + block * DEPTH + row;
                const float* from = dy + (long long)p * filters + f;
                float* to = stage + DEPTH * TAP_PITCH + row * FILTER_PITCH + piece;
                if (whole_dy) {
                    bool taken = p < end && f < filters;
                    cp_async<16>(to, taken ? from : dy, taken);
                } else
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        bool taken = p < end && f + j < filters;
                        cp_async<4>(to + j, taken ? from + j : dy, taken);
                    }
            }
        }
        cp_async_commit();
    };

    float sum[ROW_TILES][4][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[m][n][i] = 0;
    int own_taps = warp / WARPS_N * ROW_TILES * 16 + lane / 4, own_filters = warp % WARPS_N * 32 + lane / 4;
#pragma unroll 1
    for (int block = 1 - STAGES; block < blocks; block++) {  // the first ones only fetch
        if (block >= 0) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // this block has arrived; the one before it is no longer read
        }
        fetch(block + STAGES - 1);
        if (block < 0) continue;
        const float* stage = stages + block % STAGES * STAGE;
#pragma unroll 1
        for (int d = 0; d < DEPTH; d += 8) {
            const float* a_at = stage + (d + lane % 4) * TAP_PITCH + own_taps;
            const float* b_at = stage + DEPTH * TAP_PITCH + (d + lane % 4) * FILTER_PITCH + own_filters;
            unsigned b[4][2], b_low[4][2];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                b[n][0] = as_bits(b_at[n * 8]), b[n][1] = as_bits(b_at[n * 8 + 4 * FILTER_PITCH]);
                split(b[n], b_low[n]);
            }
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) {
                const float* at = a_at + m * 16;
                unsigned a_low[4], a[4] = {as_bits(at[0]), as_bits(at[8]), as_bits(at[4 * TAP_PITCH]),
                                           as_bits(at[4 * TAP_PITCH + 8])};
                split(a, a_low);
                multiply_split(sum[m], a, a_low, b, b_low);
            }
        }
    }
    resolve(partial);
    partial += (long long)blockIdx.z * depth * filters;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = first_tap + own_taps + m * 16 + i / 2 * 8;
                int column = first_filter + warp % WARPS_N * 32 + n * 8 + lane % 4 * 2 + i % 2;
                if (row < depth && column < filters) partial[(long long)row * filters + column] = sum[m][n][i];
            }
}
#endif

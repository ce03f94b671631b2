// Gradients of kernels as a matrix product over pixels: dkernel [tap and channel][filter] = Σ x dy.
//
// Blocks are (tiles of filters, tiles of taps, shares of the pixels): each share writes sums of its own, which
// elementwise.cu's add_products adds in their order. Images come as [outer][inner], those of x with strides of their
// own (the frames' is of an inner one); masked ones of x are not read. A pixel of dy takes dy_channels elements; what
// fills up the channels of x gives no result.
//
// Macros: REAL; KIND 0: TILE (64 or 128), a thread owns EACH x EACH products; others: WARPS_M, WARPS_N, ROW_TILES, a
// warp owns 16·ROW_TILES taps and 32 filters. In both operands the depth of the product, the pixels, are the rows:
// fragments of float32 are gathered, those of 16 bits are transposed as they are loaded.
#include "frames.cuh"
#define PARAMETERS                                                                                                     \
    FRAMES(x), int inner, long long outer_stride, const unsigned char *mask, const operand *dy, int dy_channels,      \
        int pixels, int height, int width, int depth, int channels, int filters, int share, real *partial

// Where x has pixel n of dy: one thread finds out for all taps. None beyond the end, or where the image is masked.
DEVICE Place place_of(const Frames& x, const Grid& grid, int n, int end, const unsigned char* mask, int inner,
                      long long outer_stride)
{
    if (n >= end) return {};
    Pixel pixel = pixel_of(grid, n);
    if (mask && !__ldg(mask + pixel.image)) return {};
    int outer = pixel.image / inner;
    return place_of(x, x.data + outer * outer_stride + (pixel.image - outer * inner) * x.stride, pixel);
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
    Place* places = (Place*)(dy_tile + 2 * DEPTH * PITCH);  // [3][DEPTH]
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
            places[block % 3 * DEPTH + threadIdx.x] = place_of(x, grid, n, end, mask, inner, outer_stride);
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
                const real* from = find(x, places[block % 3 * DEPTH + row], tap);
                from_x[i] = from ? __ldg(from) : real(0);
                from_dy[i] = n < end && f < filters ? __ldg(dy + (long long)n * dy_channels + f) : real(0);
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

#define DEPTH (64 / int(sizeof(operand)))
#define PIECE (16 / int(sizeof(operand)))
#define STAGES 3
#define THREADS (WARPS_M * WARPS_N * 32)
#define TAPS (WARPS_M * ROW_TILES * 16)
#define FILTERS (WARPS_N * 32)
#define TAP_PITCH (TAPS + 8)  // so that 4 pixels and 8 taps meet all banks, or the rows of 8 pixels
#define FILTER_PITCH (FILTERS + 8)
#define STAGE (DEPTH * (TAP_PITCH + FILTER_PITCH))

KERNEL(THREADS, 512 / THREADS)
weight_gradient(PARAMETERS)
{
    resolve(mask, dy);
    Frames x = AS_FRAMES(x);
    Grid grid = {pixels, height, width};
    operand* stages = (operand*)shared_memory();
    Place* places = (Place*)(stages + STAGES * STAGE);  // [STAGES][DEPTH]
    int first_tap = blockIdx.y * TAPS, first_filter = blockIdx.x * FILTERS;
    int begin = blockIdx.z * share, end = min(begin + share, pixels), blocks = ceil_div(max(end - begin, 0), DEPTH);
    bool whole_dy = dy_channels % PIECE == 0 && (unsigned long long)dy % 16 == 0;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    auto place = [&](int block) {
        if (threadIdx.x < DEPTH && block < blocks) {
            int n = begin + block * DEPTH + threadIdx.x;
            places[block % STAGES * DEPTH + threadIdx.x] = place_of(x, grid, n, end, mask, inner, outer_stride);
        }
    };
    auto fetch = [&](int block) {
        if (block < blocks) {
            operand* stage = stages + block % STAGES * STAGE;
            for (int n = threadIdx.x; n < DEPTH * TAPS / PIECE; n += THREADS) {
                int row = n / (TAPS / PIECE), piece = n % (TAPS / PIECE) * PIECE, k = first_tap + piece;
                const Place& at = places[block % STAGES * DEPTH + row];
                operand* to = stage + row * TAP_PITCH + piece;
                if (sizeof(operand) == 2 || x.whole) {
                    const operand* from = k < depth ? find(x, at, __ldg(x.taps + k)) : nullptr;
                    cp_async<16>(to, from ? from : x.data, from);
                } else
#pragma unroll
                    for (int j = 0; j < PIECE; j++) {
                        const operand* from = k + j < depth ? find(x, at, __ldg(x.taps + k + j)) : nullptr;
                        cp_async<4>(to + j, from ? from : x.data, from);
                    }
            }
            for (int n = threadIdx.x; n < DEPTH * FILTERS / PIECE; n += THREADS) {
                int row = n / (FILTERS / PIECE), piece = n % (FILTERS / PIECE) * PIECE, f = first_filter + piece;
                int p = begin + block * DEPTH + row;
                const operand* from = dy + (long long)p * dy_channels + f;
                operand* to = stage + DEPTH * TAP_PITCH + row * FILTER_PITCH + piece;
                if (sizeof(operand) == 2 || whole_dy) {
                    bool taken = p < end && f < filters;
                    cp_async<16>(to, taken ? from : dy, taken);
                } else
#pragma unroll
                    for (int j = 0; j < PIECE; j++) {
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
    int own_taps = warp / WARPS_N * ROW_TILES * 16, own_filters = warp % WARPS_N * 32;
    for (int block = 0; block < STAGES; block++) place(block);
    __syncthreads();
#pragma unroll 1
    for (int block = 1 - STAGES; block < blocks; block++) {  // the first ones only fetch
        if (block >= 0) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // this block has arrived; the one before it is no longer read
        }
        fetch(block + STAGES - 1);
        if (block < 0) continue;
        place(block + STAGES);  // its place was read in the round before the last one
        const operand* stage = stages + block % STAGES * STAGE;
#if KIND > 3
#pragma unroll
        for (int d = 0; d < DEPTH; d += 16) {
            const operand* a_at = stage + (d + lane / 16 * 8 + lane % 8) * TAP_PITCH + own_taps + lane / 8 % 2 * 8;
            const operand* b_at = stage + DEPTH * TAP_PITCH + (d + lane % 16) * FILTER_PITCH + own_filters +
                                  lane / 16 * 8;
            unsigned b[4][2];
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                unsigned words[4];
                ldmatrix_transposed(words, b_at + n * 8);
                b[n][0] = words[0], b[n][1] = words[1], b[n + 1][0] = words[2], b[n + 1][1] = words[3];
            }
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) {
                unsigned a[4];
                ldmatrix_transposed(a, a_at + m * 16);
                multiply_split(sum[m], a, a, b, b);
            }
        }
#else
#pragma unroll 1
        for (int d = 0; d < DEPTH; d += 8) {
            const float* a_at = stage + (d + lane % 4) * TAP_PITCH + own_taps + lane / 4;
            const float* b_at = stage + DEPTH * TAP_PITCH + (d + lane % 4) * FILTER_PITCH + own_filters + lane / 4;
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
#endif
    }
    resolve(partial);
    partial += (long long)blockIdx.z * (depth / x.channels * channels) * filters;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int k = first_tap + own_taps + m * 16 + half * 8 + lane / 4;
            if (k >= depth) continue;
            int weight = k / x.channels, channel = k - weight * x.channels;
            if (channel >= channels) continue;
            real* row = partial + ((long long)weight * channels + channel) * filters;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int column = first_filter + own_filters + n * 8 + lane % 4 * 2 + i;
                    if (column < filters) row[column] = sum[m][n][half * 2 + i];
                }
        }
}
#endif

// A tile of an implicit matrix product on the tensor cores, from sm_80 on: the same interface as simt.cuh.
//
// The columns are packed in blocks of 32: member r (0 to 3) of quads q to q + 7 is one mma tile of 8 columns, so that a
// thread's sums hold all four members of its quads: the four gates of a pixel and filter. A warp owns 16·ROW_TILES
// pixels and one such block; both operands come through shared memory by cp.async, STAGES deep, 64 bytes of depth at a time.
//
// Macros: WARPS_M, WARPS_N, ROW_TILES, STAGES; KIND of the products: 1 tf32, 3 tf32 in three parts (float32),
// 4 bfloat16, 5 float16.
#pragma once
#include "frames.cuh"
#define DEPTH (64 / int(sizeof(operand)))
#include "pixels.cuh"

#define THREADS (WARPS_M * WARPS_N * 32)
#define MIN_BLOCKS (512 / THREADS)
#define WEIGHT_PARTS 1
#define TILE_ROWS (WARPS_M * ROW_TILES * 16)
#define TILE_COLUMNS (WARPS_N * 32)
#define TILE_QUADS (WARPS_N * 8)
#define PITCH 80  // bytes of a row: eight of them meet all banks
#define STAGE_BYTES ((TILE_ROWS + TILE_COLUMNS) * PITCH)
#define PIXELS_A_THREAD (TILE_ROWS * 4 / THREADS)
static_assert(TILE_ROWS * 4 % THREADS == 0, "all threads fetch as much");

struct Tile {
    float sum[ROW_TILES][4][4];
};

DEVICE void fetch_weights(unsigned char* stage, const operand* weights, int columns, int block)
{
    const unsigned char* from = (const unsigned char*)(weights + (long long)block * columns * DEPTH);
#pragma unroll
    for (int n = threadIdx.x; n < TILE_COLUMNS * 4; n += THREADS)
        cp_async<16>(stage + (TILE_ROWS + n / 4) * PITCH + n % 4 * 16, from + n * 16, true);
}

DEVICE void multiply_block(Tile& tile, const unsigned char* stage)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned char* a_row = stage + (warp / WARPS_N * ROW_TILES * 16 + lane % 16) * PITCH + lane / 16 * 16;
    const unsigned char* b_row =
        stage + (TILE_ROWS + warp % WARPS_N * 32 + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16;
    constexpr int AT_ONCE = KIND == 3 ? 1 : 2;  // of the slabs: registers are scarce
#pragma unroll AT_ONCE
    for (int slab = 0; slab < 64; slab += 32) {
        unsigned b[4][2], b_low[4][2];
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            unsigned words[4];
            ldmatrix(words, b_row + n * 8 * PITCH + slab);
            b[n][0] = words[0], b[n][1] = words[1], b[n + 1][0] = words[2], b[n + 1][1] = words[3];
        }
        if (KIND <= 3)
#pragma unroll
            for (int n = 0; n < 4; n++) split(b[n], b_low[n]);
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
            unsigned a[4], a_low[4];
            ldmatrix(a, a_row + m * 16 * PITCH + slab);
            if (KIND <= 3) split(a, a_low);
            multiply_split(tile.sum[m], a, a_low, b, b_low);
        }
    }
}

DEVICE void clear(Tile& tile)
{
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) tile.sum[m][n][i] = 0;
}

// Add the products over the taps of two frames, one after the other, for the pixels of rows; weights
// [block][columns][DEPTH].
DEVICE void multiply_add(Tile& tile, const Grid& grid, const Frames& a, const Frames& b, const operand* weights,
                         int columns, const Rows& rows, int first_quad)
{
    unsigned char* stages = shared_memory();
    Place places[PIXELS_A_THREAD] = {};
    weights += (long long)first_quad * 4 * DEPTH;
    int blocks = a.blocks + b.blocks;

    auto fetch = [&](int block) {
        if (block < blocks) {
            unsigned char* stage = stages + block % STAGES * STAGE_BYTES;
            bool first = block < a.blocks;
            Frames frames = chosen(first, a, b);
            if (!block || block == a.blocks)
#pragma unroll 1
                for (int i = 0; i < PIXELS_A_THREAD; i++)
                    pushed_out(places, place_of(frames, grid, rows.first + threadIdx.x / 4 + i * (THREADS / 4)));
            int row = threadIdx.x / 4, piece = threadIdx.x % 4;
            fetch_pixels<THREADS / 4 * PITCH>(stage + row * PITCH + piece * 16, piece, frames, places,
                                              first ? block : block - a.blocks);
            fetch_weights(stage, weights, columns, block);
        }
        cp_async_commit();  // an empty group too, so that the count of groups stays that of blocks
    };
#pragma unroll 1
    for (int block = 1 - STAGES; block < blocks; block++) {  // the first ones only fetch
        if (block >= 0) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // this block has arrived; the one before it is no longer read
        }
        fetch(block + STAGES - 1);
        if (block >= 0) multiply_block(tile, stages + block % STAGES * STAGE_BYTES);
    }
}

// Sums leave by shared memory, all in one pass: [PASS_ROWS][TILE_QUADS][4]. So no register holds them any more.
#define PASSES 1
#define PASS_ROWS TILE_ROWS

DEVICE void stage_sums(real* to, const Tile& tile, int)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int row = warp / WARPS_N * ROW_TILES * 16 + lane / 4, quad = warp % WARPS_N * 8 + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            alignas(16) real sums[4] = {tile.sum[m][0][i], tile.sum[m][1][i], tile.sum[m][2][i], tile.sum[m][3][i]};
            copy4(to + ((row + m * 16 + i / 2 * 8) * TILE_QUADS + quad + i % 2) * 4, sums);
        }
}

DEVICE int staged_row(int, int row) { return row; }

// A tile of an implicit matrix product on Hopper's own tensor core instructions (sm_90a): the interface of mma.cuh.
//
// A warpgroup owns ROW_TILES times 64 pixels and all COLUMNS of the tile. Blocks of depth are rows of 128 bytes of
// columns, swizzled, STAGES deep; and of pixels: below as those of columns, for each tap anew, or in halo.cuh (HALO) once
// for all taps. All of them come by cp.async and a block has one barrier: nothing here waits for a count of bytes, so
// that nothing can wait for ever. Columns are packed as for mma.cuh, whose sums lie in a warp's registers alike.
//
// Operands of 16 bits are both read from shared memory, and the products of a block run on while the next block's
// start. For tf32 and float32 the pixels pass through registers, where they are rounded, or split in two; the weights
// come rounded, or in two parts. With float32 the products of a block are summed apart, and those sums added outside of
// the tensor cores, which cut off where others round.
//
// Macros: WARPGROUPS, ROW_TILES, COLUMNS (64, 128 or 256), STAGES, HALO or not; KIND as in mma.cuh.
#pragma once
#include "frames.cuh"
#define DEPTH (128 / int(sizeof(operand)))
#include "pixels.cuh"
#include "warpgroup.cuh"

#ifndef ROW_TILES
#define ROW_TILES 1
#endif

#define THREADS (WARPGROUPS * 128)
#define TILE_ROWS (WARPGROUPS * ROW_TILES * 64)
#define TILE_COLUMNS COLUMNS
#define TILE_QUADS (COLUMNS / 4)
#define WEIGHT_PARTS (KIND == 3 ? 2 : 1)
#define IN_FLIGHT (KIND >= 4 ? 1 : 0)  // blocks whose products may still run when the next ones start
#define AHEAD (STAGES - 1 - IN_FLIGHT)  // blocks that are fetched ahead
#define WEIGHT_BYTES (WEIGHT_PARTS * COLUMNS * 128)  // of a block
#define MIN_BLOCKS (COLUMNS > 128 || ROW_TILES > 1 || KIND == 3 ? 1 : 2)
static_assert(AHEAD > 0, "one block at least is under way");
static_assert(THREADS % 64 == 0 && COLUMNS * 8 % THREADS == 0, "all threads fetch as much, in rows alike modulo 8");

typedef float Sums[COLUMNS / 8][4];

struct Tile {
    Sums sum[ROW_TILES];
};

// The stages, from a multiple of 1024 bytes on.
DEVICE unsigned char* aligned_stages()
{
    unsigned char* shared = shared_memory();
    return shared + (-shared_address(shared) & 1023);
}

// Where 16 bytes of a row stand.
DEVICE int swizzled(int row, int piece) { return row * 128 + (piece ^ row % 8) * 16; }

DEVICE void fetch_weights(unsigned char* to, const operand* weights, int columns, int block)
{
    to += swizzled(threadIdx.x / 8, threadIdx.x % 8);
#pragma unroll
    for (int part = 0; part < WEIGHT_PARTS; part++) {
        const unsigned char* from =
            (const unsigned char*)(weights + (long long)(block * WEIGHT_PARTS + part) * columns * DEPTH) +
            threadIdx.x * 16;
#pragma unroll
        for (int i = 0; i < COLUMNS * 8 / THREADS; i++)
            cp_async<16>(to + (part * COLUMNS + i * (THREADS / 8)) * 128, from + i * (THREADS * 16), true);
    }
}

struct Operands {
#if KIND < 4
    unsigned high[ROW_TILES][4][4], low[ROW_TILES][4][4];  // of the pixels, by 32 bytes of depth
#endif
};

// Keep the operands of products under way in their registers.
DEVICE void pin(Operands& a)
{
#if KIND < 4
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
        pin(a.high[m]);
        if (KIND == 3) pin(a.low[m]);
    }
#endif
}

// The thread's warpgroup, known to the compiler as one of a warp.
DEVICE int warpgroup() { return __shfl_sync(0xffffffff, threadIdx.x / 128, 0); }

DEVICE void pin(Sums (&sums)[ROW_TILES])
{
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) pin(sums[m]);
}

// Start the products of a block: of `pixels`, which tells where the 32 bytes number k of the depth lie of the warpgroup's
// 64 pixels number m, and of the weights. Descriptors count units of 16 bytes: the next 32 are 2 on.
#if KIND >= 4
template <class Pixels>
DEVICE void multiply_block(Sums (&sums)[ROW_TILES], Operands&, const Pixels& pixels, const unsigned char* weights)
{
    unsigned long long columns = descriptor(shared_address(weights));
    pin(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++)
            wgmma<COLUMNS>(sums[m], pixels.descriptor_of(m, k), columns + k * 2, 1);
    wgmma_commit();
}
#else
template <class Pixels>
DEVICE void multiply_block(Sums (&sums)[ROW_TILES], Operands& a, const Pixels& pixels, const unsigned char* weights)
{
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    unsigned long long columns = descriptor(shared_address(weights));
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            ldmatrix(a.high[m][k], pixels.address_of(m, row, k, lane / 16));
            split(a.high[m][k], a.low[m][k]);
        }
    pin(sums);
    pin(a);
    wgmma_fence();
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
        if (KIND == 3) {  // the small ones first, into new sums
#pragma unroll
            for (int k = 0; k < 4; k++) wgmma<COLUMNS>(sums[m], a.low[m][k], columns + k * 2, k > 0);
#pragma unroll
            for (int k = 0; k < 4; k++)
                wgmma<COLUMNS>(sums[m], a.high[m][k], columns + (COLUMNS * 8 + k * 2), 1);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma<COLUMNS>(sums[m], a.high[m][k], columns + k * 2, 1);
    }
    wgmma_commit();
}
#endif

// Wait for the products of all blocks but those that may still run.
DEVICE void finish_block(Tile& tile, Sums (&sums)[ROW_TILES], Operands& operands)
{
    __syncwarp();
    wgmma_wait<IN_FLIGHT>();
    pin(operands);
#if KIND == 3
    pin(sums);
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) tile.sum[m][j][i] += sums[m][j][i];
#endif
}

// Add the products of a block to the sums; meanwhile() runs beside them.
template <class Pixels, class Meanwhile>
DEVICE void add_block(Tile& tile, const Pixels& pixels, const unsigned char* weights, const Meanwhile& meanwhile)
{
    Operands operands;
#if KIND == 3
    Sums sums[ROW_TILES];
#else
    Sums(&sums)[ROW_TILES] = tile.sum;
#endif
    multiply_block(sums, operands, pixels, weights);
    meanwhile();
    finish_block(tile, sums, operands);
}

DEVICE void clear(Tile& tile)
{
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) tile.sum[m][j][i] = 0;
}

#ifdef HALO
#include "halo.cuh"
#else
#define PIXEL_BYTES (TILE_ROWS * 128)  // of a block
#define STAGE_BYTES (PIXEL_BYTES + WEIGHT_BYTES)
#define PIXELS_A_THREAD (TILE_ROWS * 8 / THREADS)

struct Pixels {
    const unsigned char* first;  // of the warpgroup
    DEVICE unsigned long long descriptor_of(int m, int k) const
    {
        return descriptor(shared_address(first)) + (m * 512 + k * 2);
    }
    DEVICE const unsigned char* address_of(int m, int row, int k, int half) const
    {
        return first + swizzled(m * 64 + row, k * 2 + half);
    }
};

// Add the products over the taps of two frames, one after the other, for the pixels of rows; weights
// [block][part][columns][DEPTH].
DEVICE void multiply_add(Tile& tile, const Grid& grid, const Frames& a, const Frames& b, const operand* weights,
                         int columns, const Rows& rows, int first_quad)
{
    unsigned char* stages = aligned_stages();
    Place places[PIXELS_A_THREAD] = {};
    weights += (long long)first_quad * 4 * DEPTH;
    int blocks = a.blocks + b.blocks, group = warpgroup();

    auto fetch = [&](int block) {
        if (block < blocks) {
            unsigned char* stage = stages + block % STAGES * STAGE_BYTES;
            bool first = block < a.blocks;
            Frames frames = chosen(first, a, b);
            if (!block || block == a.blocks)
#pragma unroll 1
                for (int i = 0; i < PIXELS_A_THREAD; i++)
                    pushed_out(places, place_of(frames, grid, rows.first + threadIdx.x / 8 + i * (THREADS / 8)));
            int row = threadIdx.x / 8, piece = threadIdx.x % 8;  // rows THREADS / 8 apart are alike modulo 8
            fetch_pixels<THREADS / 8 * 128>(stage + swizzled(row, piece), piece, frames, places,
                                            first ? block : block - a.blocks);
            fetch_weights(stage + PIXEL_BYTES, weights, columns, block);
        }
        cp_async_commit();  // an empty group too, so that the count of groups stays that of blocks
    };
#pragma unroll 1
    for (int block = 0; block < AHEAD; block++) fetch(block);
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
        cp_async_wait<AHEAD - 1>();
        fence_async_proxy();
        __syncthreads();  // this block has arrived; the one before those under way is no longer read
        unsigned char* stage = stages + block % STAGES * STAGE_BYTES;
        add_block(tile, Pixels{stage + group * (ROW_TILES * 64 * 128)}, stage + PIXEL_BYTES,
                  [&] { fetch(block + AHEAD); });
    }
    wgmma_wait<0>();
    pin(tile.sum);
}
static_assert(TILE_ROWS * TILE_COLUMNS * 4 <= STAGES * STAGE_BYTES, "the sums fit");
#endif

// Sums leave by shared memory, all in one pass: [PASS_ROWS][TILE_QUADS][4].
#define PASSES 1
#define PASS_ROWS TILE_ROWS

DEVICE void stage_sums(real* to, const Tile& tile, int)
{
    int lane = threadIdx.x % 32, quad = lane % 4 * 2;
    int row = threadIdx.x / 128 * (ROW_TILES * 64) + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int first = 0; first < COLUMNS / 8; first += 4)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const Sums& sum = tile.sum[m];
                alignas(16) real sums[4] = {sum[first][i], sum[first + 1][i], sum[first + 2][i], sum[first + 3][i]};
                copy4(to + ((row + m * 64 + i / 2 * 8) * TILE_QUADS + first * 2 + quad + i % 2) * 4, sums);
            }
}

DEVICE int staged_row(int, int row) { return row; }

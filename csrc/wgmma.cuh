// A tile of an implicit matrix product on Hopper's own tensor core instructions (sm_90a): the interface of mma.cuh.
//
// A warpgroup owns 64 pixels and all COLUMNS of the tile. Blocks of depth are rows of 128 bytes, swizzled, of pixels
// and of columns, STAGES deep. All of them come by cp.async and a block has one barrier: nothing here waits for a count
// of bytes, so that nothing can wait for ever. Columns are packed as for mma.cuh, whose sums lie in a warp's registers
// alike.
//
// Operands of 16 bits are both read from shared memory, and the products of a block run on while the next block's
// start. For tf32 and float32 the pixels pass through registers, where they are rounded, or split in two; the weights
// come rounded, or in two parts. With float32 the products of a block are summed apart, and those sums added outside of
// the tensor cores, which cut off where others round.
//
// Macros: WARPGROUPS, COLUMNS (64, 128 or 256), STAGES; KIND as in mma.cuh.
#pragma once
#include "frames.cuh"
#define DEPTH (128 / int(sizeof(operand)))
#include "pixels.cuh"
#include "warpgroup.cuh"

#define THREADS (WARPGROUPS * 128)
#define TILE_ROWS (WARPGROUPS * 64)
#define TILE_COLUMNS COLUMNS
#define TILE_QUADS (COLUMNS / 4)
#define WEIGHT_PARTS (KIND == 3 ? 2 : 1)
#define IN_FLIGHT (KIND >= 4 ? 1 : 0)  // blocks whose products may still run when the next ones start
#define AHEAD (STAGES - 1 - IN_FLIGHT)  // blocks that are fetched ahead
#define STAGE_BYTES ((TILE_ROWS + WEIGHT_PARTS * TILE_COLUMNS) * 128)
#define PIXELS_A_THREAD (TILE_ROWS * 8 / THREADS)
#define MIN_BLOCKS (COLUMNS > 128 || KIND == 3 ? 1 : 2)
static_assert(AHEAD > 0, "one block at least is under way");
static_assert(THREADS % 64 == 0 && COLUMNS * 8 % THREADS == 0, "all threads fetch as much, in rows alike modulo 8");

typedef float Sums[COLUMNS / 8][4];

struct Tile {
    Sums sum;
};

// The stages, from a multiple of 1024 bytes on.
DEVICE unsigned char* aligned_stages()
{
    unsigned char* shared = shared_memory();
    return shared + (-shared_address(shared) & 1023);
}

// Where 16 bytes of a row stand.
DEVICE int swizzled(int row, int piece) { return row * 128 + (piece ^ row % 8) * 16; }

DEVICE void fetch_weights(unsigned char* stage, const operand* weights, int columns, int block)
{
    unsigned char* to = stage + swizzled(TILE_ROWS + threadIdx.x / 8, threadIdx.x % 8);
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
    unsigned high[4][4], low[4][4];  // of the pixels, by 32 bytes of depth
#endif
};

// Keep the operands of products under way in their registers.
DEVICE void pin(Operands& a)
{
#if KIND < 4
    pin(a.high);
    if (KIND == 3) pin(a.low);
#endif
}

// Start the products of a block.
#if KIND >= 4
DEVICE void multiply_block(Sums& sums, Operands&, const unsigned char* stage)
{
    int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // the compiler sees that a warp has one
    unsigned rows = shared_address(stage) + group * 64 * 128, columns = shared_address(stage) + TILE_ROWS * 128;
    pin(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 128; k += 32) wgmma<COLUMNS>(sums, descriptor(rows + k), descriptor(columns + k), 1);
    wgmma_commit();
}
#else
DEVICE void multiply_block(Sums& sums, Operands& a, const unsigned char* stage)
{
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
    unsigned columns = shared_address(stage) + TILE_ROWS * 128;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        ldmatrix(a.high[k], stage + swizzled(row, k * 2 + lane / 16));
        split(a.high[k], a.low[k]);
    }
    pin(sums);
    pin(a);
    wgmma_fence();
    if (KIND == 3) {  // the small ones first, into new sums
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma<COLUMNS>(sums, a.low[k], descriptor(columns + k * 32), k > 0);
#pragma unroll
        for (int k = 0; k < 4; k++)
            wgmma<COLUMNS>(sums, a.high[k], descriptor(columns + COLUMNS * 128 + k * 32), 1);
    }
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma<COLUMNS>(sums, a.high[k], descriptor(columns + k * 32), 1);
    wgmma_commit();
}
#endif

DEVICE void clear(Tile& tile)
{
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) tile.sum[j][i] = 0;
}

// Add the products over the taps of two frames, one after the other, for pixels from first_row on; weights
// [block][part][columns][DEPTH].
DEVICE void multiply_add(Tile& tile, const Grid& grid, const Frames& a, const Frames& b, const operand* weights,
                         int columns, int first_row, int first_quad)
{
    unsigned char* stages = aligned_stages();
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
                    pushed_out(places, place_of(frames, grid, first_row + threadIdx.x / 8 + i * (THREADS / 8)));
            int row = threadIdx.x / 8, piece = threadIdx.x % 8;  // rows THREADS / 8 apart are alike modulo 8
            fetch_pixels<THREADS / 8 * 128>(stage + swizzled(row, piece), piece, frames, places,
                                            first ? block : block - a.blocks);
            fetch_weights(stage, weights, columns, block);
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
        Operands operands;
#if KIND == 3
        Sums sums;
#else
        Sums& sums = tile.sum;
#endif
        multiply_block(sums, operands, stages + block % STAGES * STAGE_BYTES);
        fetch(block + AHEAD);
        __syncwarp();
        wgmma_wait<IN_FLIGHT>();
        pin(operands);
#if KIND == 3
        pin(sums);
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) tile.sum[j][i] += sums[j][i];
#endif
    }
    wgmma_wait<0>();
    pin(tile.sum);
}

// Sums leave by shared memory, all in one pass: [PASS_ROWS][TILE_QUADS][4].
#define PASSES 1
#define PASS_ROWS TILE_ROWS
static_assert(PASS_ROWS * TILE_COLUMNS * 4 <= STAGES * STAGE_BYTES, "a pass fits");

DEVICE void stage_sums(real* to, const Tile& tile, int)
{
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, quad = lane % 4 * 2;
#pragma unroll
    for (int first = 0; first < COLUMNS / 8; first += 4)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            alignas(16) real sums[4] = {tile.sum[first][i], tile.sum[first + 1][i], tile.sum[first + 2][i],
                                        tile.sum[first + 3][i]};
            copy4(to + ((row + i / 2 * 8) * TILE_QUADS + first * 2 + quad + i % 2) * 4, sums);
        }
}

DEVICE int staged_row(int, int row) { return row; }

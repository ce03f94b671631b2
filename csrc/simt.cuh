// A tile of an implicit matrix product by ordinary multiply-adds: float32, float64, any GPU.
//
// The columns come in quads of 4 neighbours. A thread owns ROWS pixels and QUADS quads; the tiles of both operands
// pass through shared memory, double-buffered, the next one waiting in registers.
//
// Macros: REAL, TILE_ROWS, TILE_QUADS of a block; ROWS (a multiple of 4), QUADS of a thread.
#pragma once
#include "frames.cuh"

#define DEPTH 16
#define QUAD_LANES (TILE_QUADS / QUADS)
#define ROW_LANES (TILE_ROWS / ROWS)
#define THREADS (QUAD_LANES * ROW_LANES)
#define MIN_BLOCKS (512 / THREADS)
#define WEIGHT_PARTS 1
#define ROW_PITCH (TILE_ROWS + 4)
#define COLUMN_PITCH (TILE_QUADS * 4)
#define GROUPS (DEPTH / 4 * TILE_ROWS / THREADS)
#define WEIGHTS ((DEPTH * TILE_QUADS + THREADS - 1) / THREADS)
static_assert(THREADS % TILE_ROWS == 0 && GROUPS * THREADS == DEPTH / 4 * TILE_ROWS, "a thread fetches for one pixel");

struct Tile {
    alignas(16) real sum[ROWS][QUADS][4];
};

struct Fetched {
    real pixels[GROUPS][4], weights[WEIGHTS][4];
};

DEVICE void fetch_pixels(real (&to)[GROUPS][4], const Frames& frames, const Place& place, int block)
{
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        const int4* tap = frames.taps + block * DEPTH + (threadIdx.x / TILE_ROWS + i * (THREADS / TILE_ROWS)) * 4;
        if (frames.whole) {
            const real* from = find(frames, place, __ldg(tap));
            if (from)
                load4(to[i], from, frames.late);
            else
                to[i][0] = to[i][1] = to[i][2] = to[i][3] = 0;
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const real* from = find(frames, place, __ldg(tap + j));
                to[i][j] = from ? load(from, frames.late) : real(0);
            }
        }
    }
}

DEVICE void fetch_weights(real (&to)[WEIGHTS][4], const real* weights, int columns, int block)
{
#pragma unroll
    for (int i = 0; i < WEIGHTS; i++) {
        int n = threadIdx.x + i * THREADS;
        if (n < DEPTH * TILE_QUADS)
            load4(to[i], weights + (long long)(block * DEPTH + n / TILE_QUADS) * columns + n % TILE_QUADS * 4);
    }
}

DEVICE void keep(real* pixels, real* weights, const Fetched& fetched)
{
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            pixels[((threadIdx.x / TILE_ROWS + i * (THREADS / TILE_ROWS)) * 4 + j) * ROW_PITCH +
                   threadIdx.x % TILE_ROWS] = fetched.pixels[i][j];
#pragma unroll
    for (int i = 0; i < WEIGHTS; i++) {
        int n = threadIdx.x + i * THREADS;
        if (n < DEPTH * TILE_QUADS)
            copy4(weights + n / TILE_QUADS * COLUMN_PITCH + n % TILE_QUADS * 4, fetched.weights[i]);
    }
}

DEVICE void multiply_block(Tile& tile, const real* pixels, const real* weights)
{
    const real* row = pixels + threadIdx.x / QUAD_LANES * 4;
    const real* quad = weights + threadIdx.x % QUAD_LANES * 4;
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
        alignas(16) real a[ROWS], b[QUADS][4];
#pragma unroll
        for (int i = 0; i < ROWS; i += 4) copy4(a + i, row + k * ROW_PITCH + i * ROW_LANES);
#pragma unroll
        for (int j = 0; j < QUADS; j++) copy4(b[j], quad + k * COLUMN_PITCH + j * QUAD_LANES * 4);
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < QUADS; j++)
#pragma unroll
                for (int r = 0; r < 4; r++) tile.sum[i][j][r] = fma(a[i], b[j][r], tile.sum[i][j][r]);
    }
}

DEVICE void clear(Tile& tile)
{
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < QUADS; j++)
#pragma unroll
            for (int r = 0; r < 4; r++) tile.sum[i][j][r] = 0;
}

// Add the products over the taps of two frames, one after the other, for the pixels of rows; weights
// [depth][columns].
DEVICE void multiply_add(Tile& tile, const Grid& grid, const Frames& a, const Frames& b, const operand* weights,
                         int columns, const Rows& rows, int first_quad)
{
    real* pixels = (real*)shared_memory();
    real* kept_weights = pixels + 2 * DEPTH * ROW_PITCH;
    Place place = {};
    weights += first_quad * 4;
    int blocks = a.blocks + b.blocks;
    Fetched fetched;
    for (int block = 0; block <= blocks; block++) {
        if (block < blocks) {
            bool first = block < a.blocks;
            Frames frames = chosen(first, a, b);
            if (!block || block == a.blocks) place = place_of(frames, grid, rows.first + threadIdx.x % TILE_ROWS);
            fetch_pixels(fetched.pixels, frames, place, first ? block : block - a.blocks);
            fetch_weights(fetched.weights, weights, columns, block);
        }
        if (block) {
            int last = (block - 1) % 2;
            multiply_block(tile, pixels + last * DEPTH * ROW_PITCH, kept_weights + last * DEPTH * COLUMN_PITCH);
        }
        if (block < blocks) {
            int now = block % 2;
            keep(pixels + now * DEPTH * ROW_PITCH, kept_weights + now * DEPTH * COLUMN_PITCH, fetched);
            __syncthreads();
        }
    }
}

// Sums leave by shared memory, in passes: [PASS_ROWS][TILE_QUADS][4].
#define PASSES (ROWS / 4)
#define PASS_ROWS (ROW_LANES * 4)
static_assert(PASS_ROWS * TILE_QUADS * 4 <= 2 * DEPTH * (ROW_PITCH + COLUMN_PITCH), "a pass fits in shared memory");

DEVICE void stage_sums(real* to, const Tile& tile, int pass)
{
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < QUADS; j++)
            if (i / 4 == pass)
                copy4(to + ((threadIdx.x / QUAD_LANES * 4 + i % 4) * TILE_QUADS + threadIdx.x % QUAD_LANES +
                            j * QUAD_LANES) * 4, tile.sum[i][j]);
}

DEVICE int staged_row(int pass, int row) { return pass * PASS_ROWS + row; }

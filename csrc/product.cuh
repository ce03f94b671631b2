// A tile of an implicit matrix product, and a way to its sums: with a KIND other than 0 the product runs on the tensor
// cores (mma.cuh, or wgmma.cuh where WARPGROUPS are told), else on the ordinary units (simt.cuh).
//
// Sums pass through shared memory once more, so that neighbouring threads own neighbouring filters: what follows on
// them is coalesced, and one piece of code for all of a thread's.
#pragma once
#ifdef WARPGROUPS
#include "wgmma.cuh"
#elif KIND
#include "mma.cuh"
#else
#include "simt.cuh"
#endif

DEVICE void multiply(Tile& tile, const Grid& grid, const Frames& a, const Frames& b, const operand* weights,
                     int columns, int first_row, int first_quad)
{
    clear(tile);
    multiply_add(tile, grid, a, b, weights, columns, first_row, first_quad);
}

// Call visit(row, quad, its 4 sums) for every quad of the tile.
template <class Visit> DEVICE void visit_quads(const Tile& tile, int first_row, int first_quad, Visit visit)
{
    real* staged = (real*)shared_memory();
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        __syncthreads();
        stage_sums(staged, tile, pass);
        __syncthreads();
#pragma unroll 2
        for (int n = threadIdx.x; n < PASS_ROWS * TILE_QUADS; n += THREADS) {
            alignas(16) real sums[4];
            copy4(sums, staged + n * 4);
            visit(first_row + staged_row(pass, n / TILE_QUADS), first_quad + n % TILE_QUADS, sums);
        }
    }
}

// Call visit(row, column, its sum) for every column of the tile.
template <class Visit> DEVICE void visit_columns(const Tile& tile, int first_row, int first_column, Visit visit)
{
    real* staged = (real*)shared_memory();
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        __syncthreads();
        stage_sums(staged, tile, pass);
        __syncthreads();
#pragma unroll 2
        for (int n = threadIdx.x; n < PASS_ROWS * TILE_QUADS * 4; n += THREADS)
            visit(first_row + staged_row(pass, n / (TILE_QUADS * 4)), first_column + n % (TILE_QUADS * 4), staged[n]);
    }
}

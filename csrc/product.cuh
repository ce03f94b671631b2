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
                     int columns, const Rows& rows, int first_quad)
{
    clear(tile);
    multiply_add(tile, grid, a, b, weights, columns, rows, first_quad);
}

// Read only the blocks of depth from `begin` to `end`, those of them that there are; where a halo is, whole chunks.
DEVICE void take(Frames& frames, int begin, int end)
{
    begin = min(max(begin, 0), frames.blocks), end = min(max(end, begin), frames.blocks);
#ifdef HALO
    frames.taps += begin;
    frames.channel += begin / frames.chunk * DEPTH;
#else
    frames.taps += begin * DEPTH;
#endif
    frames.blocks = end - begin;
}

// A thread's sums are all of one column, or of one quad of columns: the next one's of the next thread.
static_assert(THREADS % (TILE_QUADS * 4) == 0, "a thread keeps its column, and its quad");
DEVICE int own_quad(int first_quad) { return first_quad + threadIdx.x % TILE_QUADS; }
DEVICE int own_column(int first_quad) { return first_quad * 4 + threadIdx.x % (TILE_QUADS * 4); }

// Call visit(row, next row, where its sums are) for the thread's rows, `across` of which are side by side. Before that
// enter(row) tells up to where rows have something in common (an image), again and again: no further than row, to stop.
template <class Enter, class Visit>
DEVICE void visit_rows(const Tile& tile, const Rows& rows, int across, int sums, Enter enter, Visit visit)
{
    real* staged = (real*)shared_memory();
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        __syncthreads();
        stage_sums(staged, tile, pass);
        __syncthreads();
        int count = PASS_ROWS * across;
        int n = int(threadIdx.x) - THREADS, row;
        auto go_on = [&] {
#pragma unroll 1
            do {
                n += THREADS;
                row = rows(staged_row(pass, unsigned(n) / across));
            } while (Rows::GAPS && row == NO_ROW && n < count);
        };
        go_on();
#pragma unroll 1
        while (n < count) {
            int end = enter(row);
            if (end <= row) break;
#pragma unroll 1
            do {
                const real* from = staged + n * sums;
                int now = row;
                go_on();
                visit(now, row, from);
            } while (n < count && row < end);
        }
    }
}

// visit(row, next row, the 4 sums of the thread's quad)
template <class Enter, class Visit>
DEVICE void visit_quads(const Tile& tile, const Rows& rows, Enter enter, Visit visit)
{
    visit_rows(tile, rows, TILE_QUADS, 4, enter, [&](int row, int next, const real* from) {
        alignas(16) real sums[4];
        copy4(sums, from);
        visit(row, next, sums);
    });
}

// visit(row, the sum of the thread's column)
template <class Enter, class Visit>
DEVICE void visit_columns(const Tile& tile, const Rows& rows, Enter enter, Visit visit)
{
    visit_rows(tile, rows, TILE_QUADS * 4, 1, enter, [&](int row, int, const real* from) { visit(row, *from); });
}

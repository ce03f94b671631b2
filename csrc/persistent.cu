// All time steps of convlstm2d in one launch, for calls so small that a launch a step would take much of the time.
//
// All blocks are resident at once (a cooperative launch) and wait for each other after every step. The product of x and
// its kernel does not need h: it is computed before the wait, which it hides, and its sums stay in registers until h is
// there. A thread owns its pixels and filters for all steps: their c and h stay in the memory of the last ones.
//
// Sums are added in the order of convlstm2d_step, so that the results have its very bits.
#include "cell.cuh"
#include "product.cuh"

// A barrier of all blocks: a count of arrivals, which the last one of the launch sets back to zero.
DEVICE int arrive(int* arrived)
{
#ifdef FASTCLSTM_EMULATOR
    return (*arrived)++;
#else
    int before;
    asm volatile("atom.add.release.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
    return before;
#endif
}

DEVICE void wait_for(const int* arrived, int count)
{
#ifdef FASTCLSTM_EMULATOR
    emulated_wait_for(arrived, count);
#else
    int now;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
    while (now < count);
#endif
}

// Blocks (any number of them) take the tiles of a step in turn. h: frames of the first of two places, `h_operand`, of
// which step t reads number t % 2 and writes the other; without h_first step 0 reads none. x, y and mask: those of step
// 0, with a number of elements to those of the next one (of y 0: the last output is all that is wanted). States:
// [image][pixel][filter].
KERNEL(THREADS, MIN_BLOCKS)
convlstm2d_steps(FRAMES(h), FRAMES(x), long long x_step, int T, int* arrived, const operand* weights, int columns,
                 int pixels, int height, int width, int filters, const real* bias, operand* h_operand,
                 const real* h_first, real* h_last, const real* c_first, real* c_last, real* y, long long y_stride,
                 long long y_step, const real* peep_i, const real* peep_f, const real* peep_o, int peep_stride,
                 const unsigned char* mask, int mask_step, int mask_stride, real cell_clip, int recurrent_activation,
                 int activation, int output_activation)
{
    resolve(arrived, weights, bias, h_operand, h_first, h_last, c_first, c_last, y, peep_i, peep_f, peep_o, mask);
    Frames h = AS_FRAMES(h), x = AS_FRAMES(x), none = AS_FRAMES(x);
    none.blocks = 0;
    h.late = true;
    if (!h_first) h.blocks = 0;
    Grid grid = {pixels, height, width};
    Cell cell = {height * width, filters, bias, peep_i, peep_f, peep_o, peep_stride, cell_clip, recurrent_activation,
                 activation, output_activation};
    const operand* weights_h = weights + (long long)x.blocks * DEPTH * columns;
    long long frame = (long long)height * width * filters, place = (long long)pixels * h.channels;
    int down = ceil_div(pixels, TILE_ROWS), tiles = down * (columns / (TILE_QUADS * 4));
#pragma unroll 1
    for (int t = 0; t < T; t++) {
#pragma unroll 1
        for (int n = blockIdx.x; n < tiles; n += gridDim.x) {
            Rows rows = rows_of(grid, n % down, TILE_ROWS);
            int first_quad = n / down * TILE_QUADS;
            Tile tile;
            clear(tile);
#pragma unroll 1
            for (int of_h = 0; of_h < 2; of_h++) {
                if (of_h && t && n == blockIdx.x && !threadIdx.x) wait_for(arrived, t * gridDim.x);
                __syncthreads();  // h is there; what lies in shared memory has been read
                multiply_add(tile, grid, chosen(of_h, h, x), none, of_h ? weights_h : weights, columns, rows,
                             first_quad);
            }
            bool last = t == T - 1;
            Step step = {t ? h_last : h_first, frame, mask || last ? h_last : nullptr, frame,  // null: nobody asks
                         t ? c_last : c_first, frame, c_last, frame,
                         t ? y - y_step : nullptr, y_step || mask || last ? y : nullptr, y_stride,
                         nullptr, 0, 0, last ? nullptr : h_operand + (t + 1) % 2 * place,
                         (long long)height * width * h.channels, h.channels, mask, mask_stride};
            Advance<true> advance(cell, step, pixels, own_quad(first_quad));
            visit_quads(tile, rows, [&](int row) { return advance.enter(row); },
                        [&](int row, int next, const real(&sums)[4]) { advance(row, next, sums); });
        }
        __syncthreads();  // all that this block writes is written
        if (!threadIdx.x && arrive(arrived) == T * gridDim.x - 1) *arrived = 0;
        x.data += x_step;
        h.data = h_operand + (t + 1) % 2 * place;
        h.blocks = h_blocks;
        y += y_step;
        if (mask) mask += mask_step;
    }
}

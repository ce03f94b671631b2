// A time step whose depth is cut into shares, where rows and columns make few tiles.
//
// convlstm2d_products        the products of each share
// convlstm2d_step_of_shares  their sum, in their order, then bias, the gates, c and h
#include "cell.cuh"
#include "product.cuh"

// The products of a time step, [share][pixel][filter][gate]: the first `first` blocks of the depth, then `share` each.
KERNEL(THREADS, MIN_BLOCKS)
convlstm2d_products(FRAMES(h), FRAMES(x), const operand* weights, int columns, int pixels, int height, int width,
                    int filters, real* partial, int first, int share)
{
    resolve(weights, partial);
    Frames h = AS_FRAMES(h), x = AS_FRAMES(x);
    int end = first + blockIdx.z * share, begin = blockIdx.z ? end - share : 0, of_x = x.blocks;
    take(x, begin, end);
    take(h, begin - of_x, end - of_x);
    weights += (long long)begin * DEPTH * WEIGHT_PARTS * columns;
    Grid grid = {pixels, height, width};
    Rows rows = rows_of(grid, blockIdx.x, TILE_ROWS);
    int first_quad = blockIdx.y * TILE_QUADS, f = own_quad(first_quad);
    Tile tile;
    multiply(tile, grid, x, h, weights, columns, rows, first_quad);
    partial += (long long)blockIdx.z * pixels * filters * 4;
    visit_quads(tile, rows, [&](int) { return f < filters ? pixels : 0; },
                [&](int row, int, const real(&sums)[4]) { copy4(partial + ((long long)row * filters + f) * 4, sums); });
}

// A thread owns a pixel and filter.
KERNEL(256)
convlstm2d_step_of_shares(const real* partial, int shares, int pixels, int height, int width, int filters,
                          const real* bias, const real* h_last, long long h_last_stride, real* h_next,
                          long long h_next_stride, const real* c_last, long long c_last_stride, real* c_next,
                          long long c_next_stride, const real* y_last, real* y_next, long long y_stride, kept* z,
                          long long z_stride, int z_channels, operand* h_operand, long long h_operand_stride,
                          int h_operand_channels, const real* peep_i, const real* peep_f, const real* peep_o,
                          int peep_stride, const unsigned char* mask, int mask_stride, real cell_clip,
                          int recurrent_activation, int activation, int output_activation)
{
    resolve(partial, bias, h_last, h_next, c_last, c_next, y_last, y_next, z, h_operand, peep_i, peep_f, peep_o, mask);
    long long n = (long long)blockIdx.x * 256 + threadIdx.x, count = (long long)pixels * filters;
    if (n >= count) return;
    real sums[4] = {};
#pragma unroll 1
    for (int share = 0; share < shares; share++) {
        real added[4];
        load4(added, partial + (share * count + n) * 4);
#pragma unroll
        for (int r = 0; r < 4; r++) sums[r] += added[r];
    }
    Cell cell = {height * width, filters, bias, peep_i, peep_f, peep_o, peep_stride, cell_clip, recurrent_activation,
                 activation, output_activation};
    Step step = {h_last, h_last_stride, h_next, h_next_stride, c_last, c_last_stride, c_next, c_next_stride, y_last,
                 y_next, y_stride, z, z_stride, z_channels, h_operand, h_operand_stride, h_operand_channels, mask,
                 mask_stride};
    int row = int(n / filters);
    Advance<false> advance(cell, step, pixels, int(n % filters));
    advance.enter(row);
    advance(row, NO_ROW, sums);
}

// One time step from the products of gemm.cu's convlstm2d_products, whose depth was cut into shares: they are added in
// their order, then come the gates, c and h. A thread owns a pixel and filter.
#include "cell.cuh"

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

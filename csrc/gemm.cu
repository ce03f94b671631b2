// The convolutions as implicit matrix products, and what follows on their sums in registers.
//
// conv2d                     y = x * kernel + bias
// convlstm2d_step            z = x * kernel + h * recurrent_kernel + bias, the gates, c and h
// convlstm2d_step_backward   dh = dz of the step after, pulled back; the gates' gradients dz and dc of this step
//
// Blocks are (pixels, quads of columns); every element of a result has one owner: nothing depends on their order.
#include "cell.cuh"
#include "product.cuh"

// y [pixels][filters] of frames x, plus what `residual` holds.
KERNEL(THREADS, MIN_BLOCKS)
conv2d(FRAMES(x), const operand* weights, int columns, int pixels, int height, int width, const real* bias,
       const real* residual, real* y, int filters)
{
    resolve(weights);
    Frames x = AS_FRAMES(x), none = AS_FRAMES(x);
    none.blocks = 0;
    Grid grid = {pixels, height, width};
    int first_row = blockIdx.x * TILE_ROWS, first_quad = blockIdx.y * TILE_QUADS;
    Tile tile;
    multiply(tile, grid, x, none, weights, columns, first_row, first_quad);
    resolve(bias, residual, y);
    visit_columns(tile, first_row, first_quad * 4, [&](int row, int f, real sum) {
        if (row >= pixels || f >= filters) return;
        long long at = (long long)row * filters + f;
        y[at] = sum + read(bias, f) + read(residual, at);
    });
}

// One time step of frames h and x; weights: those of x, then those of h.
KERNEL(THREADS, MIN_BLOCKS)
convlstm2d_step(FRAMES(h), FRAMES(x), const operand* weights, int columns, int pixels, int height, int width,
                int filters, const real* bias, const real* h_last, long long h_last_stride, real* h_next,
                long long h_next_stride, const real* c_last, long long c_last_stride, real* c_next,
                long long c_next_stride, const real* y_last, real* y_next, long long y_stride, kept* z,
                long long z_stride, int z_channels, operand* h_operand, long long h_operand_stride, int h_operand_channels, const real* peep_i,
                const real* peep_f, const real* peep_o, int peep_stride, const unsigned char* mask, int mask_stride,
                real cell_clip, int recurrent_activation, int activation, int output_activation)
{
    resolve(weights);
    Frames h = AS_FRAMES(h), x = AS_FRAMES(x);
    Grid grid = {pixels, height, width};
    int first_row = blockIdx.x * TILE_ROWS, first_quad = blockIdx.y * TILE_QUADS;
    Tile tile;
    multiply(tile, grid, x, h, weights, columns, first_row, first_quad);
    resolve(bias, h_last, h_next, c_last, c_next, y_last, y_next, z, h_operand, peep_i, peep_f, peep_o, mask);
    Cell cell = {height * width, filters, bias, peep_i, peep_f, peep_o, peep_stride, cell_clip, recurrent_activation,
                 activation, output_activation};
    Step step = {h_last, h_last_stride, h_next, h_next_stride, c_last, c_last_stride, c_next, c_next_stride, y_last,
                 y_next, y_stride, z, z_stride, z_channels, h_operand, h_operand_stride, h_operand_channels, mask,
                 mask_stride};
    visit_quads(tile, first_row, first_quad, [&](int row, int f, const real(&sums)[4]) {
        if (row < pixels && f < filters) advance<false>(cell, step, row, f, sums);
    });
}

// One time step backwards: frames dz of the step after (none at the last step), to dz of this one, in the place of its
// z, and dc of the one before. h_now: where the h that this step ends with belongs, but for masked ones; the step after
// may have had its c_last there. dh_last, dc_last: gradients of the states after this step besides; dh, dy_carry, in
// place: what masked steps hand on. Null: absent, or zeros.
KERNEL(THREADS, MIN_BLOCKS)
convlstm2d_step_backward(FRAMES(dz), const operand* weights, int columns, int pixels, int height, int width,
                         int filters, const real* dy, long long dy_stride, const real* dh_last, const real* dc_last,
                         real* dh, real* dy_carry, real* dc_next, operand* z, const real* c_last, long long c_stride,
                         real* h_now, long long h_stride, const real* peep_i, const real* peep_f, const real* peep_o,
                         int peep_stride, const unsigned char* mask, int mask_stride, real cell_clip,
                         int recurrent_activation, int activation, int output_activation)
{
    resolve(weights);
    Frames dz = AS_FRAMES(dz), none = AS_FRAMES(dz);
    none.blocks = 0;
    Grid grid = {pixels, height, width};
    int first_row = blockIdx.x * TILE_ROWS, first_quad = blockIdx.y * TILE_QUADS;
    Tile tile;
    multiply(tile, grid, dz, none, weights, columns, first_row, first_quad);
    resolve(dy, dh_last, dc_last, dh, dy_carry, dc_next, z, c_last, h_now, peep_i, peep_f, peep_o, mask);
    int frame = height * width;
    int sigma = ACTIVATION(recurrent_activation, SIGMOID), on_g = ACTIVATION(activation, TANH);
    int on_c = ACTIVATION(output_activation, TANH);
    visit_columns(tile, first_row, first_quad * 4, [&](int row, int f, real sum) {
        if (row >= pixels || f >= filters) return;
        int image = row / frame, p = row - image * frame;
        bool valid = !mask || __ldg(mask + (long long)image * mask_stride);
        long long at = (long long)p * filters + f, state = (long long)row * filters + f;
        operand* zs = z + image * dz.stride + (long long)p * dz.channels + f;
        real z_i = get_operand<KIND>(zs[0]), z_f = get_operand<KIND>(zs[filters]);
        real z_g = get_operand<KIND>(zs[2 * filters]), z_o = get_operand<KIND>(zs[3 * filters]);
        real c_old = __ldg(c_last + image * c_stride + at), dc = read(dc_last, state);
        real dh_t = sum + read(dh_last, state), dy_t = read(dy, image * dy_stride + at);
        if (dh) {
            dh_t += dh[state];
            dy_t += dy_carry[state];
            dh[state] = valid ? real(0) : dh_t;
            dy_carry[state] = valid ? real(0) : dy_t;
        }
        dh_t += dy_t;
        real i = activate(sigma, z_i), forget = activate(sigma, z_f), g = activate(on_g, z_g), o = activate(sigma, z_o);
        real c = forget * c_old + i * g;
        bool passes = !(cell_clip > 0) || fabs(c) < cell_clip;
        if (cell_clip > 0) c = clipped(c, -cell_clip, cell_clip);
        long long peep = (long long)p * peep_stride + f;
        real cell = activate(on_c, c), dz_o = dh_t * cell * derivative(sigma, z_o);
        real dc_t = dc + dh_t * o * derivative(on_c, c) + dz_o * read(peep_o, peep);
        if (!passes) dc_t = 0;
        real dz_i = dc_t * g * derivative(sigma, z_i), dz_f = dc_t * c_old * derivative(sigma, z_f);
        real dz_g = dc_t * i * derivative(on_g, z_g);
        store(zs, valid ? dz_i : real(0));
        store(zs + filters, valid ? dz_f : real(0));
        store(zs + 2 * filters, valid ? dz_g : real(0));
        store(zs + 3 * filters, valid ? dz_o : real(0));
        if (h_now && valid) h_now[image * h_stride + at] = o * cell;
        dc_next[state] = valid ? dc_t * forget + dz_i * read(peep_i, peep) + dz_f * read(peep_f, peep) : dc;
    });
}

// The convolutions as implicit matrix products, and what follows on their sums in registers.
//
// conv2d                     y = x * kernel + bias
// convlstm2d_step            z = x * kernel + h * recurrent_kernel + bias, the gates, c and h
// convlstm2d_step_backward   dh = dz of the step after, pulled back; the gates' gradients dz and dc of this step
//
// Blocks are (pixels, quads of columns); every element of a result has one owner: nothing depends on their order.
#include "cell.cuh"
#include "product.cuh"

// y [pixels][filters] of frames x, plus what `residual` holds. The depth is cut into shares, of `share` blocks: each, a
// layer of the grid, writes a y of its own, the first one with bias; what is cut has no residual.
KERNEL(THREADS, MIN_BLOCKS)
conv2d(FRAMES(x), const operand* weights, int columns, int pixels, int height, int width, const real* bias,
       const real* residual, real* y, int filters, int share)
{
    resolve(weights);
    Frames x = AS_FRAMES(x), none = AS_FRAMES(x);
    none.blocks = 0;
    int first_block = blockIdx.z * share;
    take(x, first_block, first_block + share);
    weights += (long long)first_block * DEPTH * WEIGHT_PARTS * columns;
    Grid grid = {pixels, height, width};
    Rows rows = rows_of(grid, blockIdx.x, TILE_ROWS);
    int first_quad = blockIdx.y * TILE_QUADS;
    Tile tile;
    multiply(tile, grid, x, none, weights, columns, rows, first_quad);
    resolve(bias, residual, y);
    if (blockIdx.z) bias = nullptr;
    y += (long long)blockIdx.z * pixels * filters;
    int f = own_column(first_quad);
    real added = f < filters ? read(bias, f) : real(0);
    auto enter = [&](int) { return f < filters ? pixels : 0; };
    visit_columns(tile, rows, enter, [&](int row, real sum) {
        long long at = (long long)row * filters + f;
        y[at] = sum + added + read(residual, at);
    });
}

// One time step of frames h and x; weights: those of x, then those of h.
KERNEL(THREADS, MIN_BLOCKS)
convlstm2d_step(FRAMES(h), FRAMES(x), const operand* weights, int columns, int pixels, int height, int width,
                int filters, const real* bias, const real* h_last, long long h_last_stride, real* h_next,
                long long h_next_stride, const real* c_last, long long c_last_stride, real* c_next,
                long long c_next_stride, const real* y_last, real* y_next, long long y_stride, kept* z,
                long long z_stride, int z_channels, operand* h_operand, long long h_operand_stride,
                int h_operand_channels, const real* peep_i, const real* peep_f, const real* peep_o, int peep_stride,
                const unsigned char* mask, int mask_stride, real cell_clip, int recurrent_activation, int activation,
                int output_activation)
{
    resolve(weights);
    Frames h = AS_FRAMES(h), x = AS_FRAMES(x);
    Grid grid = {pixels, height, width};
    Rows rows = rows_of(grid, blockIdx.x, TILE_ROWS);
    int first_quad = blockIdx.y * TILE_QUADS;
    Tile tile;
    multiply(tile, grid, x, h, weights, columns, rows, first_quad);
    resolve(bias, h_last, h_next, c_last, c_next, y_last, y_next, z, h_operand, peep_i, peep_f, peep_o, mask);
    Cell cell = {height * width, filters, bias, peep_i, peep_f, peep_o, peep_stride, cell_clip, recurrent_activation,
                 activation, output_activation};
    Step step = {h_last, h_last_stride, h_next, h_next_stride, c_last, c_last_stride, c_next, c_next_stride, y_last,
                 y_next, y_stride, z, z_stride, z_channels, h_operand, h_operand_stride, h_operand_channels, mask,
                 mask_stride};
    Advance<false> advance(cell, step, pixels, own_quad(first_quad));
    visit_quads(tile, rows, [&](int row) { return advance.enter(row); },
                [&](int row, int next, const real(&sums)[4]) { advance(row, next, sums); });
}

// One time step backwards: frames dz of the step after (none at the last step), to dz of this one, in the place of its
// z, and dc of the one before. h_now: where the h that this step ends with belongs, but for masked ones; the step after
// may have had its c_last there. dh_last, dc_last: gradients of the states after this step besides, that of h to be
// added up from dh_shares (where dz comes pulled back already, in shares of the depth, not as frames). dh, dy_carry, in
// place: what masked steps hand on. Null: absent, or zeros.
KERNEL(THREADS, MIN_BLOCKS)
convlstm2d_step_backward(FRAMES(dz), const operand* weights, int columns, int pixels, int height, int width,
                         int filters, const real* dy, long long dy_stride, const real* dh_last, int dh_shares,
                         const real* dc_last, real* dh, real* dy_carry, real* dc_next, operand* z,
                         const real* c_last, long long c_stride, real* h_now, long long h_stride, const real* peep_i,
                         const real* peep_f, const real* peep_o, int peep_stride, const unsigned char* mask,
                         int mask_stride, real cell_clip, int recurrent_activation, int activation,
                         int output_activation)
{
    resolve(weights);
    Frames dz = AS_FRAMES(dz), none = AS_FRAMES(dz);
    none.blocks = 0;
    Grid grid = {pixels, height, width};
    Rows rows = rows_of(grid, blockIdx.x, TILE_ROWS);
    int first_quad = blockIdx.y * TILE_QUADS;
    Tile tile;
    multiply(tile, grid, dz, none, weights, columns, rows, first_quad);
    resolve(dy, dh_last, dc_last, dh, dy_carry, dc_next, z, c_last, h_now, peep_i, peep_f, peep_o, mask);
    int sigma = ACTIVATION(recurrent_activation, SIGMOID), on_g = ACTIVATION(activation, TANH);
    int on_c = ACTIVATION(output_activation, TANH), f = own_column(first_quad);
    int frame = height * width, image_row = 0;
    long long states = (long long)pixels * filters;
    const real *dy_in = nullptr, *c_in = nullptr;  // of the image, at the filter
    operand* z_in = nullptr;
    real* h_in = nullptr;
    bool valid = true;
    auto enter = [&](int row) {
        if (row >= pixels || f >= filters) return 0;
        int image = row / frame;
        image_row = image * frame;
        dy_in = moved(dy, image * dy_stride + f), c_in = moved(c_last, image * c_stride + f);
        z_in = moved(z, image * dz.stride + f);
        valid = !mask || __ldg(mask + image * (long long)mask_stride);
        h_in = valid ? moved(h_now, image * h_stride + f) : nullptr;
        return image_row + frame;
    };
    visit_columns(tile, rows, enter, [&](int row, real sum) {
        int p = row - image_row, at = p * filters;
        long long state = (long long)row * filters + f;
        operand* zs = z_in + p * dz.channels;
        real z_i = get_operand<KIND>(zs[0]), z_f = get_operand<KIND>(zs[filters]);
        real z_g = get_operand<KIND>(zs[2 * filters]), z_o = get_operand<KIND>(zs[3 * filters]);
        real c_old = __ldg(c_in + at), dc = read(dc_last, state);
        real dh_t = sum, dy_t = read(dy_in, at);
#pragma unroll 1
        for (int n = 0; n < dh_shares; n++) dh_t += read(dh_last, n * states + state);
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
        if (h_in) h_in[at] = o * cell;
        dc_next[state] = valid ? dc_t * forget + dz_i * read(peep_i, peep) + dz_f * read(peep_f, peep) : dc;
    });
}

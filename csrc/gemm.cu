// The convolutions as implicit matrix products, and what follows on their sums in registers.
//
// conv2d                     y = x * kernel + bias
// convlstm2d_step            z = h * recurrent_kernel + x * kernel + bias, the gates, c and h
// convlstm2d_step_backward   dh = dz of the step after, pulled back; the gates' gradients dz and dc of this step
//
// Sums pass through shared memory once more, so that neighbouring threads own neighbouring filters: what follows on
// them is coalesced, and one piece of code for all of a thread's.
//
// With a KIND other than 0 the products run on the tensor cores (mma.cuh), else on the ordinary units (simt.cuh).
// Blocks are (pixels, quads of columns); every element of a result has one owner, so that nothing depends on their order.
#if KIND
#include "mma.cuh"
#else
#include "simt.cuh"
#endif
#include "activations.cuh"
#include "operands.cuh"

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

DEVICE real read(const real* from, long long at) { return from ? __ldg(from + at) : real(0); }

// y [pixels][filters] of frames x, plus what `residual` holds.
KERNEL(THREADS, 512 / THREADS)
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

// One time step. h, x: frames; c, y, z ...: [image][pixel][filter] with elements from one image to the next beside
// them. A quad is the gates i, f, g, o of a filter. Null: absent, or zeros. A masked image keeps its h, c and output.
// What is read here is written by no thread of this launch, but for y_last.
KERNEL(THREADS, 512 / THREADS)
convlstm2d_step(FRAMES(h), FRAMES(x), const operand* weights, int columns, int pixels, int height, int width,
                int filters, const real* bias, const real* h_last, long long h_last_stride, real* h_next,
                long long h_next_stride, const real* c_last, long long c_last_stride, real* c_next,
                long long c_next_stride, const real* y_last, real* y_next, long long y_stride, real* z,
                long long z_stride, unsigned short* h_operand, int h_operand_channels, const real* peep_i,
                const real* peep_f, const real* peep_o, int peep_stride, const unsigned char* mask, int mask_stride,
                real cell_clip, int recurrent_activation, int activation, int output_activation)
{
    resolve(weights);
    Frames h = AS_FRAMES(h), x = AS_FRAMES(x);
    Grid grid = {pixels, height, width};
    int first_row = blockIdx.x * TILE_ROWS, first_quad = blockIdx.y * TILE_QUADS;
    Tile tile;
    multiply(tile, grid, h, x, weights, columns, first_row, first_quad);
    resolve(bias, h_last, h_next, c_last, c_next, y_last, y_next, z, h_operand, peep_i, peep_f, peep_o, mask);
    int frame = height * width;
    int sigma = ACTIVATION(recurrent_activation, SIGMOID), on_g = ACTIVATION(activation, TANH);
    int on_c = ACTIVATION(output_activation, TANH);
    visit_quads(tile, first_row, first_quad, [&](int row, int f, const real(&sums)[4]) {
        if (row >= pixels || f >= filters) return;
        int image = row / frame, p = row - image * frame;
        long long at = (long long)p * filters + f, peep = (long long)p * peep_stride + f;
        bool valid = !mask || __ldg(mask + (long long)image * mask_stride);
        real c_old = read(c_last, image * c_last_stride + at);
        real z_i = sums[0] + read(bias, f) + read(peep_i, peep) * c_old;
        real z_f = sums[1] + read(bias, filters + f) + read(peep_f, peep) * c_old;
        real z_g = sums[2] + read(bias, 2 * filters + f);
        real c_new = activate(sigma, z_f) * c_old + activate(sigma, z_i) * activate(on_g, z_g);
        if (cell_clip > 0) c_new = clipped(c_new, -cell_clip, cell_clip);
        real z_o = sums[3] + read(bias, 3 * filters + f) + read(peep_o, peep) * c_new;
        real h_new = activate(sigma, z_o) * activate(on_c, c_new);
        if (z) {
            real* zs = z + image * z_stride + (long long)p * 4 * filters + f;
            zs[0] = z_i, zs[filters] = z_f, zs[2 * filters] = z_g, zs[3 * filters] = z_o;
        }
        if (y_next) {
            long long out = image * y_stride + at;
            y_next[out] = valid ? h_new : y_last ? y_last[out] : real(0);
        }
        if (!valid) {
            c_new = c_old;
            h_new = read(h_last, image * h_last_stride + at);
        }
        c_next[image * c_next_stride + at] = c_new;
        h_next[image * h_next_stride + at] = h_new;
        if (h_operand) set_operand<KIND>(h_operand + (long long)row * h_operand_channels + f, h_new);
    });
}

// One time step backwards: frames dz of the step after (none at the last step), to dz of this one and dc of the one
// before. dh_last, dc_last: gradients of the states after this step besides; dh, dy_carry, in place: what masked steps
// hand on. Null: absent, or zeros.
KERNEL(THREADS, 512 / THREADS)
convlstm2d_step_backward(FRAMES(dz), const operand* weights, int columns, int pixels, int height, int width,
                         int filters, const real* dy, long long dy_stride, const real* dh_last, const real* dc_last,
                         real* dh, real* dy_carry, real* dc_next, const real* z, long long z_stride,
                         const real* c_last, long long c_stride, real* dz_now, long long dz_stride_now,
                         const real* peep_i, const real* peep_f, const real* peep_o, int peep_stride,
                         const unsigned char* mask, int mask_stride, real cell_clip, int recurrent_activation,
                         int activation, int output_activation)
{
    resolve(weights);
    Frames dz = AS_FRAMES(dz), none = AS_FRAMES(dz);
    none.blocks = 0;
    Grid grid = {pixels, height, width};
    int first_row = blockIdx.x * TILE_ROWS, first_quad = blockIdx.y * TILE_QUADS;
    Tile tile;
    multiply(tile, grid, dz, none, weights, columns, first_row, first_quad);
    resolve(dy, dh_last, dc_last, dh, dy_carry, dc_next, z, c_last, dz_now, peep_i, peep_f, peep_o, mask);
    int frame = height * width;
    int sigma = ACTIVATION(recurrent_activation, SIGMOID), on_g = ACTIVATION(activation, TANH);
    int on_c = ACTIVATION(output_activation, TANH);
    visit_columns(tile, first_row, first_quad * 4, [&](int row, int f, real sum) {
        if (row >= pixels || f >= filters) return;
        int image = row / frame, p = row - image * frame;
        bool valid = !mask || __ldg(mask + (long long)image * mask_stride);
        long long at = (long long)p * filters + f, state = (long long)row * filters + f;
        const real* zs = z + image * z_stride + (long long)p * 4 * filters + f;
        real z_i = __ldg(zs), z_f = __ldg(zs + filters), z_g = __ldg(zs + 2 * filters), z_o = __ldg(zs + 3 * filters);
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
        real dz_o = dh_t * activate(on_c, c) * derivative(sigma, z_o);
        real dc_t = dc + dh_t * o * derivative(on_c, c) + dz_o * read(peep_o, peep);
        if (!passes) dc_t = 0;
        real dz_i = dc_t * g * derivative(sigma, z_i), dz_f = dc_t * c_old * derivative(sigma, z_f);
        real dz_g = dc_t * i * derivative(on_g, z_g);
        real* dzs = dz_now + image * dz_stride_now + (long long)p * 4 * filters + f;
        dzs[0] = valid ? dz_i : real(0);
        dzs[filters] = valid ? dz_f : real(0);
        dzs[2 * filters] = valid ? dz_g : real(0);
        dzs[3 * filters] = valid ? dz_o : real(0);
        dc_next[state] = valid ? dc_t * forget + dz_i * read(peep_i, peep) + dz_f * read(peep_f, peep) : dc;
    });
}

// What a time step does with the sums of its products: gates and peepholes, the states c and h, the output, masks.
#pragma once
#include "activations.cuh"
#include "frames.cuh"
#include "operands.cuh"

// What a step leaves to the way back: operands of its products, but never rounded to tf32.
#if KIND == 5
typedef real kept;  // the way back computes in tf32
#else
typedef operand kept;
#endif
DEVICE void store(real* to, real x) { *to = x; }
DEVICE void store(unsigned short* to, real x) { set_operand<KIND>(to, x); }

struct Cell {
    int frame, filters;  // pixels of an image
    const real* bias;
    const real *peep_i, *peep_f, *peep_o;
    int peep_stride;
    real cell_clip;
    int recurrent_activation, activation, output_activation;
};

// Of one step, [image][pixel][filter] with elements from one image to the next beside them. Null: absent, or zeros.
struct Step {
    const real* h_last;
    long long h_last_stride;
    real* h_next;
    long long h_next_stride;
    const real* c_last;
    long long c_last_stride;
    real* c_next;
    long long c_next_stride;
    const real* y_last;
    real* y_next;
    long long y_stride;
    kept* z;  // [pixel][z_channels]
    long long z_stride;
    int z_channels;
    operand* h_operand;  // h as the next step's product reads it, [pixel][h_operand_channels]
    long long h_operand_stride;
    int h_operand_channels;
    const unsigned char* mask;
    int mask_stride;
};

// A state; IN_PLACE: which this very thread may have written in the same launch.
template <bool IN_PLACE> DEVICE real read_state(const real* from, long long at)
{
    return !from ? real(0) : IN_PLACE ? from[at] : __ldg(from + at);
}

// Take the pixel `row` (of all images) and filter f a step on, from the sums of its gates i, f, g, o. A masked image
// keeps its h, c and output.
template <bool IN_PLACE> DEVICE void advance(const Cell& cell, const Step& step, int row, int f, const real (&sums)[4])
{
    int sigma = ACTIVATION(cell.recurrent_activation, SIGMOID), on_g = ACTIVATION(cell.activation, TANH);
    int on_c = ACTIVATION(cell.output_activation, TANH), filters = cell.filters;
    int image = row / cell.frame, p = row - image * cell.frame;
    long long at = (long long)p * filters + f, peep = (long long)p * cell.peep_stride + f;
    bool valid = !step.mask || __ldg(step.mask + (long long)image * step.mask_stride);
    real c_old = read_state<IN_PLACE>(step.c_last, image * step.c_last_stride + at);
    real z_i = sums[0] + read(cell.bias, f) + read(cell.peep_i, peep) * c_old;
    real z_f = sums[1] + read(cell.bias, filters + f) + read(cell.peep_f, peep) * c_old;
    real z_g = sums[2] + read(cell.bias, 2 * filters + f);
    real c_new = activate(sigma, z_f) * c_old + activate(sigma, z_i) * activate(on_g, z_g);
    if (cell.cell_clip > 0) c_new = clipped(c_new, -cell.cell_clip, cell.cell_clip);
    real z_o = sums[3] + read(cell.bias, 3 * filters + f) + read(cell.peep_o, peep) * c_new;
    real h_new = activate(sigma, z_o) * activate(on_c, c_new);
    if (step.z) {
        kept* zs = step.z + image * step.z_stride + (long long)p * step.z_channels + f;
        store(zs, z_i);
        store(zs + filters, z_f);
        store(zs + 2 * filters, z_g);
        store(zs + 3 * filters, z_o);
    }
    if (step.y_next) {
        long long out = image * step.y_stride + at;
        step.y_next[out] = valid ? h_new : step.y_last ? step.y_last[out] : real(0);
    }
    if (!valid) {
        c_new = c_old;
        h_new = read_state<IN_PLACE>(step.h_last, image * step.h_last_stride + at);
    }
    step.c_next[image * step.c_next_stride + at] = c_new;
    if (step.h_next) step.h_next[image * step.h_next_stride + at] = h_new;
    if (step.h_operand) {
        long long to = image * step.h_operand_stride + (long long)p * step.h_operand_channels + f;
        set_operand<KIND>(step.h_operand + to, h_new);
    }
}

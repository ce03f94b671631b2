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

template <class T> DEVICE T* moved(T* pointer, long long elements) { return pointer ? pointer + elements : nullptr; }

// Takes pixels of filter f a step on, from the sums of their gates i, f, g, o. What most steps read and write is found
// once an image. A masked image keeps its h, c and output.
template <bool IN_PLACE> struct Advance {
    const Cell& cell;
    const Step& step;
    int pixels, f;
    bool more;  // than the bare cell
    real bias[4];
    int image, first_row, end;  // the rows from first_row to end are pixels of the image
    const real* c_last;         // in it, at the filter
    real *c_next, *h_next;
    operand* h_operand;
    real c_prepared;

    DEVICE Advance(const Cell& cell, const Step& step, int pixels, int f) : cell(cell), step(step), pixels(pixels), f(f)
    {
        more = cell.peep_i || step.z || step.y_next || step.mask || cell.cell_clip > 0;
#pragma unroll
        for (int r = 0; r < 4; r++) bias[r] = f < cell.filters ? read(cell.bias, r * cell.filters + f) : real(0);
    }

    DEVICE int enter(int row)
    {
        if (row >= pixels || f >= cell.filters) return 0;
        image = row / cell.frame;
        first_row = image * cell.frame, end = first_row + cell.frame;
        c_last = moved(step.c_last, image * step.c_last_stride + f);
        c_next = step.c_next + (image * step.c_next_stride + f);
        h_next = moved(step.h_next, image * step.h_next_stride + f);
        h_operand = moved(step.h_operand, image * step.h_operand_stride + f);
        prepare(row);
        return end;
    }

    DEVICE void prepare(int row)
    {
        c_prepared = read_state<IN_PLACE>(c_last, (row - first_row) * cell.filters);
    }

    DEVICE void operator()(int row, int next, const real (&sums)[4])
    {
        int sigma = ACTIVATION(cell.recurrent_activation, SIGMOID), on_g = ACTIVATION(cell.activation, TANH);
        int on_c = ACTIVATION(cell.output_activation, TANH), p = row - first_row, at = p * cell.filters;
        long long peep = (long long)p * cell.peep_stride + f;
        real c_old = c_prepared;
        if (next < end) prepare(next);
        real z_i = sums[0] + bias[0], z_f = sums[1] + bias[1], z_g = sums[2] + bias[2], z_o = sums[3] + bias[3];
        if (more && cell.peep_i) {
            z_i += __ldg(cell.peep_i + peep) * c_old;
            z_f += __ldg(cell.peep_f + peep) * c_old;
        }
        real c_new = activate(sigma, z_f) * c_old + activate(sigma, z_i) * activate(on_g, z_g);
        if (more) {
            if (cell.cell_clip > 0) c_new = clipped(c_new, -cell.cell_clip, cell.cell_clip);
            if (cell.peep_o) z_o += __ldg(cell.peep_o + peep) * c_new;
        }
        real h_new = activate(sigma, z_o) * activate(on_c, c_new);
        if (more) {
            if (step.z) {
                kept* zs = step.z + (image * step.z_stride + (long long)p * step.z_channels + f);
                store(zs, z_i);
                store(zs + cell.filters, z_f);
                store(zs + 2 * cell.filters, z_g);
                store(zs + 3 * cell.filters, z_o);
            }
            bool valid = !step.mask || __ldg(step.mask + (long long)image * step.mask_stride);
            if (step.y_next) {
                long long out = image * step.y_stride + at + f;
                step.y_next[out] = valid ? h_new : step.y_last ? step.y_last[out] : real(0);
            }
            if (!valid) {
                c_new = c_old;
                h_new = read_state<IN_PLACE>(step.h_last, image * step.h_last_stride + at + f);
            }
        }
        c_next[at] = c_new;
        if (h_next) h_next[at] = h_new;
        if (h_operand) set_operand<KIND>(h_operand + p * step.h_operand_channels, h_new);
    }
};

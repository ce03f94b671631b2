// What stands around the matrix products: packed weights, operands of 16 bits, copies of states, sums.
// One element a thread, or one column of a sum; blocks of 256 threads.
#include "operands.cuh"
#include "frames.cuh"

DEVICE long long thread_number() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }

// The kernel [tap][channel][filter] as a product reads it: packed [block][columns][inner], depth = block · inner + ...
//
// Column p is member r of quad q: q = p / 4 with block 1; with block 8 quads come eight at a time, member by member.
// That is weight 4q + r, or (gates) r · count / 4 + q, of the `count` that each tap has; `transposed`: the tap's
// channel is one of the filters, and the weights are its channels.
//
// With KIND 3 a weight is packed in two tf32 parts, [block][part][columns][inner]; with 1 it is rounded to tf32.
KERNEL(256)
pack(const real* weights, const int4* taps, int depth, int inner, int columns, int quad_block, int count, int gates,
     int transposed, int channels, int filters, operand* packed)
{
    resolve(weights, taps, packed);
    long long n = thread_number();
    if (n >= (long long)depth * columns) return;
    int at = int(n % inner), p = int(n / inner % columns), k = int(n / inner / columns) * inner + at;
    int in_block = p % (4 * quad_block);
    int q = p / (4 * quad_block) * quad_block + in_block % quad_block, r = in_block / quad_block;
    if (quad_block == 1) q = p / 4, r = p % 4;
    int column = gates ? (q < count / 4 ? r * (count / 4) + q : count) : 4 * q + r;
    int4 tap = taps[k];
    real x = 0;
    if (tap.w >= 0 && column < count) {
        int channel = transposed ? column : tap.z, filter = transposed ? tap.z : column;
        x = weights[((long long)tap.w * channels + channel) * filters + filter];
    }
#if KIND == 3
    long long part = (long long)inner * columns, high = n + n / part * part;
    set_operand<TF32>(packed + high, x);
    set_operand<TF32>(packed + high + part, x - packed[high]);
#else
    set_operand<KIND>(packed + n, x);
#endif
}

// Frames [pixel][channels] to operands [pixel][padded], zeros in the padding.
KERNEL(256)
convert(const real* from, long long pixels, int channels, int padded, operand* to)
{
    resolve(from, to);
    long long n = thread_number();
    if (n >= pixels * padded) return;
    int channel = int(n % padded);
    set_operand<KIND>(to + n, channel < channels ? from[n / padded * channels + channel] : real(0));
}

// `count` elements of every image; zeros where there is nothing to copy.
KERNEL(256)
copy(const real* from, long long from_stride, real* to, long long to_stride, long long count, int images)
{
    resolve(from, to);
    long long n = thread_number();
    if (n >= count * images) return;
    long long image = n / count, at = n - image * count;
    to[image * to_stride + at] = from ? from[image * from_stride + at] : real(0);
}

// Sums of each column of [rows][width] over a share of the rows, in float64: partial [shares][columns].
// Blocks of (32 columns, 8), grid (columns, shares).
KERNEL(256)
column_sums(const operand* rows, long long count, int width, int columns, double* partial)
{
    resolve(rows, partial);
    double* kept = (double*)shared_memory();
    int column = blockIdx.x * 32 + threadIdx.x;
    double sum = 0;
    if (column < columns)
        for (long long row = (long long)blockIdx.y * 8 + threadIdx.y; row < count; row += (long long)gridDim.y * 8)
            sum += get_operand<KIND>(rows[row * width + column]);
    kept[threadIdx.y * 32 + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= columns) return;
    for (int y = 1; y < 8; y++) sum += kept[y * 32 + threadIdx.x];
    partial[(long long)blockIdx.y * columns + column] = sum;
}

template <class T> DEVICE void add_shares(const T* partial, int shares, long long count, const real* more, real* to)
{
    resolve(partial, more, to);
    long long n = thread_number();
    if (n >= count) return;
    double sum = more ? more[n] : real(0);
    for (int share = 0; share < shares; share++) sum += partial[share * count + n];
    to[n] = real(sum);
}

// Shares [shares][count], added in their order to what there was before.
KERNEL(256)
add_sums(const double* partial, int shares, long long count, const real* more, real* to)
{
    add_shares(partial, shares, count, more, to);
}

KERNEL(256)
add_products(const real* partial, int shares, long long count, const real* more, real* to)
{
    add_shares(partial, shares, count, more, to);
}

// Shares [shares][count] of the depth of a product, then `residual`: to the bit as convlstm2d_step_backward adds them.
KERNEL(256)
add_depth(const real* partial, int shares, long long count, const real* residual, real* to)
{
    resolve(partial, residual, to);
    long long n = thread_number();
    if (n >= count) return;
    real sum = 0;
#pragma unroll 1
    for (int share = 0; share < shares; share++) sum += partial[share * count + n];
    to[n] = residual ? sum + residual[n] : sum;
}

// States before each step, `count` elements of them: a masked step leaves what it found. Steps are `step` elements
// apart, those of the mask [image][T] `mask_step`; both pointers are at the first step of the first image.
KERNEL(256)
fill_masked(real* h, long long stride, long long step, long long count, int images, int T, const unsigned char* mask,
            int mask_step)
{
    resolve(h, mask);
    long long n = thread_number();
    if (n >= count * images) return;
    long long image = n / count;
    h += image * stride + n % count;
    mask += image * T;
    for (int t = 0; t + 1 < T; t++)
        if (!mask[t * mask_step]) h[(t + 1) * step] = h[t * step];
}

// Gradients of elementwise peepholes, [i, f, o][pixel][filter]: dz [image][T][pixel][4][filter] times the cell before
// (i, f) or after (o) the step; c [image][T + 1][pixel][filter], where step s starts from slot s + first. A pixel of dz
// takes `channels` elements. What there was before, `more`, is added.
KERNEL(256)
peephole_gradient(const operand* dz, int channels, const real* c, int images, int T, int first, int count, int filters,
                  const real* more, real* to)
{
    resolve(dz, c, more, to);
    long long n = thread_number();
    if (n >= count) return;
    long long p = n / filters, f = n - p * filters;
    double sum_i = 0, sum_f = 0, sum_o = 0;
    if (more) sum_i = more[n], sum_f = more[count + n], sum_o = more[2ll * count + n];
    for (int image = 0; image < images; image++)
        for (int s = 0; s < T; s++) {
            const operand* dzs = dz + (((long long)image * T + s) * (count / filters) + p) * channels + f;
            const real* cs = c + ((long long)image * (T + 1) + s) * count + n;
            double before = cs[first ? count : 0], after = cs[first ? 0 : count];
            sum_i += get_operand<KIND>(dzs[0]) * before;
            sum_f += get_operand<KIND>(dzs[filters]) * before;
            sum_o += get_operand<KIND>(dzs[3 * filters]) * after;
        }
    to[n] = real(sum_i);
    to[count + n] = real(sum_f);
    to[2ll * count + n] = real(sum_o);
}

// Where the rows and the depth of an implicit matrix product stand in channels-last frames.
//
// A row is a pixel (image, row, column) of a grid; a step of the depth is a tap: an offset of the pixel and a channel.
#pragma once
#include "common.cuh"

#ifndef OPERAND
#define OPERAND real
#endif
typedef OPERAND operand;  // real, or the bits of a bfloat16 or float16

struct Frames {
    const operand* data;
    long long stride;  // elements from one image to the next
    int height, width, channels;
    int step_h, step_w;      // pixels of the frame a pixel of the grid
    int divide_h, divide_w;  // or pixels of the grid a pixel of the frame: a transposed convolution
    int circular;
    int whole;        // tap 4n to 4n + 3 (16 bytes) are one aligned piece
    const int4* taps;  // (row, column, channel, number of the weight or -1 for none), padded to whole blocks
    int blocks;
    bool late;  // other blocks of the launch write it
#ifdef HALO  // then taps are where the four parts of a block's depth start in the halo of a tile, by 16 bytes
    int top, left, high, wide;  // the halo: its first pixel, seen from that of the tile, and its size
    int chunk;                  // blocks of depth of 128 bytes of the channels, under all taps
    int channel;                // the first one
#endif

    // A tap is as far from every pixel: frames do not turn, and every pixel of the grid is one of theirs.
    DEVICE bool plain() const { return !circular && divide_h <= 1 && divide_w <= 1; }
};

#ifdef HALO
#define HALO_PARAMETERS(p) , int p##_top, int p##_left, int p##_high, int p##_wide, int p##_chunk
#define HALO_OF(p) , p##_top, p##_left, p##_high, p##_wide, p##_chunk, 0
#else
#define HALO_PARAMETERS(p)
#define HALO_OF(p)
#endif

#define FRAMES(p)                                                                                                      \
    const operand *p##_data, long long p##_stride, int p##_height, int p##_width, int p##_channels, int p##_step_h,   \
        int p##_step_w, int p##_divide_h, int p##_divide_w, int p##_circular, int p##_whole, const int4 *p##_taps,    \
        int p##_blocks HALO_PARAMETERS(p)
#define AS_FRAMES(p)                                                                                                   \
    {resolved(p##_data), p##_stride, p##_height, p##_width, p##_channels, p##_step_h, p##_step_w, p##_divide_h,        \
     p##_divide_w, p##_circular, p##_whole, p##_taps, p##_blocks, false HALO_OF(p)}

struct Grid {
    int pixels;  // of all images
    int height, width;
};

struct Pixel {
    int image, row, column;
};

const int NO_ROW = 0x7fffffff;  // a row of a tile that is no pixel

DEVICE Pixel pixel_of(const Grid& grid, int n)
{
    int line = n / grid.width, image = line / grid.height;
    return {image, line - image * grid.height, n - line * grid.width};
}

// The pixels of a tile, by their rows in it.
#ifdef HALO  // a tile of 16 columns of one image, in squares of 8x8
#define TILE_WIDTH 16
struct Rows {
    Pixel corner;
    int first, width;  // the corner's number; pixels of a line
    int down, right;   // lines and columns from the corner to the frame's end
    static const bool GAPS = true;
    DEVICE int operator()(int n) const
    {
        unsigned at = n;
        int row = at / 128 * 8 + at % 64 / 8, column = at / 64 % 2 * 8 + at % 8;
        return row < down && column < right ? first + row * width + column : NO_ROW;
    }
};

DEVICE Rows rows_of(const Grid& grid, int tile, int tile_rows)
{
    Grid tiles = {0, ceil_div(grid.height, tile_rows / TILE_WIDTH), ceil_div(grid.width, TILE_WIDTH)};
    Pixel corner = pixel_of(tiles, tile);
    corner.row *= tile_rows / TILE_WIDTH, corner.column *= TILE_WIDTH;
    int first = (corner.image * grid.height + corner.row) * grid.width + corner.column;
    return {corner, first, grid.width, grid.height - corner.row, grid.width - corner.column};
}
#else  // one after the other, of one image after the other
struct Rows {
    int first;
    static const bool GAPS = false;
    DEVICE int operator()(int n) const { return first + n; }
};

DEVICE Rows rows_of(const Grid&, int tile, int tile_rows) { return {tile * tile_rows}; }
#endif

// A row or column that no tap brings into a frame: neither alone nor twice is it more than 32 bits hold.
const int NOWHERE = -(1 << 30);

// Where a pixel of the grid stands in frames, before a tap moves it.
struct alignas(16) Place {
    const operand* from;  // its image; in plain frames the pixel itself; null: there is no such pixel
    int row, column;
};

DEVICE Place place_of(const Frames& frames, const operand* image, const Pixel& pixel)
{
    int row = pixel.row * frames.step_h, column = pixel.column * frames.step_w;
    int pixels = frames.plain() ? row * frames.width + column : 0;
    return {image + (long long)pixels * frames.channels, row, column};
}

DEVICE Place place_of(const Frames& frames, const Grid& grid, int n)
{
    if (n >= grid.pixels) return {nullptr, NOWHERE, NOWHERE};
    Pixel pixel = pixel_of(grid, n);
    return place_of(frames, frames.data + pixel.image * frames.stride, pixel);
}

// Put a place behind the others, and return the first of them, which makes room: so a loop that is not unrolled gets at
// all places, which are in registers, that no number can index.
template <int N> DEVICE Place pushed_out(Place (&places)[N], Place last)
{
    Place first = places[0];
#pragma unroll
    for (int i = 1; i < N; i++) places[i - 1] = places[i];
    places[N - 1] = last;
    return first;
}

DEVICE int wrapped(int n, int size)  // no division: it is seldom far away
{
#pragma unroll 1
    while (n < 0) n += size;
#pragma unroll 1
    while (n >= size) n -= size;
    return n;
}

// One of two frames, field by field: in registers.
DEVICE Frames chosen(bool first, const Frames& a, const Frames& b)
{
#ifdef HALO
#define HALO_CHOSEN                                                                                                    \
    , first ? a.top : b.top, first ? a.left : b.left, first ? a.high : b.high, first ? a.wide : b.wide,                \
        first ? a.chunk : b.chunk, first ? a.channel : b.channel
#else
#define HALO_CHOSEN
#endif
    return {first ? a.data : b.data,         first ? a.stride : b.stride,     first ? a.height : b.height,
            first ? a.width : b.width,       first ? a.channels : b.channels, first ? a.step_h : b.step_h,
            first ? a.step_w : b.step_w,     first ? a.divide_h : b.divide_h, first ? a.divide_w : b.divide_w,
            first ? a.circular : b.circular, first ? a.whole : b.whole,       first ? a.taps : b.taps,
            first ? a.blocks : b.blocks,     first ? a.late : b.late HALO_CHOSEN};
}

DEVICE bool inside(const Frames& frames, int row, int column)
{
    return unsigned(row) < unsigned(frames.height) && unsigned(column) < unsigned(frames.width);
}

// How many elements a tap is from any pixel of plain frames. It may wrap around where it leaves the frame.
DEVICE int distance(const Frames& frames, const int4& tap)
{
    return int((unsigned(tap.x) * unsigned(frames.width) + unsigned(tap.y)) * unsigned(frames.channels)) + tap.z;
}

// The element that a tap meets at a pixel; null for padding.
DEVICE const operand* find(const Frames& frames, const Place& place, const int4& tap)
{
    if (!place.from || tap.w < 0) return nullptr;
    int h = place.row + tap.x, w = place.column + tap.y;
    if (frames.plain()) return inside(frames, h, w) ? place.from + distance(frames, tap) : nullptr;
    if (frames.circular) {
        h = wrapped(h, frames.height);
        w = wrapped(w, frames.width);
    } else {
        if (h < 0 || w < 0) return nullptr;
        int down = unsigned(h) / unsigned(frames.divide_h), right = unsigned(w) / unsigned(frames.divide_w);
        if (down * frames.divide_h != h || right * frames.divide_w != w || !inside(frames, down, right)) return nullptr;
        h = down, w = right;
    }
    return place.from + ((long long)(h * frames.width + w) * frames.channels + tap.z);
}

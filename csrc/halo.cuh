// The pixels of a tile and those that its taps reach beside it, the halo, once for all taps: for wgmma.cuh, in place of
// a copy of the pixels for each tap.
//
// The depth goes over chunks of 128 bytes of the channels, in a chunk over the taps and in a tap over 32 bytes, a
// product, at a time. Shared memory holds, beside STAGES blocks of weights, the halos of two chunks: plane by plane of
// 16 bytes of the channels, and in a plane pixel by pixel. So eight pixels of a line are 128 bytes together, wherever
// they start: what a product takes without a swizzle, from an address that a tap only moves. A warpgroup owns squares of
// 8x8 pixels, whose lines are a line of the halo apart. A plane holds an odd number of pixels, so that the eight pieces
// of one that eight threads copy meet all banks; eight pixels of a plane do, too.
//
// What lies outside of the frame and channels that are not there are copied as zeros. A chunk of fewer channels has
// planes of nothing but zeros: the products that fill its last block read them.
//
// The memory of a chunk is that of the last but one. Its copies are spread over the blocks from where no product reads
// that any more to where the chunk begins; so that there are such blocks, a chunk has at least STAGES - 1 of them.
#pragma once

#define STAGE_BYTES WEIGHT_BYTES
#define PLANES 8
static_assert(WARPGROUPS * ROW_TILES % 2 == 0, "squares of 8x8 pixels fill a tile of 16 columns");

DEVICE int plane_pixels(const Frames& frames) { return frames.high * frames.wide | 1; }

// Where the pixels of a block stand, for multiply_block: in the first plane of a chunk's halo, and from there on in units
// of 16 bytes, the pixels of a plane.
struct Pixels {
    const unsigned char* halo;
    unsigned long long layout;  // of a descriptor, and of a pixel's row:
    int line, plane;
    int group;
    int4 taps;

    DEVICE int place_of(int m, int k) const
    {
        int square = group * ROW_TILES + m, tap = k == 0 ? taps.x : k == 1 ? taps.y : k == 2 ? taps.z : taps.w;
        return tap + square / 2 * 8 * line + square % 2 * 8;
    }
    DEVICE unsigned long long descriptor_of(int m, int k) const { return layout + place_of(m, k); }
    DEVICE const unsigned char* address_of(int m, int row, int k, int half) const
    {
        return halo + (place_of(m, k) + row / 8 * line + row % 8 + half * plane) * 16;
    }
};

// The chunk that is being copied.
struct Coming {
    int number, channel, start;  // the block with which it starts
    int open;                    // the block from which on it may be copied
    int done, each;              // rounds: a pixel, 16 bytes of it, for each thread; and how many a block
    int row, column;             // the thread's next pixel of the halo
};

// Start the thread's copies of some rounds of a halo.
DEVICE void fetch_halo(unsigned char* halo, const Frames& frames, const Pixel& corner, Coming& coming, int rounds)
{
    const int each = 16 / int(sizeof(operand));
    int piece = threadIdx.x % PLANES, channel = coming.channel + piece * each;
    int top = corner.row + frames.top, left = corner.column + frames.left;
    const operand* image = frames.data + (corner.image * frames.stride + channel);
    unsigned char* to = halo + piece * plane_pixels(frames) * 16;
#pragma unroll 1
    for (; coming.done < rounds; coming.done++, coming.column += THREADS / PLANES) {
#pragma unroll 1
        for (; coming.column >= frames.wide; coming.column -= frames.wide) coming.row++;
        if (coming.row >= frames.high) continue;
        int row = top + coming.row, column = left + coming.column;
        unsigned char* pixel = to + (coming.row * frames.wide + coming.column) * 16;
        bool taken = inside(frames, row, column) && channel < frames.channels;
        const operand* from = image + (row * frames.width + column) * frames.channels;  // anywhere, where not taken
        if (sizeof(operand) == 2 || frames.whole)
            cp_async<16>(pixel, from, taken);
        else
#pragma unroll
            for (int j = 0; j < each; j++) cp_async<4>(pixel + j * 4, from + j, taken && channel + j < frames.channels);
    }
}

// Add the products over the taps of two frames, one after the other, for the pixels of rows; weights
// [block][part][columns][DEPTH].
DEVICE void multiply_add(Tile& tile, const Grid& grid, const Frames& a, const Frames& b, const operand* weights,
                         int columns, const Rows& rows, int first_quad)
{
    unsigned char* stages = aligned_stages();
    unsigned char* halos = stages + STAGES * STAGE_BYTES;
    int halo_bytes = max(plane_pixels(a), plane_pixels(b)) * (PLANES * 16);
    int blocks = a.blocks + b.blocks;
    weights += (long long)first_quad * 4 * DEPTH;

    Coming coming = {};
    coming.channel = a.blocks ? a.channel : b.channel;
    auto fetch = [&](int block) {
        if (block < blocks) fetch_weights(stages + block % STAGES * STAGE_BYTES, weights, columns, block);
        if (block >= coming.open && coming.start < blocks) {
            bool first = coming.start < a.blocks;
            Frames frames = chosen(first, a, b);
            int rounds = ceil_div(frames.high * frames.wide * PLANES, THREADS);
            if (!coming.done) {
                coming.each = ceil_div(rounds, coming.start - block + 1);
                coming.row = 0, coming.column = threadIdx.x / PLANES;
            }
            fetch_halo(halos + coming.number % 2 * halo_bytes, frames, rows.corner, coming,
                       min(coming.done + coming.each, rounds));
            if (coming.done == rounds) {
                int next = min(coming.start + frames.chunk, first ? a.blocks : blocks);
                // From here on all products of the chunk before have been waited for.
                coming.open = coming.start + STAGES - 1;
                coming.channel = next == a.blocks ? b.channel : coming.channel + DEPTH;
                coming.start = next, coming.number++, coming.done = 0;
            }
        }
        cp_async_commit();  // an empty group too, so that the count of groups stays that of blocks
    };
    auto taps_of = [&](int block) {
        if (block >= blocks) return int4{0, 0, 0, 0};
        return __ldg(block < a.blocks ? a.taps + block : b.taps + (block - a.blocks));
    };
#pragma unroll 1
    for (int block = 0; block < AHEAD; block++) fetch(block);
    int number = -1, end = 0;  // of the chunk that is being multiplied, and the block after it
    Pixels pixels = {nullptr, 0, 0, 0, warpgroup(), taps_of(0)};
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
        cp_async_wait<AHEAD - 1>();
        fence_async_proxy();
        __syncthreads();  // this block has arrived; the one before those under way is no longer read
        if (block == end) {
            bool first = block < a.blocks;
            pixels.line = first ? a.wide : b.wide, pixels.plane = first ? plane_pixels(a) : plane_pixels(b);
            pixels.halo = halos + ++number % 2 * halo_bytes;
            pixels.layout = descriptor(shared_address(pixels.halo), pixels.plane * 16, pixels.line * 16);
            end = min(block + (first ? a.chunk : b.chunk), first ? a.blocks : blocks);
        }
        add_block(tile, pixels, stages + block % STAGES * STAGE_BYTES, [&] {
            fetch(block + AHEAD);
            pixels.taps = taps_of(block + 1);
        });
    }
    wgmma_wait<0>();
    pin(tile.sum);
}

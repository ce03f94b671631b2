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

DEVICE int plane_bytes(const Frames& frames) { return (frames.high * frames.wide | 1) * 16; }

// Where the pixels of a block stand, for multiply_block.
struct Pixels {
    const unsigned char* halo;
    int line, plane;  // bytes
    int4 taps;

    DEVICE int offset_of(int tile, int k) const
    {
        return tile / 2 * 8 * line + tile % 2 * 128 + (k == 0 ? taps.x : k == 1 ? taps.y : k == 2 ? taps.z : taps.w);
    }
    DEVICE unsigned long long descriptor_of(int tile, int k) const
    {
        return descriptor(shared_address(halo) + offset_of(tile, k), plane, line);
    }
    DEVICE const unsigned char* address_of(int tile, int row, int k, int half) const
    {
        return halo + offset_of(tile, k) + row / 8 * line + row % 8 * 16 + half * plane;
    }
};

// Start the thread's copies of round `round` of a halo, to `halo`: 16 bytes of one pixel, from a channel on.
DEVICE void fetch_halo(unsigned char* halo, const Frames& frames, const Pixel& corner, int channel, int round)
{
    const int each = 16 / int(sizeof(operand));
    int piece = threadIdx.x % PLANES, n = round * (THREADS / PLANES) + threadIdx.x / PLANES;
    if (n >= frames.high * frames.wide) return;
    int row = int(unsigned(n) / unsigned(frames.wide)), column = n - row * frames.wide;
    row += corner.row + frames.top, column += corner.column + frames.left, channel += piece * each;
    unsigned char* to = halo + piece * plane_bytes(frames) + n * 16;
    bool taken = inside(frames, row, column) && channel < frames.channels;
    const operand* from = frames.data;
    if (taken) from += corner.image * frames.stride + ((row * frames.width + column) * frames.channels + channel);
    if (sizeof(operand) == 2 || frames.whole)
        cp_async<16>(to, from, taken);
    else
#pragma unroll
        for (int j = 0; j < each; j++) {
            bool there = taken && channel + j < frames.channels;
            cp_async<4>(to + j * 4, there ? from + j : frames.data, there);
        }
}

// Add the products over the taps of two frames, one after the other, for the pixels of rows; weights
// [block][part][columns][DEPTH].
DEVICE void multiply_add(Tile& tile, const Grid& grid, const Frames& a, const Frames& b, const operand* weights,
                         int columns, const Rows& rows, int first_quad)
{
    unsigned char* stages = aligned_stages();
    unsigned char* halos = stages + STAGES * STAGE_BYTES;
    int halo_bytes = max(plane_bytes(a), plane_bytes(b)) * PLANES;
    int blocks = a.blocks + b.blocks;
    weights += (long long)first_quad * 4 * DEPTH;

    // The chunk that is being copied: its number, the block it starts with, its first channel; from which block on that
    // may begin, how many rounds of it are done, and how many there are for each block.
    int coming = 0, start = 0, channel = a.blocks ? a.channel : b.channel, open = 0, done = 0, each = 0;
    auto fetch = [&](int block) {
        if (block < blocks) fetch_weights(stages + block % STAGES * STAGE_BYTES, weights, columns, block);
        if (block >= open && start < blocks) {
            bool first = start < a.blocks;
            Frames frames = chosen(first, a, b);
            int rounds = ceil_div(frames.high * frames.wide * PLANES, THREADS);
            if (!done) each = ceil_div(rounds, start - block + 1);
            int end = min(done + each, rounds);
#pragma unroll 1
            while (done < end) fetch_halo(halos + coming % 2 * halo_bytes, frames, rows.corner, channel, done++);
            if (done == rounds) {
                open = start + STAGES - 1;  // then all products of the chunk before have been waited for
                start = min(start + frames.chunk, first ? a.blocks : blocks);
                channel = start == a.blocks ? b.channel : channel + DEPTH;
                coming++, done = 0;
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
    Pixels pixels = {nullptr, 0, 0, taps_of(0)};
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
        cp_async_wait<AHEAD - 1>();
        fence_async_proxy();
        __syncthreads();  // this block has arrived; the one before those under way is no longer read
        if (block == end) {
            bool first = block < a.blocks;
            pixels.line = (first ? a.wide : b.wide) * 16, pixels.plane = first ? plane_bytes(a) : plane_bytes(b);
            pixels.halo = halos + ++number % 2 * halo_bytes;
            end = min(block + (first ? a.chunk : b.chunk), first ? a.blocks : blocks);
        }
        Operands operands;
#if KIND == 3
        Sums sums[ROW_TILES];
#else
        Sums(&sums)[ROW_TILES] = tile.sum;
#endif
        multiply_block(sums, operands, pixels, stages + block % STAGES * STAGE_BYTES);
        fetch(block + AHEAD);
        pixels.taps = taps_of(block + 1);
        finish_block(tile, sums, operands);
    }
    wgmma_wait<0>();
    pin(tile.sum);
}

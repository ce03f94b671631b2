// The pixels of a block of depth on their way into shared memory, by cp.async: for mma.cuh and wgmma.cuh.
#pragma once
#include "frames.cuh"
#include "tensor_cores.cuh"

// Start the copies of the thread's pixels, 16 bytes each: of `piece` of a block's steps. `to`: where that of the first
// pixel belongs, those of the next ones APART bytes on.
template <int APART, int N>
DEVICE void fetch_pixels(unsigned char* to, int piece, const Frames& frames, Place (&places)[N], int block)
{
    const int each = 16 / int(sizeof(operand));
    bool whole = sizeof(operand) == 2 || frames.whole;
    const int4* taps = frames.taps + block * DEPTH + piece * each;
    if (whole && frames.plain()) {
        int4 tap = __ldg(taps);
        int down = tap.w < 0 ? NOWHERE : tap.x, elements = distance(frames, tap);
#pragma unroll
        for (int i = 0; i < N; i++)
            cp_async<16>(to + i * APART, places[i].from + elements,
                         inside(frames, places[i].row + down, places[i].column + tap.y));
        return;
    }
#pragma unroll 1
    for (int i = 0; i < N; i++) {
        Place place = pushed_out(places, places[0]);
        if (!whole && frames.late) {  // cp.async of 4 bytes goes through the first-level cache, of 16 past it
            unsigned words[each];
#pragma unroll
            for (int j = 0; j < each; j++) {
                const operand* from = find(frames, place, __ldg(taps + j));
                words[j] = from ? load_late((const unsigned*)from) : 0;
            }
#pragma unroll
            for (int j = 0; j < each; j++) ((unsigned*)(to + i * APART))[j] = words[j];
            continue;
        }
#pragma unroll 1
        for (int j = 0; j < (whole ? 1 : each); j++) {
            const operand* from = find(frames, place, __ldg(taps + j));
            if (whole)
                cp_async<16>(to + i * APART, from ? from : frames.data, from);
            else
                cp_async<4>(to + i * APART + j * 4, from ? from : frames.data, from);
        }
    }
}

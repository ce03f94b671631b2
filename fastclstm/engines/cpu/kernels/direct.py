"""Direct convolution on register tiles.

A block of output pixels is computed from padded patches of its inputs. A tile of a few pixels × up to four vectors of
columns stays in registers while the kernel's rows, contiguous runs of KW·C scalars, pass by.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.gates import FINISHES, line_pixels, repeat_peepholes, skip_step, z_after
from fastclstm.engines.cpu.kernels.padding import copy_patch, copy_run
from fastclstm.engines.cpu.kernels.schedule import (
    first_piece,
    next_piece,
    piece_done,
    place,
    skipped_sources,
    source_at,
    wait_for_neighbours,
    worker_scratch,
)

BLOCK_PIXELS = 384
"""Output pixels of one block, at most: enough to use each weight panel often, few enough for the L2 cache."""

PANEL_BYTES = 448 << 10
"""Weights that pass by between two visits of a tile, at most."""

ROWS4, ROWS3, ROWS2, ROWS1 = (6, 8, 12, 12) if simd.REGISTERS == 32 else (3, 4, 6, 12)
"""Pixels of a tile of 4, 3, 2 and 1 vectors."""

MAX_ROWS = 12

WORK = np.dtype([(name, np.int64) for name in (
    "HO", "WO", "block_height", "block_width", "blocks_x",
    "z", "pixels", "offsets0", "offsets1",  # indices into the scratch memory
)])  # fmt: skip


@intrinsic(prefer_literal=True)
def tile(typingctx, rows, vectors, start, start_row, result, base, offsets, segments, first, last, weights):
    """result[r] = start[r] + Σ over segments [first, last) of inputs · weights, for rows × vectors in registers.

    Row r reads at base + offsets[r]; a segment is (offset of its inputs, index of its first weight row, length).
    """
    nr, nv = rows.literal_value, vectors.literal_value
    vector = simd.llvm_vector(base.dtype)

    def codegen(context, builder, sig, args):
        _, _, start, start_row, result, base, offsets, segments, first, last, weights = args
        columns = nv * vector.count
        inputs = [builder.gep(base, [builder.load(builder.gep(offsets, [simd.INT64(r)]))]) for r in range(nr)]
        sums = [simd.emit_load(builder, builder.gep(start, [builder.mul(start_row, simd.INT64(r))]), vector, v)
                for r in range(nr) for v in range(nv)]  # fmt: skip

        def segment(builder, s, sums):
            field = builder.gep(segments, [builder.mul(s, simd.INT64(3))])
            offset, row, length = (builder.load(builder.gep(field, [simd.INT64(n)])) for n in range(3))
            run = [builder.gep(pointer, [offset]) for pointer in inputs]
            panel = builder.gep(weights, [builder.mul(row, simd.INT64(columns))])

            def step(builder, k, sums):
                line = builder.gep(panel, [builder.mul(k, simd.INT64(columns))])
                new = list(sums)
                values = [simd.splat(builder, builder.load(builder.gep(run[r], [k]))) for r in range(nr)]
                for v in range(nv):
                    w = simd.emit_load(builder, line, vector, v)
                    for r in range(nr):
                        new[r * nv + v] = simd.emit_fma(builder, values[r], w, new[r * nv + v])
                return new

            return simd.emit_loop(builder, simd.INT64(0), length, 1, sums, step)

        for n, value in enumerate(simd.emit_loop(builder, first, last, 1, sums, segment)):
            simd.emit_store(builder, value, result, n)
        return context.get_dummy_value()

    return types.void(rows, vectors, start, types.intp, result, base, offsets, segments, types.intp, types.intp,
                      weights), codegen  # fmt: skip


@inline
def _rows(vectors):
    return ROWS4 if vectors == 4 else ROWS3 if vectors == 3 else ROWS2 if vectors == 2 else ROWS1


@inline
def _tile(vectors, start, start_row, result, base, offsets, segments, first, last, weights):
    if vectors == 4:
        tile(ROWS4, 4, start, start_row, result, base, offsets, segments, first, last, weights)
    elif vectors == 3:
        tile(ROWS3, 3, start, start_row, result, base, offsets, segments, first, last, weights)
    elif vectors == 2:
        tile(ROWS2, 2, start, start_row, result, base, offsets, segments, first, last, weights)
    else:
        tile(ROWS1, 1, start, start_row, result, base, offsets, segments, first, last, weights)


@inline
def _reads_in_place(src):
    """Whether an output pixel sees just the pixel in its place: nothing need be padded."""
    return src.KH == 1 and src.KW == 1 and src.stride_y == 1 and src.stride_x == 1 and src.top == 0 and src.left == 0


def _run(finish):
    """Return the kernel that ends with `finish`, one of `gates.FINISHES`."""

    @inline
    def run_block(
        flow, work, sources, groups, panels, passes, segments, weights, bias, cell, mask, scratch, b, t, block, part,
        backwards,
    ):  # fmt: skip
        """Compute one block of image b at step t, for a part of the groups, the last one first if backwards."""
        like = weights
        group0, group1 = len(groups) * part // flow.parts, len(groups) * (part + 1) // flow.parts
        y0, x0 = block // work.blocks_x * work.block_height, block % work.blocks_x * work.block_width
        height, width = min(work.block_height, work.HO - y0), min(work.block_width, work.WO - x0)
        count = height * width
        pixels = simd.at(segments, scratch + work.pixels)
        for y in range(height):
            for x in range(width):
                pixels[y * width + x] = (y0 + y) * work.WO + x0 + x
        if flow.masked and not mask[b, t]:
            for g in range(group0, group1):
                skip_step(like, flow, cell, groups[g], pixels, count, b, t)
            return
        skipped = skipped_sources(flow, sources, t)
        inputs0 = inputs1 = np.uint64(0)
        for s in range(skipped, len(sources)):
            src = sources[s]
            inputs, row0 = source_at(flow, sources, s, b, t), 0
            patch_width = src.W
            if _reads_in_place(src) and y0 + height <= src.H and x0 + width <= src.W:
                row0 = y0 * patch_width + x0
            else:
                patch_height = (height - 1) * src.stride_y + (src.KH - 1) * src.dilation_y + 1
                patch_width = (work.block_width - 1) * src.stride_x + (src.KW - 1) * src.dilation_x + 1
                patch = np.uint64(scratch + src.scratch)
                copy_patch(src, simd.at(like, inputs), y0 * src.stride_y - src.top, x0 * src.stride_x - src.left,
                           patch_height, patch_width, simd.at(like, patch))  # fmt: skip
                inputs = patch
            if s == 0:
                inputs0 = inputs
            else:
                inputs1 = inputs
            offsets = simd.at(segments, scratch + (work.offsets0 if s == 0 else work.offsets1))
            for y in range(height):
                for x in range(width):
                    offsets[y * width + x] = (row0 + y * src.stride_y * patch_width + x * src.stride_x) * src.C
            for r in range(count, count + MAX_ROWS):
                offsets[r] = offsets[count - 1]
        lines = simd.at(like, scratch + work.z)
        z = z_after(lines)
        step = simd.vector_lanes(z)
        segment = simd.pointer(segments)
        last_panel = len(panels) - 2
        first_pass = 0
        while first_pass < len(passes) and passes[first_pass, 0] < skipped:
            first_pass += 1
        for g in range(group0, group1):
            group = groups[group0 + group1 - 1 - g if backwards else g]
            vectors = group[1]
            columns = vectors * step
            rows = _rows(vectors)
            panel_weights = simd.shift(simd.pointer(weights), group[0])
            group_bias = simd.shift(simd.pointer(bias), group[5])
            at_once = line_pixels(group[4], step)
            for p in range(last_panel + 1):
                begun = 0  # the first pixel whose columns wait for `finish`
                for r in range(0, count, rows):
                    sums = simd.shift(z, (r if last_panel > 0 else r - begun) * columns)
                    for n in range(panels[p], panels[p + 1]):
                        if n < first_pass:
                            continue
                        s = passes[n, 0]
                        begin = group_bias if n == first_pass else sums
                        base = simd.at(like, inputs0 if s == 0 else inputs1)
                        offsets = simd.at(segments, scratch + (work.offsets0 if s == 0 else work.offsets1) + 8 * r)
                        _tile(vectors, begin, 0 if n == first_pass else columns, sums, base, offsets, segment,
                              passes[n, 1], passes[n, 2], panel_weights)  # fmt: skip
                    if p == last_panel:
                        if first_pass == len(passes):  # nothing is convolved
                            for i in range(rows):
                                copy_run(simd.shift(sums, i * columns), group_bias, columns)
                        if r + rows >= count or r + 2 * rows - begun > at_once:
                            waiting = simd.shift(z, begun * columns if last_panel > 0 else 0)
                            finish(like, flow, cell, group, lines, waiting, simd.shift(pixels, begun),
                                   min(r + rows, count) - begun, b, t)  # fmt: skip
                            begun = r + rows

    def run(
        job, worker, flows, works, sources, neighbours, panels, passes, segments, groups, weights, bias, cells, mask
    ):
        flow = flows[0]
        scratch = worker_scratch(flow, worker)
        repeat_peepholes(weights, cells[0], groups, simd.at(weights, scratch + works[0].z))
        unit, piece, helped = first_piece()
        backwards = False
        while True:
            unit, piece, helped = next_piece(flow, job, unit, piece, helped)
            if unit < 0:
                break
            t, block, part = place(flow, piece)
            wait_for_neighbours(flow, job, sources, neighbours, unit, block, t)
            run_block(flow, works[0], sources, groups, panels, passes, segments, weights, bias, cells[0], mask,
                       scratch, unit, t, block, part, backwards)  # fmt: skip
            backwards = not backwards  # what was read last may still be in the core's own cache
            piece_done(flow, job, sources, unit, block)

    return run


RUN = {name: kernel(_run(finish), f"direct.{name}") for name, finish in FINISHES.items()}
"""Compute a piece of a sequence, by what becomes of the columns."""

"""Gradients of convolution kernels: sums over images, steps and pixels of inputs times gradients, on register tiles.

Both algorithms take turns at two phases. The inputs and the gradient of a block of pixels (direct) or of tiles
(Winograd) are gathered into scratch memory, shared among the threads; then each element of the sums is brought up to
date by the one thread that owns it. Where Winograd's sums are small there are some of them, always as many, each of a
share of the tiles, which one thread takes alone. So results depend on the thread count in no bit.

Direct: dW[k, l] = Σ x[i·s + k·d, j·s + l·d]ᵀ dz[i, j]. Winograd: the transpose of the forward algorithm,
dW = Gᵀ [Σ_tiles (Bᵀ x B)ᵀ (A dz Aᵀ)] G, where Aᵀ, G and Bᵀ are those of F(m_y×m_x, k_y×k_x), and the sum of each point
of the transformed tile is a matrix product; a kernel's pieces are further rows of it.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd, winograd
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.gates import take
from fastclstm.engines.cpu.kernels.padding import copy_patch
from fastclstm.engines.cpu.kernels.team import claim, done, wait_for_all, workers_of
from fastclstm.engines.cpu.kernels.winograd import CHUNK0, CHUNK1, CHUNK2, CHUNK3

FRAMES = np.dtype([
    ("T", np.int64),  # steps of an image
    ("first", np.int64), ("last", np.int64),  # blocks or tiles of all frames to add; first: a multiple of `count`
    *((f"{name}{field}", kind) for name in ("dz", "source0", "source1")
      for field, kind in (("", np.uint64), ("_image", np.int64), ("_step", np.int64))),
    ("scratch", np.uint64),
])  # fmt: skip

WORK = np.dtype([(name, np.int64) for name in (
    "HO", "WO", "columns",
    "height", "parts",  # direct: rows of a block, blocks of a frame
    "tiles_x", "tiles",  # Winograd: tiles of a frame
    "pieces",  # Winograd: sources of an input
    "count",  # blocks or tiles gathered at once
    "rows", "pairs",  # of the sums: pairs of vectors
    "item", "point",  # direct: scalars of a gathered block; Winograd: of a point's tiles
    "pitch",  # Winograd: scalars between the inputs of two tiles
    "gradients",  # index of the gathered gradients: in a block, or in a point's tiles
    "zeros", "zeros_size", "addresses",  # index of the workers' zeros in the scratch memory, and of what is after them
    "shares", "own",  # Winograd: how many sums there are, and scalars between the workers' own scratch memories, 0: one
)])  # fmt: skip

RUNS = ("source", "offset", "rows", "chunk", "sums_row")
"""Rows that are neighbours in the gathered inputs: of which source, from where, how many, in tiles of how many, and
their place in the sums."""


@intrinsic(prefer_literal=True)
def accumulate(typingctx, rows, vectors, inputs, step, line, gradients, apart, lines, count, sums):
    """sums[r, v] += Σ inputs[i·line + j·step + r] · gradients[v][i·count + j], i < lines, j < count, v < vectors.

    sums has two vectors a row, of which the first may be all that counts.

    apart: scalars between the gradients of the two vectors.
    """
    nr, nv = rows.literal_value, vectors.literal_value
    places = [2 * r + v for r in range(nr) for v in range(nv)]
    vector = simd.llvm_vector(inputs.dtype)

    def codegen(context, builder, sig, args):
        inputs, step, line, gradients, apart, lines, count, sums = args[2:]
        start = [simd.constant(vector, 0.0)] * (nr * nv)  # what is added is summed apart: fewer roundings of large sums
        for n in places:
            simd.emit_prefetch(builder, builder.gep(sums, [simd.INT64(n * vector.count)]), 3)

        def outer(builder, i, carried):
            origin = builder.gep(inputs, [builder.mul(i, line)])

            def inner(builder, j, carried):
                values, weights, sums = carried[0], carried[1], list(carried[2:])
                w = [simd.emit_load(builder, builder.gep(weights, [builder.mul(apart, simd.INT64(v))]), vector)
                     for v in range(nv)]  # fmt: skip
                for r in range(nr):
                    value = simd.splat(builder, builder.load(builder.gep(values, [simd.INT64(r)])))
                    for v in range(nv):
                        sums[r * nv + v] = simd.emit_fma(builder, value, w[v], sums[r * nv + v])
                return [builder.gep(values, [step]), builder.gep(weights, [simd.INT64(vector.count)]), *sums]

            return simd.emit_loop(builder, simd.INT64(0), count, 1, [origin, *carried], inner)[1:]

        carried = simd.emit_loop(builder, simd.INT64(0), lines, 1, [gradients, *start], outer)
        for n, value in zip(places, carried[1:], strict=True):
            simd.emit_store(builder, builder.fadd(simd.emit_load(builder, sums, vector, n), value), sums, n)
        return context.get_dummy_value()

    number = types.intp
    return types.void(rows, vectors, inputs, number, number, inputs, number, number, number, sums), codegen


@inline
def _accumulate_vectors(vectors, chunk, inputs, step, line, gradients, apart, lines, count, sums):
    if chunk == CHUNK0:
        accumulate(CHUNK0, vectors, inputs, step, line, gradients, apart, lines, count, sums)
    elif chunk == CHUNK1:
        accumulate(CHUNK1, vectors, inputs, step, line, gradients, apart, lines, count, sums)
    elif chunk == CHUNK2:
        accumulate(CHUNK2, vectors, inputs, step, line, gradients, apart, lines, count, sums)
    else:
        accumulate(CHUNK3, vectors, inputs, step, line, gradients, apart, lines, count, sums)


@inline
def _accumulate(chunk, inputs, step, line, gradients, apart, lines, count, sums):
    if apart == 0:
        _accumulate_vectors(1, chunk, inputs, step, line, gradients, apart, lines, count, sums)
    else:
        _accumulate_vectors(2, chunk, inputs, step, line, gradients, apart, lines, count, sums)


@inline
def _frame_at(frames, base, image, step, n):
    return np.uint64(np.int64(base) + n // frames.T * image + n % frames.T * step)


@inline
def _source_frame(frames, s, n):
    if s == 0:
        return _frame_at(frames, frames.source0, frames.source0_image, frames.source0_step, n)
    return _frame_at(frames, frames.source1, frames.source1_image, frames.source1_step, n)


@inline
def _gradient_frame(frames, n):
    return _frame_at(frames, frames.dz, frames.dz_image, frames.dz_step, n)


# ---------------------------------------------------------------------------------------------------------- direct


@inline
def _gather_block(like, frames, work, sources, item, slot):
    """Copy the padded inputs of one block of rows, and its gradients: [vector][pixel]."""
    n, y0 = item // work.parts, item % work.parts * work.height
    height = min(work.height, work.HO - y0)
    base = simd.shift(simd.at(like, frames.scratch), slot * work.item)
    for s in range(len(sources)):
        src = sources[s]
        rows = (height - 1) * src.stride_y + (src.KH - 1) * src.dilation_y + 1
        columns = (work.WO - 1) * src.stride_x + (src.KW - 1) * src.dilation_x + 1
        frame = simd.at(like, _source_frame(frames, s, n))
        copy_patch(src, frame, y0 * src.stride_y - src.top, -src.left, rows, columns, simd.shift(base, src.scratch))
    pixels = height * work.WO
    step = simd.vector_lanes(base)
    origin = simd.shift(simd.at(like, _gradient_frame(frames, n)), y0 * work.WO * work.columns)
    target = simd.shift(base, work.gradients)
    for p in range(pixels):
        for j in range(0, work.columns, step):
            value = take(simd.shift(origin, p * work.columns + j), min(step, work.columns - j))
            simd.store(simd.shift(target, j * pixels + p * step), value)


@inline
def _add_blocks(frames, work, sources, runs, sums, first, count, q):
    """Add the blocks first .. first + count to the sums [row][two vectors] of the q-th pair."""
    target = simd.pointer(sums)
    step = simd.vector_lanes(target)
    for slot in range(count):
        y0 = (first + slot) % work.parts * work.height
        height = min(work.height, work.HO - y0)
        base = simd.shift(simd.at(sums, frames.scratch), slot * work.item)
        panel = height * work.WO * step
        gradients = simd.shift(base, work.gradients + 2 * q * panel)
        apart = panel if (2 * q + 1) * step < work.columns else 0
        for n in range(len(runs)):
            src, chunk = sources[runs[n, 0]], runs[n, 3]
            columns = (work.WO - 1) * src.stride_x + (src.KW - 1) * src.dilation_x + 1
            for r in range(0, runs[n, 2], chunk):
                inputs = simd.shift(base, runs[n, 1] + r)
                row = simd.shift(target, (q * work.rows + runs[n, 4] + r) * 2 * step)
                _accumulate(chunk, inputs, src.stride_x * src.C, src.stride_y * columns * src.C, gradients, apart,
                            height, work.WO, row)  # fmt: skip


@kernel
def add_direct(job, worker, frames, works, sources, runs, sums):
    """Bring the sums [pair][row][two vectors] up to date."""
    work, last = works[0], frames[0].last
    piece, begun = claim(job), 0
    for first in range(frames[0].first, last, work.count):
        blocks = min(work.count, last - first)
        while piece < begun + blocks:
            wait_for_all(job, begun)
            _gather_block(sums, frames[0], work, sources, first + piece - begun, piece - begun)
            done(job)
            piece = claim(job)
        begun += blocks
        while piece < begun + work.pairs:
            wait_for_all(job, begun)
            _add_blocks(frames[0], work, sources, runs, sums, first, blocks, piece - begun)
            done(job)
            piece = claim(job)
        begun += work.pairs


# -------------------------------------------------------------------------------------------------------- Winograd


@inline
def _gather_tile(m_y, m_x, k_y, k_x, base, frames, work, sources, index, slot, zeros, addresses):
    """Transform the inputs of one tile, [point][tile][channel], and its gradients, [point][vector][tile]."""
    n, tile = index // work.tiles, index % work.tiles
    gradient = sources[len(sources) - 1]
    ty = winograd.corner(m_y, gradient.dilation_y, tile // work.tiles_x)
    tx = winograd.corner(m_x, gradient.dilation_x, tile % work.tiles_x)
    step = simd.vector_lanes(base)
    target = simd.shift(base, slot * work.pitch)
    for s in range(len(sources) - 1):
        src = sources[s]
        frame = simd.at(base, _source_frame(frames, s // work.pieces, n))
        y0, x0 = ty - src.top, tx - src.left
        winograd.transform_tile(m_y, m_x, k_y, k_x, src, frame, y0, x0, target, step, work.point, zeros,
                                addresses)  # fmt: skip
        target = simd.shift(target, src.C)  # over the zeros that end the channels before
    target = simd.shift(base, work.gradients + slot * step)
    frame = simd.at(base, _gradient_frame(frames, n))
    winograd.transform_gradient_tile(m_y, m_x, k_y, k_x, gradient, frame, ty, tx, target, work.count * step,
                                     work.point, zeros, addresses)  # fmt: skip


@inline
def _add_tiles(base, work, runs, target, count, n):
    """Add the gathered tiles to the sums [row][two vectors] of the n-th point and pair."""
    step = simd.vector_lanes(target)
    panel = work.count * step
    origin = simd.shift(base, n // work.pairs * work.point)
    pair = n % work.pairs
    gradients = simd.shift(origin, work.gradients + 2 * pair * panel)
    apart = panel if (2 * pair + 1) * step < work.columns else 0
    for run in range(len(runs)):
        chunk = runs[run, 3]
        for r in range(0, runs[run, 2], chunk):
            inputs = simd.shift(origin, runs[run, 1] + r)
            row = simd.shift(target, (n * work.rows + runs[run, 4] + r) * 2 * step)
            _accumulate(chunk, inputs, work.pitch, 0, gradients, apart, 1, count, row)


@inline
def _next_piece(job, own, piece):
    """The piece after one that is done: claimed, but where a worker does all of them."""
    if own:
        return piece + 1
    done(job)
    return claim(job)


@kernel
def add_winograd(m_y, m_x, k_y, k_x, job, worker, frames, works, sources, runs, sums):
    """Bring the sums [share][point][pair][row][two vectors] up to date.

    Of several shares, each with some of the tiles, one worker does all; else the workers share each block of tiles.
    """
    work, first, last = works[0], frames[0].first, frames[0].last
    own = work.shares > 1
    base = simd.shift(simd.at(sums, frames[0].scratch), worker * work.own)
    zeros = simd.shift(base, work.zeros + worker * work.zeros_size)
    addresses = simd.at(runs, np.uint64(simd.address(simd.shift(zeros, work.addresses))))
    winograd.clear_channels(sources, zeros)
    panels = (m_y + k_y - 1) * (m_x + k_x - 1) * work.pairs
    size = 1 if own else max(1, panels // (4 * workers_of(job)))
    pieces = (panels + size - 1) // size
    share_size = panels * work.rows * 2 * simd.vector_lanes(base)
    share = claim(job) if own else 0
    piece = 0 if own else claim(job)
    while share < work.shares:
        target = simd.shift(simd.pointer(sums), share * share_size)
        begun = 0
        if own:
            piece = 0
        skipped = (share - first // work.count) % work.shares  # of all frames' blocks every `shares`-th is a share's
        for block in range(first + skipped * work.count, last, work.shares * work.count):
            tiles = min(work.count, last - block)
            while piece < begun + tiles:
                if not own:
                    wait_for_all(job, begun)
                slot = piece - begun
                _gather_tile(m_y, m_x, k_y, k_x, base, frames[0], work, sources, block + slot, slot, zeros,
                             addresses)  # fmt: skip
                piece = _next_piece(job, own, piece)
            begun += tiles
            while piece < begun + pieces:
                if not own:
                    wait_for_all(job, begun)
                for n in range((piece - begun) * size, min((piece - begun + 1) * size, panels)):
                    _add_tiles(base, work, runs, target, tiles, n)
                piece = _next_piece(job, own, piece)
            begun += pieces
        share = claim(job) if own else work.shares

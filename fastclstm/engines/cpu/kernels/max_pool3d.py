"""Max pooling in one pass over the input, on vectors of channels (of pixels where there are few)."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.team import claim, grain, next_item

GEOMETRY = np.dtype([(name, np.int64) for name in (
    "B", "T", "H", "W", "C", "TO", "HO", "WO", "PT", "PH", "PW", "ST", "SH", "SW", "front", "top", "left",
)])  # fmt: skip


@intrinsic
def _larger(typingctx, best, value):
    """The larger of each lane, the first of equals; a NaN wins, the first NaN stays."""

    def codegen(context, builder, sig, args):
        best, value = args
        # value wins if it is larger or NaN, unless best is NaN already
        wins = builder.and_(builder.fcmp_unordered(">", value, best), builder.fcmp_ordered("ord", best, best))
        return builder.select(wins, value, best)

    return best(best, best), codegen


@intrinsic
def _larger_tap(typingctx, best, value, best_tap, tap):
    """Like `_larger`, but the tap that goes with it: an integer in the bits of every lane."""

    def codegen(context, builder, sig, args):
        best, value, best_tap, tap = args
        wins = builder.and_(builder.fcmp_unordered(">", value, best), builder.fcmp_ordered("ord", best, best))
        return builder.select(wins, _splat_bits(builder, best.type, tap), best_tap)

    return best(best, best, best, types.int64), codegen


@intrinsic
def _tap_like(typingctx, like, tap):
    """An integer in the bits of every lane."""

    def codegen(context, builder, sig, args):
        return _splat_bits(builder, args[0].type, args[1])

    return like(like, types.int64), codegen


@intrinsic
def _store_indices(typingctx, base, taps, corner, count):
    """Write the first `count` lanes of taps as int64, each plus `corner`."""

    def codegen(context, builder, sig, args):
        base, taps, corner, count = args
        wide = builder.sext(builder.bitcast(taps, _integers(taps.type)), ir.VectorType(simd.INT64, taps.type.count))
        indices = builder.add(wide, simd.splat(builder, corner, taps.type.count))
        simd.emit_store_some(builder, indices, base, count)
        return context.get_dummy_value()

    return types.void(base, taps, types.int64, types.intp), codegen


@intrinsic
def _load_taps(typingctx, like, base, corner, count):
    """Undo `_store_indices`."""

    def codegen(context, builder, sig, args):
        like, base, corner, count = args
        vector = ir.VectorType(simd.INT64, like.type.count)
        indices = simd.emit_load_some(builder, base, vector, count)
        taps = builder.sub(indices, simd.splat(builder, corner, vector.count))
        return builder.bitcast(builder.trunc(taps, _integers(like.type)), like.type)

    return like(like, base, types.int64, types.intp), codegen


@intrinsic
def _where_tap(typingctx, taps, tap, value):
    """Lanes of a vector whose tap this is, zeros in the others."""

    def codegen(context, builder, sig, args):
        taps, tap, value = args
        vector, integers = taps.type, _integers(taps.type)
        wanted = builder.bitcast(_splat_bits(builder, vector, tap), integers)
        same = builder.icmp_signed("==", builder.bitcast(taps, integers), wanted)
        return builder.select(same, value, simd.constant(vector, 0.0))

    return taps(taps, types.int64, taps), codegen


def _integers(vector: ir.VectorType) -> ir.VectorType:
    """Integers as wide as a vector's floats."""
    return ir.VectorType(simd.INT32 if vector.element == ir.FloatType() else simd.INT64, vector.count)


def _splat_bits(builder: ir.IRBuilder, vector: ir.VectorType, number: ir.Value) -> ir.Value:
    """Vector of floats with the bits of an int64 in every lane."""
    integers = _integers(vector)
    number = builder.trunc(number, integers.element) if integers.element == simd.INT32 else number
    return builder.bitcast(simd.splat(builder, number), vector)


@inline
def _span(start, size, limit):
    """The part of a window [start, start + size) inside [0, limit)."""
    return max(start, 0), min(start + size, limit)


@kernel
def pool(job, worker, geometry, x, y, rows):
    """Pool the output rows: over time and height into one row of W·C, then over width."""
    g = geometry[0]
    count = g.B * g.TO * g.HO
    base, target = simd.pointer(x), simd.pointer(y)
    row = simd.shift(simd.pointer(rows), worker * rows.shape[1])
    step = simd.vector_lanes(base)
    length = g.W * g.C
    wide, pairs = length - length % (4 * step), g.C - g.C % (2 * step)
    size = grain(job, count)
    n = next_item(job, -1, size)
    while n < count:
        b, to, ho = n // (g.TO * g.HO), n // g.HO % g.TO, n % g.HO
        t0, t1 = _span(to * g.ST - g.front, g.PT, g.T)
        h0, h1 = _span(ho * g.SH - g.top, g.PH, g.H)
        first = ((b * g.T + t0) * g.H + h0) * length
        for k in range(0, wide, 4 * step):  # four vectors at a time keep the units busy
            line = simd.shift(base, first + k)
            best_0, best_1 = simd.load(line), simd.load(simd.shift(line, step))
            best_2, best_3 = simd.load(simd.shift(line, 2 * step)), simd.load(simd.shift(line, 3 * step))
            for t in range(t0, t1):
                for h in range(h0 + (t == t0), h1):
                    line = simd.shift(base, ((b * g.T + t) * g.H + h) * length + k)
                    best_0 = _larger(best_0, simd.load(line))
                    best_1 = _larger(best_1, simd.load(simd.shift(line, step)))
                    best_2 = _larger(best_2, simd.load(simd.shift(line, 2 * step)))
                    best_3 = _larger(best_3, simd.load(simd.shift(line, 3 * step)))
            target_row = simd.shift(row, k)
            simd.store(target_row, best_0)
            simd.store(simd.shift(target_row, step), best_1)
            simd.store(simd.shift(target_row, 2 * step), best_2)
            simd.store(simd.shift(target_row, 3 * step), best_3)
        for k in range(wide, length, step):
            lanes = min(step, length - k)
            best = _line(base, first + k, lanes)
            for t in range(t0, t1):
                for h in range(h0 + (t == t0), h1):
                    best = _larger(best, _line(base, ((b * g.T + t) * g.H + h) * length + k, lanes))
            simd.store(simd.shift(row, k), best)
        for wo in range(g.WO):
            w0, w1 = _span(wo * g.SW - g.left, g.PW, g.W)
            out = simd.shift(target, (n * g.WO + wo) * g.C)
            for k in range(0, pairs, 2 * step):
                pixel = simd.shift(row, w0 * g.C + k)
                best_0, best_1 = simd.load(pixel), simd.load(simd.shift(pixel, step))
                for _ in range(w0 + 1, w1):
                    pixel = simd.shift(pixel, g.C)
                    best_0 = _larger(best_0, simd.load(pixel))
                    best_1 = _larger(best_1, simd.load(simd.shift(pixel, step)))
                simd.store(simd.shift(out, k), best_0)
                simd.store(simd.shift(out, k + step), best_1)
            for k in range(pairs, g.C, step):
                best = simd.load(simd.shift(row, w0 * g.C + k))
                for w in range(w0 + 1, w1):
                    best = _larger(best, simd.load(simd.shift(row, w * g.C + k)))
                _set_line(out, k, best, min(step, g.C - k))
        n = next_item(job, n, size)


@inline
def _line(base, index, lanes):
    """Vector at an index; only `lanes` of it where fewer are left."""
    if lanes == simd.vector_lanes(base):
        return simd.load(simd.shift(base, index))
    return simd.load_some(simd.shift(base, index), lanes)


@kernel
def pool_with_indices(job, worker, geometry, x, y, indices):
    """Pool the output rows window by window, and note where the winners stand.

    A tap is how far in the flat volume an element is from its window's first one.
    """
    g = geometry[0]
    count = g.B * g.TO * g.HO
    base, target, places = simd.pointer(x), simd.pointer(y), simd.pointer(indices)
    step = simd.vector_lanes(base)
    pairs = g.C - g.C % (2 * step)
    size = grain(job, count)
    n = next_item(job, -1, size)
    while n < count:
        b, to, ho = n // (g.TO * g.HO), n // g.HO % g.TO, n % g.HO
        t_first, h_first = to * g.ST - g.front, ho * g.SH - g.top
        t0, t1 = _span(t_first, g.PT, g.T)
        h0, h1 = _span(h_first, g.PH, g.H)
        for wo in range(g.WO):
            w_first = wo * g.SW - g.left
            w0, w1 = _span(w_first, g.PW, g.W)
            first, corner = (t0 * g.H + h0) * g.W + w0, (t_first * g.H + h_first) * g.W + w_first
            for k in range(0, pairs, 2 * step):
                window = simd.shift(base, b * g.T * g.H * g.W * g.C + k)
                best_0 = simd.load(simd.shift(window, first * g.C))
                best_1 = simd.load(simd.shift(window, first * g.C + step))
                tap_0 = tap_1 = _tap_like(best_0, first - corner)
                for t in range(t0, t1):
                    for h in range(h0, h1):
                        place = (t * g.H + h) * g.W
                        for w in range(w0, w1):
                            pixel = simd.shift(window, (place + w) * g.C)
                            value_0, value_1 = simd.load(pixel), simd.load(simd.shift(pixel, step))
                            tap_0 = _larger_tap(best_0, value_0, tap_0, place + w - corner)
                            tap_1 = _larger_tap(best_1, value_1, tap_1, place + w - corner)
                            best_0, best_1 = _larger(best_0, value_0), _larger(best_1, value_1)
                out = (n * g.WO + wo) * g.C + k
                simd.store(simd.shift(target, out), best_0)
                simd.store(simd.shift(target, out + step), best_1)
                _store_indices(simd.shift(places, out), tap_0, corner, step)
                _store_indices(simd.shift(places, out + step), tap_1, corner, step)
            for k in range(pairs, g.C, step):
                lanes = min(step, g.C - k)
                best = _line(base, (b * g.T * g.H * g.W + first) * g.C + k, lanes)
                best_tap = _tap_like(best, first - corner)
                for t in range(t0, t1):
                    for h in range(h0, h1):
                        for w in range(w0, w1):
                            place = (t * g.H + h) * g.W + w
                            value = _line(base, (b * g.T * g.H * g.W + place) * g.C + k, lanes)
                            best_tap = _larger_tap(best, value, best_tap, place - corner)
                            best = _larger(best, value)
                out = (n * g.WO + wo) * g.C + k
                _set_line(target, out, best, lanes)
                _store_indices(simd.shift(places, out), best_tap, corner, lanes)
        n = next_item(job, n, size)


@inline
def _set_line(target, index, value, lanes):
    """Write a vector at an index; only `lanes` of it where fewer are left."""
    if lanes == simd.vector_lanes(target):
        simd.store(simd.shift(target, index), value)
    else:
        simd.store_some(simd.shift(target, index), value, lanes)


@kernel
def share(job, worker, geometry, indices, dy, dx):
    """Hand the output rows to windows that do not overlap: every element of these is written."""
    g = geometry[0]
    count = g.B * g.TO * g.HO
    base, target, places = simd.pointer(dy), simd.pointer(dx), simd.pointer(indices)
    step = simd.vector_lanes(base)
    size = grain(job, count)
    n = next_item(job, -1, size)
    while n < count:
        b, to, ho = n // (g.TO * g.HO), n // g.HO % g.TO, n % g.HO
        t0, t1 = _span(to * g.ST - g.front, g.PT, g.T)
        h0, h1 = _span(ho * g.SH - g.top, g.PH, g.H)
        for wo in range(g.WO):
            w0, w1 = _span(wo * g.SW - g.left, g.PW, g.W)
            corner = (t0 * g.H + h0) * g.W + w0
            for k in range(0, g.C, step):
                lanes = min(step, g.C - k)
                at = (n * g.WO + wo) * g.C + k
                gradient = _line(base, at, lanes)
                taps = _load_taps(gradient, simd.shift(places, at), corner, lanes)
                for t in range(t0, t1):
                    for h in range(h0, h1):
                        for w in range(w0, w1):
                            place = (t * g.H + h) * g.W + w
                            won = _where_tap(taps, place - corner, gradient)
                            _set_line(target, (b * g.T * g.H * g.W + place) * g.C + k, won, lanes)
        n = next_item(job, n, size)


@kernel
def scatter(job, worker, indices, dy, dx):
    """Scatter (image, 16 channels) pieces, so that no two workers touch one element."""
    B, pixels, C = indices.shape
    gradients = simd.pointer(dy)
    pieces = -(-C // 16)
    n = claim(job)
    while n < B * pieces:
        b, first = n // pieces, n % pieces * 16
        for p in range(pixels):
            for c in range(first, min(first + 16, C)):
                dx[b, indices[b, p, c], c] += gradients[(b * pixels + p) * C + c]
        n = claim(job)

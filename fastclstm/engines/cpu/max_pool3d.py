"""max_pool3d on the cpu engine: one pass over the input, vectors of channels (of pixels where there are few)."""

from __future__ import annotations

import numba
import numpy as np
from numba.extending import intrinsic

from fastclstm.engines.cpu import simd, threads
from fastclstm.engines.cpu.compilation import inline, kernel
from fastclstm.spec import PoolSpec

SERIAL_BYTES = 1 << 18
"""Below this much memory traffic a second thread costs more than it saves."""

GEOMETRY = np.dtype([(name, np.int64) for name in (
    "B", "T", "H", "W", "C", "TO", "HO", "WO", "PT", "PH", "PW", "ST", "SH", "SW", "front", "top", "left", "workers",
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
    """Like `_larger`, but the tap (a number) that goes with it."""

    def codegen(context, builder, sig, args):
        best, value, best_tap, tap = args
        wins = builder.and_(builder.fcmp_unordered(">", value, best), builder.fcmp_ordered("ord", best, best))
        return builder.select(wins, simd.splat(builder, tap), best_tap)

    return best(best, best, best, best.scalar), codegen


def max_pool3d(spec: PoolSpec, x: np.ndarray, return_indices: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Pool x (B, T, H, W, C): y (B, TO, HO, WO, C) and, if asked for, int64 indices into each (T, H, W) volume."""
    y = np.empty(spec.output_shape, x.dtype)
    indices = np.empty(spec.output_shape, np.int64) if return_indices else None
    if y.size:
        workers = max(1, min(threads.usable_threads(), x.nbytes // SERIAL_BYTES, spec.B * spec.TO * spec.HO))
        (front, _), (top, _), (left, _) = spec.padding
        geometry = np.zeros(1, GEOMETRY)
        geometry[0] = (*x.shape, spec.TO, spec.HO, spec.WO, *spec.pool_size, *spec.strides, front, top, left, workers)
        rows = np.empty((workers, spec.W * spec.C + 64), x.dtype)
        if indices is None:
            threads.run(VALUES, workers, geometry, _address(x), y.reshape(-1), rows)
        else:
            threads.run(
                INDICES, workers, geometry, _address(x), y.reshape(-1), indices.reshape(-1), rows, _tap_offsets(spec)
            )
    return y, indices


def max_pool3d_backward(spec: PoolSpec, indices: np.ndarray, dy: np.ndarray | None) -> np.ndarray:
    """Add each gradient dy (B, TO, HO, WO, C) to the element of dx (B, T, H, W, C) that won its window."""
    dtype = np.dtype(np.float32) if dy is None else dy.dtype
    dx = np.zeros((spec.B, spec.T, spec.H, spec.W, spec.C), dtype)
    if dy is not None and dy.size:
        pixels = spec.TO * spec.HO * spec.WO
        volume = (spec.B, spec.T * spec.H * spec.W, spec.C)
        workers = max(1, min(threads.usable_threads(), dy.nbytes // SERIAL_BYTES))
        threads.run(
            SCATTER, workers, indices.reshape(spec.B, pixels, spec.C), _address(dy), dx.reshape(volume), workers
        )
    return dx


def _tap_offsets(spec: PoolSpec) -> np.ndarray:
    """Distance of each tap of a window from its first, in the flat (T, H, W) volume."""
    t, h, w = np.ogrid[: spec.pool_size[0], : spec.pool_size[1], : spec.pool_size[2]]
    return ((t * spec.H + h) * spec.W + w).reshape(-1)


def _address(array: np.ndarray) -> np.uint64:
    """Where an array is: for a kernel that must not be compiled once more for read-only arrays."""
    return np.uint64(array.ctypes.data)


@inline
def _span(start, size, limit):
    """The part of a window [start, start + size) inside [0, limit)."""
    return max(start, 0), min(start + size, limit)


@inline
def _pool_rows(g, x, y, rows, worker):
    """Pool a worker's share of the output rows: over time and height into one row of W·C, then over width."""
    count = g.B * g.TO * g.HO
    base, target = simd.at(y, x), simd.pointer(y)
    row = simd.shift(simd.pointer(rows), worker * rows.shape[1])
    step = simd.vector_lanes(base)
    length = g.W * g.C
    wide, pairs = length - length % (4 * step), g.C - g.C % (2 * step)
    for n in range(count * worker // g.workers, count * (worker + 1) // g.workers):
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
                if g.C - k >= step:
                    simd.store(simd.shift(out, k), best)
                else:
                    simd.store_some(simd.shift(out, k), best, g.C - k)


@inline
def _line(base, index, lanes):
    """Vector at an index; only `lanes` of it where fewer are left."""
    if lanes == simd.vector_lanes(base):
        return simd.load(simd.shift(base, index))
    return simd.load_some(simd.shift(base, index), lanes)


@inline
def _pool_windows(g, x, y, indices, rows, offsets, worker):
    """Pool a worker's share of the output rows window by window, and note which tap won."""
    count = g.B * g.TO * g.HO
    base, target = simd.at(y, x), simd.pointer(y)
    taps = simd.shift(simd.pointer(rows), worker * rows.shape[1])
    step = simd.vector_lanes(base)
    for n in range(count * worker // g.workers, count * (worker + 1) // g.workers):
        b, to, ho = n // (g.TO * g.HO), n // g.HO % g.TO, n % g.HO
        t_first, h_first = to * g.ST - g.front, ho * g.SH - g.top
        t0, t1 = _span(t_first, g.PT, g.T)
        h0, h1 = _span(h_first, g.PH, g.H)
        for wo in range(g.WO):
            w_first = wo * g.SW - g.left
            w0, w1 = _span(w_first, g.PW, g.W)
            corner = (t_first * g.H + h_first) * g.W + w_first
            first_tap = ((t0 - t_first) * g.PH + h0 - h_first) * g.PW + w0 - w_first
            for k in range(0, g.C, step):
                lanes = min(step, g.C - k)
                best = _line(base, (((b * g.T + t0) * g.H + h0) * g.W + w0) * g.C + k, lanes)
                best_tap = simd.broadcast(best, first_tap)
                for t in range(t0, t1):
                    for h in range(h0, h1):
                        for w in range(w0, w1):
                            value = _line(base, (((b * g.T + t) * g.H + h) * g.W + w) * g.C + k, lanes)
                            tap = ((t - t_first) * g.PH + h - h_first) * g.PW + w - w_first
                            best_tap = _larger_tap(best, value, best_tap, tap)
                            best = _larger(best, value)
                out = (n * g.WO + wo) * g.C + k
                if lanes == step:
                    simd.store(simd.shift(target, out), best)
                else:
                    simd.store_some(simd.shift(target, out), best, lanes)
                simd.store(taps, best_tap)
                for lane in range(lanes):
                    indices[out + lane] = corner + offsets[int(taps[lane])]


@inline
def _scatter(indices, dy, dx, workers, worker):
    """Scatter a worker's share of (image, 16 channels) pieces, so that no two workers touch one element."""
    B, pixels, C = indices.shape
    gradients = simd.at(dx, dy)
    pieces = -(-C // 16)
    for n in range(B * pieces * worker // workers, B * pieces * (worker + 1) // workers):
        b, first = n // pieces, n % pieces * 16
        for p in range(pixels):
            for c in range(first, min(first + 16, C)):
                dx[b, indices[b, p, c], c] += gradients[(b * pixels + p) * C + c]


@kernel()
def _values_serial(geometry, x, y, rows):
    _pool_rows(geometry[0], x, y, rows, 0)


@kernel(parallel=True)
def _values_parallel(geometry, x, y, rows):
    for worker in numba.prange(geometry[0].workers):
        _pool_rows(geometry[0], x, y, rows, worker)


@kernel()
def _indices_serial(geometry, x, y, indices, rows, offsets):
    _pool_windows(geometry[0], x, y, indices, rows, offsets, 0)


@kernel(parallel=True)
def _indices_parallel(geometry, x, y, indices, rows, offsets):
    for worker in numba.prange(geometry[0].workers):
        _pool_windows(geometry[0], x, y, indices, rows, offsets, worker)


@kernel()
def _scatter_serial(indices, dy, dx, workers):
    _scatter(indices, dy, dx, workers, 0)


@kernel(parallel=True)
def _scatter_parallel(indices, dy, dx, workers):
    for worker in numba.prange(workers):
        _scatter(indices, dy, dx, workers, worker)


VALUES, INDICES, SCATTER = (
    (_values_serial, _values_parallel),
    (_indices_serial, _indices_parallel),
    (_scatter_serial, _scatter_parallel),
)
"""Each kernel for one thread and for many."""

"""What cells do with a step's pre-activations, and back: see `engines.cells` for the equations.

Workers take strips of an image's pixels and go through them chunk by chunk: the gates' pre-activations become lines of
pixels × filters, as h lies in memory, so that vectors are full for any number of filters. Which line is of what a
`ROUTE` tells, so that all cells share gathering, activations and scattering, and differ in a few products.
"""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.gates import put, take
from fastclstm.engines.cpu.kernels.lines import activate, line_at, slopes
from fastclstm.engines.cpu.kernels.team import grain, next_item

ARRAYS = "z", "other", "state", "new", "h", "y", "d", "dy", "more", "dc"

UPDATE = np.dtype([
    ("kind", np.int64),
    ("B", np.int64), ("pixels", np.int64), ("F", np.int64),
    ("chunk", np.int64), ("strip", np.int64), ("strips", np.int64),  # pixels of a chunk and of a strip
    *((f"{name}{field}", kind) for name in ARRAYS
      for field, kind in (("", np.uint64), ("_image", np.int64))),  # addresses, 0: none; bytes to the next image
    ("z_pixel", np.int64), ("other_pixel", np.int64),  # scalars to the next pixel
    ("last", np.int64),  # activation of what comes of the gates: see `_combined`
    ("sums", np.uint64), ("columns", np.int64),  # (B, strips, columns)
])  # fmt: skip
"""Where the arrays of one step are: state is h or, of an LSTM, c; new what becomes of it."""

RNN, LSTM, GRU, RESET, UPDATED = range(5)
"""Kinds: a whole step, but of a GRU with reset_after=False, which takes `RESET`, then `UPDATED`."""

CODES, Z, OTHER, SUM = range(4)
"""Rows of a route, of a line each: its activation, its gate in z, that in `other`, and where the sum of its gradients
is, -1: none."""

ROUTE_LINES = 4
LINES = 15
"""Lines of a worker's scratch memory: what was gathered and `_combined`, values of activations, derivatives."""

_VALUES, _SLOPES, _LAST = 5, 10, 4


@inline
def _place(like, base, image, b, index):
    return simd.shift(simd.at(like, np.uint64(np.int64(base) + b * image)), index)


@inline
def _gather(like, step, route, b, first, count, lines, pitch, keeps):
    """Bring the pre-activations of `count` pixels to lines: sums of z and `other`, put where z was if it keeps them."""
    F, lanes = step.F, simd.vector_lanes(lines)
    for n in range(ROUTE_LINES):
        gate, of_other = route[Z, n], route[OTHER, n]
        if gate < 0 and of_other < 0:
            continue
        for p in range(count):
            z = _place(like, step.z, step.z_image, b, (first + p) * step.z_pixel + gate * F)
            other = _place(like, step.other, step.other_image, b, (first + p) * step.other_pixel + of_other * F)
            line = line_at(lines, pitch, n, p * F)
            for k in range(0, F, lanes):
                some = min(lanes, F - k)
                if gate < 0:
                    value = take(simd.shift(other, k), some)
                else:
                    value = take(simd.shift(z, k), some)
                    if of_other >= 0:
                        value = value + take(simd.shift(other, k), some)
                        if keeps:
                            put(simd.shift(z, k), value, some)
                simd.store(simd.shift(line, k), value)  # the next pixel writes over what is too much


@inline
def _combined(like, step, lines, pitch, values, b, start, count):
    """Of a GRU n's pre-activations, of an LSTM the new c, to the last line; `values`: the line of the gates' first."""
    lanes = simd.vector_lanes(lines)
    state = _place(like, step.state, step.state_image, b, start)
    for k in range(0, count, lanes):
        first, second = simd.load(line_at(lines, pitch, values, k)), simd.load(line_at(lines, pitch, values + 1, k))
        if step.kind == GRU:
            a, q = simd.load(line_at(lines, pitch, 2, k)), simd.load(line_at(lines, pitch, 3, k))
            result = simd.fma(second, q, a)
        else:
            old = take(simd.shift(state, k), min(lanes, count - k))
            result = simd.fma(second, old, first * simd.load(line_at(lines, pitch, values + 2, k)))
        simd.store(line_at(lines, pitch, _LAST, k), result)


@inline
def _chunk_forward(like, step, route, b, first, pixels, lines, pitch):
    F, lanes, kind = step.F, simd.vector_lanes(lines), step.kind
    count, start = pixels * F, first * F
    _gather(like, step, route, b, first, pixels, lines, pitch, True)
    for n in range(ROUTE_LINES):
        if route[CODES, n] >= 0:
            activate(route[CODES, n], line_at(lines, pitch, n, 0), line_at(lines, pitch, n, 0), count)
    if step.last >= 0:
        _combined(like, step, lines, pitch, 0, b, start, count)
        if kind == LSTM:
            new = _place(like, step.new, step.new_image, b, start)
            for k in range(0, count, lanes):
                put(simd.shift(new, k), simd.load(line_at(lines, pitch, _LAST, k)), min(lanes, count - k))
        activate(step.last, line_at(lines, pitch, _LAST, 0), line_at(lines, pitch, _LAST, 0), count)
    state, h = _place(like, step.state, step.state_image, b, start), _place(like, step.h, step.h_image, b, start)
    y = _place(like, step.y, step.y_image, b, start)
    memory = _LAST if kind == GRU else 1
    for k in range(0, count, lanes):
        some = min(lanes, count - k)
        value = simd.load(line_at(lines, pitch, 0, k))
        if kind == LSTM:
            value = simd.load(line_at(lines, pitch, 3, k)) * simd.load(line_at(lines, pitch, _LAST, k))
        elif kind == RESET:
            value = simd.load(line_at(lines, pitch, 1, k)) * take(simd.shift(state, k), some)
        elif kind != RNN:
            new = simd.load(line_at(lines, pitch, memory, k))
            value = simd.fma(value, take(simd.shift(state, k), some) - new, new)
        put(simd.shift(h, k), value, some)
        if step.y != 0:
            put(simd.shift(y, k), value, some)


@kernel
def forward(job, worker, like, steps, route, rows):
    """Pre-activations of what z and `other` (B, pixels, gates · F) sum up to, in z, and what the cell makes of them."""
    step = steps[0]
    lines, pitch = simd.shift(simd.pointer(rows), worker * rows.shape[1]), rows.shape[1] // LINES
    items = step.B * step.strips
    size = grain(job, items)
    item = next_item(job, -1, size)
    while item < items:
        b, first = item // step.strips, item % step.strips * step.strip
        last = min(first + step.strip, step.pixels)
        for pixel in range(first, last, step.chunk):
            _chunk_forward(like, step, route, b, pixel, min(step.chunk, last - pixel), lines, pitch)
        item = next_item(job, item, size)


@inline
def _chunk_backward(like, step, route, b, first, pixels, lines, pitch):
    F, lanes, kind = step.F, simd.vector_lanes(lines), step.kind
    count, start = pixels * F, first * F
    _gather(like, step, route, b, first, pixels, lines, pitch, False)
    for n in range(ROUTE_LINES):
        code = route[CODES, n]
        if code >= 0:
            line, value = line_at(lines, pitch, n, 0), line_at(lines, pitch, _VALUES + n, 0)
            activate(code, line, value, count)
            slopes(code, line, value, line_at(lines, pitch, _SLOPES + n, 0), count)
    if step.last >= 0:
        _combined(like, step, lines, pitch, _VALUES, b, start, count)
        line, value = line_at(lines, pitch, _LAST, 0), line_at(lines, pitch, _VALUES + _LAST, 0)
        activate(step.last, line, value, count)
        slopes(step.last, line, value, line_at(lines, pitch, _SLOPES + _LAST, 0), count)
    state, d = _place(like, step.state, step.state_image, b, start), _place(like, step.d, step.d_image, b, start)
    dy, more = _place(like, step.dy, step.dy_image, b, start), _place(like, step.more, step.more_image, b, start)
    dc = _place(like, step.dc, step.dc_image, b, start)
    memory = _LAST if kind == GRU else 1
    for k in range(0, count, lanes):
        some = min(lanes, count - k)
        dh = take(simd.shift(d, k), some)
        if step.dy != 0:
            dh = dh + take(simd.shift(dy, k), some)
        if step.more != 0:
            dh = dh + take(simd.shift(more, k), some)
        v0, s0 = simd.load(line_at(lines, pitch, _VALUES, k)), simd.load(line_at(lines, pitch, _SLOPES, k))
        v1, s1 = simd.load(line_at(lines, pitch, _VALUES + 1, k)), simd.load(line_at(lines, pitch, _SLOPES + 1, k))
        if kind == RNN:
            simd.store(line_at(lines, pitch, 0, k), dh * s0)
        elif kind == LSTM:
            v2, s2 = simd.load(line_at(lines, pitch, _VALUES + 2, k)), simd.load(line_at(lines, pitch, _SLOPES + 2, k))
            v3, s3 = simd.load(line_at(lines, pitch, _VALUES + 3, k)), simd.load(line_at(lines, pitch, _SLOPES + 3, k))
            v4, s4 = simd.load(line_at(lines, pitch, _VALUES + 4, k)), simd.load(line_at(lines, pitch, _SLOPES + 4, k))
            whole = simd.fma(dh * v3, s4, take(simd.shift(dc, k), some))
            simd.store(line_at(lines, pitch, 0, k), whole * v2 * s0)
            simd.store(line_at(lines, pitch, 1, k), whole * take(simd.shift(state, k), some) * s1)
            simd.store(line_at(lines, pitch, 2, k), whole * v0 * s2)
            simd.store(line_at(lines, pitch, 3, k), dh * v4 * s3)
            put(simd.shift(dc, k), whole * v1, some)
        elif kind == RESET:  # dh is that of what it met, dc of the state
            simd.store(line_at(lines, pitch, 1, k), dh * take(simd.shift(state, k), some) * s1)
            put(simd.shift(dc, k), simd.fma(dh, v1, take(simd.shift(dc, k), some)), some)
        else:
            new = simd.load(line_at(lines, pitch, _VALUES + memory, k))
            da = dh * (1.0 - v0) * simd.load(line_at(lines, pitch, _SLOPES + memory, k))
            simd.store(line_at(lines, pitch, 0, k), dh * (take(simd.shift(state, k), some) - new) * s0)
            if kind == GRU:
                q = simd.load(line_at(lines, pitch, 3, k))
                simd.store(line_at(lines, pitch, 1, k), da * q * s1)
                simd.store(line_at(lines, pitch, 2, k), da)
                simd.store(line_at(lines, pitch, 3, k), da * v1)
            else:
                simd.store(line_at(lines, pitch, 1, k), da)
            put(simd.shift(d, k), dh * v0, some)


@inline
def _scatter(like, step, targets, b, first, count, lines, pitch, sums):
    """Bring lines of gradients to z and to `other`, and add them up."""
    F, lanes = step.F, simd.vector_lanes(lines)
    for n in range(ROUTE_LINES):
        gate, of_other, column = targets[Z, n], targets[OTHER, n], targets[SUM, n]
        for p in range(count if gate >= 0 or of_other >= 0 else 0):
            z = _place(like, step.z, step.z_image, b, (first + p) * step.z_pixel + gate * F)
            other = _place(like, step.other, step.other_image, b, (first + p) * step.other_pixel + of_other * F)
            line = line_at(lines, pitch, n, p * F)
            for k in range(0, F, lanes):
                some = min(lanes, F - k)
                da = simd.load(simd.shift(line, k))
                if gate >= 0:
                    put(simd.shift(z, k), da, some)
                if of_other >= 0:
                    put(simd.shift(other, k), da, some)
                if column >= 0:
                    total = simd.shift(sums, column * F + k)
                    put(total, take(total, some) + da, some)


@kernel
def backward(job, worker, like, steps, route, targets, rows):
    """Gradients of the pre-activations in their place, and of the states; what is added up goes to `sums`."""
    step = steps[0]
    lines, pitch = simd.shift(simd.pointer(rows), worker * rows.shape[1]), rows.shape[1] // LINES
    items = step.B * step.strips
    size = grain(job, items)
    item = next_item(job, -1, size)
    while item < items:
        b, first = item // step.strips, item % step.strips * step.strip
        last = min(first + step.strip, step.pixels)
        sums = simd.shift(simd.at(like, step.sums), item * step.columns)
        for pixel in range(first, last, step.chunk):
            count = min(step.chunk, last - pixel)
            _chunk_backward(like, step, route, b, pixel, count, lines, pitch)
            _scatter(like, step, targets, b, pixel, count, lines, pitch, sums)
        item = next_item(job, item, size)

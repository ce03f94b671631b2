"""A step of a cell whose pre-activations are in memory: normalization, peepholes, any activations; and the way back.

Workers take strips of an image's pixels and go through them chunk by chunk: a chunk's pre-activations become four
lines, one a gate, of pixels × filters, as h and c lie in memory, so that vectors are full for any number of filters.
"""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd, vmath
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.gates import put, take
from fastclstm.engines.cpu.kernels.padding import clear_run, copy_run
from fastclstm.engines.cpu.kernels.team import grain, next_item

_ARRAYS = "z", "zh", "c", "c_new", "h_before", "h", "y", "y_before", "dh", "dy", "dc", "da"

STEP = np.dtype([
    ("B", np.int64), ("pixels", np.int64), ("F", np.int64),
    ("chunk", np.int64), ("strip", np.int64), ("strips", np.int64),  # pixels of a chunk and of a strip
    ("recurrent_activation", np.int64), ("activation", np.int64), ("output_activation", np.int64),
    ("clip", np.float64),
    *((f"{name}{field}", kind) for name in _ARRAYS
      for field, kind in (("", np.uint64), ("_image", np.int64))),  # addresses, 0: none; bytes to the next image
    ("runs", np.int64), ("run", np.int64),  # of channels of a pixel that lie together: 1 of 4F, or 4 of F
    ("pixel", np.int64), ("z_gate", np.int64), ("zh_gate", np.int64), ("da_gate", np.int64),  # scalars to the next one
    ("peephole", np.uint64), ("peephole_size", np.int64), ("peephole_pixel", np.int64),  # lines of i, f, o
    ("masks", np.uint64), ("masked", np.uint64),  # (4, B, pixels, F): of dropout; h times these
    ("statistics_image", np.int64), ("weights_pixel", np.int64),  # scalars to the next image's, the next pixel's
    ("sums", np.uint64),  # (B, strips, 7F): bias, peepholes of channels
    ("dpeephole", np.uint64),  # (B, 3, pixels, F) of each pixel's own peepholes, 0: none
])  # fmt: skip
"""Where the arrays of one step are."""

PART = np.dtype([(name, np.uint64) for name in
                 ("mean", "scale", "gamma", "beta", "offset", "along", "sums", "dgamma", "dbeta")])  # fmt: skip
"""Of something normalized, addresses of: mean and one over the deviation (B or 1, 4F), gamma and beta (4F or pixels,
4F), the two means (B or 1, 4F) that its gradient loses, what they are made of (B, strips, 2, 4F), and the gradients (B,
pixels, 4F) of each pixel's own gamma and beta, 0: none."""

LINES = 15
"""Lines of a worker's scratch memory."""


@inline
def _place(like, base, image, b, index):
    return simd.shift(simd.at(like, np.uint64(np.int64(base) + b * image)), index)


@inline
def _add(target, value, count):
    put(target, take(target, count) + value, count)


@inline
def _standardized(like, part, at, z, count):
    """(z - mean) / deviation, where `at` finds the statistics."""
    mean, scale = simd.shift(simd.at(like, part.mean), at), simd.shift(simd.at(like, part.scale), at)
    return (z - take(mean, count)) * take(scale, count)


@inline
def _normalized(like, step, part, b, pixel, channel, z, count):
    at = pixel * step.weights_pixel + channel
    gamma, beta = simd.shift(simd.at(like, part.gamma), at), simd.shift(simd.at(like, part.beta), at)
    value = _standardized(like, part, b * step.statistics_image + channel, z, count)
    return simd.fma(value, take(gamma, count), take(beta, count))


@inline
def _gather(like, step, parts, b, first, count, lines, pitch):
    """Bring the pre-activations of `count` pixels to four lines: sums, normalized; a sum also stays where z was."""
    F, lanes = step.F, simd.vector_lanes(lines)
    for gate in range(4):
        for p in range(count):
            pixel = first + p
            z = _place(like, step.z, step.z_image, b, pixel * step.pixel + gate * step.z_gate)
            zh = _place(like, step.zh, step.zh_image, b, pixel * step.pixel + gate * step.zh_gate)
            line = simd.shift(lines, gate * pitch + p * F)
            for k in range(0, F, lanes):
                some, channel = min(lanes, F - k), gate * F + k
                value = take(simd.shift(z, k), some)
                if len(parts) == 2:
                    other = take(simd.shift(zh, k), some)
                    value = _normalized(like, step, parts[0], b, pixel, channel, value, some) + _normalized(
                        like, step, parts[1], b, pixel, channel, other, some
                    )
                elif step.zh != 0:
                    value = value + take(simd.shift(zh, k), some)
                    put(simd.shift(z, k), value, some)
                if len(parts) == 1:
                    value = _normalized(like, step, parts[0], b, pixel, channel, value, some)
                simd.store(simd.shift(line, k), value)  # the next pixel writes over what is too much


@inline
def _activate(code, source, target, count):
    """Apply an activation to a line; the usual ones in loops of their own, several vectors of which are under way."""
    lanes = simd.vector_lanes(source)
    if code == 0:
        for k in range(0, count, lanes):
            simd.store(simd.shift(target, k), vmath.tanh(simd.load(simd.shift(source, k))))
    elif code == 1:
        for k in range(0, count, lanes):
            simd.store(simd.shift(target, k), vmath.sigmoid(simd.load(simd.shift(source, k))))
    else:
        for k in range(0, count, lanes):
            simd.store(simd.shift(target, k), vmath.activate(code, simd.load(simd.shift(source, k))))


@inline
def _slopes(code, source, values, target, count):
    """Derivatives of an activation along a line, whose values there are known."""
    lanes = simd.vector_lanes(source)
    if code <= 1:
        for k in range(0, count, lanes):
            y = simd.load(simd.shift(values, k))
            simd.store(simd.shift(target, k), y * (1.0 - y) if code == 1 else 1.0 - y * y)
    else:
        for k in range(0, count, lanes):
            x, y = simd.load(simd.shift(source, k)), simd.load(simd.shift(values, k))
            simd.store(simd.shift(target, k), vmath.slope(code, x, y))


@inline
def _clipped(step, c):
    return simd.maximum(-step.clip, simd.minimum(step.clip, c))


@inline
def _line(lines, pitch, number, k):
    return simd.shift(lines, number * pitch + k)


@inline
def _peep(like, step, gate, first, k, count):
    """Peephole weights of a gate (0, 1, 2: i, f, o) at the k-th place of a line."""
    at = gate * step.peephole_size + first * step.peephole_pixel + k
    return take(simd.shift(simd.at(like, step.peephole), at), count)


@inline
def _chunk_forward(like, step, parts, b, first, pixels, lines, pitch):
    F, lanes = step.F, simd.vector_lanes(lines)
    count, start = pixels * F, first * F
    _gather(like, step, parts, b, first, pixels, lines, pitch)
    c = _place(like, step.c, step.c_image, b, start)
    if step.peephole != 0:
        for k in range(0, count, lanes):
            some = min(lanes, count - k)
            old = take(simd.shift(c, k), some)
            for gate in range(2):
                line = _line(lines, pitch, gate, k)
                simd.store(line, simd.fma(_peep(like, step, gate, first, k, some), old, simd.load(line)))
    for gate in range(2):
        line = _line(lines, pitch, gate, 0)
        _activate(step.recurrent_activation, line, line, count)
    _activate(step.activation, _line(lines, pitch, 2, 0), _line(lines, pitch, 2, 0), count)
    c_new = _place(like, step.c_new, step.c_new_image, b, start)
    for k in range(0, count, lanes):
        some = min(lanes, count - k)
        i, f, g = (simd.load(_line(lines, pitch, 0, k)), simd.load(_line(lines, pitch, 1, k)),
                   simd.load(_line(lines, pitch, 2, k)))  # fmt: skip
        new = _clipped(step, simd.fma(f, take(simd.shift(c, k), some), i * g))
        put(simd.shift(c_new, k), new, some)
        simd.store(_line(lines, pitch, 4, k), new)
        if step.peephole != 0:
            line = _line(lines, pitch, 3, k)
            simd.store(line, simd.fma(_peep(like, step, 2, first, k, some), new, simd.load(line)))
    _activate(step.recurrent_activation, _line(lines, pitch, 3, 0), _line(lines, pitch, 3, 0), count)
    _activate(step.output_activation, _line(lines, pitch, 4, 0), _line(lines, pitch, 4, 0), count)
    h, y = _place(like, step.h, step.h_image, b, start), _place(like, step.y, step.y_image, b, start)
    plane = step.pixels * F
    for k in range(0, count, lanes):
        some = min(lanes, count - k)
        new = simd.load(_line(lines, pitch, 3, k)) * simd.load(_line(lines, pitch, 4, k))
        put(simd.shift(h, k), new, some)
        if step.y != 0:
            put(simd.shift(y, k), new, some)
        if step.masked != 0:
            for gate in range(4):
                at = (gate * step.B + b) * plane + start + k
                factors = take(simd.shift(simd.at(like, step.masks), at), some)
                put(simd.shift(simd.at(like, step.masked), at), new * factors, some)


@inline
def _skip(like, step, b, first, count):
    """Carry a strip's states on, and repeat its output, zeros before the first."""
    at, length = first * step.F, count * step.F
    if step.h != step.h_before:
        h = _place(like, step.h, step.h_image, b, at)
        copy_run(h, _place(like, step.h_before, step.h_before_image, b, at), length)
    if step.c_new != step.c:
        copy_run(_place(like, step.c_new, step.c_new_image, b, at), _place(like, step.c, step.c_image, b, at), length)
    if step.y != 0:
        y = _place(like, step.y, step.y_image, b, at)
        if step.y_before != 0:
            copy_run(y, _place(like, step.y_before, step.y_before_image, b, at), length)
        else:
            clear_run(y, length)


@kernel
def forward(job, worker, like, steps, parts, valid, rows):
    """New c, h and y of z (+ zh), (B, pixels, 4F) or gate by gate, where `valid` (B,); elsewhere what was goes on."""
    step = steps[0]
    lines, pitch = simd.shift(simd.pointer(rows), worker * rows.shape[1]), rows.shape[1] // LINES
    items = step.B * step.strips
    size = grain(job, items)
    item = next_item(job, -1, size)
    while item < items:
        b, first = item // step.strips, item % step.strips * step.strip
        last = min(first + step.strip, step.pixels)
        if valid[b]:
            for pixel in range(first, last, step.chunk):
                _chunk_forward(like, step, parts, b, pixel, min(step.chunk, last - pixel), lines, pitch)
        else:
            _skip(like, step, b, first, last - first)
        item = next_item(job, item, size)


@kernel
def measure(job, worker, like, steps, valid, sums):
    """Of each channel of each strip the mean, and the squares of what is apart from it: sums (B, strips, 2, 4F).

    Where there is a zh it is added to z before.
    """
    step = steps[0]
    F, lanes = step.F, simd.vector_lanes(simd.pointer(like))
    items = step.B * step.strips
    size = grain(job, items)
    item = next_item(job, -1, size)
    while item < items:
        b, first = item // step.strips, item % step.strips * step.strip
        last = min(first + step.strip, step.pixels)
        share = 1.0 / (last - first)
        target = simd.shift(simd.pointer(sums), item * 8 * F)
        if not valid[b]:
            clear_run(target, 8 * F)
            last = first
        for gate in range(step.runs):
            z = _place(like, step.z, step.z_image, b, gate * step.z_gate)
            zh = _place(like, step.zh, step.zh_image, b, gate * step.zh_gate)
            for k in range(0, step.run, lanes):
                some = min(lanes, step.run - k)
                total = simd.zeros(target)
                for pixel in range(first, last):
                    at = pixel * step.pixel + k
                    value = take(simd.shift(z, at), some)
                    if step.zh != 0:
                        value = value + take(simd.shift(zh, at), some)
                        put(simd.shift(z, at), value, some)
                    total = total + value
                mean = total * share
                squares = simd.zeros(target)
                for pixel in range(first, last):
                    apart = take(simd.shift(z, pixel * step.pixel + k), some) - mean
                    squares = simd.fma(apart, apart, squares)
                if first < last:
                    put(simd.shift(target, gate * F + k), mean, some)
                    put(simd.shift(target, 4 * F + gate * F + k), squares, some)
        item = next_item(job, item, size)


@inline
def _chunk_backward(like, step, parts, b, first, pixels, lines, pitch, sums):
    """From the gradients of the new h and c those of what the gates take in and of the old c; and the new h."""
    F, lanes = step.F, simd.vector_lanes(lines)
    count, start = pixels * F, first * F
    sigma = step.recurrent_activation
    _gather(like, step, parts, b, first, pixels, lines, pitch)
    c = _place(like, step.c, step.c_image, b, start)
    if step.peephole != 0:
        for k in range(0, count, lanes):
            some = min(lanes, count - k)
            old = take(simd.shift(c, k), some)
            for gate in range(2):
                line = _line(lines, pitch, gate, k)
                simd.store(line, simd.fma(_peep(like, step, gate, first, k, some), old, simd.load(line)))
    for gate in range(2):
        line, value = _line(lines, pitch, gate, 0), _line(lines, pitch, 4 + gate, 0)
        _activate(sigma, line, value, count)
        _slopes(sigma, line, value, _line(lines, pitch, 8 + gate, 0), count)
    _activate(step.activation, _line(lines, pitch, 2, 0), _line(lines, pitch, 6, 0), count)
    _slopes(step.activation, _line(lines, pitch, 2, 0), _line(lines, pitch, 6, 0), _line(lines, pitch, 10, 0), count)
    for k in range(0, count, lanes):
        some = min(lanes, count - k)
        i, f, g = (simd.load(_line(lines, pitch, 4, k)), simd.load(_line(lines, pitch, 5, k)),
                   simd.load(_line(lines, pitch, 6, k)))  # fmt: skip
        new = _clipped(step, simd.fma(f, take(simd.shift(c, k), some), i * g))
        simd.store(_line(lines, pitch, 14, k), new)
        if step.peephole != 0:
            line = _line(lines, pitch, 3, k)
            simd.store(line, simd.fma(_peep(like, step, 2, first, k, some), new, simd.load(line)))
    _activate(sigma, _line(lines, pitch, 3, 0), _line(lines, pitch, 7, 0), count)
    _slopes(sigma, _line(lines, pitch, 3, 0), _line(lines, pitch, 7, 0), _line(lines, pitch, 11, 0), count)
    new, value = _line(lines, pitch, 14, 0), _line(lines, pitch, 12, 0)
    _activate(step.output_activation, new, value, count)
    _slopes(step.output_activation, new, value, _line(lines, pitch, 13, 0), count)
    for k in range(0, count, lanes):
        some, at = min(lanes, count - k), start + k
        f, o = simd.load(_line(lines, pitch, 5, k)), simd.load(_line(lines, pitch, 7, k))
        y, new, old = simd.load(_line(lines, pitch, 12, k)), simd.load(_line(lines, pitch, 14, k)), take(
            simd.shift(c, k), some)  # fmt: skip
        put(_place(like, step.h, step.h_image, b, at), o * y, some)
        dh = take(_place(like, step.dh, step.dh_image, b, at), some)
        if step.dy != 0:
            dh = dh + take(_place(like, step.dy, step.dy_image, b, at), some)
        dc_place = _place(like, step.dc, step.dc_image, b, at)
        dc = simd.fma(dh * o, simd.load(_line(lines, pitch, 13, k)), take(dc_place, some))
        da_o = dh * y * simd.load(_line(lines, pitch, 11, k))
        if step.peephole != 0:
            dc = simd.fma(da_o, _peep(like, step, 2, first, k, some), dc)
        if step.clip < np.inf:
            dc = simd.select_less(simd.absolute(new), simd.broadcast(dc, step.clip), dc, simd.zeros(lines))
        da_i = dc * simd.load(_line(lines, pitch, 6, k)) * simd.load(_line(lines, pitch, 8, k))
        da_f = dc * old * simd.load(_line(lines, pitch, 9, k))
        da_g = dc * simd.load(_line(lines, pitch, 4, k)) * simd.load(_line(lines, pitch, 10, k))
        dc = dc * f
        if step.peephole != 0:
            dc = simd.fma(da_i, _peep(like, step, 0, first, k, some), dc)
            dc = simd.fma(da_f, _peep(like, step, 1, first, k, some), dc)
            plane = step.pixels * F
            for n, product in enumerate((da_i * old, da_f * old, da_o * new)):
                simd.store(_line(lines, pitch, 8 + n, k), product)
                if step.dpeephole != 0:
                    _add(simd.shift(simd.at(like, step.dpeephole), (3 * b + n) * plane + at), product, some)
        put(dc_place, dc, some)
        simd.store(_line(lines, pitch, 0, k), da_i)
        simd.store(_line(lines, pitch, 1, k), da_f)
        simd.store(_line(lines, pitch, 2, k), da_g)
        simd.store(_line(lines, pitch, 3, k), da_o)
    if step.peephole != 0 and step.dpeephole == 0:
        for n in range(3):
            for p in range(pixels):
                for k in range(0, F, lanes):
                    _add(simd.shift(sums, (4 + n) * F + k), simd.load(_line(lines, pitch, 8 + n, p * F + k)),
                         min(lanes, F - k))  # fmt: skip


@inline
def _scatter(like, step, parts, b, first, count, lines, pitch, sums, strip):
    """Bring four lines of gradients to where z is, or beside it, and gather what normalization's gradients need."""
    F, lanes = step.F, simd.vector_lanes(lines)
    for gate in range(4):
        for p in range(count):
            pixel = first + p
            target = _place(like, step.da, step.da_image, b, pixel * step.pixel + gate * step.da_gate)
            line = simd.shift(lines, gate * pitch + p * F)
            for k in range(0, F, lanes):
                some, channel = min(lanes, F - k), gate * F + k
                da = simd.load(simd.shift(line, k))
                put(simd.shift(target, k), da, some)
                if len(parts) != 1:
                    _add(simd.shift(sums, channel), da, some)
                for n in range(len(parts)):
                    _add_of_part(like, step, parts[n], n, b, pixel, gate, k, some, da, strip)


@inline
def _add_of_part(like, step, part, n, b, pixel, gate, k, some, da, strip):
    F, channel = step.F, gate * step.F + k
    base, image, plane = (step.zh, step.zh_image, step.zh_gate) if n == 1 else (step.z, step.z_image, step.z_gate)
    z = take(_place(like, base, image, b, pixel * step.pixel + gate * plane + k), some)
    value = _standardized(like, part, b * step.statistics_image + channel, z, some)
    if part.dgamma != 0:
        at = (b * step.pixels + pixel) * 4 * F + channel
        _add(simd.shift(simd.at(like, part.dgamma), at), da * value, some)
        _add(simd.shift(simd.at(like, part.dbeta), at), da, some)
        da = da * take(simd.shift(simd.at(like, part.gamma), pixel * step.weights_pixel + channel), some)
    target = simd.shift(simd.at(like, part.sums), (b * step.strips + strip) * 8 * F + channel)
    _add(target, da, some)
    _add(simd.shift(target, 4 * F), da * value, some)


@kernel
def backward(job, worker, like, steps, parts, valid, rows):
    """Gradients da of what the gates take in, of dh (+ dy) and dc, which becomes that of c; and the h of the step.

    With normalization z stays, and da goes beside it.
    """
    step = steps[0]
    F = step.F
    lines, pitch = simd.shift(simd.pointer(rows), worker * rows.shape[1]), rows.shape[1] // LINES
    items = step.B * step.strips
    size = grain(job, items)
    item = next_item(job, -1, size)
    while item < items:
        b, strip = item // step.strips, item % step.strips
        first = strip * step.strip
        last = min(first + step.strip, step.pixels)
        sums = simd.shift(simd.at(like, step.sums), item * 7 * F)
        for n in range(len(parts)):
            clear_run(simd.shift(simd.at(like, parts[n].sums), item * 8 * F), 8 * F)
        if valid[b]:
            for pixel in range(first, last, step.chunk):
                count = min(step.chunk, last - pixel)
                _chunk_backward(like, step, parts, b, pixel, count, lines, pitch, sums)
                _scatter(like, step, parts, b, pixel, count, lines, pitch, sums, strip)
        else:
            for gate in range(4):
                for pixel in range(first, last):
                    at = pixel * step.pixel + gate * step.da_gate
                    clear_run(_place(like, step.da, step.da_image, b, at), F)
        item = next_item(job, item, size)


@kernel
def backward_of_normalization(job, worker, like, steps, parts, valid, number):
    """Gradients of what was normalized, written over it: z, or of the second of two parts zh, (number,) says which."""
    step, n = steps[0], number[0]
    part, F, lanes = parts[n], step.F, simd.vector_lanes(simd.pointer(like))
    base, image, plane = (step.zh, step.zh_image, step.zh_gate) if n == 1 else (step.z, step.z_image, step.z_gate)
    items = step.B * step.strips
    size = grain(job, items)
    item = next_item(job, -1, size)
    while item < items:
        b, first = item // step.strips, item % step.strips * step.strip
        sums = simd.shift(simd.at(like, step.sums), item * 7 * F)
        for pixel in range(first, min(first + step.strip, step.pixels)):
            for gate in range(step.runs):
                z = _place(like, base, image, b, pixel * step.pixel + gate * plane)
                if not valid[b]:
                    clear_run(z, step.run)
                    continue
                da = _place(like, step.da, step.da_image, b, pixel * step.pixel + gate * step.da_gate)
                for k in range(0, step.run, lanes):
                    some, channel = min(lanes, step.run - k), gate * F + k
                    at = b * step.statistics_image + channel
                    gamma = simd.shift(simd.at(like, part.gamma), pixel * step.weights_pixel + channel)
                    value = _standardized(like, part, at, take(simd.shift(z, k), some), some)
                    d = simd.fma(take(simd.shift(da, k), some), take(gamma, some),
                                 -take(simd.shift(simd.at(like, part.offset), at), some))  # fmt: skip
                    d = simd.fma(-value, take(simd.shift(simd.at(like, part.along), at), some), d)
                    d = d * take(simd.shift(simd.at(like, part.scale), at), some)
                    put(simd.shift(z, k), d, some)
                    if len(parts) == 1:
                        _add(simd.shift(sums, channel), d, some)
        item = next_item(job, item, size)


@kernel
def combine(job, worker, like, steps, parts, valid):
    """Sum, where `valid` (B,), four gradients times their masks, (4, B, pixels, F) both, to dh."""
    step = steps[0]
    lanes, plane, length = simd.vector_lanes(simd.pointer(like)), step.pixels * step.F, step.strip * step.F
    items = step.B * step.strips
    size = grain(job, items)
    item = next_item(job, -1, size)
    while item < items:
        b, first = item // step.strips, item % step.strips * length
        if valid[b]:
            for k in range(first, min(first + length, plane), lanes):
                some = min(lanes, min(first + length, plane) - k)
                total = simd.zeros(simd.pointer(like))
                for gate in range(4):
                    at = (gate * step.B + b) * plane + k
                    factors = take(simd.shift(simd.at(like, step.masks), at), some)
                    total = simd.fma(factors, take(simd.shift(simd.at(like, step.masked), at), some), total)
                put(_place(like, step.dh, step.dh_image, b, k), total, some)
        item = next_item(job, item, size)

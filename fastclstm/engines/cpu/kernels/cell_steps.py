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
from fastclstm.engines.cpu.kernels.gates_backward import add_to, place_at
from fastclstm.engines.cpu.kernels.lines import activate, line_at, slopes
from fastclstm.engines.cpu.kernels.padding import clear_run, copy_run
from fastclstm.engines.cpu.kernels.team import finished, grain, next_item

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
    ("planes", np.int64),  # gradients of h that `combine` adds: at `masked`, times `masks` where there are any
    ("statistics_image", np.int64), ("weights_pixel", np.int64),  # scalars to the next image's, the next pixel's
    ("summed", np.int64),  # 1: zh has been added to z
    ("given", np.int64),  # 1: the statistics are not those of z
    ("groups", np.int64), ("epsilon", np.float64),
    ("statistics", np.uint64),  # float64 (parts, 2, B or 1, 4F): where means and variances are to be left
    ("sums", np.uint64),  # (B, strips, 7F): bias, peepholes of channels
    ("dpeephole", np.uint64),  # (B, 3, pixels, F) of each pixel's own peepholes, 0: none
])  # fmt: skip
"""Where the arrays of one step are."""

PART = np.dtype([(name, np.uint64) for name in
                 ("mean", "scale", "gamma", "beta", "offset", "along", "sums", "dgamma", "dbeta",
                  "gradients")])  # fmt: skip
"""Of something normalized, addresses of: mean and one over the deviation (B or 1, 4F), gamma and beta (4F or pixels,
4F), the two means (B or 1, 4F) that its gradient loses, what they are made of (B, strips, 2, 4F), the gradients (B,
pixels, 4F) of each pixel's own gamma and beta, 0: none, and in float64 those (2, 4F) of beta and gamma, 0: none."""

MASKING = np.dtype([
    ("B", np.int64), ("T", np.int64), ("size", np.int64),  # scalars of a frame
    *((f"{name}{field}", kind) for name in ("frames", "target")
      for field, kind in (("", np.uint64), ("_image", np.int64), ("_step", np.int64))),  # addresses, bytes
    ("mask", np.uint64), ("mask_image", np.int64),  # 0: none
    ("adds", np.int64),  # 1: to what is there
])  # fmt: skip

MASKED = 4096
"""Scalars of a frame that are masked together."""

LINES = 15
"""Lines of a worker's scratch memory."""


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
def _value(like, step, parts, b, pixel, gate, k, count):
    """Pre-activations of a gate from its k-th channel on: summed, normalized; a sum also stays where z was."""
    at, channel = pixel * step.pixel, gate * step.F + k
    z = place_at(like, step.z, step.z_image, b, at + gate * step.z_gate + k)
    zh = place_at(like, step.zh, step.zh_image, b, at + gate * step.zh_gate + k)
    value = take(z, count)
    if len(parts) == 2:
        other = take(zh, count)
        return _normalized(like, step, parts[0], b, pixel, channel, value, count) + _normalized(
            like, step, parts[1], b, pixel, channel, other, count
        )
    if step.zh != 0 and step.summed == 0:
        value = value + take(zh, count)
        put(z, value, count)
    if len(parts) == 1:
        value = _normalized(like, step, parts[0], b, pixel, channel, value, count)
    return value


@inline
def _gather(like, step, parts, b, first, count, lines, pitch):
    """Bring the pre-activations of `count` pixels to four lines."""
    F, lanes = step.F, simd.vector_lanes(lines)
    for p in range(count):
        for gate in range(4):
            line = simd.shift(lines, gate * pitch + p * F)
            for k in range(0, F, lanes):
                value = _value(like, step, parts, b, first + p, gate, k, min(lanes, F - k))
                simd.store(simd.shift(line, k), value)  # the next pixel writes over what is too much


@inline
def _clipped(step, c):
    return simd.maximum(-step.clip, simd.minimum(step.clip, c))


@inline
def _peep(like, step, gate, first, k, count):
    """Peephole weights of a gate (0, 1, 2: i, f, o) at the k-th place of a line."""
    at = gate * step.peephole_size + first * step.peephole_pixel + k
    return take(simd.shift(simd.at(like, step.peephole), at), count)


@inline
def _gates_of_lines(like, step, b, first, count, lines, pitch):
    """Bring four lines of pre-activations to the fourth, the new c, and the fifth, the new h; any activations."""
    lanes, start = simd.vector_lanes(lines), first * step.F
    c = place_at(like, step.c, step.c_image, b, start)
    if step.peephole != 0:
        for k in range(0, count, lanes):
            some = min(lanes, count - k)
            old = take(simd.shift(c, k), some)
            for gate in range(2):
                line = line_at(lines, pitch, gate, k)
                simd.store(line, simd.fma(_peep(like, step, gate, first, k, some), old, simd.load(line)))
    for gate in range(2):
        line = line_at(lines, pitch, gate, 0)
        activate(step.recurrent_activation, line, line, count)
    activate(step.activation, line_at(lines, pitch, 2, 0), line_at(lines, pitch, 2, 0), count)
    for k in range(0, count, lanes):
        some = min(lanes, count - k)
        i, f, g = (simd.load(line_at(lines, pitch, 0, k)), simd.load(line_at(lines, pitch, 1, k)),
                   simd.load(line_at(lines, pitch, 2, k)))  # fmt: skip
        new = _clipped(step, simd.fma(f, take(simd.shift(c, k), some), i * g))
        simd.store(line_at(lines, pitch, 4, k), new)
        if step.peephole != 0:
            line = line_at(lines, pitch, 3, k)
            simd.store(line, simd.fma(_peep(like, step, 2, first, k, some), new, simd.load(line)))
    activate(step.recurrent_activation, line_at(lines, pitch, 3, 0), line_at(lines, pitch, 3, 0), count)
    activate(step.output_activation, line_at(lines, pitch, 4, 0), line_at(lines, pitch, 5, 0), count)
    for k in range(0, count, lanes):
        line = line_at(lines, pitch, 5, k)
        simd.store(line, simd.load(line_at(lines, pitch, 3, k)) * simd.load(line))


@inline
def _standard_states(like, step, first, k, z_i, z_f, z_g, z_o, old, count):
    """New c and h with tanh, sigmoid, tanh: fewer exponentials and divisions, as `gates` has them.

    first, k: a pixel, and the place of the first of the `count` lanes from there on.
    """
    if step.peephole != 0:
        z_i = simd.fma(_peep(like, step, 0, first, k, count), old, z_i)
        z_f = simd.fma(_peep(like, step, 1, first, k, count), old, z_f)
    i, f = 1.0 + vmath.exp2_gate(z_i * -vmath.LOG2E), 1.0 + vmath.exp2_gate(z_f * -vmath.LOG2E)
    g = vmath.exp2_gate(z_g * (-2.0 * vmath.LOG2E))
    a, gain = i * (1.0 + g), 1.0 - g
    new = _clipped(step, simd.quotient(simd.fma(old, a, gain * f), a * f))
    if step.peephole != 0:
        z_o = simd.fma(_peep(like, step, 2, first, k, count), new, z_o)
    o, e = 1.0 + vmath.exp2_gate(z_o * -vmath.LOG2E), vmath.exp2_gate(new * (-2.0 * vmath.LOG2E))
    return new, simd.quotient(1.0 - e, o * (1.0 + e))


@inline
def _standard_gates_of_lines(like, step, b, first, count, lines, pitch):
    """The same as `_gates_of_lines` with tanh, sigmoid, tanh."""
    lanes = simd.vector_lanes(lines)
    c = place_at(like, step.c, step.c_image, b, first * step.F)
    for k in range(0, count, lanes):
        some = min(lanes, count - k)
        z_i, z_f = simd.load(line_at(lines, pitch, 0, k)), simd.load(line_at(lines, pitch, 1, k))
        z_g, z_o = simd.load(line_at(lines, pitch, 2, k)), simd.load(line_at(lines, pitch, 3, k))
        old = take(simd.shift(c, k), some)
        new, h = _standard_states(like, step, first, k, z_i, z_f, z_g, z_o, old, some)
        simd.store(line_at(lines, pitch, 4, k), new)
        simd.store(line_at(lines, pitch, 5, k), h)


@inline
def _pixels_forward(like, step, parts, b, first, pixels):
    """New c, h and y of some pixels, vector by vector, with tanh, sigmoid, tanh: without lines."""
    F, lanes = step.F, simd.vector_lanes(simd.pointer(like))
    for pixel in range(first, first + pixels):
        for k in range(0, F, lanes):
            some, at = min(lanes, F - k), pixel * F + k
            z_i = _value(like, step, parts, b, pixel, 0, k, some)
            z_f = _value(like, step, parts, b, pixel, 1, k, some)
            z_g = _value(like, step, parts, b, pixel, 2, k, some)
            z_o = _value(like, step, parts, b, pixel, 3, k, some)
            old = take(place_at(like, step.c, step.c_image, b, at), some)
            new, h = _standard_states(like, step, pixel, k, z_i, z_f, z_g, z_o, old, some)
            put(place_at(like, step.c_new, step.c_new_image, b, at), new, some)
            put(place_at(like, step.h, step.h_image, b, at), h, some)
            if step.y != 0:
                put(place_at(like, step.y, step.y_image, b, at), h, some)


@inline
def _chunk_forward(like, step, parts, b, first, pixels, lines, pitch):
    F, lanes = step.F, simd.vector_lanes(lines)
    count, start = pixels * F, first * F
    standard = step.recurrent_activation == 1 and step.activation == 0 and step.output_activation == 0
    if standard and step.masked == 0 and (F + lanes - 1) // lanes * lanes <= F + F // 8:
        _pixels_forward(like, step, parts, b, first, pixels)
        return
    _gather(like, step, parts, b, first, pixels, lines, pitch)
    if standard:
        _standard_gates_of_lines(like, step, b, first, count, lines, pitch)
    else:
        _gates_of_lines(like, step, b, first, count, lines, pitch)
    c_new = place_at(like, step.c_new, step.c_new_image, b, start)
    h, y = place_at(like, step.h, step.h_image, b, start), place_at(like, step.y, step.y_image, b, start)
    plane = step.pixels * F
    for k in range(0, count, lanes):
        some = min(lanes, count - k)
        put(simd.shift(c_new, k), simd.load(line_at(lines, pitch, 4, k)), some)
        new = simd.load(line_at(lines, pitch, 5, k))
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
        h = place_at(like, step.h, step.h_image, b, at)
        copy_run(h, place_at(like, step.h_before, step.h_before_image, b, at), length)
    if step.c_new != step.c:
        c_new = place_at(like, step.c_new, step.c_new_image, b, at)
        copy_run(c_new, place_at(like, step.c, step.c_image, b, at), length)
    if step.y != 0:
        y = place_at(like, step.y, step.y_image, b, at)
        if step.y_before != 0:
            copy_run(y, place_at(like, step.y_before, step.y_before_image, b, at), length)
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


@inline
def _read_by(parts, n, step):
    """Address, bytes to the next image and scalars to the next gate of what the n-th part normalizes."""
    if len(parts) == 2 and n == 1:
        return step.zh, step.zh_image, step.zh_gate
    return step.z, step.z_image, step.z_gate


@inline
def _row_of_images(step, row):
    """First and last image, plus 1, whose statistics are one."""
    return (row, row + 1) if step.statistics_image != 0 else (0, step.B)


@inline
def _values(step, valid, row):
    """How many values of a channel its statistics are made of; where an image has its own, those of one."""
    if step.statistics_image != 0:
        return step.pixels
    count = 0
    for b in range(step.B):
        count += step.pixels if valid[b] else 0
    return count


@inline
def _combine_strips(like, step, part, n, valid):
    """Mean and variance, and one over the deviation, of what the strips' sums tell of channels, or groups of them."""
    channels, rows = 4 * step.F, step.B if step.statistics_image != 0 else 1
    group = channels // step.groups
    room = np.zeros(2 * channels)
    means, squares = simd.pointer(room), simd.shift(simd.pointer(room), channels)
    for row in range(rows):
        first, last = _row_of_images(step, row)
        values = max(_values(step, valid, row), 1)
        for c in range(2 * channels):
            means[c] = 0.0
        for again in range(2):
            for item in range(first * step.strips, last * step.strips):
                if not valid[item // step.strips]:
                    continue
                sums = simd.shift(simd.at(like, part.sums), item * 2 * channels)
                pixels = min(step.strip, step.pixels - item % step.strips * step.strip)
                if again == 0:
                    share = pixels / values
                    for c in range(channels):
                        means[c] += share * np.float64(sums[c])
                else:
                    for c in range(channels):
                        apart = np.float64(sums[c]) - means[c]
                        squares[c] += np.float64(sums[channels + c]) + pixels * apart * apart
        mean = simd.shift(simd.at(like, part.mean), row * channels)
        scale = simd.shift(simd.at(like, part.scale), row * channels)
        left = simd.shift(simd.at(room, step.statistics), 2 * n * rows * channels + row * channels)
        for c0 in range(0, channels, group):
            whole = total = 0.0
            for c in range(c0, c0 + group):
                whole += means[c] / group
            for c in range(c0, c0 + group):
                total += squares[c] + values * (means[c] - whole) ** 2
            variance = total / (values * group)
            for c in range(c0, c0 + group):
                mean[c], scale[c] = whole, 1.0 / np.sqrt(variance + step.epsilon)
                left[c], left[rows * channels + c] = whole, variance


@inline
def _measure_four(z, count, pixel, share, target, further):
    """Of four vectors of channels of `count` pixels the mean and, `further` on, the squares of what is apart from it.

    Each sum waits for its last addition: four at a time take as long as one.
    """
    lanes = simd.vector_lanes(z)
    t0 = t1 = t2 = t3 = s0 = s1 = s2 = s3 = simd.zeros(z)
    for p in range(count):
        line = simd.shift(z, p * pixel)
        t0, t1 = t0 + simd.load(line), t1 + simd.load(simd.shift(line, lanes))
        t2, t3 = t2 + simd.load(simd.shift(line, 2 * lanes)), t3 + simd.load(simd.shift(line, 3 * lanes))
    t0, t1, t2, t3 = t0 * share, t1 * share, t2 * share, t3 * share
    for p in range(count):
        line = simd.shift(z, p * pixel)
        d0, d1 = simd.load(line) - t0, simd.load(simd.shift(line, lanes)) - t1
        d2, d3 = simd.load(simd.shift(line, 2 * lanes)) - t2, simd.load(simd.shift(line, 3 * lanes)) - t3
        s0, s1, s2, s3 = simd.fma(d0, d0, s0), simd.fma(d1, d1, s1), simd.fma(d2, d2, s2), simd.fma(d3, d3, s3)
    for n, mean, squares in ((0, t0, s0), (1, t1, s1), (2, t2, s2), (3, t3, s3)):
        simd.store(simd.shift(target, n * lanes), mean)
        simd.store(simd.shift(target, further + n * lanes), squares)


@kernel
def measure(job, worker, like, steps, parts, valid, number):
    """Of each channel of each strip the mean, and the squares of what is apart from it; then the statistics of all.

    Where there is a zh besides z, and one part, it is added to z before. (number,) says which part.
    """
    step, n = steps[0], number[0]
    part, F, lanes = parts[n], step.F, simd.vector_lanes(simd.pointer(like))
    base, image, plane = _read_by(parts, n, step)
    sums = simd.at(like, part.sums)
    items = step.B * step.strips
    size, count = grain(job, items), 0
    item = next_item(job, -1, size)
    while item < items:
        b, first = item // step.strips, item % step.strips * step.strip
        last = min(first + step.strip, step.pixels)
        share = 1.0 / (last - first)
        target = simd.shift(sums, item * 8 * F)
        if not valid[b]:
            clear_run(target, 8 * F)
            last = first
        for gate in range(step.runs):
            z = place_at(like, base, image, b, gate * plane)
            zh = place_at(like, step.zh, step.zh_image, b, gate * step.zh_gate)
            adds, wide = step.zh != 0 and len(parts) == 1, 0
            if not adds and first < last:
                wide = step.run // (4 * lanes) * (4 * lanes)
                for k in range(0, wide, 4 * lanes):
                    line = simd.shift(z, first * step.pixel + k)
                    _measure_four(line, last - first, step.pixel, share, simd.shift(target, gate * F + k), 4 * F)
            for k in range(wide, step.run, lanes):
                some = min(lanes, step.run - k)
                total = simd.zeros(target)
                for pixel in range(first, last):
                    at = pixel * step.pixel + k
                    value = take(simd.shift(z, at), some)
                    if adds:
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
        item, count = next_item(job, item, size), count + 1
    if finished(job, count, items):
        _combine_strips(like, step, part, n, valid)


@inline
def _chunk_backward(like, step, parts, b, first, pixels, lines, pitch, sums):
    """From the gradients of the new h and c those of what the gates take in and of the old c; and the new h."""
    F, lanes = step.F, simd.vector_lanes(lines)
    count, start = pixels * F, first * F
    sigma = step.recurrent_activation
    _gather(like, step, parts, b, first, pixels, lines, pitch)
    c = place_at(like, step.c, step.c_image, b, start)
    if step.peephole != 0:
        for k in range(0, count, lanes):
            some = min(lanes, count - k)
            old = take(simd.shift(c, k), some)
            for gate in range(2):
                line = line_at(lines, pitch, gate, k)
                simd.store(line, simd.fma(_peep(like, step, gate, first, k, some), old, simd.load(line)))
    for gate in range(2):
        line, value = line_at(lines, pitch, gate, 0), line_at(lines, pitch, 4 + gate, 0)
        activate(sigma, line, value, count)
        slopes(sigma, line, value, line_at(lines, pitch, 8 + gate, 0), count)
    activate(step.activation, line_at(lines, pitch, 2, 0), line_at(lines, pitch, 6, 0), count)
    slopes(
        step.activation, line_at(lines, pitch, 2, 0), line_at(lines, pitch, 6, 0), line_at(lines, pitch, 10, 0), count
    )
    for k in range(0, count, lanes):
        some = min(lanes, count - k)
        i, f, g = (simd.load(line_at(lines, pitch, 4, k)), simd.load(line_at(lines, pitch, 5, k)),
                   simd.load(line_at(lines, pitch, 6, k)))  # fmt: skip
        new = _clipped(step, simd.fma(f, take(simd.shift(c, k), some), i * g))
        simd.store(line_at(lines, pitch, 14, k), new)
        if step.peephole != 0:
            line = line_at(lines, pitch, 3, k)
            simd.store(line, simd.fma(_peep(like, step, 2, first, k, some), new, simd.load(line)))
    activate(sigma, line_at(lines, pitch, 3, 0), line_at(lines, pitch, 7, 0), count)
    slopes(sigma, line_at(lines, pitch, 3, 0), line_at(lines, pitch, 7, 0), line_at(lines, pitch, 11, 0), count)
    new, value = line_at(lines, pitch, 14, 0), line_at(lines, pitch, 12, 0)
    activate(step.output_activation, new, value, count)
    slopes(step.output_activation, new, value, line_at(lines, pitch, 13, 0), count)
    for k in range(0, count, lanes):
        some, at = min(lanes, count - k), start + k
        f, o = simd.load(line_at(lines, pitch, 5, k)), simd.load(line_at(lines, pitch, 7, k))
        y, new, old = simd.load(line_at(lines, pitch, 12, k)), simd.load(line_at(lines, pitch, 14, k)), take(
            simd.shift(c, k), some)  # fmt: skip
        put(place_at(like, step.h, step.h_image, b, at), o * y, some)
        dh = take(place_at(like, step.dh, step.dh_image, b, at), some)
        if step.dy != 0:
            dh = dh + take(place_at(like, step.dy, step.dy_image, b, at), some)
        dc_place = place_at(like, step.dc, step.dc_image, b, at)
        dc = simd.fma(dh * o, simd.load(line_at(lines, pitch, 13, k)), take(dc_place, some))
        da_o = dh * y * simd.load(line_at(lines, pitch, 11, k))
        if step.peephole != 0:
            dc = simd.fma(da_o, _peep(like, step, 2, first, k, some), dc)
        if step.clip < np.inf:
            dc = simd.select_less(simd.absolute(new), simd.broadcast(dc, step.clip), dc, simd.zeros(lines))
        da_i = dc * simd.load(line_at(lines, pitch, 6, k)) * simd.load(line_at(lines, pitch, 8, k))
        da_f = dc * old * simd.load(line_at(lines, pitch, 9, k))
        da_g = dc * simd.load(line_at(lines, pitch, 4, k)) * simd.load(line_at(lines, pitch, 10, k))
        dc = dc * f
        if step.peephole != 0:
            dc = simd.fma(da_i, _peep(like, step, 0, first, k, some), dc)
            dc = simd.fma(da_f, _peep(like, step, 1, first, k, some), dc)
            plane = step.pixels * F
            for n, product in enumerate((da_i * old, da_f * old, da_o * new)):
                simd.store(line_at(lines, pitch, 8 + n, k), product)
                if step.dpeephole != 0:
                    add_to(simd.shift(simd.at(like, step.dpeephole), (3 * b + n) * plane + at), product, some)
        put(dc_place, dc, some)
        simd.store(line_at(lines, pitch, 0, k), da_i)
        simd.store(line_at(lines, pitch, 1, k), da_f)
        simd.store(line_at(lines, pitch, 2, k), da_g)
        simd.store(line_at(lines, pitch, 3, k), da_o)
    if step.peephole != 0 and step.dpeephole == 0:
        for n in range(3):
            for p in range(pixels):
                for k in range(0, F, lanes):
                    add_to(simd.shift(sums, (4 + n) * F + k), simd.load(line_at(lines, pitch, 8 + n, p * F + k)),
                         min(lanes, F - k))  # fmt: skip


@inline
def _scatter(like, step, parts, b, first, count, lines, pitch, sums, strip):
    """Bring four lines of gradients to where z is, or beside it, and gather what normalization's gradients need."""
    F, lanes = step.F, simd.vector_lanes(lines)
    for gate in range(4):
        for p in range(count):
            pixel = first + p
            target = place_at(like, step.da, step.da_image, b, pixel * step.pixel + gate * step.da_gate)
            line = simd.shift(lines, gate * pitch + p * F)
            for k in range(0, F, lanes):
                some, channel = min(lanes, F - k), gate * F + k
                da = simd.load(simd.shift(line, k))
                put(simd.shift(target, k), da, some)
                if len(parts) != 1:
                    add_to(simd.shift(sums, channel), da, some)
                for n in range(len(parts)):
                    _add_of_part(like, step, parts[n], n, b, pixel, gate, k, some, da, strip)


@inline
def _add_of_part(like, step, part, n, b, pixel, gate, k, some, da, strip):
    F, channel = step.F, gate * step.F + k
    if n == 1:
        base, image, plane = step.zh, step.zh_image, step.zh_gate
    else:
        base, image, plane = step.z, step.z_image, step.z_gate
    z = take(place_at(like, base, image, b, pixel * step.pixel + gate * plane + k), some)
    value = _standardized(like, part, b * step.statistics_image + channel, z, some)
    if part.dgamma != 0:
        at = (b * step.pixels + pixel) * 4 * F + channel
        add_to(simd.shift(simd.at(like, part.dgamma), at), da * value, some)
        add_to(simd.shift(simd.at(like, part.dbeta), at), da, some)
        da = da * take(simd.shift(simd.at(like, part.gamma), pixel * step.weights_pixel + channel), some)
    target = simd.shift(simd.at(like, part.sums), (b * step.strips + strip) * 8 * F + channel)
    add_to(target, da, some)
    add_to(simd.shift(target, 4 * F), da * value, some)


@inline
def _combine_gradients(like, step, part, valid):
    """Add the gradients of gamma and beta of what the strips' sums tell, and leave the two means."""
    channels, rows = 4 * step.F, step.B if step.statistics_image != 0 else 1
    group = channels // step.groups
    room = np.zeros(2 * channels)
    totals = simd.pointer(room)
    gamma, gradients = simd.at(like, part.gamma), simd.at(room, part.gradients)
    offset, along = simd.at(like, part.offset), simd.at(like, part.along)
    for row in range(rows):
        first, last = _row_of_images(step, row)
        for c in range(2 * channels):
            totals[c] = 0.0
        for item in range(first * step.strips, last * step.strips):
            sums = simd.shift(simd.at(like, part.sums), item * 2 * channels)
            for c in range(2 * channels):
                totals[c] += np.float64(sums[c])
        if part.gradients != 0:
            for c in range(channels):
                gradients[c] += totals[c]
                gradients[channels + c] += totals[channels + c]
                totals[c] *= np.float64(gamma[c])
                totals[channels + c] *= np.float64(gamma[c])
        values = max(_values(step, valid, row), 1) * group
        for c0 in range(0, 0 if step.given else channels, group):
            both = along_both = 0.0
            for c in range(c0, c0 + group):
                both += totals[c]
                along_both += totals[channels + c]
            for c in range(c0, c0 + group):
                offset[row * channels + c], along[row * channels + c] = both / values, along_both / values


@kernel
def backward(job, worker, like, steps, parts, valid, rows):
    """Gradients da of what the gates take in, of dh (+ dy) and dc, which becomes that of c; and the h of the step.

    With normalization z stays, and da goes beside it.
    """
    step = steps[0]
    F = step.F
    lines, pitch = simd.shift(simd.pointer(rows), worker * rows.shape[1]), rows.shape[1] // LINES
    items = step.B * step.strips
    size, done = grain(job, items), 0
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
                    clear_run(place_at(like, step.da, step.da_image, b, at), F)
        item, done = next_item(job, item, size), done + 1
    if finished(job, done, items):
        for n in range(len(parts)):
            _combine_gradients(like, step, parts[n], valid)


@kernel
def backward_of_normalization(job, worker, like, steps, parts, valid, number):
    """Gradients of what was normalized, written over it: z, or of the second of two parts zh, (number,) says which."""
    step, n = steps[0], number[0]
    part, F, lanes = parts[n], step.F, simd.vector_lanes(simd.pointer(like))
    base, image, plane = _read_by(parts, n, step)
    items = step.B * step.strips
    size = grain(job, items)
    item = next_item(job, -1, size)
    while item < items:
        b, first = item // step.strips, item % step.strips * step.strip
        sums = simd.shift(simd.at(like, step.sums), item * 7 * F)
        for pixel in range(first, min(first + step.strip, step.pixels)):
            for gate in range(step.runs):
                z = place_at(like, base, image, b, pixel * step.pixel + gate * plane)
                if not valid[b]:
                    clear_run(z, step.run)
                    continue
                da = place_at(like, step.da, step.da_image, b, pixel * step.pixel + gate * step.da_gate)
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
                        add_to(simd.shift(sums, channel), d, some)
        item = next_item(job, item, size)


@kernel
def combine(job, worker, like, steps, parts, valid):
    """Sum, where `valid` (B,), gradients (planes, B, pixels, F), with dropout times their masks, to dh."""
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
                for gate in range(step.planes):
                    at = (gate * step.B + b) * plane + k
                    value = take(simd.shift(simd.at(like, step.masked), at), some)
                    if step.masks != 0:
                        value = value * take(simd.shift(simd.at(like, step.masks), at), some)
                    total = total + value
                put(place_at(like, step.dh, step.dh_image, b, k), total, some)
        item = next_item(job, item, size)


@kernel
def mask(job, worker, like, works):
    """Write frames (B, T, size) times the masks (B, size) of their images to the target, or add them to it."""
    work, lanes = works[0], simd.vector_lanes(simd.pointer(like))
    runs = (work.size + MASKED - 1) // MASKED
    items = work.B * work.T * runs
    size = grain(job, items)
    item = next_item(job, -1, size)
    while item < items:
        b, t, first = item // (work.T * runs), item // runs % work.T, item % runs * MASKED
        frame = place_at(like, work.frames + np.uint64(t * work.frames_step), work.frames_image, b, first)
        target = place_at(like, work.target + np.uint64(t * work.target_step), work.target_image, b, first)
        factors = place_at(like, work.mask, work.mask_image, b, first)
        count = min(MASKED, work.size - first)
        for k in range(0, count, lanes):
            some = min(lanes, count - k)
            value = take(simd.shift(frame, k), some)
            if work.mask != 0:
                value = value * take(simd.shift(factors, k), some)
            if work.adds:
                value = value + take(simd.shift(target, k), some)
            put(simd.shift(target, k), value, some)
        item = next_item(job, item, size)

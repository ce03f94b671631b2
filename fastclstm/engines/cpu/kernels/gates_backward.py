"""One pass over the pixels pulls the gradients of one step's states back through its gates."""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd, vmath
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.gates import put, take
from fastclstm.engines.cpu.kernels.padding import clear_run, copy_run
from fastclstm.engines.cpu.kernels.team import grain, next_item

CHUNK_PIXELS = 64
"""Pixels whose sums of gradients are taken together."""

LINE = 1024
"""Scalars (pixels × filters) that are taken back together, at most, but for one pixel of more filters."""

PEEPS, Z, BEFORE, DH, LINES = 3, 6, 10, 11, 12
"""Which lines hold peepholes of channels (the first three: products of dz and c for them), gates (then dz), the output
gate before and dh, and how many there are."""

STEP = np.dtype([
    ("B", np.int64), ("pixels", np.int64), ("F", np.int64),
    *((f"{name}{field}", kind) for name in ("gates", "before", "h", "c", "dy", "dh", "dc", "dz")
      for field, kind in (("", np.uint64), ("_image", np.int64))),  # addresses at this step, bytes to the next image
    ("dh_pitch", np.int64),  # scalars from pixel to pixel of dh: F, or more where a gradient of x follows each pixel's
    ("dx", np.uint64), ("dx_image", np.int64),  # where that goes, 0: nowhere
    ("weights", np.uint64), ("dweights", np.uint64),  # addresses of peepholes i, f, o and of their gradients, 0: none
    ("elementwise", np.int64),  # whether each pixel has its own peepholes
    ("sums", np.uint64),  # address of the sums of each chunk: bias (4F), peepholes of channels (3F)
])  # fmt: skip
"""Where the arrays of one step are."""


@inline
def place_at(like, base, image, b, index):
    """Pointer to a scalar of an image's array."""
    return simd.shift(simd.at(like, np.uint64(np.int64(base) + b * image)), index)


@inline
def add_to(target, value, count):
    """Add a vector's first `count` lanes to what is at a pointer."""
    put(target, take(target, count) + value, count)


@inline
def _tanh(cell, x):
    """Hyperbolic tangent as the forward pass takes it, without relative accuracy near 0."""
    e = vmath.exp2_gate(x * (-2.0 * vmath.LOG2E))
    return simd.quotient(1.0 - e, 1.0 + e)


@inline
def _sigmoid_slope(cell, gate):
    """Derivative of a sigmoid by its value: nothing passes where that is the least that `exp2_gate` leaves."""
    least = 2.0**-vmath.LIMIT_DOUBLE if simd.is_double(gate) else 2.0**-vmath.LIMIT_SINGLE
    return simd.select_less(simd.broadcast(gate, least), gate, gate * (1.0 - gate), simd.broadcast(gate, 0.0))


@inline
def _tanh_slope(cell, y):
    return 1.0 - y * y


@inline
def _any_output(cell, c):
    return vmath.activate(cell.output_activation, c)


@inline
def _any_gate_slope(cell, gate):
    return vmath.derivative(cell.recurrent_activation, gate)


@inline
def _any_slope(cell, g):
    return vmath.derivative(cell.activation, g)


@inline
def _any_output_slope(cell, y):
    return vmath.derivative(cell.output_activation, y)


@inline
def _standard(step, cell, weights, gap, target, apart, count, i, f, g, o, c, dh, dc):
    """The dz of i, f, g, o and the dc of the step before, with tanh, sigmoid, tanh and nothing else."""
    y = _tanh(cell, simd.fma(f, c, i * g))
    dz_o = dh * y * _sigmoid_slope(cell, o)
    dc = simd.fma(dh * o, 1.0 - y * y, dc)
    dz_f = dc * c * _sigmoid_slope(cell, f)
    return dc * g * _sigmoid_slope(cell, i), dz_f, dc * i * (1.0 - g * g), dz_o, dc * f


def _deriving(output, gate_slope, slope, output_slope):
    """Return the same for cells with such outputs and derivatives, peepholes and clipping."""

    @inline
    def derive(step, cell, weights, gap, target, apart, count, i, f, g, o, c, dh, dc):
        """Leave also the gradients of peepholes: those of channels as they are, else added.

        weights and target: of i, then of f and o, `gap` and `apart` scalars on.
        """
        c_new = simd.maximum(-cell.clip, simd.minimum(cell.clip, simd.fma(f, c, i * g)))
        y = output(cell, c_new)
        dz_o = dh * y * gate_slope(cell, o)
        dc = simd.fma(dh * o, output_slope(cell, y), dc)
        if step.weights != 0:
            dc = simd.fma(dz_o, take(simd.shift(weights, 2 * gap), count), dc)
        if cell.clip < np.inf:
            dc = simd.select_less(simd.absolute(c_new), simd.broadcast(dc, cell.clip), dc, simd.broadcast(dc, 0.0))
        dz_i, dz_f, dz_g = dc * g * gate_slope(cell, i), dc * c * gate_slope(cell, f), dc * i * slope(cell, g)
        dc = dc * f
        if step.weights != 0:
            dc = simd.fma(dz_i, take(weights, count), dc)
            dc = simd.fma(dz_f, take(simd.shift(weights, gap), count), dc)
            if step.elementwise:
                add_to(target, dz_i * c, count)
                add_to(simd.shift(target, apart), dz_f * c, count)
                add_to(simd.shift(target, 2 * apart), dz_o * c_new, count)
            else:
                put(target, dz_i * c, count)
                put(simd.shift(target, apart), dz_f * c, count)
                put(simd.shift(target, 2 * apart), dz_o * c_new, count)
        return dz_i, dz_f, dz_g, dz_o, dc

    return derive


@inline
def _is_even(F, lanes):
    """Whether vectors of a pixel's filters are full, or nearly all of many are; else pixels share them, in lines."""
    return F % lanes == 0 or 4 * lanes < F


@inline
def _copy_pixels(gates, count, F, target, target_pixel, target_gate, origin, origin_pixel, origin_gate):
    """Copy the filters of some gates of `count` pixels, which are so many scalars apart, and so are the gates.

    Whole vectors or quarters of one are copied. What is too much the next gate or pixel overwrites, as it is never more
    than the next pixel has; the last pixel is copied as it is.
    """
    lanes = simd.vector_lanes(target)
    if lanes >= 4 * F:
        for n in range(count - 1):
            for g in range(gates):
                to = simd.shift(target, n * target_pixel + g * target_gate)
                simd.copy_quarters(1, to, simd.shift(origin, n * origin_pixel + g * origin_gate))
    elif lanes >= 2 * F:
        for n in range(count - 1):
            for g in range(gates):
                to = simd.shift(target, n * target_pixel + g * target_gate)
                simd.copy_quarters(2, to, simd.shift(origin, n * origin_pixel + g * origin_gate))
    else:
        for n in range(count - 1):
            for g in range(gates):
                for k in range(0, F, lanes):
                    to = simd.shift(target, n * target_pixel + g * target_gate + k)
                    simd.copy_quarters(4, to, simd.shift(origin, n * origin_pixel + g * origin_gate + k))
    for g in range(gates):
        to = simd.shift(target, (count - 1) * target_pixel + g * target_gate)
        copy_run(to, simd.shift(origin, (count - 1) * origin_pixel + g * origin_gate), F)


@inline
def _sum_rows(rows, count, length, stride, sums):
    """Add `count` rows of `length` scalars to sums, four at a time."""
    lanes = simd.vector_lanes(sums)
    for k in range(0, length, lanes):
        some = min(lanes, length - k)
        row = simd.shift(rows, k)
        s0 = s1 = s2 = s3 = simd.zeros(sums)
        whole = count - count % 4
        for r in range(0, whole, 4):
            s0 = s0 + take(simd.shift(row, r * stride), some)
            s1 = s1 + take(simd.shift(row, (r + 1) * stride), some)
            s2 = s2 + take(simd.shift(row, (r + 2) * stride), some)
            s3 = s3 + take(simd.shift(row, (r + 3) * stride), some)
        for r in range(whole, count):
            s0 = s0 + take(simd.shift(row, r * stride), some)
        add_to(simd.shift(sums, k), (s0 + s1) + (s2 + s3), some)


def _run(output, derive):
    """Return the kernel for cells with such outputs and derivatives."""

    @inline
    def pull_back_cells(
        like, step, cell, b, index, size, z, before, dz, z_gap, dh, weights, weights_gap, target, target_gap
    ):
        """Compute dz, the new dc and the h they began with, of `size` cells that are neighbours in memory.

        z, dz, weights and target: of the first gate or peephole, then of the next ones, so many scalars on; before: of
        the output gate alone. Of the other arrays `index` is the first cell.
        """
        lanes = simd.vector_lanes(z)
        for k in range(0, size, lanes):
            count, at = min(lanes, size - k), index + k
            z_k, dz_k = simd.shift(z, k), simd.shift(dz, k)
            weights_k, target_k = simd.shift(weights, k), simd.shift(target, k)
            i, f = take(z_k, count), take(simd.shift(z_k, z_gap), count)
            g, o = take(simd.shift(z_k, 2 * z_gap), count), take(simd.shift(z_k, 3 * z_gap), count)
            c = take(place_at(like, step.c, step.c_image, b, at), count)
            dh_k = take(simd.shift(dh, k), count)
            if step.dy != 0:
                dh_k = dh_k + take(place_at(like, step.dy, step.dy_image, b, at), count)
            dc_place = place_at(like, step.dc, step.dc_image, b, at)
            if step.before != 0:
                h = take(simd.shift(before, k), count) * output(cell, c)
                put(place_at(like, step.h, step.h_image, b, at), h, count)
            dz_i, dz_f, dz_g, dz_o, dc = derive(step, cell, weights_k, weights_gap, target_k, target_gap, count, i, f,
                                                g, o, c, dh_k, take(dc_place, count))  # fmt: skip
            put(dc_place, dc, count)
            put(dz_k, dz_i, count)
            put(simd.shift(dz_k, z_gap), dz_f, count)
            put(simd.shift(dz_k, 2 * z_gap), dz_g, count)
            put(simd.shift(dz_k, 3 * z_gap), dz_o, count)

    @inline
    def pull_back(like, step, cell, b, first, stop, sums, lines, pitch):
        """Pull back some pixels, and add to the sums of their chunk."""
        F, lanes = step.F, simd.vector_lanes(lines)
        gates = place_at(like, step.gates, step.gates_image, b, 4 * first * F)
        before = gates if step.before == 0 else place_at(like, step.before, step.before_image, b, (4 * first + 3) * F)
        dz = place_at(like, step.dz, step.dz_image, b, 4 * first * F)
        dh = place_at(like, step.dh, step.dh_image, b, first * step.dh_pitch)
        if step.dx != 0:
            C = step.dh_pitch - F
            dx = place_at(like, step.dx, step.dx_image, b, first * C)
            for n in range(stop - first):
                copy_run(simd.shift(dx, n * C), simd.shift(dh, n * step.dh_pitch + F), C)
        weights, target, weights_gap, target_gap = simd.shift(lines, PEEPS * pitch), lines, pitch, pitch
        if step.elementwise:
            weights = simd.shift(simd.at(like, step.weights), first * F)
            target = simd.shift(simd.at(like, step.dweights), first * F)
            weights_gap = target_gap = step.pixels * F
        if _is_even(F, lanes):
            for n in range(stop - first):
                at = n * F
                pull_back_cells(
                    like, step, cell, b, first * F + at, F, simd.shift(gates, 4 * at), simd.shift(before, 4 * at),
                    simd.shift(dz, 4 * at), F, simd.shift(dh, n * step.dh_pitch), simd.shift(weights, at), weights_gap,
                    simd.shift(target, at), target_gap,
                )  # fmt: skip
        else:
            z, o_before = simd.shift(lines, Z * pitch), simd.shift(lines, BEFORE * pitch)
            dh_line = dh if step.dh_pitch == F else simd.shift(lines, DH * pitch)
            _copy_pixels(4, stop - first, F, z, F, pitch, gates, 4 * F, F)
            if step.before != 0:
                _copy_pixels(1, stop - first, F, o_before, F, 0, before, 4 * F, 0)
            if step.dh_pitch != F:
                _copy_pixels(1, stop - first, F, dh_line, F, 0, dh, step.dh_pitch, 0)
            pull_back_cells(like, step, cell, b, first * F, (stop - first) * F, z, o_before, z, pitch, dh_line,
                            weights, weights_gap, target, target_gap)  # fmt: skip
            _copy_pixels(4, stop - first, F, dz, 4 * F, F, z, F, pitch)
        _sum_rows(dz, stop - first, 4 * F, 4 * F, sums)
        if step.weights != 0 and not step.elementwise:
            for peephole in range(3):
                products = simd.shift(lines, peephole * pitch)
                _sum_rows(products, stop - first, F, F, simd.shift(sums, (4 + peephole) * F))

    def run(job, worker, like, steps, cells, rows):
        step = steps[0]
        F, pixels = step.F, step.pixels
        chunks = (pixels + CHUNK_PIXELS - 1) // CHUNK_PIXELS
        local = simd.shift(simd.pointer(rows), worker * rows.shape[1])
        lanes = simd.vector_lanes(local)
        pitch = max(LINE, F) + lanes
        lines = simd.shift(local, 7 * F + lanes)
        at_once = max(1, LINE // F)
        if step.weights != 0 and not step.elementwise:
            for peephole in range(3):
                weights = simd.shift(simd.at(like, step.weights), peephole * F)
                for n in range(at_once):
                    copy_run(simd.shift(lines, (PEEPS + peephole) * pitch + n * F), weights, F)
        size = grain(job, chunks)
        chunk = next_item(job, -1, size)
        while chunk < chunks:
            sums = simd.shift(simd.at(like, step.sums), chunk * 7 * F)
            last = min((chunk + 1) * CHUNK_PIXELS, pixels)
            for b in range(step.B):
                clear_run(local, 7 * F)
                for first in range(chunk * CHUNK_PIXELS, last, at_once):
                    pull_back(like, step, cells[0], b, first, min(first + at_once, last), local, lines,
                              pitch)  # fmt: skip
                for k in range(0, 7 * F, lanes):
                    count = min(lanes, 7 * F - k)
                    add_to(simd.shift(sums, k), take(simd.shift(local, k), count), count)
            chunk = next_item(job, chunk, size)

    return run


PULL_BACK = {
    "standard": kernel(_run(_tanh, _standard), "gates_backward.standard"),
    "peeping": kernel(
        _run(_tanh, _deriving(_tanh, _sigmoid_slope, _tanh_slope, _tanh_slope)), "gates_backward.peeping"
    ),
    "any": kernel(
        _run(_any_output, _deriving(_any_output, _any_gate_slope, _any_slope, _any_output_slope)), "gates_backward.any"
    ),
}
"""Pull one step's gradients back through the gates of all pixels, by `gates.kind`."""


def row_length(F: int, itemsize: int) -> int:
    """Scalars that each worker needs: for the sums of a chunk and for the lines."""
    lanes = simd.lanes(itemsize)
    return 7 * F + lanes + LINES * (max(LINE, F) + lanes)

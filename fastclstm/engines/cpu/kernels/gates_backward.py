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

BEFORE, PRODUCTS, PEEPS, PLANES = 4, 5, 8, 11
"""Which lines hold the output gate before, products of dz and c for three peepholes, and the peepholes of channels (the
first: the four gates, then dz), and how many there are."""

STEP = np.dtype([
    ("B", np.int64), ("pixels", np.int64), ("F", np.int64),
    *((f"{name}{field}", kind) for name in ("gates", "before", "h", "c", "dy", "dh", "dc", "dz")
      for field, kind in (("", np.uint64), ("_image", np.int64))),  # addresses at this step, bytes to the next image
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
def _standard(like, step, cell, lines, pitch, index, at, count, i, f, g, o, c, dh, dc):
    """The dz of i, f, g, o and the dc of the step before, with tanh, sigmoid, tanh and nothing else."""
    y = _tanh(cell, simd.fma(f, c, i * g))
    dz_o = dh * y * _sigmoid_slope(cell, o)
    dc = simd.fma(dh * o, 1.0 - y * y, dc)
    dz_f = dc * c * _sigmoid_slope(cell, f)
    return dc * g * _sigmoid_slope(cell, i), dz_f, dc * i * (1.0 - g * g), dz_o, dc * f


def _deriving(output, gate_slope, slope, output_slope):
    """Return the same for cells with such outputs and derivatives, peepholes and clipping."""

    @inline
    def derive(like, step, cell, lines, pitch, index, at, count, i, f, g, o, c, dh, dc):
        """Leave also the gradients of peepholes: of channels in the lines, else added to memory."""
        c_new = simd.maximum(-cell.clip, simd.minimum(cell.clip, simd.fma(f, c, i * g)))
        y = output(cell, c_new)
        dz_o = dh * y * gate_slope(cell, o)
        dc = simd.fma(dh * o, output_slope(cell, y), dc)
        weights, gap = simd.shift(lines, PEEPS * pitch + at), pitch
        if step.elementwise:
            weights, gap = simd.shift(simd.at(like, step.weights), index), step.pixels * step.F
        if step.weights != 0:
            dc = simd.fma(dz_o, take(simd.shift(weights, 2 * gap), count), dc)
        if cell.clip < np.inf:
            dc = simd.select_less(simd.absolute(c_new), simd.broadcast(dc, cell.clip), dc, simd.zeros(lines))
        dz_i, dz_f, dz_g = dc * g * gate_slope(cell, i), dc * c * gate_slope(cell, f), dc * i * slope(cell, g)
        dc = dc * f
        if step.weights != 0:
            dc = simd.fma(dz_i, take(weights, count), dc)
            dc = simd.fma(dz_f, take(simd.shift(weights, gap), count), dc)
            if step.elementwise:
                target = simd.shift(simd.at(like, step.dweights), index)
                add_to(target, dz_i * c, count)
                add_to(simd.shift(target, gap), dz_f * c, count)
                add_to(simd.shift(target, 2 * gap), dz_o * c_new, count)
            else:
                target = simd.shift(lines, PRODUCTS * pitch + at)
                put(target, dz_i * c, count)
                put(simd.shift(target, gap), dz_f * c, count)
                put(simd.shift(target, 2 * gap), dz_o * c_new, count)
        return dz_i, dz_f, dz_g, dz_o, dc

    return derive


@inline
def _gather(line, gates, pixels, F, gate, first, stop):
    """Bring one gate of the pixels [first, stop) of an image to a line."""
    lanes = simd.vector_lanes(line)
    for pixel in range(first, stop):
        at, place = (pixel - first) * F, (4 * pixel + gate) * F
        for k in range(0, F, lanes):
            # What is too much will be overwritten by the next pixel; but nothing is read behind the image.
            count = min(lanes, 4 * pixels * F - place - k)
            simd.store(simd.shift(line, at + k), take(simd.shift(gates, place + k), count))


@inline
def _scatter(lines, pitch, dz, F, first, stop):
    """Bring the dz of the pixels [first, stop) of an image from lines to their place."""
    lanes = simd.vector_lanes(lines)
    for pixel in range(first, stop):
        for gate in range(4):
            at, place = (pixel - first) * F, (4 * pixel + gate) * F
            for k in range(0, F, lanes):
                # What is too much will be overwritten by the next gate; but nothing is written behind the last pixel.
                count = lanes if 4 * stop * F - place - k >= lanes else min(lanes, F - k)
                put(simd.shift(dz, place + k), simd.load(simd.shift(lines, gate * pitch + at + k)), count)


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
    def pull_back(like, step, cell, b, first, stop, sums, lines, pitch):
        """Compute dz and the new dc of some pixels, and the h they began with, and add to the sums of their chunk."""
        F, lanes = step.F, simd.vector_lanes(sums)
        gates = place_at(like, step.gates, step.gates_image, b, 0)
        before = place_at(like, step.before, step.before_image, b, 0)
        dz_place = place_at(like, step.dz, step.dz_image, b, 0)
        cells = (stop - first) * F
        in_place = F % lanes == 0 or 4 * lanes < F
        if not in_place:
            for gate in range(4):
                _gather(simd.shift(lines, gate * pitch), gates, step.pixels, F, gate, first, stop)
            if step.before != 0:
                _gather(simd.shift(lines, BEFORE * pitch), before, step.pixels, F, 3, first, stop)
        at = k = 0
        while at < cells:
            count = min(lanes, F - k if in_place else cells - at)
            index = first * F + at
            gap = F if in_place else pitch
            z = simd.shift(gates, 4 * (index - k) + k) if in_place else simd.shift(lines, at)
            i, f = take(z, count), take(simd.shift(z, gap), count)
            g, o = take(simd.shift(z, 2 * gap), count), take(simd.shift(z, 3 * gap), count)
            c = take(place_at(like, step.c, step.c_image, b, index), count)
            dh = take(place_at(like, step.dh, step.dh_image, b, index), count)
            if step.dy != 0:
                dh = dh + take(place_at(like, step.dy, step.dy_image, b, index), count)
            dc_place = place_at(like, step.dc, step.dc_image, b, index)
            dc = take(dc_place, count)
            if step.before != 0:
                o_place = simd.shift(lines, BEFORE * pitch + at)
                if in_place:
                    o_place = simd.shift(before, 4 * (index - k) + 3 * F + k)
                put(place_at(like, step.h, step.h_image, b, index), take(o_place, count) * output(cell, c), count)
            dz_i, dz_f, dz_g, dz_o, dc = derive(like, step, cell, lines, pitch, index, at, count, i, f, g, o, c, dh, dc)
            put(dc_place, dc, count)
            if in_place:
                z = simd.shift(dz_place, 4 * (index - k) + k)
            put(z, dz_i, count)
            put(simd.shift(z, gap), dz_f, count)
            put(simd.shift(z, 2 * gap), dz_g, count)
            put(simd.shift(z, 3 * gap), dz_o, count)
            at += count
            k = 0 if k + count == F else k + count
        if not in_place:
            _scatter(lines, pitch, dz_place, F, first, stop)
        _sum_rows(simd.shift(dz_place, 4 * first * F), stop - first, 4 * F, 4 * F, sums)
        if step.weights != 0 and not step.elementwise:
            for peephole in range(3):
                products = simd.shift(lines, (PRODUCTS + peephole) * pitch)
                _sum_rows(products, stop - first, F, F, simd.shift(sums, (4 + peephole) * F))

    def run(job, worker, like, steps, cells, rows):
        step = steps[0]
        F, pixels = step.F, step.pixels
        chunks = (pixels + CHUNK_PIXELS - 1) // CHUNK_PIXELS
        local = simd.shift(simd.pointer(rows), worker * rows.shape[1])
        lanes = simd.vector_lanes(local)
        pitch = max(LINE, F) + lanes
        lines = simd.shift(local, rows.shape[1] - PLANES * pitch)
        at_once = max(1, LINE // F)
        if step.weights != 0 and not step.elementwise:
            for peephole in range(3):
                for n in range(at_once):
                    line = simd.shift(lines, (PEEPS + peephole) * pitch + n * F)
                    copy_run(line, simd.shift(simd.at(like, step.weights), peephole * F), F)
        size = grain(job, chunks)
        chunk = next_item(job, -1, size)
        while chunk < chunks:
            sums = simd.shift(simd.at(like, step.sums), chunk * 7 * F)
            last = min((chunk + 1) * CHUNK_PIXELS, pixels)
            for b in range(step.B):
                clear_run(local, 7 * F)
                for first in range(chunk * CHUNK_PIXELS, last, at_once):
                    pull_back(like, step, cells[0], b, first, min(first + at_once, last), local, lines, pitch)
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
    return 7 * F + lanes + PLANES * (max(LINE, F) + lanes)

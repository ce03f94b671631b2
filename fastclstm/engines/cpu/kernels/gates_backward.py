"""One pass over the pixels pulls the gradients of one step's states back through its gates."""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd, vmath
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.gates import put, take
from fastclstm.engines.cpu.kernels.lanes import gather, scatter
from fastclstm.engines.cpu.kernels.padding import clear_run, copy_run
from fastclstm.engines.cpu.kernels.team import grain, next_item

CHUNK_PIXELS = 64
"""Pixels whose sums of gradients are taken together."""

LINE = 1024
"""Scalars (pixels × filters) that are taken back together, at most, but for one pixel of more filters."""

PEEPS, LINES = 3, 6
"""Which lines hold peepholes of channels (the first three: products of dz and c for them), and how many there are."""

WEIGHTS, PRODUCTS, Z, BEFORE, C, DH, DY, DC, H, PLANES = 0, 3, 6, 10, 11, 12, 13, 14, 15, 16
"""Which planes, times F, hold weights of peepholes and products for them, gates (then dz), the output gate before, c,
dh, dy, dc and h, and how many there are."""

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
def _place(like, base, image, b, index):
    return simd.shift(simd.at(like, np.uint64(np.int64(base) + b * image)), index)


@inline
def _offset(base, image, b, bytes_on):
    return np.int64(base) + b * image + bytes_on


@inline
def _add(target, value, count):
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
                _add(target, dz_i * c, count)
                _add(simd.shift(target, apart), dz_f * c, count)
                _add(simd.shift(target, 2 * apart), dz_o * c_new, count)
            else:
                put(target, dz_i * c, count)
                put(simd.shift(target, apart), dz_f * c, count)
                put(simd.shift(target, 2 * apart), dz_o * c_new, count)
        return dz_i, dz_f, dz_g, dz_o, dc

    return derive


@inline
def _is_even(F, lanes):
    """Whether vectors of a pixel's filters are full, or nearly all of many are; else pixels are the lanes."""
    return F % lanes == 0 or 4 * lanes < F


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
        _add(simd.shift(sums, k), (s0 + s1) + (s2 + s3), some)


def _run(output, derive):
    """Return the kernel for cells with such outputs and derivatives."""

    @inline
    def by_filters(like, step, cell, b, first, stop, lines, pitch):
        """Compute dz, the new dc and the h they began with: of each pixel vectors of filters."""
        F, lanes = step.F, simd.vector_lanes(lines)
        gates = _place(like, step.gates, step.gates_image, b, 0)
        before = _place(like, step.before, step.before_image, b, 0)
        dz_place = _place(like, step.dz, step.dz_image, b, 0)
        for pixel in range(first, stop):
            for k in range(0, F, lanes):
                count = min(lanes, F - k)
                index, at = pixel * F + k, (pixel - first) * F + k
                z = simd.shift(gates, 4 * pixel * F + k)
                i, f = take(z, count), take(simd.shift(z, F), count)
                g, o = take(simd.shift(z, 2 * F), count), take(simd.shift(z, 3 * F), count)
                c = take(_place(like, step.c, step.c_image, b, index), count)
                dh = take(_place(like, step.dh, step.dh_image, b, index), count)
                if step.dy != 0:
                    dh = dh + take(_place(like, step.dy, step.dy_image, b, index), count)
                dc_place = _place(like, step.dc, step.dc_image, b, index)
                if step.before != 0:
                    o_before = take(simd.shift(before, 4 * pixel * F + 3 * F + k), count)
                    put(_place(like, step.h, step.h_image, b, index), o_before * output(cell, c), count)
                weights, gap = simd.shift(lines, PEEPS * pitch + at), pitch
                target, apart = simd.shift(lines, at), pitch
                if step.elementwise:
                    weights, gap = simd.shift(simd.at(like, step.weights), index), step.pixels * F
                    target, apart = simd.shift(simd.at(like, step.dweights), index), gap
                dz_i, dz_f, dz_g, dz_o, dc = derive(step, cell, weights, gap, target, apart, count, i, f, g, o, c, dh,
                                                    take(dc_place, count))  # fmt: skip
                put(dc_place, dc, count)
                z = simd.shift(dz_place, 4 * pixel * F + k)
                put(z, dz_i, count)
                put(simd.shift(z, F), dz_f, count)
                put(simd.shift(z, 2 * F), dz_g, count)
                put(simd.shift(z, 3 * F), dz_o, count)

    @inline
    def by_pixels(like, step, cell, b, first, stop, lines, pitch, planes, addresses):
        """The same: of each filter vectors of pixels, brought to planes."""
        F, lanes = step.F, simd.vector_lanes(lines)
        itemsize = simd.VECTOR_BYTES // lanes
        plane, wide = F * lanes, simd.shift(addresses, lanes)
        for pixel in range(first, stop, lanes):
            for lane in range(lanes):  # behind the last pixel once more that one, whose results are the same
                addresses[lane] = min(lane, stop - 1 - pixel) * F * itemsize
                wide[lane] = 4 * addresses[lane]
            cells = pixel * F * itemsize
            elementwise = step.weights != 0 and step.elementwise
            if elementwise:
                for n in range(3):
                    offset = n * step.pixels * F * itemsize + cells
                    gather(addresses, np.int64(step.weights) + offset, F, simd.shift(planes, (WEIGHTS + n) * plane))
                for n in range(3):
                    offset = n * step.pixels * F * itemsize + cells
                    gather(addresses, np.int64(step.dweights) + offset, F, simd.shift(planes, (PRODUCTS + n) * plane))
            gather(wide, _offset(step.gates, step.gates_image, b, 4 * cells), 4 * F, simd.shift(planes, Z * plane))
            if step.before != 0:
                offset = _offset(step.before, step.before_image, b, 4 * cells) + 3 * F * itemsize
                gather(wide, offset, F, simd.shift(planes, BEFORE * plane))
            gather(addresses, _offset(step.c, step.c_image, b, cells), F, simd.shift(planes, C * plane))
            gather(addresses, _offset(step.dh, step.dh_image, b, cells), F, simd.shift(planes, DH * plane))
            if step.dy != 0:
                gather(addresses, _offset(step.dy, step.dy_image, b, cells), F, simd.shift(planes, DY * plane))
            gather(addresses, _offset(step.dc, step.dc_image, b, cells), F, simd.shift(planes, DC * plane))
            for n in range(F):
                own = simd.shift(planes, n * lanes)
                z, dc_place = simd.shift(own, Z * plane), simd.shift(own, DC * plane)
                i, f = simd.load(z), simd.load(simd.shift(z, plane))
                g, o = simd.load(simd.shift(z, 2 * plane)), simd.load(simd.shift(z, 3 * plane))
                c, dh = simd.load(simd.shift(own, C * plane)), simd.load(simd.shift(own, DH * plane))
                if step.dy != 0:
                    dh = dh + simd.load(simd.shift(own, DY * plane))
                if step.before != 0:
                    simd.store(simd.shift(own, H * plane), simd.load(simd.shift(own, BEFORE * plane)) * output(cell, c))
                dz_i, dz_f, dz_g, dz_o, dc = derive(
                    step, cell, simd.shift(own, WEIGHTS * plane), plane, simd.shift(own, PRODUCTS * plane), plane,
                    lanes, i, f, g, o, c, dh, simd.load(dc_place),
                )  # fmt: skip
                simd.store(dc_place, dc)
                simd.store(z, dz_i)
                simd.store(simd.shift(z, plane), dz_f)
                simd.store(simd.shift(z, 2 * plane), dz_g)
                simd.store(simd.shift(z, 3 * plane), dz_o)
            scatter(wide, _offset(step.dz, step.dz_image, b, 4 * cells), 4 * F, simd.shift(planes, Z * plane))
            scatter(addresses, _offset(step.dc, step.dc_image, b, cells), F, simd.shift(planes, DC * plane))
            if step.before != 0:
                scatter(addresses, _offset(step.h, step.h_image, b, cells), F, simd.shift(planes, H * plane))
            if step.weights != 0:
                for n in range(3):
                    offset = simd.address(simd.shift(lines, n * pitch + (pixel - first) * F))
                    if elementwise:
                        offset = np.int64(step.dweights) + n * step.pixels * F * itemsize + cells
                    scatter(addresses, offset, F, simd.shift(planes, (PRODUCTS + n) * plane))

    @inline
    def pull_back(like, step, cell, b, first, stop, sums, lines, pitch, planes, addresses):
        """Pull back some pixels, and add to the sums of their chunk."""
        F = step.F
        if _is_even(F, simd.vector_lanes(lines)):
            by_filters(like, step, cell, b, first, stop, lines, pitch)
        else:
            by_pixels(like, step, cell, b, first, stop, lines, pitch, planes, addresses)
        dz = _place(like, step.dz, step.dz_image, b, 4 * first * F)
        _sum_rows(dz, stop - first, 4 * F, 4 * F, sums)
        if step.weights != 0 and not step.elementwise:
            for peephole in range(3):
                products = simd.shift(lines, peephole * pitch)
                _sum_rows(products, stop - first, F, F, simd.shift(sums, (4 + peephole) * F))

    def run(job, worker, like, steps, cells, rows, tables):
        step = steps[0]
        F, pixels = step.F, step.pixels
        chunks = (pixels + CHUNK_PIXELS - 1) // CHUNK_PIXELS
        local = simd.shift(simd.pointer(rows), worker * rows.shape[1])
        addresses = simd.shift(simd.pointer(tables), worker * tables.shape[1])
        lanes = simd.vector_lanes(local)
        pitch = max(LINE, F) + lanes
        lines = simd.shift(local, 7 * F + lanes)
        planes = simd.shift(lines, LINES * pitch)
        at_once = max(1, LINE // F if _is_even(F, lanes) else LINE // F // lanes * lanes)
        if step.weights != 0 and not step.elementwise:
            for peephole in range(3):
                weights = simd.shift(simd.at(like, step.weights), peephole * F)
                if _is_even(F, lanes):
                    for n in range(at_once):
                        copy_run(simd.shift(lines, (PEEPS + peephole) * pitch + n * F), weights, F)
                else:
                    for n in range(F):
                        own = simd.shift(planes, ((WEIGHTS + peephole) * F + n) * lanes)
                        simd.store(own, simd.broadcast(simd.zeros(own), weights[n]))
        size = grain(job, chunks)
        chunk = next_item(job, -1, size)
        while chunk < chunks:
            sums = simd.shift(simd.at(like, step.sums), chunk * 7 * F)
            last = min((chunk + 1) * CHUNK_PIXELS, pixels)
            for b in range(step.B):
                clear_run(local, 7 * F)
                for first in range(chunk * CHUNK_PIXELS, last, at_once):
                    pull_back(like, step, cells[0], b, first, min(first + at_once, last), local, lines, pitch,
                              planes, addresses)  # fmt: skip
                for k in range(0, 7 * F, lanes):
                    count = min(lanes, 7 * F - k)
                    _add(simd.shift(sums, k), take(simd.shift(local, k), count), count)
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
    """Scalars that each worker needs: for the sums of a chunk, for the lines and for the planes."""
    lanes = simd.lanes(itemsize)
    planes = 0 if _is_even.py_func(F, lanes) else (PLANES * F + lanes) * lanes
    return 7 * F + lanes + LINES * (max(LINE, F) + lanes) + planes

"""One pass over the pixels pulls the gradients of one step's states back through its gates."""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd, vmath
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.gates import put, take
from fastclstm.engines.cpu.kernels.padding import clear_run
from fastclstm.engines.cpu.kernels.team import grain, next_item

CHUNK_PIXELS = 64
"""Pixels whose sums of gradients are taken together."""

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
def _add(target, value, count):
    put(target, take(target, count) + value, count)


@inline
def _tanh(x):
    """Hyperbolic tangent as the forward pass takes it, without relative accuracy near 0."""
    e = vmath.exp2_gate(x * (-2.0 * vmath.LOG2E))
    return (1.0 - e) / (1.0 + e)


@inline
def _standard_output(cell, c):
    """What the output gate multiplies."""
    return _tanh(c)


@inline
def _any_output(cell, c):
    return vmath.activate(cell.output_activation, c)


@inline
def _slope(gate):
    """Derivative of a sigmoid by its value: nothing passes where that is the least that `exp2_gate` leaves."""
    least = 2.0**-vmath.LIMIT_DOUBLE if simd.is_double(gate) else 2.0**-vmath.LIMIT_SINGLE
    return simd.select_less(simd.broadcast(gate, least), gate, gate * (1.0 - gate), simd.broadcast(gate, 0.0))


@inline
def _standard(like, step, cell, sums, pixel, k, count, i, f, g, o, c, dh, dc):
    """The dz of i, f, g, o and the dc of the step before, with tanh, sigmoid, tanh and nothing else."""
    y = _tanh(simd.fma(f, c, i * g))
    dz_o = dh * y * _slope(o)
    dc = simd.fma(dh * o, 1.0 - y * y, dc)
    return dc * g * _slope(i), dc * c * _slope(f), dc * i * (1.0 - g * g), dz_o, dc * f


@inline
def _general(like, step, cell, sums, pixel, k, count, i, f, g, o, c, dh, dc):
    """The same with any activations, peepholes and clipping; adds to the gradients of the peepholes."""
    c_new = simd.maximum(-cell.clip, simd.minimum(cell.clip, simd.fma(f, c, i * g)))
    y = vmath.activate(cell.output_activation, c_new)
    dz_o = dh * y * vmath.derivative(cell.recurrent_activation, o)
    dc = simd.fma(dh * o, vmath.derivative(cell.output_activation, y), dc)
    own = (pixel if step.elementwise else 0) * step.F + k
    size = (step.pixels if step.elementwise else 1) * step.F
    weights = simd.at(like, step.weights)
    if step.weights != 0:
        dc = simd.fma(dz_o, take(simd.shift(weights, 2 * size + own), count), dc)
    if cell.clip < np.inf:
        dc = simd.select_less(simd.absolute(c_new), simd.broadcast(dc, cell.clip), dc, simd.zeros(sums))
    dz_i = dc * g * vmath.derivative(cell.recurrent_activation, i)
    dz_f = dc * c * vmath.derivative(cell.recurrent_activation, f)
    dz_g = dc * i * vmath.derivative(cell.activation, g)
    dc = dc * f
    if step.weights != 0:
        dc = simd.fma(dz_i, take(simd.shift(weights, own), count), dc)
        dc = simd.fma(dz_f, take(simd.shift(weights, size + own), count), dc)
        target = simd.shift(sums, 4 * step.F + k)
        if step.elementwise:
            target = simd.shift(simd.at(like, step.dweights), own)
        _add(target, dz_i * c, count)
        _add(simd.shift(target, size), dz_f * c, count)
        _add(simd.shift(target, 2 * size), dz_o * c_new, count)
    return dz_i, dz_f, dz_g, dz_o, dc


def _run(output, derive):
    """Return the kernel for cells with such outputs and derivatives."""

    @inline
    def pull_back(like, step, cell, b, pixel, sums):
        """Compute dz and the new dc of one pixel, and the h it began with, and add to the sums of its chunk."""
        F = step.F
        lanes = simd.vector_lanes(sums)
        for k in range(0, F, lanes):
            count = min(lanes, F - k)
            index, gate_index = pixel * F + k, 4 * pixel * F + k
            gates = _place(like, step.gates, step.gates_image, b, gate_index)
            i, f = take(gates, count), take(simd.shift(gates, F), count)
            g, o = take(simd.shift(gates, 2 * F), count), take(simd.shift(gates, 3 * F), count)
            c = take(_place(like, step.c, step.c_image, b, index), count)
            dh = take(_place(like, step.dh, step.dh_image, b, index), count)
            if step.dy != 0:
                dh = dh + take(_place(like, step.dy, step.dy_image, b, index), count)
            dc_place = _place(like, step.dc, step.dc_image, b, index)
            dc = take(dc_place, count)
            if step.before != 0:
                o_before = take(_place(like, step.before, step.before_image, b, gate_index + 3 * F), count)
                y = output(cell, c)
                put(_place(like, step.h, step.h_image, b, index), o_before * y, count)
            dz_i, dz_f, dz_g, dz_o, dc = derive(like, step, cell, sums, pixel, k, count, i, f, g, o, c, dh, dc)
            put(dc_place, dc, count)
            dz, bias = _place(like, step.dz, step.dz_image, b, gate_index), simd.shift(sums, k)
            put(dz, dz_i, count)
            put(simd.shift(dz, F), dz_f, count)
            put(simd.shift(dz, 2 * F), dz_g, count)
            put(simd.shift(dz, 3 * F), dz_o, count)
            _add(bias, dz_i, count)
            _add(simd.shift(bias, F), dz_f, count)
            _add(simd.shift(bias, 2 * F), dz_g, count)
            _add(simd.shift(bias, 3 * F), dz_o, count)

    def run(job, worker, like, steps, cells, rows):
        step = steps[0]
        chunks = (step.pixels + CHUNK_PIXELS - 1) // CHUNK_PIXELS
        local = simd.shift(simd.pointer(rows), worker * rows.shape[1])
        lanes = simd.vector_lanes(local)
        size = grain(job, chunks)
        chunk = next_item(job, -1, size)
        while chunk < chunks:
            sums = simd.shift(simd.at(like, step.sums), chunk * 7 * step.F)
            for b in range(step.B):
                clear_run(local, 7 * step.F)
                for pixel in range(chunk * CHUNK_PIXELS, min((chunk + 1) * CHUNK_PIXELS, step.pixels)):
                    pull_back(like, step, cells[0], b, pixel, local)
                for k in range(0, 7 * step.F, lanes):
                    count = min(lanes, 7 * step.F - k)
                    _add(simd.shift(sums, k), take(simd.shift(local, k), count), count)
            chunk = next_item(job, chunk, size)

    return run


PULL_BACK = {
    True: kernel(_run(_standard_output, _standard), "gates_backward.standard"),
    False: kernel(_run(_any_output, _general), "gates_backward.any"),
}
"""Pull one step's gradients back through the gates of all pixels, standard ones or any."""

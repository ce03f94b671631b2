"""What happens to finished pre-activations: the fused gate update, or a plain store.

z holds, for each pixel of a tile, the columns of one group: of a convolution up to 4 vectors of filters; of a ConvLSTM
the gates i, f, g, o of up to one vector of filters, each gate `width` lanes wide.
"""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd, vmath
from fastclstm.engines.cpu.kernels.padding import clear_run, copy_run
from fastclstm.engines.cpu.kernels.schedule import c_after, c_before, gates_at, h_after, h_before, y_at, zx_at
from fastclstm.nn.activations import TABLE
from fastclstm.spec import PEEPHOLE_GATES, ConvLSTMSpec

CELL = np.dtype([
    ("F", np.int64),
    ("recurrent_activation", np.int64), ("activation", np.int64), ("output_activation", np.int64),
    ("peephole_i", np.uint64), ("peephole_f", np.uint64), ("peephole_o", np.uint64),  # addresses, 0: none
    ("peephole_pixel", np.int64),  # weights of the next pixel are so many scalars on
    ("clip", np.float64),
])  # fmt: skip

SCALES = -vmath.LOG2E * np.array([1.0, 1.0, 2.0, 1.0])
"""Factors of the weights of i, f, g, o that let the standard gates be powers of two."""

_NAMES = {TABLE[name]: code for name, code in vmath.ACTIVATION_CODES.items()}


def activation_codes(spec: ConvLSTMSpec) -> tuple[int, int, int] | None:
    """Numbers of the three activations, or None where NumPy must compute one of them."""
    names = _NAMES
    codes = names.get(spec.recurrent_activation), names.get(spec.activation), names.get(spec.output_activation)
    return None if None in codes else codes  # type: ignore[return-value]


def cell(spec: ConvLSTMSpec, peephole: dict[str, np.ndarray] | None) -> np.ndarray:
    """Describe what the cell does, as one `CELL`; it points into the peephole weights."""
    codes = activation_codes(spec)
    assert codes is not None
    cells = np.zeros(1, CELL)
    record = cells[0]
    record["F"] = spec.F
    record["recurrent_activation"], record["activation"], record["output_activation"] = codes
    record["clip"] = np.inf if spec.cell_clip is None else spec.cell_clip
    if peephole is not None:
        for gate in PEEPHOLE_GATES:
            record[f"peephole_{gate}"] = peephole[gate].ctypes.data
        record["peephole_pixel"] = spec.F if spec.peephole == "elementwise" else 0
    return cells


def is_standard(spec: ConvLSTMSpec) -> bool:
    """Whether the cell has tanh, sigmoid, tanh and nothing else: then the weights carry `SCALES`."""
    return activation_codes(spec) == (1, 0, 0) and spec.peephole is None and spec.cell_clip is None


@inline
def take(base, count):
    """Load the first `count` lanes."""
    if count == simd.vector_lanes(base):
        return simd.load(base)
    return simd.load_some(base, count)


@inline
def put(base, value, count):
    """Store the first `count` lanes."""
    if count == simd.vector_lanes(base):
        simd.store(base, value)
    else:
        simd.store_some(base, value, count)


@inline
def _keep(like, address, F, index, count, i, f, g, o):
    """Store the activated gates of a pixel (4, F) whose states have the given index."""
    target = simd.shift(simd.at(like, address), index)
    put(target, i, count)
    put(simd.shift(target, F), f, count)
    put(simd.shift(target, 2 * F), g, count)
    put(simd.shift(target, 3 * F), o, count)


@inline
def _standard(like, cell, kept, kept_index, index, count, z_i, z_f, z_g, z_o, c):
    """New c and h from pre-activations that carry SCALES.

    With E = 2**z: c' = [c(1+Ei)(1+Eg) + (1-Eg)(1+Ef)] / [(1+Ei)(1+Eg)(1+Ef)] and h = (1-Ec) / [(1+Eo)(1+Ec)].
    """
    e_i, e_f, e_g, e_o = vmath.exp2_gate(z_i), vmath.exp2_gate(z_f), vmath.exp2_gate(z_g), vmath.exp2_gate(z_o)
    return _states(e_i, e_f, e_g, e_o, c)


@inline
def _states(e_i, e_f, e_g, e_o, c):
    a = (1.0 + e_i) * (1.0 + e_g)
    b = 1.0 + e_f
    c = simd.fma(c, a, (1.0 - e_g) * b) / (a * b)
    e_c = vmath.exp2_gate(c * (-2.0 * vmath.LOG2E))
    return c, (1.0 - e_c) / ((1.0 + e_o) * (1.0 + e_c))


@inline
def _standard_keeping(like, cell, kept, kept_index, index, count, z_i, z_f, z_g, z_o, c):
    """The same; the gates go to the address `kept`."""
    e_i, e_f, e_g, e_o = vmath.exp2_gate(z_i), vmath.exp2_gate(z_f), vmath.exp2_gate(z_g), vmath.exp2_gate(z_o)
    one = simd.broadcast(c, 1.0)
    g = (1.0 - e_g) / (1.0 + e_g)
    _keep(like, kept, cell.F, kept_index, count, one / (1.0 + e_i), one / (1.0 + e_f), g, one / (1.0 + e_o))
    return _states(e_i, e_f, e_g, e_o, c)


@inline
def _peep(like, address, index, c, count):
    return take(simd.shift(simd.at(like, address), index), count) * c


@inline
def _general(like, cell, kept, kept_index, index, count, z_i, z_f, z_g, z_o, c):
    """New c and h with any activations, peepholes and clipping; `index` finds this pixel's peephole weights.

    The gates go to the address `kept` unless it is 0.
    """
    if cell.peephole_i != 0:
        z_i = z_i + _peep(like, cell.peephole_i, index, c, count)
        z_f = z_f + _peep(like, cell.peephole_f, index, c, count)
    i = vmath.activate(cell.recurrent_activation, z_i)
    f = vmath.activate(cell.recurrent_activation, z_f)
    g = vmath.activate(cell.activation, z_g)
    c = simd.fma(f, c, i * g)
    c = simd.maximum(-cell.clip, simd.minimum(cell.clip, c))
    if cell.peephole_o != 0:
        z_o = z_o + _peep(like, cell.peephole_o, index, c, count)
    o = vmath.activate(cell.recurrent_activation, z_o)
    if kept != 0:
        _keep(like, kept, cell.F, kept_index, count, i, f, g, o)
    return c, o * vmath.activate(cell.output_activation, c)


@inline
def store(like, flow, cell, group, z, pixels, count, b, t):
    """Store the z of `count` pixels; `pixels[r]` is the index of the r-th on the output's grid, negative: skip it.

    group is (weights, vectors, width, first filter, filters); b and t say which image's states at which step.
    """
    step = simd.vector_lanes(z)
    first, filters, columns = group[3], group[4], group[1] * step
    zero = simd.zeros(z)
    unusual = zero  # becomes NaN where anything stored is infinite or NaN
    for r in range(count):
        if pixels[r] < 0:
            continue
        target = simd.shift(simd.at(like, h_after(flow, b, t)), pixels[r] * cell.F + first)
        for j in range(0, filters, step):
            value = simd.load(simd.shift(z, r * columns + j))
            unusual = simd.fma(value, zero, unusual)
            put(simd.shift(target, j), value, min(step, filters - j))
    if simd.horizontal_sum(unusual) != 0.0:
        simd.at(group, flow.trouble)[b] = 1


def _updating(gates_of):
    """Return the function that makes new states by one of the three functions above."""

    @inline
    def update(like, flow, cell, group, z, pixels, count, b, t):
        """Make new states of the z of `count` pixels, as `store`."""
        h_new, y, gates = h_after(flow, b, t), y_at(flow, b, t), gates_at(flow, b, t)
        c_old, c_new, zx = c_before(flow, b, t), c_after(flow, b, t), zx_at(flow, b, t)
        width, first, filters = group[2], group[3], group[4]
        columns = group[1] * simd.vector_lanes(z)
        for r in range(count):
            pixel = pixels[r]
            if pixel < 0:
                continue
            z_r = simd.shift(z, r * columns)
            index = pixel * cell.F + first
            c = take(simd.shift(simd.at(like, c_old), index), filters)
            z_i, z_f = simd.load(z_r), simd.load(simd.shift(z_r, width))
            z_g, z_o = simd.load(simd.shift(z_r, 2 * width)), simd.load(simd.shift(z_r, 3 * width))
            if zx != 0:
                added = simd.shift(simd.at(like, zx), 4 * pixel * cell.F + first)
                z_i, z_f = z_i + take(added, filters), z_f + take(simd.shift(added, cell.F), filters)
                added = simd.shift(added, 2 * cell.F)
                z_g, z_o = z_g + take(added, filters), z_o + take(simd.shift(added, cell.F), filters)
            kept_index, weights = 4 * pixel * cell.F + first, pixel * cell.peephole_pixel + first
            c, h = gates_of(like, cell, gates, kept_index, weights, filters, z_i, z_f, z_g, z_o, c)
            put(simd.shift(simd.at(like, c_new), index), c, filters)
            put(simd.shift(simd.at(like, h_new), index), h, filters)
            if y != 0:
                put(simd.shift(simd.at(like, y), index), h, filters)

    return update


FINISHES = {
    "store": store,
    "update": _updating(_standard),
    "update_and_keep": _updating(_standard_keeping),
    "update_any": _updating(_general),
}
"""What may become of the columns, each a kernel of its own: stored; states, with tanh, sigmoid, tanh and nothing else;
these, and the gates kept; states with any activations, peepholes and clipping, the gates kept where there is memory."""


@inline
def _carry(like, pixels, count, F, first, filters, old, new):
    for r in range(count):
        if pixels[r] >= 0:
            index = pixels[r] * F + first
            target = simd.shift(simd.at(like, new), index)
            if old == 0:
                clear_run(target, filters)
            elif old != new:
                copy_run(target, simd.shift(simd.at(like, old), index), filters)


@inline
def skip_step(like, flow, cell, group, pixels, count, b, t):
    """Carry the states of `count` pixels on, and repeat the output before (zeros before the first)."""
    F, first, filters = cell.F, group[3], group[4]
    _carry(like, pixels, count, F, first, filters, h_before(flow, b, t), h_after(flow, b, t))
    _carry(like, pixels, count, F, first, filters, c_before(flow, b, t), c_after(flow, b, t))
    if flow.y != 0:
        _carry(like, pixels, count, F, first, filters, y_at(flow, b, t - 1), y_at(flow, b, t))

"""What happens to finished pre-activations: the fused gate update, or a plain store.

z holds, for each pixel of a tile, the columns of one group: of a convolution up to 4 vectors of filters; of a ConvLSTM
the gates i, f, g, o of up to one vector of filters, each gate `width` lanes wide.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd, vmath
from fastclstm.engines.cpu.kernels.padding import clear_run, copy_run
from fastclstm.engines.cpu.kernels.schedule import c_after, c_before, gates_at, h_after, h_before, y_at, zx_at
from fastclstm.nn.activations import TABLE, Activation
from fastclstm.spec import PEEPHOLE_GATES, CellSpec, ConvLSTMSpec

CELL = np.dtype([
    ("F", np.int64),
    ("recurrent_activation", np.int64), ("activation", np.int64), ("output_activation", np.int64),
    ("peephole_i", np.uint64), ("peephole_f", np.uint64), ("peephole_o", np.uint64),  # addresses, 0: none
    ("peephole_pixel", np.int64),  # weights of the next pixel are so many scalars on
    ("clip", np.float64),
])  # fmt: skip

SCALES = -vmath.LOG2E * np.array([1.0, 1.0, 2.0, 1.0])
"""Factors of the weights of i, f, g, o that let the standard gates be powers of two."""

LINE = 1024
"""Scalars of a line, at most: pixels × filters that go through the gates together where a pixel's fill no vector."""

MOST_PIXELS = 192
"""Pixels of a line, at most."""

C, H, PEEPS, PLANES = 4, 5, 6, 9
"""Which lines hold c, h and three peepholes' weights (the first: the four gates), and how many there are."""


def activation_codes(spec: ConvLSTMSpec | CellSpec) -> tuple[int, int, int] | None:
    """Numbers of the three activations, or None where NumPy must compute one of them."""
    codes = tuple(map(_code, (spec.recurrent_activation, spec.activation, spec.output_activation)))
    return None if None in codes else codes  # type: ignore[return-value]


def _code(function: Activation | None) -> int | None:
    if function is None or TABLE.get(function.name) is not function:
        return None
    return vmath.ACTIVATION_CODES.get(function.name)


def cell(spec: ConvLSTMSpec, peephole: dict[str, np.ndarray] | None) -> np.ndarray:
    """Describe what the cell does, as one `CELL`; it points into the peephole weights."""
    codes = activation_codes(spec)
    assert codes is not None
    cells = _plain_cell(spec.F, codes, np.inf if spec.cell_clip is None else spec.cell_clip)
    if peephole is not None:
        cells = cells.copy()
        record = cells[0]
        for gate in PEEPHOLE_GATES:
            record[f"peephole_{gate}"] = peephole[gate].ctypes.data
        record["peephole_pixel"] = spec.F if spec.peephole == "elementwise" else 0
    return cells


def storing(columns: int) -> np.ndarray:
    """Describe what has no gates, whose columns are stored, as one `CELL`."""
    return _plain_cell(columns, (0, 0, 0), 0.0)


@lru_cache(maxsize=256)
def _plain_cell(F: int, codes: tuple[int, int, int], clip: float) -> np.ndarray:
    cells = np.zeros(1, CELL)
    record = cells[0]
    record["F"], record["clip"] = F, clip
    record["recurrent_activation"], record["activation"], record["output_activation"] = codes
    return cells


def is_standard(spec: ConvLSTMSpec) -> bool:
    """Whether the activations are tanh, sigmoid, tanh: then the weights carry `SCALES`."""
    return activation_codes(spec) == (1, 0, 0)


def kind(spec: ConvLSTMSpec) -> str:
    """Return the kernels' kind: "standard", with peepholes or clipping "peeping", with other activations "any"."""
    if not is_standard(spec):
        return "any"
    return "standard" if spec.peephole is None and spec.cell_clip is None else "peeping"


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
def line_pixels(filters, lanes):
    """How many pixels of a group `finish` should get at once, at most; 1: as they come."""
    return 1 if filters >= lanes else min(MOST_PIXELS, LINE // filters)


def z_bytes(pixels: int, itemsize: int) -> int:
    """Scratch memory for the columns of so many pixels, or of those of a line; lines come first (see `z_after`)."""
    lines = PLANES * (LINE + simd.lanes(itemsize)) * itemsize
    return lines + (max(pixels, MOST_PIXELS) + 4) * 4 * simd.VECTOR_BYTES


@inline
def _pitch(lines):
    """Scalars between two lines."""
    return LINE + simd.vector_lanes(lines)


@inline
def z_after(lines):
    """Where the columns begin in scratch memory of `z_bytes` that begins with the lines."""
    return simd.shift(lines, PLANES * _pitch(lines))


@inline
def repeat_peepholes(like, cell, groups, lines):
    """Fill the lines of peepholes for the last group, where channels have them and are fewer than a vector's lanes."""
    first, filters = groups[len(groups) - 1, 3], groups[len(groups) - 1, 4]
    lanes, line = simd.vector_lanes(lines), simd.shift(lines, PEEPS * _pitch(lines))
    if cell.peephole_i == 0 or cell.peephole_pixel != 0 or filters >= lanes:
        return
    w_i = simd.load_some(simd.shift(simd.at(like, cell.peephole_i), first), filters)
    w_f = simd.load_some(simd.shift(simd.at(like, cell.peephole_f), first), filters)
    w_o = simd.load_some(simd.shift(simd.at(like, cell.peephole_o), first), filters)
    for r in range(line_pixels(filters, lanes)):
        simd.store(simd.shift(line, r * filters), w_i)
        simd.store(simd.shift(line, _pitch(lines) + r * filters), w_f)
        simd.store(simd.shift(line, 2 * _pitch(lines) + r * filters), w_o)


@inline
def _standard(cell, peeps, z_i, z_f, z_g, z_o, c):
    """New c and h, and the gates, from pre-activations that carry SCALES.

    With E = 2**z: c' = [c(1+Ei)(1+Eg) + (1-Eg)(1+Ef)] / [(1+Ei)(1+Eg)(1+Ef)] and h = (1-Ec) / [(1+Eo)(1+Ec)].
    """
    i, f, g, o = 1.0 + vmath.exp2_gate(z_i), 1.0 + vmath.exp2_gate(z_f), vmath.exp2_gate(z_g), vmath.exp2_gate(z_o)
    a, gain, o = i * (1.0 + g), 1.0 - g, 1.0 + o
    c = simd.quotient(simd.fma(c, a, gain * f), a * f)
    e = vmath.exp2_gate(c * (-2.0 * vmath.LOG2E))
    one = simd.broadcast(c, 1.0)
    return c, simd.quotient(1.0 - e, o * (1.0 + e)), one / i, one / f, gain / (1.0 + g), one / o


@inline
def _standard_peeping(cell, peeps, z_i, z_f, z_g, z_o, c):
    """The same with peepholes and clipping."""
    if cell.peephole_i != 0:
        scaled = c * -vmath.LOG2E
        z_i, z_f = simd.fma(scaled, simd.load(peeps[0]), z_i), simd.fma(scaled, simd.load(peeps[1]), z_f)
    i, f, g = 1.0 + vmath.exp2_gate(z_i), 1.0 + vmath.exp2_gate(z_f), vmath.exp2_gate(z_g)
    a, gain = i * (1.0 + g), 1.0 - g
    c = simd.quotient(simd.fma(c, a, gain * f), a * f)
    c = simd.maximum(-cell.clip, simd.minimum(cell.clip, c))
    if cell.peephole_o != 0:
        z_o = simd.fma(c * -vmath.LOG2E, simd.load(peeps[2]), z_o)
    o = 1.0 + vmath.exp2_gate(z_o)
    e = vmath.exp2_gate(c * (-2.0 * vmath.LOG2E))
    one = simd.broadcast(c, 1.0)
    return c, simd.quotient(1.0 - e, o * (1.0 + e)), one / i, one / f, gain / (1.0 + g), one / o


@inline
def _general(cell, peeps, z_i, z_f, z_g, z_o, c):
    """New c and h, and the gates, with any activations, peepholes and clipping."""
    if cell.peephole_i != 0:
        z_i, z_f = z_i + simd.load(peeps[0]) * c, z_f + simd.load(peeps[1]) * c
    i = vmath.activate_gate(cell.recurrent_activation, z_i)
    f = vmath.activate_gate(cell.recurrent_activation, z_f)
    g = vmath.activate_gate(cell.activation, z_g)
    c = simd.fma(f, c, i * g)
    c = simd.maximum(-cell.clip, simd.minimum(cell.clip, c))
    if cell.peephole_o != 0:
        z_o = z_o + simd.load(peeps[2]) * c
    o = vmath.activate_gate(cell.recurrent_activation, z_o)
    return c, o * vmath.activate_gate(cell.output_activation, c), i, f, g, o


@inline
def store(like, flow, cell, group, lines, z, pixels, count, b, t):
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


@inline
def prefetch_zx(like, flow, cell, group, pixels, first, count, side, tiles, t):
    """Ask for what x gives the columns of a group at `count` tiles, of all images' from the `first` on."""
    for n in range(count):
        frame = simd.at(like, zx_at(flow, (first + n) // tiles, t))
        for r in range(n * side, (n + 1) * side):
            if pixels[r] >= 0:
                origin = simd.shift(frame, 4 * pixels[r] * cell.F + group[3])
                for gate in range(4):
                    simd.prefetch(simd.shift(origin, gate * cell.F))


@inline
def _run_length(pixels, r, count, whole):
    """Count of the pixels from the r-th on whose filters follow each other in memory; `whole`: a group has all."""
    length = 1
    if whole:
        while r + length < count and pixels[r + length] == pixels[r] + length:
            length += 1
    return length


@inline
def _copy(target, origin, count):
    """Copy `count` scalars, the last vector overlapping the one before."""
    step = simd.vector_lanes(target)
    if count < step:
        simd.store_some(target, simd.load_some(origin, count), count)
        return
    for k in range(0, count - step, step):
        simd.store(simd.shift(target, k), simd.load(simd.shift(origin, k)))
    simd.store(simd.shift(target, count - step), simd.load(simd.shift(origin, count - step)))


@inline
def _gather(like, flow, cell, group, lines, z, pixels, count, c_old, zx):
    """Bring the z, c and peepholes of pixels to lines without gaps; return their length."""
    step, pitch = simd.vector_lanes(z), _pitch(lines)
    columns, width, first, filters, F = group[1] * step, group[2], group[3], group[4], cell.F
    at = 0
    for r in range(count):
        pixel = pixels[r]
        if pixel < 0:
            continue
        # What is copied too much will be overwritten by the next pixel.
        for gate in range(4):
            line, origin = simd.shift(lines, gate * pitch + at), simd.shift(z, r * columns + gate * width)
            if zx != 0:
                added = simd.shift(simd.at(like, zx), (4 * pixel + gate) * F + first)
                simd.store(line, simd.load(origin) + simd.load_some(added, filters))
            elif 4 * width <= step:
                simd.copy_quarters(1, line, origin)
            elif 2 * width <= step:
                simd.copy_quarters(2, line, origin)
            else:
                simd.copy_quarters(4, line, origin)
        at += filters
    at = r = 0
    while r < count:
        if pixels[r] < 0:
            r += 1
            continue
        length = _run_length(pixels, r, count, filters == F)
        index, size = pixels[r] * F + first, length * filters
        _copy(simd.shift(lines, C * pitch + at), simd.shift(simd.at(like, c_old), index), size)
        if cell.peephole_pixel != 0:
            line = simd.shift(lines, PEEPS * pitch + at)
            _copy(line, simd.shift(simd.at(like, cell.peephole_i), index), size)
            _copy(simd.shift(line, pitch), simd.shift(simd.at(like, cell.peephole_f), index), size)
            _copy(simd.shift(line, 2 * pitch), simd.shift(simd.at(like, cell.peephole_o), index), size)
        at += size
        r += length
    return at


@inline
def _scatter(like, cell, group, lines, pixels, count, c_new, h_new, y, kept):
    """Bring the c and h of pixels, and their gates where `kept` is an address, from lines to where they belong."""
    pitch, first, filters, F = _pitch(lines), group[3], group[4], cell.F
    at = r = 0
    while r < count:
        if pixels[r] < 0:
            r += 1
            continue
        length = _run_length(pixels, r, count, filters == F)
        index, size = pixels[r] * F + first, length * filters
        h = simd.shift(lines, H * pitch + at)
        _copy(simd.shift(simd.at(like, c_new), index), simd.shift(lines, C * pitch + at), size)
        _copy(simd.shift(simd.at(like, h_new), index), h, size)
        if y != 0:
            _copy(simd.shift(simd.at(like, y), index), h, size)
        at += size
        r += length
    if kept != 0:
        at = 0
        for r in range(count):
            if pixels[r] >= 0:
                target, line = simd.shift(simd.at(like, kept), 4 * pixels[r] * F + first), simd.shift(lines, at)
                simd.store_some(target, simd.load(line), filters)
                simd.store_some(simd.shift(target, F), simd.load(simd.shift(line, pitch)), filters)
                simd.store_some(simd.shift(target, 2 * F), simd.load(simd.shift(line, 2 * pitch)), filters)
                simd.store_some(simd.shift(target, 3 * F), simd.load(simd.shift(line, 3 * pitch)), filters)
                at += filters


def _updating(gates_of, keeps):
    """Return the function that makes new states by `gates_of`; the gates are kept where there is memory, if `keeps`."""

    @inline
    def update(like, flow, cell, group, lines, z, pixels, count, b, t):
        """Make new states of the z of `count` pixels, as `store`.

        A pixel's filters are a vector of their own where they fill it, else they and those of the others are one line.
        """
        lanes, width, first = simd.vector_lanes(z), group[2], group[3]
        c_old, c_new, h_new = c_before(flow, b, t), c_after(flow, b, t), h_after(flow, b, t)
        zx, y, kept = zx_at(flow, b, t), y_at(flow, b, t), gates_at(flow, b, t) if keeps else np.uint64(0)
        in_place = group[4] == lanes
        if in_place:
            vectors, z_step, z_gate, pixel_step, kept_gate = count, group[1] * lanes, width, cell.F, cell.F
            c_from, c_to, h_to = simd.at(like, c_old), simd.at(like, c_new), simd.at(like, h_new)
            kept_to, kept_step, peep_step = simd.at(like, kept), 4 * cell.F, cell.peephole_pixel
            peep_i, peep_f = simd.at(like, cell.peephole_i), simd.at(like, cell.peephole_f)
            peep_o = simd.at(like, cell.peephole_o)
        else:
            pitch = _pitch(lines)
            cells = _gather(like, flow, cell, group, lines, z, pixels, count, c_old, zx)
            first = 0
            vectors, z_step, z_gate, pixel_step, kept_gate = (cells + lanes - 1) // lanes, lanes, pitch, lanes, pitch
            z = kept_to = lines
            c_from, h_to = simd.shift(lines, C * pitch), simd.shift(lines, H * pitch)
            c_to, kept_step, peep_step = c_from, lanes, lanes
            peep_i, peep_f = simd.shift(lines, PEEPS * pitch), simd.shift(lines, (PEEPS + 1) * pitch)
            peep_o = simd.shift(lines, (PEEPS + 2) * pitch)
        for v in range(vectors):
            pixel = pixels[v] if in_place else v
            if pixel < 0:
                continue
            index, peep, z_v = pixel * pixel_step + first, pixel * peep_step + first, simd.shift(z, v * z_step)
            z_i, z_f = simd.load(z_v), simd.load(simd.shift(z_v, z_gate))
            z_g, z_o = simd.load(simd.shift(z_v, 2 * z_gate)), simd.load(simd.shift(z_v, 3 * z_gate))
            if zx != 0 and in_place:
                added = simd.shift(simd.at(like, zx), 4 * pixel * cell.F + first)
                z_i, z_f = z_i + simd.load(added), z_f + simd.load(simd.shift(added, cell.F))
                added = simd.shift(added, 2 * cell.F)
                z_g, z_o = z_g + simd.load(added), z_o + simd.load(simd.shift(added, cell.F))
            peeps = simd.shift(peep_i, peep), simd.shift(peep_f, peep), simd.shift(peep_o, peep)
            c, h, i, f, g, o = gates_of(cell, peeps, z_i, z_f, z_g, z_o, simd.load(simd.shift(c_from, index)))
            simd.store(simd.shift(c_to, index), c)
            simd.store(simd.shift(h_to, index), h)
            if y != 0 and in_place:
                simd.store(simd.shift(simd.at(like, y), index), h)
            if keeps and kept != 0:
                target = simd.shift(kept_to, pixel * kept_step + first)
                simd.store(target, i)
                simd.store(simd.shift(target, kept_gate), f)
                simd.store(simd.shift(target, 2 * kept_gate), g)
                simd.store(simd.shift(target, 3 * kept_gate), o)
        if not in_place:
            _scatter(like, cell, group, lines, pixels, count, c_new, h_new, y, kept)

    return update


GATES = {
    "update": (_standard, False),
    "update_and_keep": (_standard, True),
    "update_peeping": (_standard_peeping, True),
    "update_any": (_general, True),
}
"""How states are made of pre-activations, and whether the gates can be kept, by the name of a kernel's finish."""

FINISHES = {"store": store} | {name: _updating(*how) for name, how in GATES.items()}
"""What may become of the columns, each a kernel of its own: stored; states, with tanh, sigmoid, tanh and nothing else;
these, and the gates kept; the same with peepholes and clipping, and with any activations too, the gates kept where
there is memory."""


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

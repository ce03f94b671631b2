"""A ConvLSTM step by step on the cpu engine: convolutions into pre-activations, then kernels over these, and back.

What one kernel for all of a step cannot do goes this way: normalization, whose statistics need all of z; in-cell
dropout, with which each gate sees inputs of its own; and the training of activations whose slope does not follow from
their value.
What a step keeps for the way back is z, of which everything else is computed again, and the cell state.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np

from fastclstm.engines import lending, remembered
from fastclstm.engines.cpu import launch, outliers, packing, plans, threads, weight_gradient
from fastclstm.engines.cpu.input_gradient import InputGradient
from fastclstm.engines.cpu.kernels import cell_steps, gates
from fastclstm.engines.cpu.kernels.entry import table
from fastclstm.engines.cpu.kernels.schedule import Plan, Slots, slots
from fastclstm.engines.cpu.normalizing import Normalizing, Statistics
from fastclstm.engines.cpu.program import EVERY, Course, Pace, Program, course
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.nn.activations import is_bounded
from fastclstm.spec import GATES, PEEPHOLE_GATES, ConvLSTMSpec, ConvSpec

Arrays = dict[str, np.ndarray]
Pair = tuple[np.ndarray | None, np.ndarray | None]

CHUNK_BYTES = 2048
"""Size of a line of a chunk, about."""

STRIP_PIXELS = 64
"""Pixels whose sums are taken together, about."""

PIECE_BYTES = 4 << 20
"""Pre-activations of the steps whose frames are convolved together where they are not kept, about."""

CELL_FLOPS = 200
"""Computing one value of a new state takes as long as so many operations, for the number of threads."""

MASK_FLOPS = 8
"""Multiplying a scalar by its mask takes as long as so many operations, for the number of threads."""

PART_NUMBERS = table(np.array([0])), table(np.array([1]))


@dataclass(frozen=True)
class Inputs:
    """What a call was given."""

    x: np.ndarray
    kernels: tuple[np.ndarray, np.ndarray]
    """The recurrent and the input kernel."""
    bias: np.ndarray | None
    first: Pair
    peephole: Arrays | None
    mask: np.ndarray | None
    normalization: Arrays | None
    dropout: Arrays | None
    algorithm: str


@dataclass(frozen=True)
class Saved:
    """What the way back needs of the forward pass, steps in the order of processing."""

    inputs: Inputs
    direct: np.ndarray
    """The images (B,) that took direct convolutions, because of what `outliers` finds."""
    statistics: list[tuple[Statistics, ...]] = field(default_factory=list)
    """Of each step, of each part that is normalized."""
    kept: list[tuple[np.ndarray, np.ndarray | None, np.ndarray]] = field(default_factory=list)
    """z, zh where it is normalized separately, and c (B, T + 1, HO, WO, F), until the way back uses them up."""
    states: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """h (B, T, HO, WO, F) and c, where they are all that is kept."""

    @property
    def steps(self) -> list[tuple[tuple[Statistics, ...]]]:
        """The statistics as `recurrence.Saved` holds them."""
        return [(found,) for found in self.statistics]


def knows(spec: ConvLSTMSpec) -> bool:
    """Whether there are kernels for everything that the cell does."""
    return spec.B > 0 and spec.peephole != "conv" and gates.activation_codes(spec) is not None


def _split(weights: np.ndarray) -> list[np.ndarray]:
    """Of a kernel or a bias each gate's."""
    return list(map(np.ascontiguousarray, np.split(weights, len(GATES), -1)))


class _Convolution:
    """A sum of convolutions whose result is stored, planned and packed."""

    def __init__(
        self,
        specs: tuple[ConvSpec, ...],
        kernels: tuple[np.ndarray, ...],
        bias: np.ndarray | None,
        algorithm: str,
        *,
        remember: bool,
    ):
        self._specs, self._kernels = specs, kernels
        self._tile = plans.choose(specs, algorithm, kernels[0].itemsize, remember=remember)
        strides = tuple(spec.strides for spec in specs)
        self._packed = cache(
            lambda tile: launch.pack(kernels, bias, np.ones(1), tile, strides=strides, remember=remember)
        )
        self._cell = gates.storing(specs[0].F)

    def run(self, target: Slots, B: int, T: int, direct: np.ndarray, x: Slots) -> None:
        """Store T steps of B images in `target`; those that are `direct`, and all where infinities come out, directly.

        x are the frames of a single convolution.
        """
        tile = None if direct.all() else self._tile
        trouble = self._run(tile, target, B, T, x)
        if tile:
            for b in np.flatnonzero(trouble | direct).tolist():
                self._run(None, target.after(b, 0), 1, T, x.after(b, 0))

    def _plan(self, tile: Tile | None, B: int, team: int) -> tuple[Plan, packing.Columns]:
        specs, columns = tuple(spec.with_batch(B) for spec in self._specs), self._packed(tile)
        return plans.plan(specs, tile, "store", len(columns.groups), self._kernels[0].itemsize, team), columns

    def _run(self, tile: Tile | None, target: Slots, B: int, T: int, x: Slots) -> np.ndarray:
        flops = sum(spec.with_batch(B).flops for spec in self._specs)
        team = launch.team_size(flops)
        plan, columns = self._plan(tile, B, team)
        return launch.run(plan, columns, self._cell, B, T, team, x=x, h=target, step_flops=flops)

    def add(
        self, program: Program, target: Course, B: int, direct: np.ndarray, team: int, *, x: Course | None = None,
        h: Course | None = None, fresh: np.ndarray | bool = False, where: slice = EVERY,
    ) -> np.ndarray:  # fmt: skip
        """Add it to a program; where (B,) the result is not 0 then, the image must be done again directly.

        x are the frames; of two convolutions those of the second, and h of the first.
        """
        tile, trouble = None if direct.all() else self._tile, np.zeros(B, np.int64)
        jobs = [(tile, 0, B, trouble)]
        if tile:
            jobs += [(None, b, 1, np.zeros(1, np.int64)) for b in np.flatnonzero(direct).tolist()]
        for way, b, count, found in jobs:
            plan, columns = self._plan(way, count, team)
            sources = {"x": None if x is None else x.after(b), "h": None if h is None else h.after(b)}
            program.convolve(plan, columns, self._cell, count, found, target=target.after(b), **sources, fresh=fresh,
                             where=where)  # fmt: skip
        return trouble if tile else np.zeros(B, np.int64)


class _Cell:
    """Everything of a call but its states: convolutions, tables and the record that kernels read."""

    def __init__(self, spec: ConvLSTMSpec, inputs: Inputs, direct: np.ndarray, *, remember: bool):
        x, dtype, mask = inputs.x, inputs.x.dtype, inputs.mask
        self.spec, self.dtype, self.direct = spec, dtype, direct
        self.planar = inputs.dropout is not None
        """Whether z lies gate by gate, (4, B, T, HO, WO, F), each the result of convolutions of its own."""
        self.masks = inputs.dropout or {}
        ordered = x if mask is None else np.where(mask[:, :, None, None, None], x, dtype.type(0))
        self.x = ordered[:, ::-1] if spec.go_backwards else ordered
        steps = np.ones((spec.T, spec.B), np.int64) if mask is None else mask.T.astype(np.int64)
        self.valid = np.ascontiguousarray(steps[::-1] if spec.go_backwards else steps)
        pixels, F = spec.HO * spec.WO, spec.F
        chunk = min(max(1, CHUNK_BYTES // (F * dtype.itemsize)), pixels)
        strip = -(-STRIP_PIXELS // chunk) * chunk
        strips = -(-pixels // strip)
        self.normalizing = Normalizing(spec, inputs.normalization, inputs.bias, strips, dtype)
        self.separate = len(self.normalizing.parts) == 2
        codes = gates.activation_codes(spec)
        assert codes is not None
        self._step = np.zeros(1, cell_steps.STEP)
        self.put(
            B=spec.B, pixels=pixels, F=F, chunk=chunk, strip=strip, strips=strips, recurrent_activation=codes[0],
            activation=codes[1], output_activation=codes[2], clip=np.inf if spec.cell_clip is None else spec.cell_clip,
            pixel=F if self.planar else 4 * F,
            runs=4 if self.planar else 1, run=F if self.planar else 4 * F,
        )  # fmt: skip
        if len(self.normalizing.parts):
            n = self.normalizing
            self.put(statistics_image=4 * F if n.per_image else 0, weights_pixel=4 * F if n.elementwise else 0,
                     groups=n.groups, given=n.given, epsilon=spec.normalization.epsilon)  # fmt: skip
        self.peepholes = None
        if inputs.peephole is not None:
            whole = np.stack([inputs.peephole[gate].reshape(-1) for gate in PEEPHOLE_GATES])
            self.peepholes = np.ascontiguousarray(whole if spec.peephole == "elementwise" else np.tile(whole, chunk))
            self.put(peephole=self.peepholes.ctypes.data, peephole_size=self.peepholes.shape[1],
                     peephole_pixel=F if spec.peephole == "elementwise" else 0)  # fmt: skip
        self.flops = spec.flops // spec.T + CELL_FLOPS * spec.B * pixels * F
        """Operations of a step, about."""
        self.team = launch.team_size(self.flops)
        pitch = -(-chunk * F // 16) * 16 + 32  # lines at different places of the cache
        rows = lending.aligned_empty(self.team * cell_steps.LINES * pitch, dtype).reshape(self.team, -1)
        self.like, self.parts, self.rows = (
            table(array) for array in (np.empty(0, dtype), self.normalizing.parts, rows)
        )
        self._plan_convolutions(inputs, remember)

    def _plan_convolutions(self, inputs: Inputs, remember: bool) -> None:
        spec = self.spec
        bias = None if self.separate else inputs.bias
        self.specs = spec.recurrent, spec.input
        """Geometry of the convolutions of h and x: of all gates, or of one where z is planar."""
        self.kernels = [inputs.kernels]
        """Their kernels, of all gates together or of each."""
        biases: list[np.ndarray | None] = [bias]
        if self.planar:
            self.specs = replace(spec.recurrent, F=spec.F), replace(spec.input, F=spec.F)
            self.kernels = list(zip(*map(_split, inputs.kernels), strict=True))
            biases = [None] * len(GATES) if bias is None else [*_split(bias)]
        self.joint = plans.alike(self.specs) and not self.separate and not self.planar
        """Whether the convolutions of x and h are summed by one kernel."""
        one = partial(_Convolution, algorithm=inputs.algorithm, remember=remember and not self.planar)
        if self.joint:
            self._both = one(self.specs, inputs.kernels, bias)
        else:
            self._of_h = [one(self.specs[:1], (recurrent,), None) for recurrent, _ in self.kernels]
            self._of_x = [one(self.specs[1:], (k,), b) for (_, k), b in zip(self.kernels, biases, strict=True)]

    def put(self, **values: Any) -> None:
        """Set fields of the record."""
        record = self._step[0]
        for name, value in values.items():
            record[name] = value

    def records(self, steps: int, **arrays: Course) -> np.ndarray:
        """What kernels read of some steps, with the places of arrays of the states' kind."""
        records = np.repeat(self._step, steps)
        self.place(records, **arrays)
        return records

    def place(self, records: np.ndarray, **arrays: Course) -> None:
        """Set the places of arrays of the states' kind."""
        for name, where in arrays.items():
            records[name], records[f"{name}_image"] = where

    def place_z(self, records: np.ndarray, name: str, array: np.ndarray | None, at: np.ndarray) -> None:
        """Set where pre-activations are: steps `at` of an array."""
        if array is None:
            return
        time = 2 if self.planar else 1
        records[name] = array.ctypes.data + at * array.strides[time]
        records[f"{name}_image"] = array.strides[time - 1]
        records[f"{name}_gate"] = array.strides[0] // array.itemsize if self.planar else self.spec.F

    def empty_z(self, T: int) -> np.ndarray:
        """Memory for pre-activations of T steps."""
        spec = self.spec
        frame = spec.B, T, spec.HO, spec.WO
        shape = (4, *frame, spec.F) if self.planar else (*frame, 4 * spec.F)
        return lending.lend(shape, self.dtype)

    def gates_of(self, z: np.ndarray, t: int) -> list[Slots]:
        return [slots(gate[:, t:]) for gate in z] if self.planar else [slots(z[:, t:])]

    def seen(self, name: str, frames: np.ndarray) -> Iterator[np.ndarray]:
        """Frames (B, T, …) as the gates see them, one after the other in the same memory where there is dropout."""
        if name not in self.masks:
            yield from (frames for _ in self.kernels)
            return
        memory = lending.lend(frames.shape, self.dtype)
        for mask in self.masks[name]:
            self.mask(frames, mask, memory)
            yield memory

    def mask(self, frames: np.ndarray, mask: np.ndarray | None, target: np.ndarray, *, adds: bool = False) -> None:
        """Write frames (B, T, …) times a mask (B, …), None: as they are, to the target, or add them to it."""
        B, T, *frame = frames.shape
        source, place = slots(frames), slots(target)
        masks = (0, 0) if mask is None else (mask.ctypes.data, mask.strides[0])
        work = np.zeros(1, cell_steps.MASKING)
        work[0] = (B, T, math.prod(frame), *source[:3], *place[:3], *masks, adds)
        threads.run(cell_steps.mask, launch.team_size(MASK_FLOPS * frames.size), (), self.like, work)

    def convolve_x(self, z: np.ndarray, first: int, count: int) -> None:
        """Convolve the frames of some steps together."""
        if self.joint:
            return
        frames = self.seen("x", self.x[:, first : first + count])
        for convolution, target, seen in zip(self._of_x, self.gates_of(z, 0), frames, strict=True):
            convolution.run(target, self.spec.B, count, self.direct, x=slots(seen))

    def add_h(
        self, program: Program, z: np.ndarray, zh: np.ndarray | None, ts: np.ndarray, h: Course,
        masked: np.ndarray | None, fresh: bool, *, at: np.ndarray, at_h: np.ndarray,
    ) -> list[np.ndarray]:  # fmt: skip
        """Add the convolutions of h at steps `ts` to a program: to steps `at` of z (with x), or `at_h` of zh.

        masked: h as the gates see it, each step's in the same memory; fresh: at the first step h is zeros. What is
        returned tells afterwards which images (B,) must be done again directly.
        """
        B, team = self.spec.B, min(self.team, max(1, sum(spec.flops for spec in self.specs) // launch.SERIAL_FLOPS))
        if self.joint:
            first = np.zeros(len(ts), np.int64)
            first[0] = fresh
            x, target = course(slots(self.x), ts), course(slots(z), at)
            return [self._both.add(program, target, B, self.direct, team, x=x, h=h, fresh=first)]
        assert zh is not None
        if fresh:
            zh[(slice(None),) * (2 if self.planar else 1) + (int(at_h[0]),)] = 0
        found = []
        for gate, (convolution, slot) in enumerate(zip(self._of_h, self.gates_of(zh, 0), strict=True)):
            seen = h if masked is None else course(slots(masked[gate]), np.zeros(len(ts), np.int64))
            target = course(slot, at_h)
            where = slice(int(fresh), None)
            found.append(convolution.add(program, target, B, self.direct, team, x=seen, where=where))
        return found

    def add_statistics(self, program: Program, records: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Add the statistics of pre-activations to a program; return the memory where they will be."""
        n = self.normalizing
        if not len(n.parts):
            return np.zeros((program.steps, 0))
        found = n.memory(program.steps)
        records["statistics"] = found.ctypes.data + np.arange(program.steps) * found.strides[0]
        records["summed"] = int(not n.given)
        for part in PART_NUMBERS[: 0 if n.given else len(n.parts)]:
            program.add(cell_steps.measure, (), self.like, records, self.parts, valid, part)
        program.keep(found)
        return found


@dataclass(frozen=True)
class _Ready:
    """Launches of some steps, and what they read and write but for frames and states.

    Where they are all steps of a call without a mask, they can be run again with others.
    """

    cell: _Cell
    z: np.ndarray
    program: Program
    records: np.ndarray
    found: list[np.ndarray]
    statistics: np.ndarray


READY_BYTES = 1 << 20, 8 << 20
"""Size of the pre-activations of a step, and of the weights, at most, for which launches are kept for the next call: of
larger ones Python's share is small."""


def _ready(spec: ConvLSTMSpec, inputs: Inputs) -> deque[_Ready] | None:
    """What calls with these weights have left, each for one that takes it away; None: it is not worth keeping."""
    weights = *inputs.kernels, inputs.bias, *(inputs.normalization or {}).values(), *(inputs.peephole or {}).values()
    size = 4 * math.prod(spec.state_shape) * inputs.x.itemsize, sum(w.nbytes for w in weights if w is not None)
    if size[0] > READY_BYTES[0] or size[1] > READY_BYTES[1]:
        return None
    key = "steps", spec, inputs.algorithm, tuple(inputs.normalization or {}), threads.usable_threads()
    found: deque[_Ready] = remembered.remember(weights, key, lambda: deque(maxlen=2))
    return found


def forward(
    spec: ConvLSTMSpec, inputs: Inputs, save: bool | str, out: tuple[np.ndarray, np.ndarray] | None,
    spoilt: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Saved | None]:  # fmt: skip
    """Run a ConvLSTM: output, last h, last c and, with `save`, what `backward` needs: see `convlstm2d`.

    The images (B,) that are `spoilt` take direct convolutions. Where others turn out to be, all begins again.
    """
    x, dtype, mask, T, state = inputs.x, inputs.x.dtype, inputs.mask, spec.T, spec.state_shape
    direct = np.zeros(spec.B, np.bool_) if spoilt is None else spoilt
    if inputs.algorithm != "direct":
        direct = direct | outliers.find(x, mask)
        direct |= False if inputs.first[0] is None else outliers.find(inputs.first[0])
    saved = Saved(inputs, direct)
    pool = _ready(spec, inputs) if not (save or direct.any() or mask is not None or inputs.dropout) else None
    try:
        ready = pool.pop() if pool else None
    except IndexError:  # another thread has taken it
        ready = None
    if ready:
        cell = ready.cell
        cell.x = x[:, ::-1] if spec.go_backwards else x
    else:
        cell = _Cell(spec, inputs, direct, remember=not save)
    keep = save is True
    step_bytes = 4 * math.prod(state) * dtype.itemsize
    length = T if keep else 1 if cell.joint else min(T, max(1, PIECE_BYTES // step_bytes))
    z = ready.z if ready else cell.empty_z(length)
    zh = None if cell.joint else cell.empty_z(T if keep and cell.separate else 1)

    h_first, c_first = inputs.first
    sequence = np.empty((spec.B, T, *state[1:]), dtype) if spec.return_sequences else None
    everything = save == "states"
    own = everything or mask is not None or sequence is None
    h = np.empty((spec.B, T if everything else 1, *state[1:]), dtype) if own else sequence
    assert h is not None
    y = None if sequence is h or (mask is None and sequence is None) else sequence
    if mask is not None and sequence is None:
        y = np.empty((spec.B, 1, *state[1:]), dtype)
    c = np.empty((spec.B, T + 1 if save else 1, *state[1:]), dtype)
    c[:, 0] = 0 if c_first is None else c_first
    start = h_first
    if mask is not None and h_first is None:
        start = np.zeros(state, dtype)
    if start is not None and h.shape[1] == 1:
        h[:, 0] = start
    masked = None
    if "h" in cell.masks:
        masks = cell.masks["h"]
        masked = np.empty(masks.shape, dtype) if start is None else masks * start
        cell.put(masks=masks.ctypes.data, masked=masked.ctypes.data)
    # of states that are bounded nothing need be looked for that Winograd's transforms would spoil
    bounded = is_bounded(spec.recurrent_activation) and is_bounded(spec.output_activation)
    pace = Pace(cell.flops, T if bounded or h.shape[1] == T else 1)
    t = 0
    while t < T:
        j = t % length
        if j == 0:
            cell.convolve_x(z, t, min(length, T - t))
        count = min(pace.steps, T - t if cell.joint else min(length - j, T - t))
        ts = np.arange(t, t + count)
        at, at_h = ts % length, ts if zh is not None and zh.shape[-4] == T else 0 * ts
        everywhere = course(slots(h), ts)
        before = course(slots(h), ts - 1)
        if t == 0 and h.shape[1] > 1:  # where h has one slot `start` is there already
            before = before.begin(slots(start))
        fresh = t == 0 and start is None
        now, then = (ts, ts + 1) if save else (0 * ts, 0 * ts)
        places = {"c": course(slots(c), now), "c_new": course(slots(c), then), "h": everywhere, "h_before": before}
        if y is not None:
            places |= {"y": course(slots(y), ts), "y_before": course(slots(y), ts - 1)}
        valid = cell.valid[t : t + count]
        if ready and ready.program.steps == count:
            made = ready
            made.program.begin_again(x=course(slots(cell.x), ts), h=before, fresh=fresh)
            cell.place(made.records, **places)
        else:
            program = Program(count)
            found = cell.add_h(program, z, zh, ts, before, masked, fresh, at=at, at_h=at_h)
            records = cell.records(count, **places)
            cell.place_z(records, "z", z, at)
            cell.place_z(records, "zh", zh, at_h)
            statistics = cell.add_statistics(program, records, valid)
            program.add(cell_steps.forward, (), cell.like, records, cell.parts, valid, cell.rows)
            made = _Ready(cell, z, program, records, found, statistics)
        if t == 0:
            made.records["y_before"][0] = 0
            if start is None:
                made.records["h_before"][0] = made.records["h"][0]
                if not cell.separate:
                    made.records["zh"][0] = 0
        made.program.run(cell.team, pace)
        trouble = np.logical_or.reduce(made.found) & ~direct
        if not bounded and inputs.algorithm != "direct":
            states = h[:, t : t + count] if h.shape[1] == T else h
            trouble |= outliers.find(states) & ~direct
        if trouble.any():
            return forward(spec, inputs, save, out, direct | trouble)
        if save:
            saved.statistics.extend(map(cell.normalizing.statistics, made.statistics, valid))
        t += count
        if pool is not None and cell.joint and count == T:
            cell.x = np.empty((0, 0), dtype)  # let go of
            pool.append(made)
    h_last, c_last = h[:, (T - 1) % h.shape[1]].copy(), np.ascontiguousarray(c[:, T if save else 0])
    if save:
        c_last = c_last.copy()
    output = sequence
    if output is None:
        output = h_last.copy() if y is None else y[:, 0]
    if out is not None:
        np.copyto(out[0], h_last)
        np.copyto(out[1], c_last)
        h_last, c_last = out
    if keep:
        saved.kept.append((z, zh if cell.separate else None, c))
    elif save:
        saved.states.append((h, c))
    return output, h_last, c_last, saved if save else None


def backward(
    spec: ConvLSTMSpec, saved: Saved, dy: np.ndarray | None, dh: np.ndarray | None, dc: np.ndarray | None,
    *, input_gradient: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Pull gradients of the output, the last h and the last c back through time: see `recurrence.backward`.

    The gradients of an initial state that was not given are not computed: they are None.
    """
    way = _WayBack(spec, saved, dy, dh, dc, input_gradient)
    try:
        if saved.states:
            way.pull_back_pieces(*saved.states[0])
        else:
            try:
                z, zh, c = saved.kept.pop()
            except IndexError:  # they are used up
                *_, again = forward(spec, saved.inputs, True, None, saved.direct)
                assert again is not None
                z, zh, c = again.kept.pop()
            way.pull_back(z, zh, c, 0, saved.inputs.first[0])
    except _Spoilt as spoilt:
        again = replace(saved, direct=saved.direct | spoilt.images, kept=[])
        return backward(spec, again, dy, dh, dc, input_gradient=input_gradient)
    return way.gradients()


class _Spoilt(Exception):
    """Some images need direct convolutions: all begins again."""

    def __init__(self, images: np.ndarray):
        super().__init__()
        self.images = images


class _WayBack:
    """The gradients so far, on the way back through the steps."""

    def __init__(
        self, spec: ConvLSTMSpec, saved: Saved, dy: np.ndarray | None, dh: np.ndarray | None, dc: np.ndarray | None,
        input_gradient: bool,
    ):  # fmt: skip
        inputs, dtype = saved.inputs, saved.inputs.x.dtype
        spoilt = saved.direct.copy()
        if inputs.algorithm != "direct":
            for array in (inputs.first[0], dy, dh, dc):
                spoilt |= False if array is None else outliers.find(array)
        self._runs = outliers.runs(spoilt)
        self._spec, self._saved, self._cell = spec, saved, _Cell(spec, inputs, saved.direct, remember=False)
        cell = self._cell
        self._dx = None
        if input_gradient:
            self._dx = np.zeros_like(inputs.x) if cell.planar else np.empty_like(inputs.x)
        self._dh, self._dc = (np.zeros(spec.state_shape, dtype) if d is None else d.copy() for d in (dh, dc))
        self._dy = dy if spec.return_sequences else None
        masked = inputs.mask is not None
        self._doutput = np.zeros_like(self._dh) if masked else self._dh  # of what masked steps repeat
        if dy is not None and not spec.return_sequences:
            self._doutput += dy
        strips = int(cell._step[0]["strips"])
        self._sums = np.zeros((spec.B, strips, 7 * spec.F), dtype)
        cell.put(sums=self._sums.ctypes.data)
        self._dpeephole = None
        if spec.peephole == "elementwise":
            self._dpeephole = np.zeros((spec.B, 3, *spec.state_shape[1:]), dtype)
            cell.put(dpeephole=self._dpeephole.ctypes.data)
        self._parts_of = None
        if len(cell.normalizing.parts):
            cell.normalizing.start_back(dtype)
            self._parts_of = cell.normalizing.again(saved.statistics)
        self._da = cell.empty_z(1) if len(cell.normalizing.parts) else None
        self._planes = None
        if cell.planar or masked:
            self._planes = np.zeros((len(cell.kernels), *spec.state_shape), dtype)
            masks = cell.masks["h"].ctypes.data if "h" in cell.masks else 0
            cell.put(masks=masks, masked=self._planes.ctypes.data, planes=len(self._planes))
        ways = inputs.algorithm, "direct"
        self._recurrent, self._inputs = (
            cache(lambda gate, direct, n=n: InputGradient(cell.specs[n], cell.kernels[gate][n], ways[direct]))
            for n in range(2)
        )
        self._kernels = {
            (gate, direct): weight_gradient.of_kernels(
                *cell.specs, ways[direct], spec.B * spec.T, dtype, one_dz=not cell.separate
            )
            for gate in range(len(cell.kernels))
            for direct in sorted({direct for _, direct in self._runs})
        }

    def _team(self, B: int) -> int:
        """Threads for a step of B images."""
        return launch.team_size(self._spec.recurrent.with_batch(B).flops)

    def pull_back_pieces(self, h: np.ndarray, c: np.ndarray) -> None:
        """Compute the pre-activations of some steps at a time again, from the states, and go back through them."""
        spec, cell, T = self._spec, self._cell, self._spec.T
        step = 4 * math.prod(spec.state_shape) * cell.dtype.itemsize
        length = min(T, max(1, PIECE_BYTES // step))
        z, zh = cell.empty_z(length), None if cell.joint else cell.empty_z(length)
        first = self._saved.inputs.first[0]
        if self._saved.inputs.mask is not None and first is None:
            first = np.zeros(spec.state_shape, cell.dtype)
        for start in reversed(range(0, T, length)):
            count = min(length, T - start)
            cell.convolve_x(z, start, count)
            for j in range(count):
                before = h[:, start + j - 1] if start + j else first
                masked = None if "h" not in cell.masks or before is None else cell.masks["h"] * before
                program, at = Program(1), np.array([j])
                where = course(slots(before), np.array([0]))
                cell.add_h(program, z, zh, at + start, where, masked, before is None, at=at, at_h=at)
                program.run(cell.team, Pace(cell.flops, 1))
            self.pull_back(z, zh, c[:, start : start + count + 1].copy(), start, h[:, start - 1] if start else first)

    def pull_back(
        self, z: np.ndarray, zh: np.ndarray | None, c: np.ndarray, first: int, h_start: np.ndarray | None
    ) -> None:
        """Take all images back through the steps of a piece; z, zh and c become dz, dzh and h."""
        spec, saved, cell = self._spec, self._saved, self._cell
        n, valid = cell.normalizing, cell.valid
        count, with_mask = c.shape[1] - 1, saved.inputs.mask is not None
        given = any(state is not None for state in saved.inputs.first)
        dz_h = z if zh is None or not cell.separate else zh
        pace, stop = Pace(cell.flops, 1 if with_mask else count), count
        while stop > 0:
            start = max(0, stop - pace.steps)
            at = np.arange(start, stop)[::-1]
            ts = first + at
            program = Program(len(at))
            here = 0 * at
            records = cell.records(len(at), dh=course(slots(self._dh), here), dc=course(slots(self._dc), here),
                                   c=course(slots(c), at), h=course(slots(c), at + 1))  # fmt: skip
            cell.place_z(records, "z", z, at)
            cell.place_z(records, "zh", zh, at)
            cell.place_z(records, "da", *((z, at) if self._da is None else (self._da, here)))
            if with_mask:
                self._doutput += 0 if self._dy is None else self._dy[:, ts[0]]
                records["dy"], records["dy_image"] = course(slots(self._doutput), here)
            elif self._dy is not None:
                records["dy"], records["dy_image"] = course(slots(self._dy), ts)
            steps = np.ascontiguousarray(valid[ts])
            parts = cell.parts if self._parts_of is None else np.ascontiguousarray(self._parts_of[ts])
            program.add(cell_steps.backward, (), cell.like, records, parts, steps, cell.rows)
            for number in PART_NUMBERS[: len(n.parts)]:
                program.add(cell_steps.backward_of_normalization, (), cell.like, records, parts, steps, number)
            where = slice(0, len(at) if start + first > 0 or given else len(at) - 1)
            found = self._add_h(program, dz_h, at, records, steps, where)
            program.run(cell.team, pace)
            if with_mask:
                self._doutput[steps[0] != 0] = 0
            spoilt = np.zeros(spec.B, np.bool_)
            for images, troubled in found:
                spoilt[images] |= troubled != 0
            if spoilt.any():
                raise _Spoilt(spoilt)
            stop = start
        c[:, 0] = 0 if h_start is None else h_start
        if with_mask:
            for j, b in zip(*np.nonzero(valid[first : first + count] == 0), strict=True):
                c[b, j + 1] = c[b, j]
        self._pull_back_inputs(z, dz_h, c, first, count)

    def _add_h(
        self, program: Program, dz: np.ndarray, at: np.ndarray, records: np.ndarray, valid: np.ndarray, where: slice
    ) -> list[tuple[slice, np.ndarray]]:
        """Add the gradient of h to a program, at the steps `where`.

        What is returned tells afterwards which of some images must be done again directly.
        """
        cell, here = self._cell, 0 * at
        found: list[tuple[slice, np.ndarray]] = []
        if not len(at[where]):
            return found
        for gate, source in enumerate(cell.gates_of(dz, 0)):
            target = course(slots(self._dh if self._planes is None else self._planes[gate]), here)
            for images, direct in self._runs:
                B, b = images.stop - images.start, images.start
                way = self._recurrent(gate, direct)
                dx = target.after(b)
                found.append((images, way.add(program, course(source, at).after(b), dx, B, self._team(B), where)))
                if direct:
                    found.pop()
        if self._planes is not None:
            program.add(cell_steps.combine, (), cell.like, records, cell.parts, valid, where=where)
        return found

    def _pull_back_inputs(self, dz_x: np.ndarray, dz_h: np.ndarray, h: np.ndarray, first: int, count: int) -> None:
        """Gradients of the frames and of the kernels of a piece, whose hidden states h (B, count + 1, …) begin with."""
        cell, spec = self._cell, self._spec
        dx = None
        if self._dx is not None:
            dx = (self._dx[:, ::-1] if spec.go_backwards else self._dx)[:, first : first + count]
        frames = cell.x[:, first : first + count]
        target = lending.lend(dx.shape, dx.dtype) if cell.planar and dx is not None else dx
        gates = zip(
            cell.gates_of(dz_x, 0), cell.gates_of(dz_h, 0), cell.seen("x", frames), cell.seen("h", h), strict=True
        )
        for gate, (of_x, of_h, seen_x, seen_h) in enumerate(gates):
            seen = {"kernel": seen_x, "recurrent_kernel": seen_h}
            for images, direct in self._runs:
                B = images.stop - images.start
                team, b = self._team(B), images.start
                if target is not None:
                    self._inputs(gate, direct).pull_back(of_x.after(b, 0), slots(target[images]), B, count, team)
                for names, job in self._kernels[gate, direct]:
                    dz = of_x if names == ("kernel",) else of_h
                    job.add(tuple(slots(seen[name][images]) for name in names), dz.after(b, 0), B, count, team)
            if cell.planar and dx is not None and target is not None:
                cell.mask(target, cell.masks["x"][gate] if "x" in cell.masks else None, dx, adds=True)

    def gradients(self) -> dict[str, Any]:
        """Return all gradients, when every step has been taken back."""
        cell, F, dtype = self._cell, self._spec.F, self._cell.dtype
        sums = self._sums.sum((0, 1), np.float64).astype(dtype)
        result: dict[str, Any] = {"x": self._dx, "bias": sums[: 4 * F], "h": None, "c": None, "peephole": None}
        gates_of: dict[str, list[Any]] = {"kernel": [0] * 4, "recurrent_kernel": [0] * 4}
        for (gate, _), jobs in self._kernels.items():
            for names, job in jobs:
                for name, gradient in zip(names, job.result(), strict=True):
                    gates_of[name][gate] = gates_of[name][gate] + gradient
        for name, found in gates_of.items():
            result[name] = np.concatenate(found, -1) if cell.planar else found[0]
        if any(state is not None for state in self._saved.inputs.first):
            result |= {"h": self._dh, "c": self._dc}
        if cell.peepholes is not None:
            channels = sums[4 * F :].reshape(3, F)
            of_pixels = None if self._dpeephole is None else self._dpeephole.sum(0, np.float64).astype(dtype)
            result["peephole"] = dict(zip(PEEPHOLE_GATES, channels if of_pixels is None else of_pixels, strict=True))
        parts = len(cell.normalizing.parts)
        result["normalization"] = cell.normalizing.result(dtype) if parts else None
        return result

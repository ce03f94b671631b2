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
from fastclstm.engines.cpu import launch, outliers, packing, plans, threads
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


class Cell:
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
        self.step = np.zeros(1, cell_steps.STEP)
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
        record = self.step[0]
        for name, value in values.items():
            record[name] = value

    def records(self, steps: int, **arrays: Course) -> np.ndarray:
        """What kernels read of some steps, with the places of arrays of the states' kind."""
        records = np.repeat(self.step, steps)
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
        """Return what each kernel writes of z, from step t on: of all gates, or with dropout a gate's."""
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

    cell: Cell
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
        cell = Cell(spec, inputs, direct, remember=not save)
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

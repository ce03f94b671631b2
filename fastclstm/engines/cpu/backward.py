"""Backpropagation through time on the cpu engine: what the forward pass keeps, and the way back.

Going back, a step's gates give way to the gradients of its pre-activations, and the cell state it began with to the
hidden state it began with; so the gradients of x and of the kernels wait until all steps, or all of a piece, are done.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np

from fastclstm.engines import lending, remembered
from fastclstm.engines.cpu import outliers, plans, weight_gradient
from fastclstm.engines.cpu.fused_steps import Steps
from fastclstm.engines.cpu.gate_gradients import GateGradients
from fastclstm.engines.cpu.input_gradient import InputGradient, join
from fastclstm.engines.cpu.kernels import gates, vmath
from fastclstm.engines.cpu.kernels.schedule import NOTHING, Slots, slots
from fastclstm.engines.cpu.launch import team_size
from fastclstm.spec import PEEPHOLE_GATES, ConvLSTMSpec, ConvSpec

Arrays = dict[str, np.ndarray]
Pair = tuple[np.ndarray | None, np.ndarray | None]

STEP_BYTES = 4 << 20
"""Gates of one step of the images that are taken forward again together, about."""

SPARE_BYTES = 64 << 20
"""Memory up to this size is left to the next call: fresh memory costs as much as a small forward pass.

4 steps of 1→8 filters on 256², forward and back, whose 42 MB were fresh: 88 ms on one thread of a Zen 4, else 80.
"""

_spare: deque[np.ndarray] = deque(maxlen=1)


@dataclass(frozen=True)
class Kept:
    """What every step leaves."""

    memory: np.ndarray
    gates: np.ndarray
    """Activated (B, T, HO, WO, 4F)."""
    c: np.ndarray
    """Cell states (B, T + 1, HO, WO, F), first the initial one."""

    def of(self, images: slice) -> Kept:
        """The same of some images."""
        return Kept(self.memory, self.gates[images], self.c[images])


@dataclass(frozen=True)
class Saved:
    """What the way back needs of the forward pass, steps in the order of processing."""

    x: np.ndarray
    kernels: tuple[np.ndarray, np.ndarray]
    """The recurrent and the input kernel."""
    bias: np.ndarray | None
    peephole: Arrays | None
    mask: np.ndarray | None
    algorithm: str
    ways: plans.Ways
    """The algorithms of the forward pass."""
    first: Pair
    """The initial h and c, where they were given."""
    length: int
    """Steps of a piece: pieces are taken forward again where what all steps leave is not, or no longer, there."""
    h: np.ndarray
    """Hidden states (B, _, HO, WO, F) at which pieces begin, but the first."""
    c: np.ndarray
    """Cell states at which pieces begin, but the first."""
    direct: np.ndarray
    """The images (B,) that took the direct algorithm, because of what `outliers` finds."""
    kept: list[Kept] = field(default_factory=list)
    """What all steps leave, until the way back uses it up."""

    @property
    def given_state(self) -> bool:
        """Whether an initial state was given, so that its gradients are of use."""
        return any(state is not None for state in self.first)

    def replace(self, images: np.ndarray, others: Saved) -> None:
        """Take what is saved of some images, where `images` is true, from a run of those alone by the direct way."""
        self.h[images], self.c[images], self.direct[images] = others.h, others.c, True
        for kept, other in zip(self.kept, others.kept, strict=True):
            kept.gates[images], kept.c[images] = other.gates, other.c

    def start_of(self, images: slice, piece: int) -> Pair:
        """The h and c at which a piece begins; None: zeros."""
        if piece > 0:
            return self.h[images, piece - 1], self.c[images, piece - 1]
        h, c = (None if state is None else state[images] for state in self.first)
        return h, c


def fits(spec: ConvLSTMSpec) -> bool:
    """Whether the derivatives of the activations, which the kernels must know, follow from what is kept."""
    codes = gates.activation_codes(spec)
    return codes is not None and vmath.DERIVATIVE_CODES.issuperset(codes)


def start(
    spec: ConvLSTMSpec, x: np.ndarray, kernels: tuple[np.ndarray, np.ndarray], bias: np.ndarray | None, first: Pair,
    peephole: Arrays | None, mask: np.ndarray | None, algorithm: str, ways: plans.Ways, length: int, *,
    states_only: bool,
) -> Saved:  # fmt: skip
    """Memory for the forward pass to fill: for what all steps leave, or only for states every `length` steps."""
    B, *frame = spec.state_shape
    h, c = (np.empty((B, -(-spec.T // length) - 1, *frame), x.dtype) for _ in range(2))
    saved = Saved(x, kernels, bias, peephole, mask, algorithm, ways, first, length, h, c, np.zeros(B, np.bool_))
    if not states_only:
        saved.kept.append(_keep(spec, B, spec.T, x.dtype))
    return saved


def _keep(spec: ConvLSTMSpec, B: int, T: int, dtype: np.dtype) -> Kept:
    """Memory for what T steps of B images leave: that of a call before, where it is large enough, else fresh."""
    shapes = (B, T, spec.HO, spec.WO, 4 * spec.F), (B, T + 1, spec.HO, spec.WO, spec.F)
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    memory = None
    with suppress(IndexError):  # another thread may be faster
        memory = _spare.pop()
    if memory is None or not sum(sizes) <= memory.nbytes <= 2 * sum(sizes):
        memory = lending.aligned_empty(sum(sizes), np.dtype(np.uint8))
    edges = (0, sizes[0], sum(sizes))
    parts = (memory[a:b].view(dtype).reshape(s) for a, b, s in zip(edges[:-1], edges[1:], shapes, strict=True))
    return Kept(memory, *parts)


def _group_size(spec: ConvLSTMSpec, itemsize: int) -> int:
    """How many images are taken forward again together, at most."""
    step = spec.B * spec.HO * spec.WO * 4 * spec.F * itemsize
    return max(1, -(-spec.B // max(1, -(-step // STEP_BYTES))))


def piece_length(spec: ConvLSTMSpec, itemsize: int) -> int:
    """The steps of a piece for which the states of all images and the gates of one group are smallest together."""
    groups = max(1, -(-spec.B // _group_size(spec, itemsize)))
    pieces = [2 * -(-spec.T // length) + 5 * length / groups for length in range(1, spec.T + 1)]
    return pieces.index(min(pieces)) + 1


def run_forward(
    spec: ConvLSTMSpec, saved: Saved, steps: Steps, h: np.ndarray, c_last: np.ndarray, y: np.ndarray | None
) -> None:
    """Run all steps to h, where there are fewer slots than steps in turn, c_last and y; and fill `saved`."""
    if saved.kept:
        (kept,) = saved.kept
        _run_piece(spec, saved, steps, slice(0, spec.B), 0, kept, h, y)
        c_last[...] = kept.c[:, -1]
        return
    for piece, t in enumerate(range(0, spec.T, saved.length)):
        count = min(saved.length, spec.T - t)
        states = h[:, t : t + count] if h.shape[1] == spec.T else h
        _run_piece(spec, saved, steps, slice(0, spec.B), piece, None, states, y, c_last)
        h_last = states[:, (count - 1) % states.shape[1]]
        if t + count < spec.T:
            saved.h[:, piece], saved.c[:, piece] = h_last, c_last
        elif h.shape[1] != spec.T:  # its slot is that of its number in the whole sequence
            h[:, (spec.T - 1) % h.shape[1]] = h_last


def _run_piece(
    spec: ConvLSTMSpec, saved: Saved, steps: Steps, images: slice, piece: int, kept: Kept | None, h: np.ndarray,
    y: np.ndarray | None = None, c_last: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Run one piece of some images, to h and c_last, or to `kept`."""
    t = piece * saved.length
    count = min(saved.length, spec.T - t)
    shape = (images.stop - images.start, *spec.state_shape[1:])
    starts = saved.start_of(images, piece)
    h_first, c_first = (np.zeros(shape, saved.x.dtype) if state is None else state for state in starts)
    c = c_last
    if kept is not None:
        kept.c[:, 0] = c_first
        c = kept.c[:, 1:]
    mask = None if saved.mask is None else np.ascontiguousarray(saved.mask[images, t : t + count])
    outputs = slots(y)
    steps.run(
        shape[0], count, x=slots(saved.x[images], spec.go_backwards).after(0, t), h_first=slots(h_first),
        c_first=slots(c_first), h=slots(h), c=slots(c), y=outputs.after(0, t),
        y_first=NOTHING if y is None or t == 0 else outputs.after(0, t - 1),
        kept=NOTHING if kept is None else slots(kept.gates), fresh=starts[0] is None, mask=mask,
    )  # fmt: skip


def backward(
    spec: ConvLSTMSpec, saved: Saved, dy: np.ndarray | None, dh: np.ndarray | None, dc: np.ndarray | None,
    *, input_gradient: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Pull gradients of the output, the last h and the last c back through time: see `recurrence.backward`.

    The gradients of an initial state that was not given are not computed: they are None.
    """
    way = _WayBack(spec, saved, dy, dh, dc, input_gradient)
    if spec.B == 0:
        return way.gradients()
    try:
        kept = saved.kept.pop()
    except IndexError:
        kept = way.pull_back_pieces()
    else:
        for images, direct in way.runs:
            way.pull_back(images, 0, kept.of(images), direct, last=images.stop == spec.B)
    if kept.memory.nbytes <= SPARE_BYTES:
        _spare.append(kept.memory)
    del kept
    return way.gradients()


class _WayBack:
    """The gradients so far, on the way back through the steps."""

    def __init__(
        self, spec: ConvLSTMSpec, saved: Saved, dy: np.ndarray | None, dh: np.ndarray | None, dc: np.ndarray | None,
        input_gradient: bool,
    ):  # fmt: skip
        x, dtype = saved.x, saved.x.dtype
        mask = None if saved.mask is None else saved.mask[:, :: -1 if spec.go_backwards else 1]
        self.runs = outliers.runs(saved.direct | _spoilt(saved, mask, dy, dh, dc))
        """Images one after another, and whether they take the direct way."""
        if mask is not None:  # what is masked must not be read, were it NaN
            x = np.where(mask[:, :, None, None, None], x, dtype.type(0))
        self._spec, self._saved, self._x = spec, saved, x
        self._dx = np.empty_like(x) if input_gradient else None
        self._dh, self._dc = (np.zeros(spec.state_shape, dtype) if d is None else d.copy() for d in (dh, dc))
        self._dy = dy if spec.return_sequences else None
        self._doutput = self._dh if saved.mask is None else np.zeros_like(self._dh)  # of what masked steps repeat
        if dy is not None and not spec.return_sequences:
            self._doutput += dy
        peephole = None if saved.peephole is None else np.stack([saved.peephole[gate] for gate in PEEPHOLE_GATES])
        self._gates = GateGradients(
            gates.kind(spec), gates.cell(spec, saved.peephole), spec.HO * spec.WO, dtype, peephole
        )
        ways = saved.algorithm, "direct"
        self._recurrent, self._inputs = (
            cache(lambda direct, conv=conv, kernel=kernel: InputGradient(conv, kernel, ways[direct]))
            for conv, kernel in zip((spec.recurrent, spec.input), saved.kernels, strict=True)
        )
        self._joint: Callable[[bool], InputGradient] | None = None
        if input_gradient and mask is None:
            joint = join(spec.recurrent, spec.input, saved.algorithm, dtype.itemsize, spec.T)
            self._joint = None if joint is None else cache(partial(self._of_both, joint, ways))
        self._passage = remembered.current(saved.kernels)
        self._place = (*map(id, saved.kernels), spec.recurrent, spec.input)
        frames = spec.B * spec.T
        self._kernels: dict[bool, list[tuple[tuple[str, ...], weight_gradient.WeightGradient]]] = {}
        if self._passage is not None:
            _, self._kernels = self._passage.sums.pop(self._place, (None, self._kernels))
            frames *= self._passage.steps
        for direct in sorted({direct for _, direct in self.runs} or {False}):
            if direct not in self._kernels:
                self._kernels[direct] = weight_gradient.of_kernels(
                    spec.recurrent, spec.input, ways[direct], frames, dtype
                )

    def _of_both(self, spec: ConvSpec, ways: tuple[str, str], direct: bool) -> InputGradient:
        """The gradient of h, and after it x, as of one convolution."""

        def make() -> InputGradient:
            return InputGradient(spec, np.concatenate(self._saved.kernels, 2), ways[direct])

        return remembered.passing(self._saved.kernels, ("joint", spec, ways[direct]), make)

    def pull_back_pieces(self) -> Kept:
        """Take all pieces forward again and back, the last one first; return the memory that it took."""
        spec, saved, dtype = self._spec, self._saved, self._x.dtype
        size = _group_size(spec, dtype.itemsize)
        most = min(size, max(images.stop - images.start for images, _ in self.runs))
        kept = _keep(spec, most, saved.length, dtype)
        states = np.empty((most, min(2, saved.length), *spec.state_shape[1:]), dtype)
        steps = cache(lambda ways: Steps(spec, ways, saved.kernels, saved.bias, saved.peephole, remember=False))
        groups = [
            (slice(start, min(start + size, images.stop)), direct)
            for images, direct in self.runs
            for start in range(images.start, images.stop, size)
        ]
        for part, direct in groups:
            ours = kept.of(slice(0, part.stop - part.start))
            ways = plans.DIRECT if direct else saved.ways
            for piece in reversed(range(saved.h.shape[1] + 1)):
                last = piece == 0 and part.stop == spec.B
                _run_piece(spec, saved, steps(ways), part, piece, ours, states[: len(ours.c)])
                if last:
                    steps.cache_clear()  # packed kernels are large
                self.pull_back(part, piece, ours, direct, last=last)
        return kept

    def pull_back(self, images: slice, piece: int, kept: Kept, direct: bool, *, last: bool) -> None:
        """Take some images back through one piece, the direct way or not; `last`: nothing comes after it."""
        spec, saved, B = self._spec, self._saved, images.stop - images.start
        first = piece * saved.length
        count = min(saved.length, spec.T - first)
        team, h_start = _team(spec, B), saved.start_of(images, piece)[0]
        dh, dc, dz, h = slots(self._dh[images]), slots(self._dc[images]), slots(kept.gates), slots(kept.c)
        dy = slots(None if self._dy is None else self._dy[images, first:])
        dx = slots(None if self._dx is None else self._dx[images], spec.go_backwards).after(0, first)
        recurrent = self._recurrent(direct) if self._joint is None else self._joint(direct)
        both, due, pitch = None, NOTHING, spec.F  # of h and x, and where x's part of it goes with the next step
        if self._joint is not None:
            both = np.empty((B, *spec.state_shape[1:3], spec.F + self._x.shape[4]), self._x.dtype)
        for t in reversed(range(count)):
            gates_t, c_t = dz.after(0, t), h.after(0, t)
            arrays = {"gates": gates_t, "dz": gates_t, "c": c_t, "h": c_t, "dh": dh, "dc": dc}
            if saved.mask is not None:
                self._masked_step(images, first, t, kept, arrays, h_start, recurrent)
                continue
            before = NOTHING if t == 0 else dz.after(0, t - 1)
            self._gates.pull_back(B, team, pitch, dy=dy.after(0, t), before=before, dx=due, **arrays)
            due = NOTHING
            if t == 0:
                kept.c[:, 0] = 0 if h_start is None else h_start
            if first + t > 0 or saved.given_state:
                if both is not None:
                    dh, due, pitch = slots(both), dx.after(0, t), both.shape[3]
                recurrent.pull_back(gates_t, dh, B, 1, team)
            elif both is not None:
                self._inputs(direct).pull_back(gates_t, dx.after(0, t), B, 1, team)
        if both is not None and self._dx is not None and due is not NOTHING:
            self._dh[images] = both[..., : spec.F]
            self._dx[images, spec.T - 1 - first if spec.go_backwards else first] = both[..., spec.F :]
        if last:
            del recurrent  # its packed kernel is large
            self._recurrent.cache_clear()
            self._joint = None
        if self._dx is not None and both is None:
            self._inputs(direct).pull_back(dz, dx, B, count, team)
        x = slots(self._x[images], spec.go_backwards).after(0, first)
        sources = {"kernel": x, "recurrent_kernel": h}
        for names, job in self._kernels[direct]:
            job.add(tuple(sources[name] for name in names), dz, B, count, team)

    def _masked_step(
        self, images: slice, first: int, t: int, kept: Kept, arrays: dict[str, Slots], h_start: np.ndarray | None,
        recurrent: InputGradient,
    ) -> None:  # fmt: skip
        """Take back the images whose step t of a piece counts; the gradients of the others' states stay."""
        assert self._saved.mask is not None
        mask = self._saved.mask[images, first:]
        valid, dh, doutput = mask[:, t], self._dh[images], self._doutput[images]
        if self._dy is not None:
            doutput += self._dy[images, first + t]
        kept.gates[~valid, t] = 0
        for b in np.flatnonzero(valid).tolist():
            here = {name: slot.after(b, 0) for name, slot in arrays.items()}
            earlier = np.flatnonzero(mask[b, :t])  # the last of these left the hidden state
            before = here["gates"].after(0, int(earlier[-1]) - t) if earlier.size else NOTHING
            self._gates.pull_back(1, _team(self._spec, 1), dy=slots(doutput[b : b + 1]), before=before, **here)
            if not earlier.size:
                kept.c[b, t] = 0 if h_start is None else h_start[b]
        doutput[valid] = 0
        dh_new = np.empty_like(dh)
        recurrent.pull_back(arrays["dz"], slots(dh_new), len(dh), 1, _team(self._spec, len(dh)))
        np.copyto(dh, dh_new, where=valid[:, np.newaxis, np.newaxis, np.newaxis])

    def gradients(self) -> dict[str, Any]:
        """Return all gradients, when every step has been taken back: in a passage the kernels' with its last call."""
        self._inputs.cache_clear()
        dbias, dpeephole = self._gates.result()
        result: dict[str, Any] = {"x": self._dx, "bias": dbias, "h": None, "c": None, "peephole": None}
        more = self._passage is not None and self._passage.more
        if self._passage is not None and more:
            self._passage.sums[self._place] = self._saved.kernels, self._kernels
            result |= {"kernel": None, "recurrent_kernel": None}
        for jobs in () if more else self._kernels.values():
            for names, job in jobs:
                for name, gradient in zip(names, job.result(), strict=True):
                    result[name] = result[name] + gradient if name in result else gradient
        if self._saved.given_state:
            result |= {"h": self._dh, "c": self._dc}
        if dpeephole is not None:
            result["peephole"] = dict(zip(PEEPHOLE_GATES, dpeephole, strict=True))
        return result


def _spoilt(saved: Saved, mask: np.ndarray | None, *gradients: np.ndarray | None) -> np.ndarray:
    """Which images Winograd's transforms would spoil on the way back."""
    if saved.algorithm == "direct":
        return saved.direct
    found = [outliers.find(a) for a in (*saved.first, *gradients) if a is not None]
    return np.logical_or.reduce([outliers.find(saved.x, mask), *found])


def _team(spec: ConvLSTMSpec, B: int) -> int:
    """Threads for a step of B images."""
    return team_size(B * spec.recurrent.flops // max(1, spec.B))

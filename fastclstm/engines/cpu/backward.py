"""Backpropagation through time on the cpu engine: what the forward pass keeps, and the way back.

Each step takes one pass over the gates and one convolution; the gradients of x and of the kernels wait until a few
steps have come together. Images go back in groups small enough that what waits stays in the cache.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from fastclstm.engines.cpu import gates, packing, sequence, vmath, winograd
from fastclstm.engines.cpu.conv2d import InputGradient, team_size
from fastclstm.engines.cpu.flow import NOTHING, Slots, slots
from fastclstm.engines.cpu.gates_backward import GateGradients
from fastclstm.engines.cpu.steps import Steps
from fastclstm.engines.cpu.weight_gradient import WeightGradient
from fastclstm.spec import PEEPHOLE_GATES, ConvLSTMSpec

Arrays = dict[str, np.ndarray]

STEP_BYTES = 4 << 20
"""Gradients of the pre-activations of one step of a group of images, about."""

WAITING_BYTES = 8 << 20
"""Those of the steps that wait, at most; one step always may."""

SPARE_BYTES = 16 << 20
"""Gates up to this size leave their memory to the next call: fresh memory costs as much as a small forward pass."""

_spare: deque[np.ndarray] = deque(maxlen=1)


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
    m: int
    """Of Winograd in the forward pass, which is what can be taken again; 0: direct."""
    given_state: bool
    """Whether an initial state was given, so that its gradients are of use."""
    fresh: bool
    """Whether the initial hidden state was not given: zeros."""
    gates: np.ndarray | None
    """Activated (B, T, HO, WO, 4F); None: pieces of the sequence are taken forward again, one at a time."""
    h: np.ndarray
    """Hidden states (B, _, HO, WO, F) at which pieces begin; those between follow from c and o."""
    c: np.ndarray
    """Cell states (B, T + 1, HO, WO, F), first the initial one; without gates, those at which pieces begin."""

    def replace(self, images: np.ndarray, others: Saved) -> None:
        """Take the gates and states of some images, where `images` is true, from a run of those alone."""
        assert self.gates is not None
        self.gates[images], self.c[images] = others.gates, others.c


def fits(spec: ConvLSTMSpec) -> bool:
    """Whether the derivatives of the activations, which the kernels must know, follow from what is kept."""
    codes = gates.activation_codes(spec)
    return codes is not None and vmath.DERIVATIVE_CODES.issuperset(codes)


def start(
    spec: ConvLSTMSpec, x: np.ndarray, kernels: tuple[np.ndarray, np.ndarray], bias: np.ndarray | None,
    h: np.ndarray | None, c: np.ndarray | None, peephole: Arrays | None, mask: np.ndarray | None, algorithm: str,
    m: int, *, recompute: bool,
) -> Saved:  # fmt: skip
    """Memory for the forward pass to fill, the initial state in its place."""
    B, *frame, F = spec.state_shape
    pieces = -(-spec.T // _cut(spec, x.itemsize)[1]) if recompute else 1
    hidden = np.empty((B, pieces, *frame, F), x.dtype)
    cells = np.empty((B, pieces if recompute else spec.T + 1, *frame, F), x.dtype)
    for states, first in ((hidden, h), (cells, c)):
        states[:, 0] = 0 if first is None else first
    shape = (B, spec.T, *frame, 4 * F)
    memory = None if recompute else _memory(math.prod(shape) * x.itemsize)
    kept = None if memory is None else memory[: math.prod(shape) * x.itemsize].view(x.dtype).reshape(shape)
    given = h is not None or c is not None
    saved = Saved(x, kernels, bias, peephole, mask, algorithm, m, given, h is None, kept, hidden, cells)
    if memory is not None and memory.nbytes <= SPARE_BYTES:
        weakref.finalize(saved, _spare.append, memory).atexit = False
    return saved


def _memory(size: int) -> np.ndarray:
    """Memory for the gates: that of a call before, where it is large enough, else fresh."""
    with suppress(IndexError):  # another thread may be faster
        memory = _spare.pop()
        if size <= memory.nbytes <= 2 * size:
            return memory
    return packing.aligned_empty(size, np.dtype(np.uint8))


def forward_in_pieces(spec: ConvLSTMSpec, saved: Saved, steps: Steps, h_states: np.ndarray, c_last: np.ndarray) -> None:
    """Run all steps, noting the states at which pieces begin."""
    length, kept = _cut(spec, c_last.itemsize)[1], h_states.shape[1]
    x, h = slots(saved.x, spec.go_backwards), slots(h_states)
    for piece, t in enumerate(range(0, spec.T, length)):
        count, offset = min(length, spec.T - t), t if kept == spec.T else 0
        steps.run(
            spec.B, count, x=x.after(0, t), h_first=slots(saved.h[:, piece]), c_first=slots(saved.c[:, piece]),
            h=h.after(0, offset), c=slots(c_last), fresh=saved.fresh and t == 0,
        )  # fmt: skip
        if t + count < spec.T:
            saved.h[:, piece + 1] = h_states[:, offset + (count - 1) % kept]
            saved.c[:, piece + 1] = c_last
        elif kept != spec.T:  # the last step's slot is that of its number in the whole sequence
            h_states[:, (spec.T - 1) % kept] = h_states[:, (count - 1) % kept]


def _cut(spec: ConvLSTMSpec, itemsize: int) -> tuple[list[slice], int]:
    """The groups of images that go back together, and the steps that are taken in one piece."""
    frame = spec.HO * spec.WO * 4 * spec.F * itemsize
    groups = min(spec.B, -(-spec.B * frame // STEP_BYTES))
    edges = [spec.B * n // groups for n in range(groups + 1)] if groups else []
    largest = -(-spec.B // max(1, groups))
    return list(map(slice, edges, edges[1:])), max(1, min(spec.T, WAITING_BYTES // (max(1, largest) * frame)))


def backward(
    spec: ConvLSTMSpec, saved: Saved, dy: np.ndarray | None, dh: np.ndarray | None, dc: np.ndarray | None
) -> dict[str, Any]:
    """Pull gradients of the output, the last h and the last c back through time: see `recurrence.backward`.

    The gradients of an initial state that was not given are not computed: they are None.
    """
    x, dtype = saved.x, saved.x.dtype
    if saved.mask is not None:  # what is masked must not be read, were it NaN
        x = np.where(saved.mask[:, :: -1 if spec.go_backwards else 1, None, None, None], x, x.dtype.type(0))
    dx = np.empty_like(x)
    dh, dc = (np.zeros(spec.state_shape, dtype) if d is None else d.copy() for d in (dh, dc))
    peephole = None if saved.peephole is None else np.stack([saved.peephole[gate] for gate in PEEPHOLE_GATES])
    gate_gradients = GateGradients(gates.cell(spec, saved.peephole), spec.HO * spec.WO, dtype, peephole)
    groups, steps = _cut(spec, dtype.itemsize)
    kernel_gradients = _kernel_gradients(spec, saved.algorithm, spec.B * spec.T, dtype)
    again = None
    if saved.gates is None:
        again = Steps(spec, saved.m, saved.kernels, saved.bias, saved.peephole, remember=False)
    pull_back = cache(partial(_input_gradients, spec, saved))  # at most two sizes of groups
    for part in groups:
        dy_part = None if dy is None else dy[part]
        _group_backward(spec, saved, again, part, steps, x[part], dx[part], dy_part, dh[part], dc[part],
                        pull_back(part.stop - part.start), gate_gradients, kernel_gradients)  # fmt: skip
    pull_back.cache_clear()  # the kernels' copies are large
    dbias, dpeephole = gate_gradients.result()
    gradients = {
        name: gradient for names, job in kernel_gradients for name, gradient in zip(names, job.result(), strict=True)
    }
    return gradients | {
        "x": dx, "bias": dbias, "h": dh if saved.given_state else None, "c": dc if saved.given_state else None,
        "peephole": None if dpeephole is None else dict(zip(PEEPHOLE_GATES, dpeephole, strict=True)),
    }  # fmt: skip


def _input_gradients(spec: ConvLSTMSpec, saved: Saved, B: int) -> tuple[InputGradient, ...]:
    """The way back through the recurrent and the input convolution of B images."""
    team = team_size(B * spec.recurrent.flops // max(1, spec.B))
    return tuple(
        InputGradient(conv.with_batch(B), kernel, saved.algorithm, team)
        for conv, kernel in zip((spec.recurrent, spec.input), saved.kernels, strict=True)
    )


def _kernel_gradients(
    spec: ConvLSTMSpec, algorithm: str, frames: int, dtype: np.dtype
) -> list[tuple[tuple[str, ...], WeightGradient]]:
    """The gradients to gather: of both kernels together, or apart where Winograd's tiles fit only one."""
    specs = {"recurrent_kernel": spec.recurrent, "kernel": spec.input}
    together = winograd.fits(tuple(specs.values())) or not any(winograd.fits((part,)) for part in specs.values())
    jobs = [tuple(specs)] if together else [(name,) for name in specs]
    return [(names, WeightGradient(tuple(specs[n] for n in names), dtype, frames, algorithm)) for names in jobs]


def _group_backward(
    spec: ConvLSTMSpec, saved: Saved, again: Steps | None, part: slice, steps: int, x: np.ndarray, dx: np.ndarray,
    dy: np.ndarray | None, dh: np.ndarray, dc: np.ndarray, input_gradients: tuple[InputGradient, ...],
    gate_gradients: GateGradients, kernel_gradients: list[tuple[tuple[str, ...], WeightGradient]],
) -> None:  # fmt: skip
    """Take a group of images back through time; dh and dc become the gradients of the initial state."""
    B, T = len(x), spec.T
    recurrent, inputs = input_gradients
    team = recurrent.team
    frame = (spec.HO, spec.WO)
    dz = sequence.scratch_array((B, steps, *frame, 4 * spec.F), x.dtype, "dz")
    h = sequence.scratch_array((B, steps, *frame, spec.F), x.dtype, "h")  # before each step
    dz_slots, x_slots, dx_slots = slots(dz), slots(x, spec.go_backwards), slots(dx, spec.go_backwards)
    h_slots, dh_slots = slots(h), slots(dh)
    mask = None if saved.mask is None else saved.mask[part]
    h_starts = saved.h[part]
    sequences = dy if spec.return_sequences else None
    doutput = np.zeros_like(dh)  # of an output that masked steps repeat
    if dy is not None and not spec.return_sequences:
        np.copyto(doutput, dy)
    if mask is None:
        dh += doutput

    for first in reversed(range(0, T, steps)):
        last = min(first + steps, T)
        if again is None:
            assert saved.gates is not None
            kept, c, h_start = (
                slots(saved.gates[part]).after(0, first),
                slots(saved.c[part]).after(0, first),
                h_starts[:, 0],
            )
        else:
            piece = first // steps
            h_start = h_starts[:, piece]
            kept, c = _piece_again(
                spec,
                again,
                x_slots.after(0, first),
                h_start,
                saved.c[part, piece],
                last - first,
                steps,
                saved.fresh and first == 0,
            )
        for t in reversed(range(first, last)):
            n = t - first
            arrays = {"gates": kept.after(0, n), "c": c.after(0, n), "dh": dh_slots, "dc": slots(dc),
                      "dz": dz_slots.after(0, n), "h": h_slots.after(0, n)}  # fmt: skip
            if mask is not None:
                if sequences is not None:
                    doutput += sequences[:, t]
                dz[:, n], h[:, n] = 0, h_start
                _masked_step(mask, t, team, doutput, dh, arrays, gate_gradients, recurrent)
                continue
            before = NOTHING
            if n > 0 or (again is None and t > 0):
                before = kept.after(0, n - 1)
            else:
                h[:, n] = h_start
            dy_slot = NOTHING if sequences is None else slots(sequences).after(0, t)
            gate_gradients.pull_back(B, team, dy=dy_slot, before=before, **arrays)
            if t > 0 or saved.given_state:
                recurrent.pull_back(arrays["dz"], dh_slots, 1)
        inputs.pull_back(dz_slots, dx_slots.after(0, first), last - first)
        sources = {"kernel": x_slots.after(0, first), "recurrent_kernel": h_slots}
        for names, job in kernel_gradients:
            job.add(tuple(sources[name] for name in names), dz_slots, B, last - first, team)


def _piece_again(
    spec: ConvLSTMSpec, again: Steps, x: Slots, h_start: np.ndarray, c_start: np.ndarray, count: int, most: int,
    fresh: bool,
) -> tuple[Slots, Slots]:  # fmt: skip
    """Take up to `most` steps forward again: their gates, and the cell states from the first on."""
    B, *frame, F = h_start.shape
    kept = sequence.scratch_array((B, most, *frame, 4 * F), h_start.dtype, "gates")
    c = sequence.scratch_array((B, most + 1, *frame, F), h_start.dtype, "c")
    h = sequence.scratch_array((B, min(2, most), *frame, F), h_start.dtype, "h again")
    c[:, 0] = c_start
    again.run(B, count, x=x, h_first=slots(h_start), c_first=slots(c_start), h=slots(h), c=slots(c[:, 1:]),
              kept=slots(kept), fresh=fresh)  # fmt: skip
    return slots(kept), slots(c)


def _masked_step(
    mask: np.ndarray, t: int, team: int, doutput: np.ndarray, dh: np.ndarray, arrays: dict[str, Slots],
    gate_gradients: GateGradients, recurrent: InputGradient,
) -> None:  # fmt: skip
    """Take back the images whose step was not masked; the gradients of the others' states stay as they are."""
    valid = mask[:, t]
    for b in np.flatnonzero(valid):
        here = {name: slot.after(int(b), 0) for name, slot in arrays.items()}
        earlier = np.flatnonzero(mask[b, :t])  # the last of these left the hidden state
        before = here["gates"].after(0, int(earlier[-1]) - t) if earlier.size else NOTHING
        gate_gradients.pull_back(1, team, dy=slots(doutput[b : b + 1]), before=before, **here)
    doutput[valid] = 0
    dh_new = np.empty_like(dh)
    recurrent.pull_back(arrays["dz"], slots(dh_new), 1)
    np.copyto(dh, dh_new, where=valid[:, np.newaxis, np.newaxis, np.newaxis])

"""The way back of a ConvLSTM step by step on the cpu engine: see `stepwise`."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from fastclstm.engines import lending
from fastclstm.engines.cpu import launch, outliers, stepwise, weight_gradient
from fastclstm.engines.cpu.input_gradient import InputGradient
from fastclstm.engines.cpu.kernels import cell_steps
from fastclstm.engines.cpu.kernels.schedule import slots
from fastclstm.engines.cpu.program import Pace, Program, course
from fastclstm.spec import PEEPHOLE_GATES, ConvLSTMSpec


def backward(
    spec: ConvLSTMSpec, saved: stepwise.Saved, dy: np.ndarray | None, dh: np.ndarray | None, dc: np.ndarray | None,
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
                *_, again = stepwise.forward(spec, saved.inputs, True, None, saved.direct)
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
        self, spec: ConvLSTMSpec, saved: stepwise.Saved, dy: np.ndarray | None, dh: np.ndarray | None,
        dc: np.ndarray | None, input_gradient: bool,
    ):  # fmt: skip
        inputs, dtype = saved.inputs, saved.inputs.x.dtype
        spoilt = saved.direct.copy()
        if inputs.algorithm != "direct":
            for array in (inputs.first[0], dy, dh, dc):
                spoilt |= False if array is None else outliers.find(array)
        self._runs = outliers.runs(spoilt)
        self._spec, self._saved, self._cell = spec, saved, stepwise.Cell(spec, inputs, saved.direct, remember=False)
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
        strips = int(cell.step[0]["strips"])
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
        length = min(T, max(1, stepwise.PIECE_BYTES // step))
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
            for number in stepwise.PART_NUMBERS[: len(n.parts)]:
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

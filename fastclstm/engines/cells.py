"""The recurrence of any cell, forward and backward: one loop over time, with the cell and the convolutions given.

Frames of x are convolved ahead of the steps, many at once, so that a step is one convolution of h (two with
``reset_after=False``) and a cell's update. An engine brings both: `Tools` of NumPy over its conv2d, or kernels.

The cells, with z_x and z_h the convolutions of x and of h, ∘ the elementwise product, σ and tanh the activations::

    rnn    h' = tanh(z_x + z_h)                                                        Elman 1990
    lstm   i, f, o = σ(z_x + z_h), g = tanh(z_x + z_h), c' = f∘c + i∘g, h' = o∘tanh(c')     Shi et al. 2015
    gru    z, r = σ(z_x + z_h), n = tanh(z_x + r∘z_h), h' = z∘h + (1 − z)∘n            reset_after
           z, r = σ(z_x + z_h), n = tanh(z_x + R_n * (r∘h)), h' = z∘h + (1 − z)∘n      else: Ballas et al. 2016

A backward pass goes through the same lines in reverse order, each by the chain rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fastclstm.engines import remembered
from fastclstm.engines.cell_updates import accumulate
from fastclstm.engines.recurrence import total
from fastclstm.nn.activations import is_bounded
from fastclstm.spec import CELL_GATES, CELL_STATES, CellSpec

Arrays = dict[str, np.ndarray]
States = tuple[np.ndarray, ...]

PIECE_BYTES = 4 << 20
"""Pre-activations of the steps whose frames are convolved together where they are not kept, about."""


class Convolves(Protocol):
    """A convolution of n steps, (B, n, *space, C) to (B, n, *grid, columns), and its transposes."""

    @property
    def gradient(self) -> np.ndarray:
        """Of the kernel: what `add` has summed up."""

    def look(self, *arrays: np.ndarray | None) -> None:
        """Take note of samples (B, …) that transforms would spoil, in what will be convolved or pulled back."""

    def forward(self, x: np.ndarray, z: np.ndarray) -> None:
        """Write the convolution of x, and its bias, to z."""

    def pull_back(self, dz: np.ndarray, dx: np.ndarray) -> None:
        """Write the gradient of x to dx."""

    def add(self, x: np.ndarray, dz: np.ndarray) -> None:
        """Add the kernel's gradient."""


class Convolution:
    """A convolution over an engine's conv2d."""

    def __init__(
        self, conv2d: Callable[..., np.ndarray], conv2d_backward: Callable[..., Any], spec: Any, kernel: np.ndarray,
        bias: np.ndarray | None, algorithm: str,
    ):  # fmt: skip
        self._conv2d, self._backward, self._algorithm = conv2d, conv2d_backward, algorithm
        self._spec, self._kernel, self._bias = spec, kernel, bias
        self.gradient = np.zeros_like(kernel)

    def look(self, *arrays: np.ndarray | None) -> None:
        """Leave it to conv2d, which looks itself."""

    def forward(self, x: np.ndarray, z: np.ndarray) -> None:
        """Write the convolution of x to z."""
        frames = _frames(x)
        result = self._conv2d(
            self._spec.with_batch(len(frames)), frames, self._kernel, self._bias, algorithm=self._algorithm
        )
        z[...] = result.reshape(z.shape)

    def pull_back(self, dz: np.ndarray, dx: np.ndarray) -> None:
        """Write the gradient of x to dx."""
        frames, spec = _frames(dz), self._spec.with_batch(dz.shape[0] * dz.shape[1])
        result, _, _ = self._backward(spec, _frames(dx), self._kernel, frames, algorithm=self._algorithm, wanted=("x",))
        dx[...] = result.reshape(dx.shape)

    def add(self, x: np.ndarray, dz: np.ndarray) -> None:
        """Add the kernel's gradient."""
        frames, d = _frames(x), _frames(dz)
        spec = self._spec.with_batch(len(frames))
        _, dkernel, _ = self._backward(spec, frames, self._kernel, d, algorithm=self._algorithm, wanted=("kernel",))
        self.gradient += dkernel


def _frames(array: np.ndarray) -> np.ndarray:
    """Return (B, n, …) as one batch (B · n, …)."""
    return np.ascontiguousarray(array).reshape(array.shape[0] * array.shape[1], *array.shape[2:])


class _Masked:
    """A convolution each gate of which has its own factors (gates, B, *space, C) of what it sees: dropout."""

    def __init__(self, gates: Sequence[Convolves], masks: np.ndarray):
        self._gates, self._masks = gates, masks[:, :, np.newaxis]

    def look(self, *arrays: np.ndarray | None) -> None:
        for gate in self._gates:
            gate.look(*arrays)

    def forward(self, x: np.ndarray, z: np.ndarray) -> None:
        for gate, mask, part in zip(self._gates, self._masks, np.split(z, len(self._gates), -1), strict=True):
            result = np.empty(part.shape, z.dtype)
            gate.forward(x * mask, result)
            part[...] = result

    def pull_back(self, dz: np.ndarray, dx: np.ndarray) -> None:
        dx.fill(0)
        for gate, mask, part in zip(self._gates, self._masks, np.split(dz, len(self._gates), -1), strict=True):
            seen = np.empty(dx.shape, dx.dtype)
            gate.pull_back(np.ascontiguousarray(part), seen)
            dx += mask * seen

    def add(self, x: np.ndarray, dz: np.ndarray) -> None:
        for gate, mask, part in zip(self._gates, self._masks, np.split(dz, len(self._gates), -1), strict=True):
            gate.add(x * mask, np.ascontiguousarray(part))

    @property
    def gradient(self) -> np.ndarray:
        return np.concatenate([gate.gradient for gate in self._gates], -1)


@dataclass(frozen=True)
class Tools:
    """What an engine computes a cell with."""

    convolution: Callable[..., Convolves]
    """Makes one of (spec, kernel, bias, algorithm)."""
    updates: Callable[[CellSpec, np.dtype], Any]
    """Makes `cell_updates.Updates`, or what has its methods, of a dtype."""
    empty: Callable[[tuple[int, ...], np.dtype], np.ndarray] = np.empty


@dataclass(frozen=True)
class Inputs:
    """What a call was given."""

    x: np.ndarray
    kernel: np.ndarray
    recurrent_kernel: np.ndarray
    bias: np.ndarray | None
    states: tuple[np.ndarray | None, ...]
    mask: np.ndarray | None
    normalization: Arrays | None
    dropout: Arrays | None
    algorithm: str


@dataclass(frozen=True)
class Saved:
    """What `backward` needs of the forward pass."""

    tools: Tools
    inputs: Inputs
    kept: list[_Run] = field(default_factory=list)
    """The run, until its pre-activations have become their gradients."""


def forward(
    spec: CellSpec, tools: Tools, inputs: Inputs, save: bool = False
) -> tuple[np.ndarray, States, Saved | None]:  # fmt: skip
    """Run a cell over x (B, T, *space, C): output, last states and, with `save`, what `backward` needs.

    Where a step is masked the states stay, and the output is that of the step before, zeros before the first.
    """
    run = _RUNS[spec.cell, spec.reset_after or spec.cell != "gru"](spec, tools, inputs, save)
    output, states = run.forward()
    return output, states, Saved(tools, inputs, [run]) if save else None


def backward(
    spec: CellSpec, saved: Saved, dy: np.ndarray | None, dstates: Sequence[np.ndarray | None],
    *, input_gradient: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Pull gradients of the output and of the last states back through time, not truncated.

    Returns
    -------
    dict
        Gradients under "x", "kernel", "recurrent_kernel", "bias", of the initial states by their names, and under
        "normalization" a dict of its weights' gradients, or None. "x" is None where nobody asks for it, and those of
        initial states where none was given.
    """
    if not saved.kept:  # they are used up
        _, _, again = forward(spec, saved.tools, saved.inputs, True)
        assert again is not None
        saved.kept.extend(again.kept)
    return saved.kept.pop().backward(dy, dstates, input_gradient)


class _Run:
    """One call: its convolutions, its states and its pre-activations. A subclass takes a step of its cell, and back."""

    def __init__(self, spec: CellSpec, tools: Tools, inputs: Inputs, save: bool):
        self.spec, self.tools, self.inputs, self.save = spec, tools, inputs, save
        self.dtype, self.updates = inputs.x.dtype, tools.updates(spec, inputs.x.dtype)
        self.B, self.T, self.F, self.width = spec.B, spec.T, spec.F, spec.G * spec.F
        mask = inputs.mask
        self.x = inputs.x if mask is None else np.where(mask.reshape(*mask.shape, *(1,) * (inputs.x.ndim - 2)),
                                                        inputs.x, np.zeros((), self.dtype))  # fmt: skip
        masks, bias, algorithm = inputs.dropout or {}, inputs.bias, inputs.algorithm
        both = bias is not None and bias.ndim == 2
        first, second = (_cut(bias, n) for n in range(2)) if both else (bias, None)
        self._of_x = self._convolution(spec.input, inputs.kernel, first, masks.get("x"), 0, spec.G, algorithm)
        self.of_h, gate = list[Convolves](), 0
        for count in spec.columns:
            self.of_h.append(self._convolution(spec.recurrent, inputs.recurrent_kernel, second, masks.get("h"), gate,
                                               gate + count, algorithm))  # fmt: skip
            gate += count
        self._of_x.look(self.x)
        for convolution in self.of_h:
            convolution.look(inputs.states[0])
        ends = (spec.recurrent_activation, spec.output_activation) if spec.cell == "lstm" else (spec.activation,)
        self._bounded = all(map(is_bounded, ends))
        slots = self.T + 1 if save else 2
        self.states = [self.empty(slots) for _ in CELL_STATES[spec.cell]]
        for held, given in zip(self.states, inputs.states, strict=True):
            held[:, 0] = 0 if given is None else given
        self._normalized: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self.z = np.empty(0)

    def _convolution(
        self, spec: Any, kernel: np.ndarray, bias: np.ndarray | None, masks: np.ndarray | None, first: int, stop: int,
        algorithm: str,
    ) -> Convolves:  # fmt: skip
        """Return the convolution of the gates from the first on, with masks each by itself."""
        F = self.F
        if masks is None:
            part = None if (first, stop) == (0, self.spec.G) else slice(first * F, stop * F)
            return self.tools.convolution(spec.with_filters((stop - first) * F), _cut(kernel, part), _cut(bias, part),
                                          algorithm)  # fmt: skip
        one = spec.with_filters(F)
        parts = [slice(gate * F, (gate + 1) * F) for gate in range(first, stop)]
        return _Masked([self.tools.convolution(one, _cut(kernel, part), _cut(bias, part), algorithm) for part in parts],
                       masks[first:stop])  # fmt: skip

    def empty(self, steps: int, columns: int | None = None) -> np.ndarray:
        """Return memory for so many steps of what has `columns`, F if not given."""
        spec = self.spec
        shape = self.B, steps, *spec.state_shape[1:-1], self.F if columns is None else columns
        return self.tools.empty(shape, self.dtype)

    def valid(self, t: int) -> np.ndarray | None:
        """Return which samples (B,) step t counts for; None where it does for all."""
        if self.inputs.mask is None:
            return None
        steps = self.inputs.mask[:, self.spec.source_step(t)]
        return None if steps.all() else steps

    # Forward

    def forward(self) -> tuple[np.ndarray, States]:
        spec, T = self.spec, self.T
        step_bytes = max(1, self.B * self.width * int(np.prod(spec.state_shape[1:-1])) * self.dtype.itemsize)
        length = T if self.save else min(T, max(1, PIECE_BYTES // step_bytes))
        self.z = self.empty(length, self.width)
        masked = self.inputs.mask is not None
        output = self.empty(T if spec.return_sequences else 1)
        if masked:
            output[:, 0] = 0
        for start in range(0, T, length):
            count = min(length, T - start)
            first = T - start - count if spec.go_backwards else start
            self._of_x.forward(self.x[:, first : first + count], self.z[:, :count])
            for t in range(start, start + count):
                now, then = (t, t + 1) if self.save else (t % 2, (t + 1) % 2)
                before, after = ([held[:, slot] for held in self.states] for slot in (now, then))
                whole = spec.return_sequences and not masked
                last = not masked and t == T - 1
                y = output[:, t] if whole else output[:, 0] if last else None
                self.step(t, self.z[:, spec.source_step(t) - first], before, after, y)
                if masked:
                    self._skip(t, before, after, output)
        states = tuple(np.ascontiguousarray(held[:, T if self.save else T % 2]) for held in self.states)
        if self.save:
            states = tuple(state.copy() for state in states)
        return output if spec.return_sequences else output[:, 0], states

    def _skip(self, t: int, before: list[np.ndarray], after: list[np.ndarray], output: np.ndarray) -> None:
        """Carry the states of masked samples on, and write the output, which repeats itself there."""
        valid = self.valid(t)
        slot = t if self.spec.return_sequences else 0
        if t and self.spec.return_sequences:
            output[:, t] = output[:, t - 1]
        if valid is None:
            output[:, slot] = after[0]
            return
        output[valid, slot] = after[0][valid]
        for old, new in zip(before, after, strict=True):
            new[~valid] = old[~valid]

    def step(
        self, t: int, z: np.ndarray, before: list[np.ndarray], after: list[np.ndarray], y: np.ndarray | None
    ) -> None:  # fmt: skip
        raise NotImplementedError

    def convolved(self, number: int, h: np.ndarray) -> np.ndarray:
        """Return one of the convolutions of h (B, *grid, F), in memory that the next step uses again."""
        z_h = self._memory(("z_h", number), self.spec.columns[number] * self.F)
        self.convolve(number, h, z_h)
        return z_h[:, 0]

    def convolve(self, number: int, h: np.ndarray, z_h: np.ndarray) -> None:
        """Write one of the convolutions of h (B, *grid, F) to z_h (B, 1, *grid, columns)."""
        if not self._bounded:
            self.of_h[number].look(h)
        self.of_h[number].forward(h[:, np.newaxis], z_h)

    def _memory(self, key: Any, columns: int | None = None) -> np.ndarray:
        memory = self.__dict__.setdefault("_lent", {})
        if key not in memory:
            memory[key] = self.empty(1, columns)
        return memory[key]

    def normalized(self, z: np.ndarray, z_h: np.ndarray, number: int) -> np.ndarray | None:
        """Return z_h; or with normalization None, when z, of the `number`-th columns, is the normalized sum.

        ``gamma (z - mean) / √(variance + ε) + beta`` over pixels and a group of channels: Wu & He 2018.
        """
        weights = self.inputs.normalization
        if weights is None:
            return z_h
        z += z_h
        groups, gamma, beta = self._group(z, number)
        axes = (*range(1, groups.ndim - 2), groups.ndim - 1)
        count = np.prod([groups.shape[axis] for axis in axes])
        mean = total(groups, axes, keepdims=True) / count
        scale = 1 / np.sqrt(total((groups - mean) ** 2, axes, keepdims=True) / count + self.spec.normalization.epsilon)
        values = ((groups - mean) * scale).astype(self.dtype, copy=False)
        z[...] = gamma * values.reshape(z.shape) + beta
        if self.save:
            if number == 0:
                self._normalized.append([])
            self._normalized[-1].append((values, scale.astype(self.dtype, copy=False)))
        return None

    def _group(self, z: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """View z by groups of channels; and gamma and beta of its columns."""
        weights, first = self.inputs.normalization or {}, sum(self.spec.columns[:number]) * self.F
        size = self.width // (self.spec.normalization.groups or self.spec.G)
        part = slice(first, first + z.shape[-1])
        return np.ascontiguousarray(z).reshape(*z.shape[:-1], -1, size), weights["gamma"][part], weights["beta"][part]

    # Backward

    def backward(
        self, dy: np.ndarray | None, dstates: Sequence[np.ndarray | None], input_gradient: bool
    ) -> dict[str, Any]:  # fmt: skip
        spec, T = self.spec, self.T
        for convolution in (self._of_x, *self.of_h):
            convolution.look(dy, *dstates)
        d = [np.zeros(spec.state_shape, self.dtype) if given is None else given.copy() for given in dstates]
        if dy is not None and not spec.return_sequences:
            steps, dy = [dy if t == T - 1 else None for t in range(T)], None
        else:
            steps = [None if dy is None else dy[:, t] for t in range(T)]
        repeated = None if self.inputs.mask is None else np.zeros(spec.state_shape, self.dtype)
        given = any(state is not None for state in self.inputs.states)
        names = ("gamma", "beta") if self.inputs.normalization is not None else ()
        self.dnormalization = {name: np.zeros(self.width, self.dtype) for name in names}
        more = None
        for t in reversed(range(T)):
            doutput = steps[t]
            if repeated is not None:
                repeated += 0 if doutput is None else doutput
                doutput = repeated
            valid = self.valid(t)
            before = [states[:, t] for states in self.states]
            z, wanted = self.z[:, spec.source_step(t)], t > 0 or given
            if valid is None:
                more = self.back(t, z, before, d, doutput, more, wanted)
                if repeated is not None:
                    repeated.fill(0)
                continue
            accumulate(d[0], more)  # what is masked goes on as it is
            held = [array[~valid] for array in d]
            for array in d:
                array[~valid] = 0
            assert repeated is not None
            d[0][valid] += repeated[valid]
            accumulate(d[0], self.back(t, z, before, d, None, None, wanted))
            for array, kept in zip(d, held, strict=True):
                array[~valid] = kept
            repeated[valid] = 0
            more = None
        accumulate(d[0], more)
        dx = None
        if input_gradient:
            dx = np.empty_like(self.x)
            self._of_x.pull_back(self.z, dx)
        self._of_x.add(self.x, self.z)
        self.gather()
        result: dict[str, Any] = {"x": dx, "kernel": self._of_x.gradient}
        result["recurrent_kernel"] = np.concatenate([convolution.gradient for convolution in self.of_h], -1)
        result["bias"] = self.bias_gradient()
        result |= dict(zip(CELL_STATES[spec.cell], d if given else (None,) * len(d), strict=True))
        return result | {"normalization": self.dnormalization or None}

    def back(
        self, t: int, z: np.ndarray, before: list[np.ndarray], d: list[np.ndarray], dy: np.ndarray | None,
        more: np.ndarray | None, wanted: bool,
    ) -> np.ndarray | None:  # fmt: skip
        """Go back through step t: z becomes the gradient of x's convolution, d those of the states before it.

        dy and `more` are added to that of the new h; what is returned is to be added to that of the h before. They need
        not be right where they are not `wanted`.
        """
        raise NotImplementedError

    def gather(self) -> None:
        """Gather the gradients of the recurrent kernels, z being that of x's convolution: here h's is the same."""
        self.of_h[0].add(self.states[0][:, :-1], self.z[:, ::-1] if self.spec.go_backwards else self.z)

    def bias_gradient(self) -> np.ndarray:
        sums: np.ndarray | None = None if self.dnormalization else self.updates.sums
        return self.summed(self.z) if sums is None else sums

    def summed(self, z: np.ndarray) -> np.ndarray:
        return total(z, tuple(range(z.ndim - 1)))

    def pulled(self, number: int, dz: np.ndarray) -> np.ndarray:
        """Pull the gradient of one of the convolutions of h back, in memory that the next step uses again."""
        dh = self._memory(("dh", number))
        self.of_h[number].pull_back(dz[:, np.newaxis], dh)
        return dh[:, 0]

    def normalized_back(self, dz: np.ndarray, t: int, number: int) -> None:
        """Pull back through `normalized`: gradients of what it made become those of the sum."""
        if not self.dnormalization:
            return
        values, scale = self._normalized[t][number]
        first = sum(self.spec.columns[:number]) * self.F
        part, over = slice(first, first + dz.shape[-1]), tuple(range(dz.ndim - 1))
        _, gamma, _ = self._group(dz, number)
        self.dnormalization["gamma"][part] += total(dz * values.reshape(dz.shape), over)
        self.dnormalization["beta"][part] += total(dz, over)
        d = (dz * gamma).reshape(values.shape)
        axes = (*range(1, d.ndim - 2), d.ndim - 1)
        count = np.prod([d.shape[axis] for axis in axes]).astype(self.dtype)
        along = total(d * values, axes, keepdims=True) / count
        d = (d - total(d, axes, keepdims=True) / count - values * along) * scale
        dz[...] = d.reshape(dz.shape)


class _RNN(_Run):
    def step(
        self, t: int, z: np.ndarray, before: list[np.ndarray], after: list[np.ndarray], y: np.ndarray | None
    ) -> None:  # fmt: skip
        self.updates.rnn(z, self.normalized(z, self.convolved(0, before[0]), 0), after[0], y)

    def back(
        self, t: int, z: np.ndarray, before: list[np.ndarray], d: list[np.ndarray], dy: np.ndarray | None,
        more: np.ndarray | None, wanted: bool,
    ) -> np.ndarray | None:  # fmt: skip
        self.updates.rnn_back(z, d[0], dy, more)
        self.normalized_back(z, t, 0)
        if wanted:
            self.of_h[0].pull_back(z[:, np.newaxis], d[0][:, np.newaxis])
        return None


class _LSTM(_Run):
    def step(
        self, t: int, z: np.ndarray, before: list[np.ndarray], after: list[np.ndarray], y: np.ndarray | None
    ) -> None:  # fmt: skip
        z_h = self.normalized(z, self.convolved(0, before[0]), 0)
        self.updates.lstm(z, z_h, before[1], after[1], after[0], y)

    def back(
        self, t: int, z: np.ndarray, before: list[np.ndarray], d: list[np.ndarray], dy: np.ndarray | None,
        more: np.ndarray | None, wanted: bool,
    ) -> np.ndarray | None:  # fmt: skip
        self.updates.lstm_back(z, before[1], *d, dy, more)
        self.normalized_back(z, t, 0)
        if wanted:
            self.of_h[0].pull_back(z[:, np.newaxis], d[0][:, np.newaxis])
        return None


class _GRU(_Run):
    """With reset_after: n's convolutions of x and of h are kept apart, and have gradients of their own."""

    def __init__(self, spec: CellSpec, tools: Tools, inputs: Inputs, save: bool):
        super().__init__(spec, tools, inputs, save)
        self._z_h = self.empty(self.T if save else 1, self.width)

    def step(
        self, t: int, z: np.ndarray, before: list[np.ndarray], after: list[np.ndarray], y: np.ndarray | None
    ) -> None:  # fmt: skip
        z_h = self._z_h[:, t : t + 1] if self.save else self._z_h
        self.convolve(0, before[0], z_h)
        self.updates.gru(z, z_h[:, 0], before[0], after[0], y)

    def back(
        self, t: int, z: np.ndarray, before: list[np.ndarray], d: list[np.ndarray], dy: np.ndarray | None,
        more: np.ndarray | None, wanted: bool,
    ) -> np.ndarray | None:  # fmt: skip
        self.updates.gru_back(z, self._z_h[:, t], before[0], d[0], dy, more)
        return self.pulled(0, self._z_h[:, t]) if wanted else None

    def gather(self) -> None:
        self.of_h[0].add(self.states[0][:, :-1], self._z_h)

    def bias_gradient(self) -> np.ndarray:
        sums = self.updates.sums
        if sums is None:
            return np.stack([self.summed(self.z), self.summed(self._z_h)])
        z, r, n, q = np.split(sums, 4)
        return np.stack([np.concatenate([z, r, n]), np.concatenate([z, r, q])])


class _ResetBefore(_Run):
    """A GRU with reset_after=False: the convolution of r∘h for n follows that of h for z and r."""

    def __init__(self, spec: CellSpec, tools: Tools, inputs: Inputs, save: bool):
        super().__init__(spec, tools, inputs, save)
        self._met = self.empty(self.T if save else 1)
        self._dgates = self._dn = self._met

    def step(
        self, t: int, z: np.ndarray, before: list[np.ndarray], after: list[np.ndarray], y: np.ndarray | None
    ) -> None:  # fmt: skip
        gates, n = z[..., : 2 * self.F], z[..., 2 * self.F :]
        met = self._met[:, t if self.save else 0]
        self.updates.reset(z, self.normalized(gates, self.convolved(0, before[0]), 0), before[0], met)
        self.updates.update(z, self.normalized(n, self.convolved(1, met), 1), before[0], after[0], y)

    def back(
        self, t: int, z: np.ndarray, before: list[np.ndarray], d: list[np.ndarray], dy: np.ndarray | None,
        more: np.ndarray | None, wanted: bool,
    ) -> np.ndarray | None:  # fmt: skip
        if t == self.T - 1:
            self._dgates, self._dn = self.empty(self.T, 2 * self.F), self.empty(self.T)
        dgates, dn = self._dgates[:, t], self._dn[:, t]
        self.updates.update_back(z, before[0], d[0], dn, dy, more)
        self.normalized_back(dn, t, 1)
        self.updates.reset_back(z, before[0], self.pulled(1, dn), dgates, d[0])
        if self.dnormalization:
            self.normalized_back(dgates, t, 0)
            z[..., : 2 * self.F], z[..., 2 * self.F :] = dgates, dn
        return self.pulled(0, dgates) if wanted else None

    def gather(self) -> None:
        self.of_h[0].add(self.states[0][:, :-1], self._dgates)
        self.of_h[1].add(self._met, self._dn)


_RUNS: dict[tuple[str, bool], type[_Run]] = {
    ("rnn", True): _RNN, ("lstm", True): _LSTM, ("gru", True): _GRU, ("gru", False): _ResetBefore,
}  # fmt: skip
assert {cell for cell, _ in _RUNS} == set(CELL_GATES)


def _cut(array: np.ndarray | None, part: Any) -> Any:
    """Return a part of a weight's last axis, or a row of it; the same object for the same weights."""
    if array is None or part is None:
        return array
    key = ("part", part) if isinstance(part, int) else ("part", part.start, part.stop)
    index = part if isinstance(part, int) else (..., part)
    return remembered.remember((array,), key, lambda: remembered.immutable(np.ascontiguousarray(array[index])))

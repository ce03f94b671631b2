"""conv2d on the cpu engine."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fastclstm.engines import recurrence
from fastclstm.engines.cpu import launch, threads
from fastclstm.engines.cpu.kernels import direct, simd, winograd
from fastclstm.engines.cpu.kernels.col2im import fold
from fastclstm.engines.cpu.kernels.gates import CELL
from fastclstm.engines.cpu.kernels.schedule import Slots, slots
from fastclstm.engines.cpu.kernels.weight_gradient import WeightGradient
from fastclstm.spec import ConvSpec

SERIAL_FLOPS = 2_000_000
"""Below this much work a second thread costs more than it saves."""

FOLDED_BYTES = 8 << 20
"""Size of what the taps of a kernel add, before it is folded, at most; more than one step never waits."""


def team_size(flops: int) -> int:
    """Threads for so many floating-point operations a step."""
    return max(1, min(threads.usable_threads(), flops // SERIAL_FLOPS))


def conv2d(
    spec: ConvSpec, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None, *, algorithm: str = "auto"
) -> np.ndarray:
    """Convolve x (B, H, W, C) with kernel (KH, KW, C, F): y (B, HO, WO, F)."""
    y = np.empty((spec.B, spec.HO, spec.WO, spec.F), x.dtype)
    m = launch.choose("conv2d", (spec,), algorithm, x.itemsize)
    if y.size:
        cell = np.zeros(1, CELL)
        cell["F"] = spec.F
        team = team_size(spec.flops)
        columns = launch.pack((kernel,), bias, np.ones(1), m)
        plan = launch.plan((spec,), columns, m, x.itemsize, team)
        trouble = launch.run(plan, columns, cell, spec.B, 1, team, x=slots(x), h=slots(y))
        if m and trouble.any():  # a tile spreads what is not finite beyond its receptive field
            y[trouble] = conv2d(spec.with_batch(trouble.sum()), x[trouble], kernel, bias, algorithm="direct")
    return y


def conv2d_backward(
    spec: ConvSpec, x: np.ndarray, kernel: np.ndarray, dy: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pull dy (B, HO, WO, F) back through `conv2d`: dx, dkernel, dbias."""
    if dy is None or dy.size == 0:
        return np.zeros_like(x), np.zeros_like(kernel), np.zeros(spec.F, x.dtype)
    team = team_size(spec.flops)
    dx = np.empty_like(x)
    InputGradient(spec, kernel, "auto", team).pull_back(slots(dy), slots(dx), 1)
    gradient = WeightGradient((spec,), x.dtype, 1)
    gradient.add((slots(x),), slots(dy), spec.B, 1, team)
    return dx, gradient.result()[0], recurrence.total(dy, (0, 1, 2))


class InputGradient:
    """The transpose of a convolution, planned.

    Either a convolution with the flipped, transposed kernel; or, where strides or crops forbid that or channels are
    few, what each tap of the kernel adds, as further channels of a 1×1 convolution, is folded.
    """

    def __init__(self, spec: ConvSpec, kernel: np.ndarray, algorithm: str, team: int):
        self._spec, self._dtype, self.team = spec, kernel.dtype, team
        inner, m, self._folds = _way_back(spec, algorithm, kernel.itemsize, winograd.TILES)
        if self._folds:
            kernel = kernel.reshape(1, 1, -1, spec.F)
        self._cell = np.zeros(1, CELL)
        self._cell["F"] = inner.F
        self._columns = launch.pack((kernel,), None, np.ones(1), m, transposed=True, remember=False)
        self._plan = launch.plan((inner,), self._columns, m, kernel.itemsize, team)

    def pull_back(self, dy: Slots, dx: Slots, T: int) -> None:
        """Compute T steps of B images: dx (B, T, H, W, C) of dy (B, T, HO, WO, F)."""
        if not self._folds:
            self._run(dy, dx, T)
            return
        spec = self._spec
        step = spec.B * spec.HO * spec.WO * spec.KH * spec.KW * spec.C * self._dtype.itemsize
        at_once = max(1, min(T, FOLDED_BYTES // step))
        shape = (spec.B, at_once, spec.HO, spec.WO, spec.KH * spec.KW * spec.C)
        taps = slots(launch.scratch_array(shape, self._dtype, "taps"))
        for t in range(0, T, at_once):
            count = min(at_once, T - t)
            self._run(dy.after(0, t), taps, count)
            fold(spec, self._dtype, taps, dx.after(0, t), count, self.team)

    def _run(self, dy: Slots, dx: Slots, T: int) -> None:
        launch.run(self._plan, self._columns, self._cell, self._spec.B, T, self.team, x=dy, h=dx)


@lru_cache(maxsize=64)
def _way_back(spec: ConvSpec, algorithm: str, itemsize: int, tiles: tuple[int, ...]) -> tuple[ConvSpec, int, bool]:
    """The convolution of dy, its Winograd tile of the given ones (0: direct), and whether its results are folded."""
    taps = ConvSpec.infer((spec.B, spec.HO, spec.WO, spec.F), (1, 1, spec.F, spec.KH * spec.KW * spec.C))
    inner = _transposed(spec)
    if inner is None:
        return taps, 0, True
    m = launch.choose("conv2d", (inner,), algorithm if winograd.fits((inner,)) else "auto", itemsize)
    if algorithm != "winograd" and _fold_cost(spec, taps, itemsize) < launch.cost((inner,), m, itemsize):
        return taps, 0, True
    return inner, m, False


def _transposed(spec: ConvSpec) -> ConvSpec | None:
    """Geometry of the convolution of dy that gives dx, None where there is none."""
    pads = []
    for axis in (0, 1):
        reach = ((spec.KH, spec.KW)[axis] - 1) * spec.dilation[axis]
        before, after = spec.padding[axis]
        if spec.padding_mode == "circular" and before + after != reach:
            return None
        pads.append((reach - before, reach - after))
    if max(spec.strides) > 1 or min(min(pad) for pad in pads) < 0:
        return None
    return ConvSpec(spec.B, spec.HO, spec.WO, spec.F, spec.C, spec.KH, spec.KW, spec.H, spec.W, (1, 1), spec.dilation,
                    (pads[0], pads[1]), spec.padding_mode)  # fmt: skip


def _fold_cost(spec: ConvSpec, taps: ConvSpec, itemsize: int) -> float:
    """Estimate the work in multiply-adds of vectors (see `direct.cost`)."""
    additions = spec.B * spec.HO * spec.WO * spec.KH * spec.KW * (spec.C / simd.lanes(itemsize) + 1)
    return direct.cost((taps,), spec.B, itemsize) + 4 * additions

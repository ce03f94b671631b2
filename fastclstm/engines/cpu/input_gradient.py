"""Gradients of a convolution's input."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from fastclstm.engines.cpu import launch, plans, threads
from fastclstm.engines.cpu.kernels import col2im, simd
from fastclstm.engines.cpu.kernels.entry import table
from fastclstm.engines.cpu.kernels.gates import CELL
from fastclstm.engines.cpu.kernels.padding import SOURCE, source
from fastclstm.engines.cpu.kernels.schedule import Slots, slots
from fastclstm.spec import ConvSpec

FOLDED_BYTES = 8 << 20
"""Size of what the taps of a kernel add, before it is folded, at most; more than one step never waits."""


class InputGradient:
    """The transpose of a convolution, planned.

    Either a convolution with the flipped, transposed kernel; or, where strides or crops forbid that or channels are
    few, what each tap of the kernel adds, as further channels of a 1×1 convolution, is folded.
    """

    def __init__(self, spec: ConvSpec, kernel: np.ndarray, algorithm: str, team: int):
        self._spec, self._dtype, self.team = spec, kernel.dtype, team
        self._source = table(np.array([source(spec)], SOURCE))
        inner, m, self._folds = _way_back(spec, algorithm, kernel.itemsize, plans.TILES)
        if self._folds:
            kernel = kernel.reshape(1, 1, -1, spec.F)
        self._cell = np.zeros(1, CELL)
        self._cell["F"] = inner.F
        self._columns = launch.pack((kernel,), None, np.ones(1), m, transposed=True, remember=False)
        self._plan = plans.plan((inner,), m, "store", len(self._columns.groups), kernel.itemsize, team)

    def pull_back(self, dy: Slots, dx: Slots, T: int) -> None:
        """Compute T steps of B images: dx (B, T, H, W, C) of dy (B, T, HO, WO, F)."""
        if not self._folds:
            self._run(dy, dx, T)
            return
        spec = self._spec
        step = spec.B * spec.HO * spec.WO * spec.KH * spec.KW * spec.C * self._dtype.itemsize
        at_once = max(1, min(T, FOLDED_BYTES // step))
        shape = (spec.B, at_once, spec.HO, spec.WO, spec.KH * spec.KW * spec.C)
        work = np.zeros(1, col2im.WORK)
        size = math.prod(shape) * self._dtype.itemsize
        address, memory = launch.borrow(size)
        taps = slots(memory[:size].view(self._dtype).reshape(shape))
        for t in range(0, T, at_once):
            count = min(at_once, T - t)
            self._run(dy.after(0, t), taps, count)
            work[0] = (spec.B, count, spec.HO, spec.WO, *taps[:3], *dx.after(0, t)[:3])
            threads.run(col2im.fold, self.team, (), np.empty(0, self._dtype), work, self._source)
        launch.give_back(address, memory)

    def _run(self, dy: Slots, dx: Slots, T: int) -> None:
        launch.run(self._plan, self._columns, self._cell, self._spec.B, T, self.team, x=dy, h=dx)


@lru_cache(maxsize=64)
def _way_back(spec: ConvSpec, algorithm: str, itemsize: int, tiles: tuple[int, ...]) -> tuple[ConvSpec, int, bool]:
    """The convolution of dy, its Winograd tile of the given ones (0: direct), and whether its results are folded."""
    taps = ConvSpec.infer((spec.B, spec.HO, spec.WO, spec.F), (1, 1, spec.F, spec.KH * spec.KW * spec.C))
    inner = _transposed(spec)
    if inner is None:
        return taps, 0, True
    m = plans.choose("conv2d", (inner,), algorithm if plans.fits((inner,)) else "auto", itemsize)
    if algorithm != "winograd" and _fold_cost(spec, taps, itemsize) < plans.cost((inner,), m, itemsize):
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
    """Estimate the work in multiply-adds of vectors (see `plans.direct_cost`)."""
    additions = spec.B * spec.HO * spec.WO * spec.KH * spec.KW * (spec.C / simd.lanes(itemsize) + 1)
    return plans.direct_cost((taps,), spec.B, itemsize) + 4 * additions

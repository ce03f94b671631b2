"""Gradients of a convolution's input."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np

from fastclstm.engines import remembered
from fastclstm.engines.cpu import launch, plans, threads, tiles
from fastclstm.engines.cpu.kernels import col2im, simd
from fastclstm.engines.cpu.kernels.entry import table
from fastclstm.engines.cpu.kernels.gates import storing
from fastclstm.engines.cpu.kernels.padding import SOURCE, source
from fastclstm.engines.cpu.kernels.schedule import Slots, slots
from fastclstm.engines.cpu.packing import Columns
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.spec import ConvSpec

FOLDED_BYTES = 8 << 20
"""Size of what the taps of a kernel add, before it is folded, at most; more than one step of an image never waits."""


class InputGradient:
    """The transpose of a convolution, planned.

    Either a convolution with the flipped, transposed kernel; or, where strides or crops forbid that or channels are
    few, what each tap of the kernel adds, as further channels of a 1×1 convolution, is folded.
    """

    def __init__(self, spec: ConvSpec, kernel: np.ndarray, algorithm: str):
        """Choose the way, for as many images as `spec` has, and pack the kernel."""
        self._spec, self._dtype, self._kernel = spec, kernel.dtype, kernel
        if not spec.C:
            return
        self._source = table(np.array([source(spec)], SOURCE))
        self._inner, self._m, self._folds = _way_back(spec, algorithm, kernel.itemsize, tiles.choices(spec.KH, spec.KW))
        self._cell = storing(self._inner.F)
        flat = kernel.reshape(1, 1, -1, spec.F) if self._folds else kernel

        def pack() -> Columns:
            return launch.pack((flat,), None, np.ones(1), self._m, transposed=True, remember=False)

        self._columns: Columns = remembered.passing((kernel,), ("transposed", self._m, self._folds), pack)

    def pull_back(self, dy: Slots, dx: Slots, B: int, T: int, team: int) -> None:
        """Compute T steps of B images: dx (B, T, H, W, C) of dy (B, T, HO, WO, F)."""
        if not self._spec.C:
            return
        if not self._folds:
            trouble = self._run(dy, dx, B, T, team)
            if self._m and trouble.any():  # dy, or transformed weights, are not finite
                direct = InputGradient(self._spec, self._kernel, "direct")
                for b in np.flatnonzero(trouble).tolist():
                    direct.pull_back(dy.after(b, 0), dx.after(b, 0), 1, T, team)
            return
        spec = self._spec
        image = spec.HO * spec.WO * spec.KH * spec.KW * spec.C * self._dtype.itemsize
        at_once = max(1, FOLDED_BYTES // image)
        images = min(B, at_once)
        steps = min(T, at_once // images)
        shape = (images, steps, spec.HO, spec.WO, spec.KH * spec.KW * spec.C)
        work = np.zeros(1, col2im.WORK)
        size = math.prod(shape) * self._dtype.itemsize
        address, memory = launch.borrow(size)
        taps = slots(memory[:size].view(self._dtype).reshape(shape))
        for b, t in itertools.product(range(0, B, images), range(0, T, steps)):
            count = min(images, B - b), min(steps, T - t)
            self._run(dy.after(b, t), taps, *count, team)
            work[0] = (*count, spec.HO, spec.WO, *taps[:3], *dx.after(b, t)[:3])
            threads.run(col2im.fold, team, (), np.empty(0, self._dtype), work, self._source)
        launch.give_back(address, memory)

    def _run(self, dy: Slots, dx: Slots, B: int, T: int, team: int) -> np.ndarray:
        inner, groups = self._inner.with_batch(B), len(self._columns.groups)
        plan = plans.plan((inner,), self._m, "store", groups, self._dtype.itemsize, team)
        return launch.run(plan, self._columns, self._cell, B, T, team, x=dy, h=dx, step_flops=inner.flops)


@lru_cache(maxsize=64)
def _way_back(
    spec: ConvSpec, algorithm: str, itemsize: int, choices: tuple[Tile, ...]
) -> tuple[ConvSpec, Tile | None, bool]:
    """The convolution of dy, its Winograd tile of the given ones (None: direct), and whether its results are folded."""
    taps = ConvSpec.infer((spec.B, spec.HO, spec.WO, spec.F), (1, 1, spec.F, spec.KH * spec.KW * spec.C))
    inner = _transposed(spec)
    if inner is None:
        return taps, None, True
    m = plans.choose("conv2d", (inner,), algorithm if plans.fits((inner,)) else "auto", itemsize)
    if algorithm != "winograd" and _fold_cost(spec, taps, itemsize) < plans.cost((inner,), m, itemsize):
        return taps, None, True
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

"""Gradients of a convolution's input."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fastclstm.engines import lending, remembered
from fastclstm.engines.cpu import launch, packing, plans, threads, tiles
from fastclstm.engines.cpu.kernels import col2im, simd
from fastclstm.engines.cpu.kernels.entry import table
from fastclstm.engines.cpu.kernels.gates import storing
from fastclstm.engines.cpu.kernels.padding import SOURCE, source
from fastclstm.engines.cpu.kernels.schedule import Slots, slots
from fastclstm.engines.cpu.program import Course, Program
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
        self._inner, self._m, self._folds, _ = _way_back(
            spec, algorithm, kernel.itemsize, tiles.choices((spec.KH, spec.KW))
        )
        self._cell = storing(self._inner.F)
        flat = kernel.reshape(1, 1, -1, spec.F) if self._folds else kernel

        def pack() -> packing.Columns:
            return launch.pack((flat,), None, np.ones(1), self._m, transposed=True, remember=False)

        self._columns: packing.Columns = remembered.passing((kernel,), ("transposed", self._m, self._folds), pack)

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

    def add(self, program: Program, dy: Course, dx: Course, B: int, team: int, where: slice) -> np.ndarray:
        """Add it to a program, one step at a time; where (B,) the result is not 0 then, it must be done directly."""
        trouble = np.zeros(B, np.int64)
        inner, groups, itemsize = self._inner, len(self._columns.groups), self._dtype.itemsize
        if not self._folds:
            plan = plans.plan((inner.with_batch(B),), self._m, "store", groups, itemsize, team)
            program.convolve(plan, self._columns, self._cell, B, trouble, target=dx, x=dy, where=where)
            return trouble
        spec = self._spec
        image = spec.HO * spec.WO * spec.KH * spec.KW * spec.C
        images = min(B, max(1, FOLDED_BYTES // (image * itemsize)))
        taps = lending.aligned_empty(images * image, self._dtype)
        target = Course(np.full(program.steps, taps.ctypes.data), image * itemsize)
        program.keep(taps)
        for b in range(0, B, images):
            count = min(images, B - b)
            plan = plans.plan((inner.with_batch(count),), self._m, "store", groups, itemsize, team)
            program.convolve(plan, self._columns, self._cell, count, np.zeros(count, np.int64), target=target,
                             x=dy.after(b), where=where)  # fmt: skip
            work = np.zeros(program.steps, col2im.WORK)
            for name, value in (("B", count), ("T", 1), ("HO", spec.HO), ("WO", spec.WO)):
                work[name] = value
            work["taps"], work["taps_image"] = target
            work["dx"], work["dx_image"] = dx.after(b)
            program.add(col2im.fold, (), table(np.empty(0, self._dtype)), work, self._source, where=where)
        return trouble

    def _run(self, dy: Slots, dx: Slots, B: int, T: int, team: int) -> np.ndarray:
        inner, groups = self._inner.with_batch(B), len(self._columns.groups)
        plan = plans.plan((inner,), self._m, "store", groups, self._dtype.itemsize, team)
        return launch.run(plan, self._columns, self._cell, B, T, team, x=dy, h=dx, step_flops=inner.flops)


def join(recurrent: ConvSpec, inputs: ConvSpec, algorithm: str, itemsize: int, T: int) -> ConvSpec | None:
    """The convolution of both, its channels h's, then x's, where one gradient of it a step takes no longer than two.

    That is nearly always so where their geometries agree: dz is read and transformed once. x's alone could take T steps
    at once. On one thread of a Zen 4, 2×10×64², k3, ms of h's and of x's alone, then together: 1→4 2.4 + 3.1, 4.0; 1→8
    6.4 + 3.9, 6.3; 3→16 11.0 + 12.9, 16.5; 4×8×16², 16→64, k5 24.3 + 9.7, 25.9.
    """
    joint = replace(recurrent, C=recurrent.C + inputs.C)
    if not inputs.C or replace(inputs, C=joint.C) != joint:
        return None
    costs = [
        _way_back(spec, algorithm, itemsize, tiles.choices((spec.KH, spec.KW)))[3] / steps
        for spec, steps in ((joint, 1), (recurrent, 1), (inputs.with_batch(inputs.B * T), T))
    ]
    return joint if costs[0] <= costs[1] + costs[2] else None


@lru_cache(maxsize=64)
def _way_back(
    spec: ConvSpec, algorithm: str, itemsize: int, choices: tuple[Tile, ...]
) -> tuple[ConvSpec, Tile | None, bool, float]:
    """The convolution of dy, its Winograd tile of the given ones (None: direct), whether its results are folded, cost.

    The cost is an estimate in multiply-adds of vectors.
    """
    taps = ConvSpec.infer((spec.B, spec.HO, spec.WO, spec.F), (1, 1, spec.F, spec.KH * spec.KW * spec.C))
    inner, folded = _transposed(spec), _fold_cost(spec, taps, itemsize)
    if inner is None:
        return taps, None, True, folded
    m = plans.choose((inner,), algorithm, itemsize, remember=False)
    cost = plans.cost((inner,), m, itemsize)
    if algorithm != "winograd" and folded < cost:
        return taps, None, True, folded
    return inner, m, False, cost


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

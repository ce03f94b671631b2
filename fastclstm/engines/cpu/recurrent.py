"""The recurrence of any cell on the cpu engine: convolutions planned once, and kernels for a cell's update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from fastclstm.engines import cells, lending
from fastclstm.engines.cpu import launch, outliers, plans
from fastclstm.engines.cpu.input_gradient import InputGradient
from fastclstm.engines.cpu.kernels.gates import storing
from fastclstm.engines.cpu.kernels.schedule import slots
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.engines.cpu.updates import updates_of
from fastclstm.engines.cpu.weight_gradient import WeightGradient
from fastclstm.spec import CellSpec, ConvSpec


def recurrent(
    spec: CellSpec,
    x: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None,
    states: tuple[np.ndarray | None, ...],
    mask: np.ndarray | None,
    *,
    normalization: cells.Arrays | None = None,
    dropout: cells.Arrays | None = None,
    algorithm: str = "auto",
    save: bool = False,
    convolution: Callable[..., Any] | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, ...], cells.Saved | None]:
    """Run a cell over x (B, T, *space, C): see `cells`."""
    tools = cells.Tools(convolution or PlannedConvolution, updates_of, _empty)
    inputs = cells.Inputs(x, kernel, recurrent_kernel, bias, states, mask, normalization, dropout, algorithm)
    return cells.forward(spec, tools, inputs, save)


def recurrent_backward(
    spec: CellSpec,
    saved: cells.Saved,
    dy: np.ndarray | None,
    dstates: Sequence[np.ndarray | None],
    *,
    input_gradient: bool = True,
) -> dict[str, Any]:
    """Pull gradients of the output and of the last states back through time: see `cells.backward`."""
    return cells.backward(spec, saved, dy, dstates, input_gradient=input_gradient)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return lending.aligned_empty(int(np.prod(shape)), dtype).reshape(shape)


class PlannedConvolution:
    """A convolution of frames that is planned and packed once: see `cells.Convolves`.

    Images with what `outliers` finds are convolved directly, as by conv2d.
    """

    def __init__(self, spec: ConvSpec, kernel: np.ndarray, bias: np.ndarray | None, algorithm: str):
        self._spec, self._kernel, self._dtype = spec, kernel, kernel.dtype
        self._looks = algorithm != "direct"
        self._tile = plans.choose((spec,), algorithm, kernel.itemsize)
        self._packed = cache(lambda tile: launch.pack((kernel,), bias, np.ones(1), tile, strides=(spec.strides,)))
        self._cell = storing(spec.F)
        self._direct = np.zeros(spec.B, np.bool_)
        self._back = cache(lambda direct: InputGradient(spec, kernel, "direct" if direct else algorithm))
        self._of_kernel: dict[bool, WeightGradient] = {}
        self._algorithm = algorithm

    def look(self, *arrays: np.ndarray | None) -> None:
        """Take note of samples (B, …) that transforms would spoil: they will be computed directly."""
        for array in arrays if self._looks else ():
            if array is not None and array.size:
                self._direct = self._direct | outliers.find(array)

    def forward(self, x: np.ndarray, z: np.ndarray) -> None:
        """Write the convolution of x to z."""
        if not z.size:
            return
        x = _with_whole_frames(x)
        tile = None if self._direct.all() else self._tile
        spoilt = self._run(tile, x, z)
        if tile:
            for b in np.flatnonzero(spoilt | self._direct).tolist():
                self._run(None, x[b : b + 1], z[b : b + 1])

    def _run(self, tile: Tile | None, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        B, n = x.shape[:2]
        spec, columns = self._spec.with_batch(B), self._packed(tile)
        team = launch.team_size(spec.flops)
        plan = plans.plan((spec,), tile, "store", len(columns.groups), self._dtype.itemsize, team)
        return launch.run(plan, columns, self._cell, B, n, team, x=slots(x), h=slots(z), step_flops=spec.flops)

    def pull_back(self, dz: np.ndarray, dx: np.ndarray) -> None:
        """Write the gradient of x to dx."""
        if not dz.size:
            dx.fill(0)
            return
        for images, spoilt in self._parts():
            d, target = dz[images], dx[images]
            team = launch.team_size(self._spec.with_batch(len(d)).flops)
            self._back(spoilt).pull_back(slots(d), slots(target), d.shape[0], d.shape[1], team)

    def add(self, x: np.ndarray, dz: np.ndarray) -> None:
        """Add the kernel's gradient."""
        if not dz.size:
            return
        x = _with_whole_frames(x)
        for images, spoilt in self._parts():
            d = dz[images]
            if spoilt not in self._of_kernel:
                way = "direct" if spoilt else self._algorithm
                self._of_kernel[spoilt] = WeightGradient((self._spec,), self._dtype, d.shape[1], way)
            team = launch.team_size(self._spec.with_batch(len(d)).flops)
            self._of_kernel[spoilt].add((slots(x[images]),), slots(d), d.shape[0], d.shape[1], team)

    def _parts(self) -> list[tuple[slice, bool]]:
        """Return runs of images, and whether they are computed directly."""
        return outliers.runs(self._direct)

    @property
    def gradient(self) -> np.ndarray:
        """Of the kernel: what `add` has summed up."""
        sums = [job.result()[0] for job in self._of_kernel.values()]
        return sum(sums[1:], sums[0]) if sums else np.zeros_like(self._kernel)


def _with_whole_frames(x: np.ndarray) -> np.ndarray:
    """Return x (B, n, *frame), its frames without gaps."""
    return x if x[:1, :1].flags.c_contiguous else np.ascontiguousarray(x)

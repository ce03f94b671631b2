"""conv2d on the cpu engine."""

from __future__ import annotations

import numpy as np

from fastclstm.engines import recurrence
from fastclstm.engines.cpu import launch, plans
from fastclstm.engines.cpu.input_gradient import InputGradient
from fastclstm.engines.cpu.kernels.gates import CELL
from fastclstm.engines.cpu.kernels.schedule import slots
from fastclstm.engines.cpu.launch import team_size
from fastclstm.engines.cpu.weight_gradient import WeightGradient
from fastclstm.spec import ConvSpec


def conv2d(
    spec: ConvSpec, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None, *, algorithm: str = "auto"
) -> np.ndarray:
    """Convolve x (B, H, W, C) with kernel (KH, KW, C, F): y (B, HO, WO, F)."""
    y = np.empty((spec.B, spec.HO, spec.WO, spec.F), x.dtype)
    m = plans.choose("conv2d", (spec,), algorithm, x.itemsize)
    if y.size:
        cell = np.zeros(1, CELL)
        cell["F"] = spec.F
        team = team_size(spec.flops)
        columns = launch.pack((kernel,), bias, np.ones(1), m)
        plan = plans.plan((spec,), m, "store", len(columns.groups), x.itemsize, team)
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

"""conv2d on the cpu engine."""

from __future__ import annotations

import numpy as np

from fastclstm.engines import recurrence
from fastclstm.engines.cpu import launch, outliers, plans
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
    if not y.size:
        return y
    spoilt = outliers.find(x) if outliers.spoil(m) else np.zeros(spec.B, np.bool_)
    if spoilt.all():
        m = None
    cell = np.zeros(1, CELL)
    cell["F"] = spec.F
    team = team_size(spec.flops)
    columns = launch.pack((kernel,), bias, np.ones(1), m)
    plan = plans.plan((spec,), m, "store", len(columns.groups), x.itemsize, team)
    spoilt |= launch.run(plan, columns, cell, spec.B, 1, team, x=slots(x), h=slots(y))
    if m and spoilt.any():
        y[spoilt] = conv2d(spec.with_batch(int(spoilt.sum())), x[spoilt], kernel, bias, algorithm="direct")
    return y


def conv2d_backward(
    spec: ConvSpec, x: np.ndarray, kernel: np.ndarray, dy: np.ndarray | None, *, algorithm: str = "auto",
    input_gradient: bool = True,
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:  # fmt: skip
    """Pull dy (B, HO, WO, F) back through `conv2d`: dx, None where nobody asks for it, dkernel, dbias."""
    if dy is None or dy.size == 0:
        return np.zeros_like(x) if input_gradient else None, np.zeros_like(kernel), np.zeros(spec.F, x.dtype)
    dx = np.empty_like(x) if input_gradient else None
    dkernel, dbias = np.zeros_like(kernel), recurrence.total(dy, (0, 1, 2))
    direct = algorithm == "direct" or not plans.fits((spec,))
    runs = outliers.runs(np.zeros(spec.B, np.bool_) if direct else outliers.find(x) | outliers.find(dy))
    for spoilt in sorted({spoilt for _, spoilt in runs}):
        way = "direct" if spoilt else algorithm
        inputs = InputGradient(spec, kernel, way) if input_gradient else None
        kernels = WeightGradient((spec,), x.dtype, 1, way)
        for images in (images for images, kind in runs if kind == spoilt):
            B = images.stop - images.start
            team = team_size(spec.with_batch(B).flops)
            if inputs is not None and dx is not None:
                inputs.pull_back(slots(dy[images]), slots(dx[images]), B, 1, team)
            kernels.add((slots(x[images]),), slots(dy[images]), B, 1, team)
        dkernel += kernels.result()[0]
    return dx, dkernel, dbias

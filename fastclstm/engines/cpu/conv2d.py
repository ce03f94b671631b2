"""conv2d on the cpu engine."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from fastclstm.engines import recurrence
from fastclstm.engines.cpu import launch, outliers, plans
from fastclstm.engines.cpu.input_gradient import InputGradient
from fastclstm.engines.cpu.kernels.gates import storing
from fastclstm.engines.cpu.kernels.schedule import slots
from fastclstm.engines.cpu.launch import team_size
from fastclstm.engines.cpu.weight_gradient import WeightGradient
from fastclstm.spec import ConvSpec


def conv2d(
    spec: ConvSpec, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None, *, algorithm: str = "auto"
) -> np.ndarray:
    """Convolve x (B, H, W, C) with kernel (KH, KW, C, F): y (B, HO, WO, F)."""
    y = np.empty((spec.B, spec.HO, spec.WO, spec.F), x.dtype)
    m = plans.choose((spec,), algorithm, x.itemsize)
    if not y.size:
        return y
    spoilt = outliers.find(x) if outliers.spoil(m) else np.zeros(spec.B, np.bool_)
    if spoilt.all():
        m = None
    team = team_size(spec.flops)
    columns = launch.pack((kernel,), bias, np.ones(1), m, strides=(spec.strides,))
    plan = plans.plan((spec,), m, "store", len(columns.groups), x.itemsize, team)
    spoilt |= launch.run(plan, columns, storing(spec.F), spec.B, 1, team, x=slots(x), h=slots(y))
    if m and spoilt.any():
        y[spoilt] = conv2d(spec.with_batch(int(spoilt.sum())), x[spoilt], kernel, bias, algorithm="direct")
    return y


def conv2d_backward(
    spec: ConvSpec, x: np.ndarray, kernel: np.ndarray, dy: np.ndarray | None, *, algorithm: str = "auto",
    wanted: Collection[str] = ("x", "kernel", "bias"),
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Pull dy (B, HO, WO, F) back through `conv2d`: dx, dkernel, dbias, None for what is not `wanted`.

    Only dkernel looks at x, only dx at kernel: what is not looked at may be any array of the dtype.
    """
    dtype, of_x, of_kernel = x.dtype, "x" in wanted, "kernel" in wanted
    dx = np.empty((spec.B, spec.H, spec.W, spec.C), dtype) if of_x else None
    dkernel = np.zeros((spec.KH, spec.KW, spec.C, spec.F), dtype) if of_kernel else None
    if dy is None or dy.size == 0:
        if dx is not None:
            dx.fill(0)
        return dx, dkernel, np.zeros(spec.F, dtype) if "bias" in wanted else None
    direct = algorithm == "direct" or not plans.alike((spec,))
    looked_at = (dy, x) if of_kernel else (dy,)
    spoilt_images = np.zeros(spec.B, np.bool_) if direct else np.any([outliers.find(a) for a in looked_at], 0)
    runs = outliers.runs(spoilt_images)
    for spoilt in sorted({spoilt for _, spoilt in runs}):
        way = "direct" if spoilt else algorithm
        inputs = InputGradient(spec, kernel, way) if of_x else None
        kernels = WeightGradient((spec,), dtype, 1, way) if of_kernel else None
        for images in (images for images, kind in runs if kind == spoilt):
            B = images.stop - images.start
            team = team_size(spec.with_batch(B).flops)
            if inputs is not None and dx is not None:
                inputs.pull_back(slots(dy[images]), slots(dx[images]), B, 1, team)
            if kernels is not None:
                kernels.add((slots(x[images]),), slots(dy[images]), B, 1, team)
        if kernels is not None:
            dkernel += kernels.result()[0]
    return dx, dkernel, recurrence.total(dy, (0, 1, 2)) if "bias" in wanted else None

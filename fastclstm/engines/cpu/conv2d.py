"""conv2d on the cpu engine."""

from __future__ import annotations

import numpy as np

from fastclstm.engines import recurrence
from fastclstm.engines.cpu import sequence, threads
from fastclstm.engines.cpu.flow import slots
from fastclstm.engines.cpu.gates import CELL
from fastclstm.spec import ConvSpec

SERIAL_FLOPS = 2_000_000
"""Below this much work a second thread costs more than it saves."""


def team_size(flops: int) -> int:
    """Threads for so many floating-point operations a step."""
    return max(1, min(threads.usable_threads(), flops // SERIAL_FLOPS))


def conv2d(
    spec: ConvSpec, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None, *, algorithm: str = "auto"
) -> np.ndarray:
    """Convolve x (B, H, W, C) with kernel (KH, KW, C, F): y (B, HO, WO, F)."""
    y = np.empty((spec.B, spec.HO, spec.WO, spec.F), x.dtype)
    m = sequence.choose("conv2d", (spec,), algorithm, x.itemsize)
    if y.size:
        cell = np.zeros(1, CELL)
        cell["F"] = spec.F
        team = team_size(spec.flops)
        plan, columns = sequence.prepare((spec,), (kernel,), bias, np.ones(1), m, team)
        trouble = sequence.run(plan, columns, cell, spec.B, 1, team, x=slots(x), h=slots(y))
        if m and trouble.any():  # a tile spreads what is not finite beyond its receptive field
            y[trouble] = conv2d(spec.with_batch(trouble.sum()), x[trouble], kernel, bias, algorithm="direct")
    return y


def conv2d_backward(
    spec: ConvSpec, x: np.ndarray, kernel: np.ndarray, dy: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pull dy (B, HO, WO, F) back through `conv2d`: dx, dkernel, dbias."""
    dkernel = np.zeros_like(kernel)
    if dy is None or dy.size == 0:
        return np.zeros_like(x), dkernel, np.zeros(spec.F, x.dtype)
    rows, columns = (_positions(spec, axis) for axis in (0, 1))
    padded = (
        x[:, rows][:, :, columns] if spec.padding_mode == "circular" else np.pad(x, ((0, 0), *spec.padding, (0, 0)))
    )
    pixels = dy.reshape(-1, spec.F)
    (sh, sw), (dh, dw) = spec.strides, spec.dilation
    for kh, kw in np.ndindex(spec.KH, spec.KW):
        tap = padded[:, kh * dh :: sh, kw * dw :: sw][:, : spec.HO, : spec.WO]
        dkernel[kh, kw] = tap.reshape(-1, spec.C).T @ pixels
    return _input_gradient(spec, kernel, dy), dkernel, recurrence.total(pixels, (0,))


def _positions(spec: ConvSpec, axis: int) -> np.ndarray:
    """Row or column of the frame that each one of the circularly padded frame repeats."""
    before, after = spec.padding[axis]
    size = (spec.H, spec.W)[axis]
    return np.arange(-before, size + after) % size


def _input_gradient(spec: ConvSpec, kernel: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return dx: the convolution of dy, its pixels spread by the strides, with the flipped, transposed kernel."""
    if max(spec.strides) > 1:
        spread = np.zeros(
            (spec.B, (spec.HO - 1) * spec.strides[0] + 1, (spec.WO - 1) * spec.strides[1] + 1, spec.F), dy.dtype
        )
        spread[:, :: spec.strides[0], :: spec.strides[1]] = dy
        dy = spread
    reach = ((spec.KH - 1) * spec.dilation[0], (spec.KW - 1) * spec.dilation[1])
    flipped = np.ascontiguousarray(kernel[::-1, ::-1].swapaxes(2, 3))
    sizes = [n + sum(pad) for n, pad in zip((spec.H, spec.W), spec.padding, strict=True)]
    # every row of the padded frame, also those that no window reached
    around = tuple((r, size - n) for r, size, n in zip(reach, sizes, dy.shape[1:3], strict=True))
    inner = ConvSpec.infer(dy.shape, flipped.shape, padding=around, dilation=spec.dilation)
    padded = conv2d(inner, dy, flipped, None)
    if spec.padding_mode == "circular":
        folded = np.zeros((spec.B, spec.H, spec.W, spec.C), dy.dtype)
        rows, columns = (_positions(spec, axis) for axis in (0, 1))
        for row, column in np.ndindex(len(rows), len(columns)):
            folded[:, rows[row], columns[column]] += padded[:, row, column]
        return folded
    (top, _), (left, _) = spec.padding
    return np.ascontiguousarray(padded[:, top : top + spec.H, left : left + spec.W])

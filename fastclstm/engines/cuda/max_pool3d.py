"""max_pool3d on the cuda engine: one thread an element, or four neighbouring channels, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastclstm.engines.cuda import product
from fastclstm.engines.cuda.device import DeviceArray
from fastclstm.spec import PoolSpec

MOST_FRAMES = 65535
"""That a grid has along y; more are taken in turns."""


def max_pool3d(spec: PoolSpec, x: DeviceArray, return_indices: bool) -> tuple[DeviceArray, DeviceArray | None]:
    """Pool x (B, T, H, W, C): y (B, TO, HO, WO, C) and, if asked for, int64 indices into each (T, H, W) volume."""
    device = x.device
    y = device.empty(spec.output_shape, x.dtype)
    indices = device.empty(spec.output_shape, np.int64) if return_indices else None
    if y.size:
        _launch(spec, "max_pool3d", spec.B * spec.TO, spec.HO * spec.WO, x, (x,), (y, indices))
    return y, indices


def max_pool3d_backward(spec: PoolSpec, indices: DeviceArray, dy: DeviceArray | None) -> DeviceArray:
    """Add each gradient dy (B, TO, HO, WO, C) to the element of dx (B, T, H, W, C) that won its window."""
    device = indices.device
    shape = spec.B, spec.T, spec.H, spec.W, spec.C
    if dy is None:
        return device.zeros(shape, np.float32)
    dx = device.empty(shape, dy.dtype)
    if dx.size:
        _launch(spec, "max_pool3d_backward", spec.B * spec.T, spec.H * spec.W, dy, (indices, dy), (dx,))
    return dx


def _launch(
    spec: PoolSpec, name: str, frames: int, pixels: int, read: DeviceArray, inputs: tuple[Any, ...],
    outputs: tuple[Any, ...],
) -> None:  # fmt: skip
    """Launch a kernel over frames of pixels; `read` is what it reads in wide pieces, if that is aligned."""
    device = read.device
    elements = max(spec.H * spec.W, spec.HO * spec.WO) * spec.C
    if elements > product.LARGEST_FRAME:
        raise ValueError(f"engine 'cuda' counts the elements of a frame in 32 bits, but one has {elements}; "
                         f"pass engine='cpu'")  # fmt: skip
    width = 4 if spec.C % 4 == 0 and read.pointer % 16 == 0 else 1
    kernel = device.kernel("max_pool3d.cu", name, {"REAL": product.real(read.dtype), "WIDTH": width})
    (front, _), (top, _), (left, _) = spec.padding
    volume = product.int32(frames, spec.T, spec.H, spec.W, spec.C, spec.TO, spec.HO, spec.WO, *spec.pool_size,
                           *spec.strides, front, top, left)  # fmt: skip
    grid = -(-pixels * (spec.C // width) // 256), min(frames, MOST_FRAMES)
    device.launch(kernel, grid, (256,), 0, *inputs, *volume, *outputs)

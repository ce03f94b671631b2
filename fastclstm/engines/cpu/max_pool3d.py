"""max_pool3d on the cpu engine."""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu import threads
from fastclstm.engines.cpu.kernels import max_pool3d as kernels
from fastclstm.spec import PoolSpec

SERIAL_BYTES = 1 << 18
"""Below this much memory traffic a second thread costs more than it saves."""


def max_pool3d(spec: PoolSpec, x: np.ndarray, return_indices: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Pool x (B, T, H, W, C): y (B, TO, HO, WO, C) and, if asked for, int64 indices into each (T, H, W) volume."""
    y = np.empty(spec.output_shape, x.dtype)
    indices = np.empty(spec.output_shape, np.int64) if return_indices else None
    if y.size:
        workers = max(1, min(threads.usable_threads(), x.nbytes // SERIAL_BYTES, spec.B * spec.TO * spec.HO))
        geometry = _geometry(spec)
        if indices is None:
            rows = np.empty((workers, spec.W * spec.C + 64), x.dtype)
            threads.run(kernels.pool, workers, (), geometry, x.reshape(-1), y.reshape(-1), rows)
        else:
            threads.run(
                kernels.pool_with_indices, workers, (), geometry, x.reshape(-1), y.reshape(-1), indices.reshape(-1)
            )
    return y, indices


def max_pool3d_backward(spec: PoolSpec, indices: np.ndarray, dy: np.ndarray | None) -> np.ndarray:
    """Add each gradient dy (B, TO, HO, WO, C) to the element of dx (B, T, H, W, C) that won its window."""
    shape = spec.B, spec.T, spec.H, spec.W, spec.C
    if dy is None or not dy.size:
        return np.zeros(shape, np.float32 if dy is None else dy.dtype)
    if any(stride < size for stride, size in zip(spec.strides, spec.pool_size, strict=True)):
        dx = np.zeros((spec.B, spec.T * spec.H * spec.W, spec.C), dy.dtype)
        workers = max(1, min(threads.usable_threads(), dy.nbytes // SERIAL_BYTES))
        places = indices.reshape(spec.B, spec.TO * spec.HO * spec.WO, spec.C)
        threads.run(kernels.scatter, workers, (), places, dy.reshape(-1), dx)
        return dx.reshape(shape)
    dx = (np.empty if _is_covered(spec) else np.zeros)(shape, dy.dtype)
    workers = max(1, min(threads.usable_threads(), dx.nbytes // SERIAL_BYTES, spec.B * spec.TO * spec.HO))
    threads.run(kernels.share, workers, (), _geometry(spec), indices.reshape(-1), dy.reshape(-1), dx.reshape(-1))
    return dx


def _geometry(spec: PoolSpec) -> np.ndarray:
    """What kernels know of a call."""
    (front, _), (top, _), (left, _) = spec.padding
    geometry = np.zeros(1, kernels.GEOMETRY)
    geometry[0] = (spec.B, spec.T, spec.H, spec.W, spec.C, spec.TO, spec.HO, spec.WO, *spec.pool_size, *spec.strides,
                   front, top, left)  # fmt: skip
    return geometry


def _is_covered(spec: PoolSpec) -> bool:
    """Whether windows that do not overlap hold every element of x."""
    axes = zip(spec.strides, spec.pool_size, (spec.TO, spec.HO, spec.WO), (spec.T, spec.H, spec.W), spec.padding,
               strict=True)  # fmt: skip
    return all(stride == size and count * stride - before >= n for stride, size, count, n, (before, _) in axes)

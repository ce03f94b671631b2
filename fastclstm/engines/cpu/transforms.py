"""Convolution kernels brought to Winograd's points, where the packed panels want them; and their gradients back."""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu import threads
from fastclstm.engines.cpu.kernels import kernel_transform, winograd
from fastclstm.engines.cpu.kernels.entry import Kernel
from fastclstm.engines.cpu.packing import Columns

PARALLEL_SCALARS = 1 << 19
"""Packed scalars that are worth a second thread."""


def transform(kernels: list[np.ndarray], scales: np.ndarray, m: int, columns: Columns) -> None:
    """Write G w Gᵀ of the taps w of kernels (k, k, C, gates·F), whose channels are the rows of `columns`, to these.

    The columns of a gate are multiplied by its scale; everything is computed in float64 and rounded once.
    """
    G = winograd.transforms(m, kernels[0].shape[0]).G
    _run(kernel_transform.transform, kernels, len(scales), columns.weights, G, scales, columns.groups, columns.weights)


def pull_back(sums: np.ndarray, m: int, gradients: list[np.ndarray]) -> None:
    """Write Gᵀ U G of sums U (points, pairs, rows, two vectors) to the gradients (k, k, C, F), which share the rows."""
    G = winograd.transforms(m, gradients[0].shape[0]).G
    _run(kernel_transform.pull_back, gradients, 1, sums.reshape(-1), np.ascontiguousarray(G.T), sums)


def _run(kernel: Kernel, arrays: list[np.ndarray], gates: int, scalars: np.ndarray, *arguments: np.ndarray) -> None:
    """Run a kernel for arrays (k, k, C, gates·F), whose channels are rows one after another of all `scalars`."""
    team = max(1, min(threads.usable_threads(), scalars.size // PARALLEL_SCALARS))
    work = np.zeros(1, kernel_transform.WORK)
    first_row, all_rows = 0, sum(array.shape[2] for array in arrays)
    for array in arrays:
        strides = (stride // array.itemsize for stride in array.strides)
        work[0] = (array.ctypes.data, *strides, array.shape[2], first_row, all_rows, gates, array.shape[3] // gates)
        first_row += array.shape[2]
        threads.run(kernel, team, (), work, *arguments)

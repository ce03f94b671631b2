"""Convolution kernels brought to Winograd's points, where the packed panels want them; and their gradients back."""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu import threads, tiles
from fastclstm.engines.cpu.kernels import kernel_transform
from fastclstm.engines.cpu.kernels.entry import Kernel
from fastclstm.engines.cpu.packing import Columns
from fastclstm.engines.cpu.tiles import Tile

PARALLEL_SCALARS = 1 << 19
"""Packed scalars that are worth a second thread."""


def rows(kernels: list[np.ndarray], tile: Tile) -> int:
    """Count of the rows of transformed kernels (KH, KW, C, …): the channels of each piece."""
    return sum(k.shape[2] * len(tiles.pieces(k.shape[0], k.shape[1], tile)) for k in kernels)


def transform(kernels: list[np.ndarray], scales: np.ndarray, tile: Tile, columns: Columns) -> None:
    """Write G w Gᵀ of the taps w of kernels (KH, KW, C, gates·F), piece by piece, to `columns`, whose rows these are.

    The columns of a gate are multiplied by its scale; everything is computed in float64 and rounded once.
    """
    _run(kernel_transform.transform, kernels, tile, len(scales), columns.weights, scales, columns.groups,
         columns.weights)  # fmt: skip


def pull_back(sums: np.ndarray, tile: Tile, gradients: list[np.ndarray]) -> None:
    """Write Gᵀ U G of sums U (points, pairs, rows, two vectors) to the gradients (KH, KW, C, F), which share the rows.

    The rows are those of `transform`.
    """
    _run(kernel_transform.pull_back, gradients, tile, 1, sums.reshape(-1), sums)


def _run(
    kernel: Kernel, arrays: list[np.ndarray], tile: Tile, gates: int, scalars: np.ndarray, *arguments: np.ndarray
) -> None:
    """Run a kernel for the pieces of arrays (KH, KW, C, gates·F), whose channels are rows of all `scalars` in turn."""
    team = max(1, min(threads.usable_threads(), scalars.size // PARALLEL_SCALARS))
    work = np.zeros(1, kernel_transform.WORK)
    first_row, all_rows = 0, rows(arrays, tile)
    for array in arrays:
        for y, x in tiles.pieces(array.shape[0], array.shape[1], tile):
            piece = array[y.first + y.skipped : y.first + tile.k_y, x.first + x.skipped : x.first + tile.k_x]
            strides = (stride // array.itemsize for stride in array.strides)
            work[0] = (piece.ctypes.data, *strides, *piece.shape[:2], y.skipped, x.skipped, array.shape[2], first_row,
                       all_rows, gates, array.shape[3] // gates)  # fmt: skip
            first_row += array.shape[2]
            threads.run(kernel, team, tuple(tile), work, *arguments)

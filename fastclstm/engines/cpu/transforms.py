"""Convolution kernels brought to Winograd's points, where the packed panels want them; and their gradients back."""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu import threads, tiles
from fastclstm.engines.cpu.kernels import kernel_transform
from fastclstm.engines.cpu.kernels.entry import Kernel
from fastclstm.engines.cpu.packing import Columns
from fastclstm.engines.cpu.tiles import Tile

AS_IT_IS = Tile(1, 1, 1, 1)
"""The tile whose transform changes nothing; each tap is a piece of its own."""

PARALLEL_SCALARS = 1 << 19
"""Packed scalars that are worth a second thread."""


def rows(kernels: list[np.ndarray], tile: Tile) -> int:
    """Count of the rows of transformed kernels (KH, KW, C, …): the channels of each piece."""
    return sum(k.shape[2] * len(tiles.pieces(k.shape[0], k.shape[1], tile)) for k in kernels)


def transform(kernels: list[np.ndarray], scales: np.ndarray, tile: Tile | None, columns: Columns) -> None:
    """Write G w Gᵀ of the taps w of kernels (KH, KW, C, gates·F), piece by piece, to `columns`, whose rows these are.

    None: w as it is, tap by tap. Each column is multiplied by its own of the scales (gates, F); everything is computed
    in float64 and rounded once.
    """
    way, panel = (tile, 2) if tile else (AS_IT_IS, 4)
    factors = np.ones(scales.size + kernel_transform.COLUMNS)
    factors[: scales.size] = scales.ravel()
    _run(kernel_transform.transform, kernels, way, len(scales), panel, columns.weights, factors, columns.groups,
         columns.weights)  # fmt: skip


def pull_back(sums: np.ndarray, tile: Tile, gradients: list[np.ndarray]) -> None:
    """Write Gᵀ U G of sums U (points, pairs, rows, two vectors) to the gradients (KH, KW, C, F), which share the rows.

    The rows are those of `transform`.
    """
    _run(kernel_transform.pull_back, gradients, tile, 1, 2, sums.reshape(-1), sums)


def _run(
    kernel: Kernel, arrays: list[np.ndarray], tile: Tile, gates: int, panel: int, scalars: np.ndarray,
    *arguments: np.ndarray,
) -> None:  # fmt: skip
    """Run a kernel for the pieces of arrays (KH, KW, C, gates·F), whose channels are rows of all `scalars` in turn."""
    team = max(1, min(threads.usable_threads(), scalars.size // PARALLEL_SCALARS))
    works: list[tuple[int, ...]] = []
    first_row, all_rows = 0, rows(arrays, tile)
    for array in arrays:
        for y, x in tiles.pieces(array.shape[0], array.shape[1], tile):
            piece = array[y.first + y.skipped : y.first + tile.k_y, x.first + x.skipped : x.first + tile.k_x]
            strides = (stride // array.itemsize for stride in array.strides)
            works.append((piece.ctypes.data, *strides, *piece.shape[:2], y.skipped, x.skipped, array.shape[2],
                          first_row, all_rows, gates, array.shape[3] // gates, panel))  # fmt: skip
            first_row += array.shape[2]
    threads.run(kernel, team, tuple(tile), np.array(works, kernel_transform.WORK), *arguments)

"""Convolution kernels transformed for Winograd, written where the packed panels want them; and their gradients back."""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.team import grain, next_item

COLUMNS = 16
"""Columns that are transformed together."""

WORK = np.dtype([
    ("kernel", np.uint64),  # address
    *((f"{axis}_stride", np.int64) for axis in ("y", "x", "row", "column")),  # in scalars
    ("KH", np.int64), ("KW", np.int64), ("skipped_y", np.int64), ("skipped_x", np.int64),  # of a piece's taps
    ("rows", np.int64), ("first_row", np.int64), ("all_rows", np.int64),  # of this kernel, its place among all
    ("gates", np.int64), ("filters", np.int64),
])  # fmt: skip


@inline
def _combine(matrix, row, first, count, values, apart, result):
    """Σ_i matrix[row, first + i] · values[i·apart], i < count, for `COLUMNS` columns, to result."""
    step = simd.vector_lanes(values)
    for f in range(0, COLUMNS, step):
        total = simd.zeros(values)
        for i in range(count):
            value = simd.load(simd.shift(values, i * apart + f))
            total = simd.fma(simd.broadcast(value, matrix[row, first + i]), value, total)
        simd.store(simd.shift(result, f), total)


@inline
def _transform_columns(like, work, G_y, scale, first, count, taps, half):
    """Read the taps of `count` columns of one row, and apply G_y to their first axis."""
    source = simd.at(like, work.kernel)
    for i in range(work.KH):
        for j in range(work.KW):
            at = first + i * work.y_stride + j * work.x_stride
            tap = simd.shift(taps, (i * work.KW + j) * COLUMNS)
            for f in range(count):
                tap[f] = source[at + f * work.column_stride] * scale
    for a in range(G_y.shape[0]):
        for j in range(work.KW):
            target = simd.shift(half, (a * work.KW + j) * COLUMNS)
            _combine(G_y, a, work.skipped_y, work.KH, simd.shift(taps, j * COLUMNS), work.KW * COLUMNS, target)


@kernel
def transform(job, worker, works, G_y, G_x, scales, groups, weights):
    """Transform the kernels of rows and groups of columns."""
    work, like = works[0], weights
    height, width = G_y.shape[0], G_x.shape[0]
    step = simd.vector_lanes(simd.pointer(weights))
    room = np.zeros(((work.KH + height) * work.KW + 1, COLUMNS))
    taps = simd.pointer(room)
    half = simd.shift(taps, work.KH * work.KW * COLUMNS)
    line = simd.shift(half, height * work.KW * COLUMNS)
    pieces = len(groups) * work.rows
    size = grain(job, pieces)
    n = next_item(job, -1, size)
    while n < pieces:
        group, row = groups[n // work.rows], n % work.rows
        vectors, gate_width, first_filter, filters = group[1], group[2], group[3], group[4]
        target = simd.shift(simd.pointer(weights), group[0])
        for gate in range(work.gates):
            for f0 in range(0, filters, COLUMNS):
                count = min(COLUMNS, filters - f0)
                first = row * work.row_stride + (gate * work.filters + first_filter + f0) * work.column_stride
                _transform_columns(like, work, G_y, scales[gate], first, count, taps, half)
                column = gate * gate_width + f0
                for p in range(height * width):
                    from_half = simd.shift(half, p // width * work.KW * COLUMNS)
                    _combine(G_x, p % width, work.skipped_x, work.KW, from_half, COLUMNS, line)
                    f = 0
                    while f < count:  # panel by panel, of two vectors or the last of one
                        at, v = (column + f) % (2 * step), (column + f) // (2 * step) * 2
                        lanes = min(2, vectors - v) * step
                        panel = (p * vectors + v) * work.all_rows * step + (work.first_row + row) * lanes
                        place, end = simd.shift(target, panel + at), min(count, f + lanes - at)
                        for i in range(end - f):
                            place[i] = line[f + i]
                        f = end
        n = next_item(job, n, size)


@kernel
def pull_back(job, worker, works, G_T_y, G_T_x, sums):
    """Of each kernel's row, and `COLUMNS` columns, bring the sums of all points back to the taps."""
    work, like = works[0], sums
    height, width = G_T_y.shape[1], G_T_x.shape[1]
    room = np.zeros(((height + work.KH) * width + 1, COLUMNS))
    values = simd.pointer(room)
    half = simd.shift(values, height * width * COLUMNS)
    line = simd.shift(half, work.KH * width * COLUMNS)
    _, pairs, rows, lanes = sums.shape
    target = simd.at(like, work.kernel)
    size = grain(job, work.rows)
    n = next_item(job, -1, size)
    while n < work.rows:
        for f0 in range(0, work.filters, COLUMNS):
            count = min(COLUMNS, work.filters - f0)
            for p in range(height * width):
                value, f = simd.shift(values, p * COLUMNS), 0
                while f < count:  # panel by panel
                    at = (f0 + f) % lanes
                    panel = (p * pairs + (f0 + f) // lanes) * rows + work.first_row + n
                    source, end = simd.shift(simd.pointer(sums), panel * lanes + at), min(count, f + lanes - at)
                    for i in range(end - f):
                        value[f + i] = source[i]
                    f = end
            for i in range(work.KH):
                for b in range(width):
                    place = simd.shift(half, (i * width + b) * COLUMNS)
                    column = simd.shift(values, b * COLUMNS)
                    _combine(G_T_y, work.skipped_y + i, 0, height, column, width * COLUMNS, place)
            for i in range(work.KH):
                for j in range(work.KW):
                    from_half = simd.shift(half, i * width * COLUMNS)
                    _combine(G_T_x, work.skipped_x + j, 0, width, from_half, COLUMNS, line)
                    at = n * work.row_stride + i * work.y_stride + j * work.x_stride + f0 * work.column_stride
                    for f in range(count):
                        target[at + f * work.column_stride] = line[f]
        n = next_item(job, n, size)

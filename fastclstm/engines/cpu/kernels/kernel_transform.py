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
    ("rows", np.int64), ("first_row", np.int64), ("all_rows", np.int64),  # of this kernel, its place among all
    ("gates", np.int64), ("filters", np.int64),
])  # fmt: skip


@inline
def _combine(matrix, row, values, apart, result):
    """Σ_i matrix[row, i] · values[i·apart], for `COLUMNS` columns, to result."""
    step = simd.vector_lanes(values)
    for f in range(0, COLUMNS, step):
        total = simd.zeros(values)
        for i in range(matrix.shape[1]):
            value = simd.load(simd.shift(values, i * apart + f))
            total = simd.fma(simd.broadcast(value, matrix[row, i]), value, total)
        simd.store(simd.shift(result, f), total)


@inline
def _transform_columns(like, work, G, scale, first, count, taps, half):
    """Read the taps of `count` columns of one row, and apply G to their first axis."""
    alpha, k = G.shape
    source = simd.at(like, work.kernel)
    for i in range(k):
        for j in range(k):
            at = first + i * work.y_stride + j * work.x_stride
            tap = simd.shift(taps, (i * k + j) * COLUMNS)
            for f in range(count):
                tap[f] = source[at + f * work.column_stride] * scale
    for a in range(alpha):
        for j in range(k):
            _combine(G, a, simd.shift(taps, j * COLUMNS), k * COLUMNS, simd.shift(half, (a * k + j) * COLUMNS))


@kernel
def transform(job, worker, works, G, scales, groups, weights):
    """Transform the kernels of rows and groups of columns."""
    work, like = works[0], weights
    alpha, k = G.shape
    width = 2 * simd.vector_lanes(simd.pointer(weights))
    room = np.zeros((25 + 40 + 1, COLUMNS))
    taps = simd.pointer(room)
    half, line = simd.shift(taps, 25 * COLUMNS), simd.shift(taps, 65 * COLUMNS)
    pieces = len(groups) * work.rows
    size = grain(job, pieces)
    n = next_item(job, -1, size)
    while n < pieces:
        group, row = groups[n // work.rows], n % work.rows
        gate_width, first_filter, filters = group[2], group[3], group[4]
        pairs = (group[1] + 1) // 2
        target = simd.shift(simd.pointer(weights), group[0])
        for gate in range(work.gates):
            for f0 in range(0, filters, COLUMNS):
                count = min(COLUMNS, filters - f0)
                first = row * work.row_stride + (gate * work.filters + first_filter + f0) * work.column_stride
                _transform_columns(like, work, G, scales[gate], first, count, taps, half)
                column = gate * gate_width + f0
                for p in range(alpha * alpha):
                    _combine(G, p % alpha, simd.shift(half, p // alpha * k * COLUMNS), COLUMNS, line)
                    f = 0
                    while f < count:  # panel by panel
                        at = (column + f) % width
                        panel = (p * pairs + (column + f) // width) * work.all_rows + work.first_row + row
                        place, end = simd.shift(target, panel * width + at), min(count, f + width - at)
                        for i in range(end - f):
                            place[i] = line[f + i]
                        f = end
        n = next_item(job, n, size)


@kernel
def pull_back(job, worker, works, G_T, sums):
    """Of each kernel's row, and `COLUMNS` columns, bring the sums of all points back to the taps."""
    work, like = works[0], sums
    k, alpha = G_T.shape
    room = np.zeros((64 + 40 + 1, COLUMNS))
    values = simd.pointer(room)
    half, line = simd.shift(values, 64 * COLUMNS), simd.shift(values, 104 * COLUMNS)
    _, pairs, rows, width = sums.shape
    target = simd.at(like, work.kernel)
    size = grain(job, work.rows)
    n = next_item(job, -1, size)
    while n < work.rows:
        for f0 in range(0, work.filters, COLUMNS):
            count = min(COLUMNS, work.filters - f0)
            for p in range(alpha * alpha):
                value, f = simd.shift(values, p * COLUMNS), 0
                while f < count:  # panel by panel
                    at = (f0 + f) % width
                    panel = (p * pairs + (f0 + f) // width) * rows + work.first_row + n
                    source, end = simd.shift(simd.pointer(sums), panel * width + at), min(count, f + width - at)
                    for i in range(end - f):
                        value[f + i] = source[i]
                    f = end
            for i in range(k):
                for b in range(alpha):
                    place = (i * alpha + b) * COLUMNS
                    _combine(G_T, i, simd.shift(values, b * COLUMNS), alpha * COLUMNS, simd.shift(half, place))
            for i in range(k):
                for j in range(k):
                    _combine(G_T, j, simd.shift(half, i * alpha * COLUMNS), COLUMNS, line)
                    at = n * work.row_stride + i * work.y_stride + j * work.x_stride + f0 * work.column_stride
                    for f in range(count):
                        target[at + f * work.column_stride] = line[f]
        n = next_item(job, n, size)

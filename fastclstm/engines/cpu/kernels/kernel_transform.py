"""Convolution kernels transformed for Winograd, written where the packed panels want them; and their gradients back."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from fastclstm.engines.cpu import threads
from fastclstm.engines.cpu.compilation import inline, kernel
from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.packing import Columns

COLUMNS = 16
"""Columns that are transformed together."""

JOB = np.dtype([
    ("kernel", np.uint64),  # address
    *((f"{axis}_stride", np.int64) for axis in ("y", "x", "row", "column")),  # in scalars
    ("rows", np.int64), ("first_row", np.int64), ("all_rows", np.int64),  # of this kernel, its place among all
    ("gates", np.int64), ("filters", np.int64),
    ("workers", np.int64),
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
def _transform_columns(like, job, G, scale, first, count, taps, half):
    """Read the taps of `count` columns of one row, and apply G to their first axis."""
    alpha, k = G.shape
    source = simd.at(like, job.kernel)
    for i in range(k):
        for j in range(k):
            at = first + i * job.y_stride + j * job.x_stride
            tap = simd.shift(taps, (i * k + j) * COLUMNS)
            for f in range(count):
                tap[f] = source[at + f * job.column_stride] * scale
    for a in range(alpha):
        for j in range(k):
            _combine(G, a, simd.shift(taps, j * COLUMNS), k * COLUMNS, simd.shift(half, (a * k + j) * COLUMNS))


@inline
def _work(like, jobs, G, scales, groups, weights, worker):
    job = jobs[0]
    alpha, k = G.shape
    width = 2 * simd.vector_lanes(simd.pointer(weights))
    room = np.zeros((25 + 40 + 1, COLUMNS))
    taps = simd.pointer(room)
    half, line = simd.shift(taps, 25 * COLUMNS), simd.shift(taps, 65 * COLUMNS)
    pieces = len(groups) * job.rows
    for n in range(pieces * worker // job.workers, pieces * (worker + 1) // job.workers):
        group, row = groups[n // job.rows], n % job.rows
        gate_width, first_filter, filters = group[2], group[3], group[4]
        pairs = (group[1] + 1) // 2
        target = simd.shift(simd.pointer(weights), group[0])
        for gate in range(job.gates):
            for f0 in range(0, filters, COLUMNS):
                count = min(COLUMNS, filters - f0)
                first = row * job.row_stride + (gate * job.filters + first_filter + f0) * job.column_stride
                _transform_columns(like, job, G, scales[gate], first, count, taps, half)
                column = gate * gate_width + f0
                for p in range(alpha * alpha):
                    _combine(G, p % alpha, simd.shift(half, p // alpha * k * COLUMNS), COLUMNS, line)
                    f = 0
                    while f < count:  # panel by panel
                        at = (column + f) % width
                        panel = (p * pairs + (column + f) // width) * job.all_rows + job.first_row + row
                        place, end = simd.shift(target, panel * width + at), min(count, f + width - at)
                        for i in range(end - f):
                            place[i] = line[f + i]
                        f = end


@kernel()
def _serial(like, jobs, G, scales, groups, weights):
    _work(like, jobs, G, scales, groups, weights, 0)


@kernel(parallel=True)
def _parallel(like, jobs, G, scales, groups, weights):
    for worker in numba.prange(jobs[0].workers):
        _work(like, jobs, G, scales, groups, weights, worker)


KERNELS = _serial, _parallel


@inline
def _pull_back(like, jobs, G_T, sums, worker):
    """Of each kernel's row, and `COLUMNS` columns, bring the sums of all points back to the taps."""
    job = jobs[0]
    k, alpha = G_T.shape
    room = np.zeros((64 + 40 + 1, COLUMNS))
    values = simd.pointer(room)
    half, line = simd.shift(values, 64 * COLUMNS), simd.shift(values, 104 * COLUMNS)
    _, pairs, rows, width = sums.shape
    target = simd.at(like, job.kernel)
    for n in range(job.rows * worker // job.workers, job.rows * (worker + 1) // job.workers):
        for f0 in range(0, job.filters, COLUMNS):
            count = min(COLUMNS, job.filters - f0)
            for p in range(alpha * alpha):
                value, f = simd.shift(values, p * COLUMNS), 0
                while f < count:  # panel by panel
                    at = (f0 + f) % width
                    panel = (p * pairs + (f0 + f) // width) * rows + job.first_row + n
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
                    at = n * job.row_stride + i * job.y_stride + j * job.x_stride + f0 * job.column_stride
                    for f in range(count):
                        target[at + f * job.column_stride] = line[f]


@kernel()
def _back_serial(like, jobs, G_T, sums):
    _pull_back(like, jobs, G_T, sums, 0)


@kernel(parallel=True)
def _back_parallel(like, jobs, G_T, sums):
    for worker in numba.prange(jobs[0].workers):
        _pull_back(like, jobs, G_T, sums, worker)


BACK_KERNELS = _back_serial, _back_parallel

PARALLEL_SCALARS = 1 << 19
"""Packed scalars that are worth a second thread."""


def transform(kernels: list[np.ndarray], scales: np.ndarray, G: np.ndarray, columns: Columns) -> None:
    """Write G w Gᵀ of the taps w of kernels (k, k, C, gates·F), whose channels are the rows of `columns`, to these.

    The columns of a gate are multiplied by its scale; everything is computed in float64 and rounded once.
    """
    _run(KERNELS, kernels, len(scales), columns.weights, G, scales, columns.groups, columns.weights)


def pull_back(sums: np.ndarray, G: np.ndarray, gradients: list[np.ndarray]) -> None:
    """Write Gᵀ U G of sums U (points, pairs, rows, two vectors) to the gradients (k, k, C, F), which share the rows."""
    _run(BACK_KERNELS, gradients, 1, sums.reshape(-1), np.ascontiguousarray(G.T), sums)


def _run(
    kernels: tuple[Any, Any], arrays: list[np.ndarray], gates: int, scalars: np.ndarray, *arguments: np.ndarray
) -> None:
    """Run the kernels for arrays (k, k, C, gates·F), whose channels are rows one after another of all `scalars`."""
    team = max(1, min(threads.usable_threads(), scalars.size // PARALLEL_SCALARS))
    job = np.zeros(1, JOB)
    first_row, all_rows = 0, sum(array.shape[2] for array in arrays)
    for array in arrays:
        strides = (stride // array.itemsize for stride in array.strides)
        job[0] = (array.ctypes.data, *strides, array.shape[2], first_row, all_rows, gates, array.shape[3] // gates,
                  team)  # fmt: skip
        first_row += array.shape[2]
        threads.run(kernels, team, scalars[:0], job, *arguments)

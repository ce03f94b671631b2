"""Convolution kernels transformed for Winograd, written where the packed panels want them; and their gradients back.

Columns go through the transforms in float64, as many together as a register holds, and are rounded once.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import lanes, simd
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.padding import clear_run
from fastclstm.engines.cpu.kernels.team import grain, next_item
from fastclstm.engines.cpu.kernels.winograd import emit_transform, matrices

COLUMNS = simd.lanes(8)
"""Columns that are transformed together: a vector's half, or in float64 a vector."""

WORK = np.dtype([
    ("kernel", np.uint64),  # address
    *((f"{axis}_stride", np.int64) for axis in ("y", "x", "row", "column")),  # in scalars
    ("KH", np.int64), ("KW", np.int64), ("skipped_y", np.int64), ("skipped_x", np.int64),  # of a piece's taps
    ("rows", np.int64), ("first_row", np.int64), ("all_rows", np.int64),  # of this kernel, its place among all
    ("gates", np.int64), ("filters", np.int64),
    ("panel", np.int64),  # vectors of a panel, at most
])  # fmt: skip


def _emit_columns(builder, down, across, origin, steps, factor, target, apart):
    """Target[i, j] = factor · (down · origin · acrossᵀ)[i, j] of a rectangle of `COLUMNS` columns.

    steps and apart: scalars between the rows and the columns of the rectangle read and written; factor: of each column.
    """
    narrow, wide = ir.VectorType(origin.type.pointee, COLUMNS), ir.VectorType(ir.DoubleType(), COLUMNS)

    def at(base, strides, i, j):
        offset = builder.add(builder.mul(strides[0], simd.INT64(i)), builder.mul(strides[1], simd.INT64(j)))
        return builder.gep(base, [offset])

    def read(i, j):
        value = simd.emit_load(builder, at(origin, steps, i, j), narrow)
        value = value if narrow == wide else builder.fpext(value, wide)
        return value if factor is None else builder.fmul(value, factor)

    rectangle = [[read(i, j) for j in range(across.shape[1])] for i in range(down.shape[1])]
    for i, line in enumerate(emit_transform(builder, down, across, rectangle)):
        for j, value in enumerate(line):
            value = value if narrow == wide else builder.fptrunc(value, narrow)
            simd.emit_store(builder, value, at(target, apart, i, j))


@intrinsic(prefer_literal=True)
def _transform_taps(typingctx, m_y, m_x, k_y, k_x, taps, row, column, scales, target, point):
    """target[p] = scales · (G w Gᵀ)[p] of the taps w; row and column: scalars between taps, point: between results."""
    down, across = matrices("G", m_y, m_x, k_y, k_x)

    def codegen(context, builder, sig, args):
        taps, row, column, scales, target, point = args[4:]
        apart = builder.mul(point, simd.INT64(len(across))), point
        factor = simd.emit_load(builder, scales, ir.VectorType(ir.DoubleType(), COLUMNS))
        _emit_columns(builder, down, across, taps, (row, column), factor, target, apart)
        return context.get_dummy_value()

    return types.void(m_y, m_x, k_y, k_x, taps, types.intp, types.intp, scales, target, types.intp), codegen


@intrinsic(prefer_literal=True)
def _pull_back_points(typingctx, m_y, m_x, k_y, k_x, sums, point, target, row, column):
    """target[i, j] = (Gᵀ U G)[i, j] of the sums U; point: scalars between these, row and column: between results."""
    down, across = matrices("G", m_y, m_x, k_y, k_x)

    def codegen(context, builder, sig, args):
        sums, point, target, row, column = args[4:]
        steps = builder.mul(point, simd.INT64(len(across))), point
        _emit_columns(builder, down.T, across.T, sums, steps, None, target, (row, column))
        return context.get_dummy_value()

    return types.void(m_y, m_x, k_y, k_x, sums, types.intp, target, types.intp, types.intp), codegen


@intrinsic
def _transpose(typingctx, origin, step, target, apart):
    """target[j·apart + i] = origin[i·step + j] for i and j below the lanes of a vector."""
    vector = simd.llvm_vector(origin.dtype)

    def codegen(context, builder, sig, args):
        origin, step, target, apart = args
        lines = [
            simd.emit_load(builder, builder.gep(origin, [builder.mul(step, simd.INT64(i))]), vector)
            for i in range(vector.count)
        ]
        for j, line in enumerate(lanes.emit_transposed(builder, lines)):
            simd.emit_store(builder, line, builder.gep(target, [builder.mul(apart, simd.INT64(j))]))
        return context.get_dummy_value()

    return types.void(origin, types.intp, target, types.intp), codegen


@inline
def _gather_taps(k_y, k_x, work, origin, rows, count, taps):
    """Bring rows × `count` columns of a kernel's taps to taps [row][k_y][k_x][lanes], zeros where a piece has none."""
    lanes = simd.vector_lanes(taps)
    apart = k_y * k_x * lanes
    for y in range(work.KH):
        for x in range(work.KW):
            source = simd.shift(origin, y * work.y_stride + x * work.x_stride)
            target = simd.shift(taps, ((work.skipped_y + y) * k_x + work.skipped_x + x) * lanes)
            if work.row_stride == 1 and rows == lanes and count == lanes:
                _transpose(source, work.column_stride, target, apart)
                continue
            for r in range(rows):
                for f in range(count):
                    target[r * apart + f] = source[r * work.row_stride + f * work.column_stride]


@inline
def _place_in_panels(work, vectors, row, column, lanes):
    """Index of a row's column in the first of a group's matrices, whose panels are of `work.panel` vectors or fewer."""
    v = column // (work.panel * lanes) * work.panel
    return (v * work.all_rows + row * min(work.panel, vectors - v)) * lanes + column - v * lanes


@inline
def _transform_block(m_y, m_x, k_y, k_x, work, like, scales, group, row0, rows, in_place, panels,
                     taps, line):  # fmt: skip
    """Transform some rows of a group of columns."""
    lanes, tap_count, points = simd.vector_lanes(panels), k_y * k_x, (m_y + k_y - 1) * (m_x + k_x - 1)
    vectors, gate_width, first_filter, filters = group[1], group[2], group[3], group[4]
    point = vectors * work.all_rows * lanes
    for gate in range(work.gates):
        for f0 in range(0, filters, lanes):
            count = min(lanes, filters - f0)
            first = gate * work.filters + first_filter + f0
            factors = simd.shift(simd.pointer(scales), first)
            origin = simd.at(like, work.kernel)
            origin = simd.shift(origin, row0 * work.row_stride + first * work.column_stride)
            direct = in_place and count == lanes
            if not direct:
                _gather_taps(k_y, k_x, work, origin, rows, count, taps)
            for r in range(rows):
                row = work.first_row + row0 + r
                for f in range(0, count, COLUMNS):
                    if direct:
                        source, y, x = simd.shift(origin, r * work.row_stride + f), work.y_stride, work.x_stride
                    else:
                        source, y, x = simd.shift(taps, r * tap_count * lanes + f), k_x * lanes, lanes
                    some, column = min(COLUMNS, count - f), gate * gate_width + f0 + f
                    whole = some == COLUMNS and column % COLUMNS == 0  # then all in one panel
                    target, apart = line, COLUMNS
                    if whole:
                        target = simd.shift(panels, _place_in_panels(work, vectors, row, column, lanes))
                        apart = point
                    _transform_taps(m_y, m_x, k_y, k_x, source, y, x, simd.shift(factors, f), target, apart)
                    for i in range(0 if whole else some):
                        place = simd.shift(panels, _place_in_panels(work, vectors, row, column + i, lanes))
                        for p in range(points):
                            place[p * point] = line[p * COLUMNS + i]


@kernel
def transform(m_y, m_x, k_y, k_x, job, worker, works, scales, groups, weights):
    """Transform the pieces of kernels: some rows, as many as a vector has lanes, and a group of columns at a time.

    scales: a factor of each column (gates·F), and further `COLUMNS` that are read with the last ones.
    """
    like = simd.pointer(weights)
    lanes, tap_count, points = simd.vector_lanes(like), k_y * k_x, (m_y + k_y - 1) * (m_x + k_x - 1)
    room = np.zeros((lanes * tap_count + points) * lanes, weights.dtype)
    taps = simd.pointer(room)
    line = simd.shift(taps, lanes * tap_count * lanes)
    total = 0
    for w in range(len(works)):
        total += len(groups) * ((works[w].rows + lanes - 1) // lanes)
    size = grain(job, total)
    n, begun = next_item(job, -1, size), 0
    for w in range(len(works)):
        work = works[w]
        in_place = work.column_stride == 1 and (k_y, k_x) == (work.KH, work.KW)
        blocks = (work.rows + lanes - 1) // lanes
        if not in_place:
            clear_run(taps, lanes * tap_count * lanes)
        while n < begun + len(groups) * blocks:  # neighbours in the kernel's memory one after the other
            if work.column_stride == 1:
                group, row0 = groups[(n - begun) % len(groups)], (n - begun) // len(groups) * lanes
            else:
                group, row0 = groups[(n - begun) // blocks], (n - begun) % blocks * lanes
            rows = min(lanes, work.rows - row0)
            _transform_block(
                m_y,
                m_x,
                k_y,
                k_x,
                work,
                weights,
                scales,
                group,
                row0,
                rows,
                in_place,
                simd.shift(like, group[0]),
                taps,
                line,
            )
            n = next_item(job, n, size)
        begun += len(groups) * blocks


@kernel
def pull_back(m_y, m_x, k_y, k_x, job, worker, works, sums):
    """Of each row of the pieces of kernels bring the sums of all points back to the taps."""
    like = simd.pointer(sums)
    tap_count = k_y * k_x
    room = np.zeros(tap_count * COLUMNS, sums.dtype)
    line = simd.pointer(room)
    _, pairs, all_rows, width = sums.shape
    point = pairs * all_rows * width
    total = 0
    for w in range(len(works)):
        total += works[w].rows
    size = grain(job, total)
    n, begun = next_item(job, -1, size), 0
    for w in range(len(works)):
        work = works[w]
        in_place = (k_y, k_x) == (work.KH, work.KW)
        while n < begun + work.rows:
            row = n - begun
            for f in range(0, work.filters, COLUMNS):
                some = min(COLUMNS, work.filters - f)
                source = simd.shift(like, (f // width * all_rows + work.first_row + row) * width + f % width)
                place = simd.shift(simd.at(sums, work.kernel), row * work.row_stride + f)
                whole = in_place and some == COLUMNS
                target, y, x = line, k_x * COLUMNS, COLUMNS
                if whole:
                    target, y, x = place, work.y_stride, work.x_stride
                _pull_back_points(m_y, m_x, k_y, k_x, source, point, target, y, x)
                for i in range(0 if whole else work.KH):
                    for j in range(work.KW):
                        tap = simd.shift(line, ((work.skipped_y + i) * k_x + work.skipped_x + j) * COLUMNS)
                        for c in range(some):
                            place[i * work.y_stride + j * work.x_stride + c] = tap[c]
            n = next_item(job, n, size)
        begun += work.rows

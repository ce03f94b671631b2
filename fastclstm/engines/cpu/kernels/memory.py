"""Memory in another order, and whether memory is the same."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastclstm.engines.cpu.kernels import lanes, simd
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.team import claim, grain, next_item

PANEL = 256
"""Rows that are read side by side, at most: what is read of a line of the cache beyond a square's is still there."""

CHUNK = 1 << 14
"""Words that are compared before a worker looks whether another has found a difference."""

WORDS = 64
"""Words that are compared at once: of four vectors, or more."""


def _emit_square(builder, vector, args, counts=None):
    """Write target[columns[j] + i] = factor · origin[rows[i] + j] for i and j below the lanes, or below two counts."""
    origin, rows, target, columns, factor = args
    times = simd.splat(builder, factor)

    def place(base, table, n, count):
        index = simd.INT64(n)
        if count is not None:  # what is beyond it lies where the last one does
            last = builder.sub(count, simd.INT64(1))
            index = builder.select(builder.icmp_signed("<", index, last), index, last)
        return builder.gep(base, [builder.load(builder.gep(table, [index]))])

    height, width = counts if counts is not None else (None, None)
    read = []
    for i in range(vector.count):
        at = place(origin, rows, i, height)
        if counts is None:
            simd.emit_prefetch(builder, builder.gep(at, [simd.INT64(2 * vector.count)]), 3)  # of the strip after next
            line = simd.emit_load(builder, at, vector)
        else:
            line = simd.emit_load_some(builder, at, vector, width)
        read.append(builder.fmul(line, times))
    for j, line in enumerate(lanes.emit_transposed(builder, read)):
        at = place(target, columns, j, width)
        if counts is None:
            simd.emit_store(builder, line, at)
        else:
            kept = builder.select(builder.icmp_signed("<", simd.INT64(j), width), height, simd.INT64(0))
            simd.emit_store_some(builder, line, at, kept)


@intrinsic
def _square(typingctx, origin, rows, target, columns, factor):
    """target[columns[j] + i] = factor · origin[rows[i] + j] for i and j below the lanes of a vector."""

    def codegen(context, builder, sig, args):
        _emit_square(builder, simd.llvm_vector(origin.dtype), args)
        return context.get_dummy_value()

    return types.void(origin, rows, target, columns, factor), codegen


@intrinsic
def _rectangle(typingctx, origin, rows, target, columns, factor, height, width):
    """The same for i below a height and j below a width, which are at most the lanes of a vector."""

    def codegen(context, builder, sig, args):
        _emit_square(builder, simd.llvm_vector(origin.dtype), args[:5], args[5:])
        return context.get_dummy_value()

    return types.void(origin, rows, target, columns, factor, types.intp, types.intp), codegen


@kernel
def transpose(job, worker, call, outer, rows, columns, like):
    """target[n_t + columns[j] + i] = ± origin[n_o + rows[i] + j] for all i, j and pairs n of `outer` (2, _).

    call: the addresses of origin and target, whose dtype is that of `like`, and whether the sign is minus. Offsets are
    in scalars.
    """
    lane_count, factor = simd.vector_lanes(simd.pointer(like)), like.dtype.type(1 - 2 * call[2])
    row_table, column_table = simd.pointer(rows), simd.pointer(columns)
    height, width = len(rows), len(columns)
    strips, panels = (width + lane_count - 1) // lane_count, (height + PANEL - 1) // PANEL
    whole = min(height, width) >= lane_count
    total = outer.shape[1] * panels * strips
    size = grain(job, total)
    n = next_item(job, -1, size)
    while n < total:
        strip, panel, pair = n % strips, n // strips % panels, n // strips // panels
        origin = simd.shift(simd.at(like, call[0]), outer[0, pair])
        target = simd.shift(simd.at(like, call[1]), outer[1, pair])
        j = strip * lane_count
        if whole:  # squares at the edges overlap their neighbours
            j = min(j, width - lane_count)
            for start in range(panel * PANEL, min(height, panel * PANEL + PANEL), lane_count):
                i = min(start, height - lane_count)
                _square(simd.shift(origin, j), simd.shift(row_table, i), simd.shift(target, i),
                        simd.shift(column_table, j), factor)  # fmt: skip
        else:
            for i in range(panel * PANEL, min(height, panel * PANEL + PANEL), lane_count):
                _rectangle(simd.shift(origin, j), simd.shift(row_table, i), simd.shift(target, i),
                           simd.shift(column_table, j), factor, min(lane_count, height - i),
                           min(lane_count, width - j))  # fmt: skip
        n = next_item(job, n, size)


@intrinsic
def _unlike(typingctx, a, b, count):
    """The bits, all together, in which words (count) of a are not those of b; count: a number of `WORDS`."""

    def codegen(context, builder, sig, args):
        vector = ir.VectorType(simd.INT32, simd.lanes(4))

        def body(builder, index, carried):
            def read(base, n):
                return simd.emit_load(builder, builder.gep(base, [index]), vector, n)

            return [builder.or_(seen, builder.xor(read(args[0], n), read(args[1], n)))
                    for n, seen in enumerate(carried)]  # fmt: skip

        zeros = [ir.Constant(vector, [0] * vector.count)] * (WORDS // vector.count)
        first, *others = simd.emit_loop(builder, simd.INT64(0), args[2], WORDS, zeros, body)
        for other in others:
            first = builder.or_(first, other)
        function_type = ir.FunctionType(simd.INT32, [vector])
        name = f"llvm.vector.reduce.or.v{vector.count}i32"
        return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [first])

    return types.int32(a, b, types.intp), codegen


@kernel
def compare(job, worker, a, b, different):
    """Set different (1,) where the words (n,) of a are not those of b; which may be, once that is known, unread."""
    a_start, b_start = simd.pointer(a), simd.pointer(b)
    chunks = (len(a) + CHUNK - 1) // CHUNK
    n = claim(job)
    while n < chunks and different[0] == 0:
        first, last = n * CHUNK, min(len(a), n * CHUNK + CHUNK)
        rest = last - (last - first) % WORDS
        unlike = _unlike(simd.shift(a_start, first), simd.shift(b_start, first), rest - first)
        for k in range(rest, last):
            unlike |= a[k] ^ b[k]
        if unlike != 0:
            different[0] = 1
        n = claim(job)

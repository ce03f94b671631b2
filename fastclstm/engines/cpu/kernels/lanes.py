"""Between channels-last memory and planes: squares of scalars, one row a lane, transposed in registers."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(simd.INT32, len(lanes)), lanes))


def emit_transposed(builder, vectors):
    """Transpose the squares of len(vectors) lanes that lie side by side in the vectors, by swaps of growing blocks."""
    vectors, count, half = list(vectors), vectors[0].type.count, 1
    while half < len(vectors):
        for a in range(len(vectors)):
            if not a & half:
                b = a + half
                low = [lane if not lane & half else count + lane - half for lane in range(count)]
                high = [lane + half if not lane & half else count + lane for lane in range(count)]
                vectors[a], vectors[b] = (_shuffle(builder, vectors[a], vectors[b], way) for way in (low, high))
        half *= 2
    return vectors


def _join(builder, pieces):
    """Put vectors side by side."""
    while len(pieces) > 1:
        both = range(2 * pieces[0].type.count)
        pieces = [_shuffle(builder, a, b, list(both)) for a, b in zip(pieces[::2], pieces[1::2], strict=True)]
    return pieces[0]


def _place(builder, addresses, lane, offset, pointer):
    address = builder.load(builder.gep(addresses, [simd.INT64(lane)]))
    return builder.inttoptr(builder.add(address, offset), pointer)


def _square(parts, pointer):
    """The vector of all lanes, and the one that is a row of the square: so many of it make the other."""
    whole = simd.llvm_vector(pointer.dtype)
    return whole, ir.VectorType(whole.element, max(1, whole.count // parts.literal_value))


@intrinsic(prefer_literal=True)
def _gather(typingctx, parts, some, addresses, offset, count, target):
    """target[s][lane] = the s-th scalar at addresses[lane] + offset bytes, for a `parts`-th of a vector's lanes.

    some: only the first `count` are read.
    """

    def codegen(context, builder, sig, args):
        _, _, addresses, offset, count, target = args
        whole, row = _square(parts, target_type)
        size = row.count

        def read(lane):
            pointer = _place(builder, addresses, lane, offset, target.type)
            if some.literal_value and size > 1:
                return simd.emit_load_some(builder, pointer, row, count)
            return simd.emit_load(builder, pointer, row)

        vectors = [_join(builder, [read(n * size + a) for n in range(whole.count // size)]) for a in range(size)]
        for s, vector in enumerate(emit_transposed(builder, vectors)):
            simd.emit_store(builder, vector, target, s)
        return context.get_dummy_value()

    target_type = target
    return types.void(parts, some, addresses, types.intp, types.intp, target), codegen


@intrinsic(prefer_literal=True)
def _scatter(typingctx, parts, some, addresses, offset, count, origin):
    """The s-th scalar at addresses[lane] + offset bytes = origin[s][lane], as `_gather`; only `count` are written."""

    def codegen(context, builder, sig, args):
        _, _, addresses, offset, count, origin = args
        whole, row = _square(parts, origin_type)
        size = row.count
        vectors = emit_transposed(builder, [simd.emit_load(builder, origin, whole, s) for s in range(size)])
        for n in range(whole.count // size):
            for a in range(size):
                piece = _shuffle(builder, vectors[a], vectors[a], list(range(n * size, (n + 1) * size)))
                pointer = _place(builder, addresses, n * size + a, offset, origin.type)
                if some.literal_value and size > 1:
                    simd.emit_store_some(builder, piece, pointer, count)
                else:
                    simd.emit_store(builder, piece, pointer)
        return context.get_dummy_value()

    origin_type = origin
    return types.void(parts, some, addresses, types.intp, types.intp, origin), codegen


def _moving(move):
    """Return the function that moves runs of any length."""

    @inline
    def run(addresses, offset, count, planes):
        """Move `count` scalars at each of the addresses + offset bytes, one address a lane, from or to so many planes.

        Up to a vector of lanes of planes more is written, or read and not used.
        """
        lanes = simd.vector_lanes(planes)
        itemsize = simd.VECTOR_BYTES // lanes
        for k in range(0, count, lanes):
            n, at, plane = count - k, offset + k * itemsize, simd.shift(planes, k * lanes)
            if n >= lanes:
                move(1, 0, addresses, at, n, plane)
            elif 4 * n <= lanes:
                move(4, 1, addresses, at, n, plane)
            elif 2 * n <= lanes:
                move(2, 1, addresses, at, n, plane)
            else:
                move(1, 1, addresses, at, n, plane)

    return run


gather, scatter = _moving(_gather), _moving(_scatter)

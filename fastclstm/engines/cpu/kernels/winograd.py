"""Winograd convolution F(m×m, k×k): fewer multiplications, for square kernels of 3 or 5 with stride and dilation 1.

Each tile of m×m outputs is Aᵀ[(G w Gᵀ) ∘ (Bᵀ x B)]A (Lavin & Gray 2016). Bᵀ x B of a block of tiles, for all channels,
is written once; then for each group of columns one matrix product a point (an element of the α×α transformed tile,
α = m + k − 1) runs over the channels, and the transform Aᵀ · A hands pre-activations straight to the gates.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.gates import FINISHES, line_pixels, repeat_peepholes, skip_step, take, z_after
from fastclstm.engines.cpu.kernels.padding import copy_run
from fastclstm.engines.cpu.kernels.schedule import (
    first_piece,
    next_piece,
    piece_done,
    place,
    skipped_sources,
    source_at,
    wait_for_neighbours,
    worker_scratch,
)

POINTS = {4: (0, 1, -1), 6: (0, 1, -1, Fraction(1, 2), -2), 8: (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))}
"""Interpolation points for each α, besides infinity: those with the smallest rounding errors."""

ONE = 1
"""Index of the point 1: what is added to the product at (1, 1) is added to every output of its tile."""

BLOCK_TILES = 24
"""Tiles of one block, about: few enough for the second-level cache, enough to use each weight often."""

CHUNKS = (13, 11, 8, 4) if simd.REGISTERS == 32 else (6, 5, 4, 3)
"""Tiles that one matrix product keeps in registers, times two vectors: the choices."""

CHUNK0, CHUNK1, CHUNK2, CHUNK3 = CHUNKS

WORK = np.dtype([(name, np.int64) for name in (
    "HO", "WO",
    "tiles_x", "tiles",  # tiles of an image
    "unit_tiles",  # of the images of one unit
    "block_tiles",
    "chunk",
    "inputs", "products", "z", "pixels", "patch",  # places in the scratch memory
)])  # fmt: skip


class Transforms(NamedTuple):
    """The matrices of F(m, k): output = Aᵀ[(G w) ∘ (Bᵀ x)] in one dimension."""

    A_T: np.ndarray
    G: np.ndarray
    B_T: np.ndarray


@lru_cache(maxsize=8)
def transforms(m: int, k: int) -> Transforms:
    """Compute the matrices (m, α), (α, k) and (α, α) exactly, by Cook and Toom's algorithm, and round them once."""
    points = [Fraction(point) for point in POINTS[m + k - 1]]
    finite = len(points)
    alpha = finite + 1
    A_T = [[point**row for point in points] + [Fraction(int(row == m - 1))] for row in range(m)]
    G, B_T = [], []
    for i, point in enumerate(points):
        others = points[:i] + points[i + 1 :]
        scale = Fraction(1)
        for other in others:
            scale *= point - other
        G.append([point**power / scale for power in range(k)])
        B_T.append([*_from_roots(others), Fraction(0)])
    G.append([Fraction(int(power == k - 1)) for power in range(k)])
    B_T.append(_from_roots(points))
    assert len(B_T) == alpha
    return Transforms(*(np.array(matrix, np.float64) for matrix in (A_T, G, B_T)))


def _from_roots(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients, lowest first, of the polynomial with these roots."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


# --------------------------------------------------------------------------------------------------- the transforms


def _combine(builder, coefficients, values):
    """Σ coefficient · value, skipping zeros and multiplying by no 1."""
    terms = sorted(
        ((float(c), v) for c, v in zip(coefficients, values, strict=True) if c), key=lambda t: abs(t[0]) != 1
    )
    total = None
    for coefficient, value in terms:
        if total is None:
            total = value if coefficient == 1 else builder.fneg(value) if coefficient == -1 else builder.fmul(
                simd.constant(value.type, coefficient), value)  # fmt: skip
        elif coefficient == 1:
            total = builder.fadd(total, value)
        elif coefficient == -1:
            total = builder.fsub(total, value)
        else:
            total = simd.emit_fma(builder, simd.constant(value.type, coefficient), value, total)
    return total


def _apply(builder, matrix, values):
    """Rows of matrix · values; columns of opposite points (equal but for signs) share their sums and differences."""
    rows, values = [list(row) for row in matrix], list(values)
    count = matrix.shape[1]
    for p in range(count):
        for q in range(p + 1, count):
            if all(abs(row[p]) == abs(row[q]) for row in rows) and any(row[p] for row in rows):
                total, difference = builder.fadd(values[p], values[q]), builder.fsub(values[p], values[q])
                values += [total, difference]
                for row in rows:
                    even = row[p] == row[q]
                    row += [row[p], 0.0] if even else [0.0, row[p]]
                    row[p] = row[q] = 0.0
    return [_combine(builder, row, values) for row in rows]


def _transform_square(builder, matrix, tile):
    """Matrix · tile · matrixᵀ for a square of vectors."""
    columns = [_apply(builder, matrix, [row[j] for row in tile]) for j in range(len(tile[0]))]
    return [_apply(builder, matrix, [column[i] for column in columns]) for i in range(len(matrix))]


def _read_and_transform(matrix, masked, ahead):
    """Codegen of a transform that reads a square of pixels and asks for the `ahead` pixels right of it."""
    side = matrix.shape[1]

    def codegen(context, builder, sig, args):
        _, _, _, origin, row, column, count, target, point = args
        vector = simd.llvm_vector(sig.args[3].dtype)

        def at(base, step, index):
            return builder.gep(base, [builder.mul(step, simd.INT64(index))])

        def read(pointer):
            if masked:
                return simd.emit_load_some(builder, pointer, vector, count)
            return simd.emit_load(builder, pointer, vector)

        tile = [[read(at(at(origin, row, i), column, j)) for j in range(side)] for i in range(side)]
        for i in range(side):
            for j in range(side, side + ahead):
                simd.emit_prefetch(builder, at(at(origin, row, i), column, j), 3)
        for i, line in enumerate(_transform_square(builder, matrix, tile)):
            for j, value in enumerate(line):
                simd.emit_store(builder, value, at(target, point, i * len(matrix) + j))
        return context.get_dummy_value()

    return codegen


@intrinsic(prefer_literal=True)
def transform_input(typingctx, m, k, some, origin, row, column, count, target, point):
    """target[p] = (Bᵀ x B)[p] of the α×α pixels at origin, for a vector of channels (`some`: only the first `count`).

    row, column: scalars between pixels; point: scalars between the α² results.
    """
    matrix = transforms(m.literal_value, k.literal_value).B_T
    # The tile to the right begins m pixels on: those of its pixels that are not read here will be wanted.
    codegen = _read_and_transform(matrix, bool(some.literal_value), m.literal_value)
    return types.void(m, k, some, origin, types.intp, types.intp, types.intp, target, types.intp), codegen


@intrinsic(prefer_literal=True)
def transform_gradient(typingctx, m, k, some, origin, row, column, count, target, point):
    """target[p] = (A dy Aᵀ)[p] of the m×m gradients at origin, as `transform_input`."""
    matrix = transforms(m.literal_value, k.literal_value).A_T.T
    codegen = _read_and_transform(matrix, bool(some.literal_value), m.literal_value)
    return types.void(m, k, some, origin, types.intp, types.intp, types.intp, target, types.intp), codegen


@intrinsic(prefer_literal=True)
def transform_output(typingctx, m, k, products, bias, target, pixel):
    """target[i·m + j] = (Aᵀ M A)[i, j] + bias of the α² vectors M at products; pixel: scalars between the results."""
    matrix = transforms(m.literal_value, k.literal_value).A_T
    side, alpha = matrix.shape
    vector = simd.llvm_vector(products.dtype)

    def codegen(context, builder, sig, args):
        _, _, products, bias, target, pixel = args
        tile = [[simd.emit_load(builder, products, vector, i * alpha + j) for j in range(alpha)] for i in range(alpha)]
        tile[ONE][ONE] = builder.fadd(tile[ONE][ONE], simd.emit_load(builder, bias, vector))
        for i, line in enumerate(_transform_square(builder, matrix, tile)):
            for j, value in enumerate(line):
                place = builder.gep(target, [builder.mul(pixel, simd.INT64(i * side + j))])
                simd.emit_store(builder, value, place)
        return context.get_dummy_value()

    return types.void(m, k, products, bias, target, types.intp), codegen


@intrinsic(prefer_literal=True)
def multiply(typingctx, rows, inputs, weights, channels, blocks, result, row, column, prefetch):
    """result[r, v] = Σ inputs[r, c] · weights[c, v] for rows × two vectors in registers.

    inputs: `blocks` blocks of rows × one vector of channels, of which channels[b] count; row and column: scalars
    between the results' rows and vectors; prefetch: weights that the next product needs.
    """
    nr, nv = rows.literal_value, 2
    vector = simd.llvm_vector(inputs.dtype)

    def codegen(context, builder, sig, args):
        _, inputs, weights, channels, blocks, result, row, column, prefetch = args
        lanes = vector.count
        zero = simd.constant(vector, 0.0)

        def block(builder, b, carried):
            count = builder.load(builder.gep(channels, [b]))
            base = builder.gep(inputs, [builder.mul(b, simd.INT64(nr * lanes))])
            line, ahead, sums = carried[0], carried[1], carried[2:]

            def step(builder, c, carried):
                line, ahead, sums = carried[0], carried[1], list(carried[2:])
                w = [simd.emit_load(builder, line, vector, v) for v in range(nv)]
                simd.emit_prefetch(builder, ahead, 2)
                for r in range(nr):
                    value = simd.splat(
                        builder, builder.load(builder.gep(base, [builder.add(c, simd.INT64(r * lanes))]))
                    )
                    for v in range(nv):
                        sums[r * nv + v] = simd.emit_fma(builder, value, w[v], sums[r * nv + v])
                following = [builder.gep(pointer, [simd.INT64(nv * lanes)]) for pointer in (line, ahead)]
                return [*following, *sums]

            return simd.emit_loop(builder, simd.INT64(0), count, 1, [line, ahead, *sums], step)

        carried = simd.emit_loop(builder, simd.INT64(0), blocks, 1, [weights, prefetch, *[zero] * (nr * nv)], block)
        for n, value in enumerate(carried[2:]):
            r, v = divmod(n, nv)
            offset = builder.add(builder.mul(row, simd.INT64(r)), builder.mul(column, simd.INT64(v)))
            simd.emit_store(builder, value, builder.gep(result, [offset]))
        return context.get_dummy_value()

    return types.void(rows, inputs, weights, channels, types.intp, result, types.intp, types.intp, weights), codegen


@inline
def _multiply(chunk, inputs, weights, channels, blocks, result, row, column, prefetch):
    if chunk == CHUNK0:
        multiply(CHUNK0, inputs, weights, channels, blocks, result, row, column, prefetch)
    elif chunk == CHUNK1:
        multiply(CHUNK1, inputs, weights, channels, blocks, result, row, column, prefetch)
    elif chunk == CHUNK2:
        multiply(CHUNK2, inputs, weights, channels, blocks, result, row, column, prefetch)
    else:
        multiply(CHUNK3, inputs, weights, channels, blocks, result, row, column, prefetch)


@inline
def _pixels(src, frame, y0, x0, side, c, count, patch):
    """Where to read channels c .. c + count of the side×side pixels at (y0, x0), and the scalars between pixels.

    At the edges of the frame they are copied to `patch`, with what the padding holds.
    """
    if y0 >= 0 and x0 >= 0 and y0 + side <= src.H and x0 + side <= src.W:
        return simd.shift(frame, (y0 * src.W + x0) * src.C + c), src.W * src.C, src.C
    step = simd.vector_lanes(patch)
    for i in range(side):
        y = (y0 + i) % src.H if src.circular else y0 + i
        line = simd.shift(frame, y * src.W * src.C + c)
        for j in range(side):
            x = (x0 + j) % src.W if src.circular else x0 + j
            value = simd.zeros(patch)
            if y >= 0 and y < src.H and x >= 0 and x < src.W:
                value = take(simd.shift(line, x * src.C), count)
            simd.store(simd.shift(patch, (i * side + j) * step), value)
    return patch, side * step, step


@inline
def transform_tile(m, k, src, frame, y0, x0, inputs, block_size, point, patch):
    """Transform the α×α pixels of a frame at (y0, x0), all channels, a block of channels at a time."""
    step = simd.vector_lanes(inputs)
    alpha = m + k - 1
    inside = y0 >= 0 and x0 >= 0 and y0 + alpha <= src.H and x0 + alpha <= src.W
    for c in range(0, src.C, step):
        count = min(step, src.C - c)
        target = simd.shift(inputs, c // step * block_size)
        if inside:
            origin = simd.shift(frame, (y0 * src.W + x0) * src.C + c)
            if count < step:
                transform_input(m, k, 1, origin, src.W * src.C, src.C, count, target, point)
            else:
                transform_input(m, k, 0, origin, src.W * src.C, src.C, count, target, point)
            continue
        for i in range(alpha):
            for j in range(alpha):
                y, x = y0 + i, x0 + j
                if src.circular:
                    y, x = y % src.H, x % src.W
                pixel = simd.shift(patch, (i * alpha + j) * step)
                simd.store(pixel, simd.zeros(pixel))
                if y >= 0 and y < src.H and x >= 0 and x < src.W:
                    copy_run(pixel, simd.shift(frame, (y * src.W + x) * src.C + c), count)
        transform_input(m, k, 0, patch, alpha * step, step, step, target, point)


@inline
def transform_gradient_tile(m, k, src, frame, y0, x0, inputs, block_size, point, patch):
    """Transform the m×m gradients of a frame at (y0, x0), all channels, a block of channels at a time."""
    step = simd.vector_lanes(inputs)
    for c in range(0, src.C, step):
        count = min(step, src.C - c)
        origin, row, column = _pixels(src, frame, y0, x0, m, c, count, patch)
        target = simd.shift(inputs, c // step * block_size)
        if count < step:
            transform_gradient(m, k, 1, origin, row, column, count, target, point)
        else:
            transform_gradient(m, k, 0, origin, row, column, count, target, point)


def _run(finish):
    """Return the kernel that ends with `finish`, one of `gates.FINISHES`."""

    @inline
    def run_block(
        m, k, flow, work, sources, groups, channels, weights, bias, cell, mask, scratch, unit, t, block, part
    ):
        """Compute one block of tiles of a unit at step t, for a part of the groups."""
        like = weights
        group0, group1 = len(groups) * part // flow.parts, len(groups) * (part + 1) // flow.parts
        total = flow.B * work.tiles
        first = unit * work.unit_tiles + block * work.block_tiles
        count = min(work.block_tiles, work.unit_tiles - block * work.block_tiles, total - first)
        if count <= 0:
            return
        chunk = work.chunk
        side = m * m
        points = (m + k - 1) * (m + k - 1)
        inputs, products = simd.at(like, scratch + work.inputs), simd.at(like, scratch + work.products)
        lines, patch = simd.at(like, scratch + work.z), simd.at(like, scratch + work.patch)
        z = z_after(lines)
        pixels = simd.at(channels, scratch + work.pixels)
        step = simd.vector_lanes(z)
        chunks = (count + chunk - 1) // chunk
        chunk_size = len(channels) * chunk * step
        point = chunks * chunk_size + step  # one vector more: the points of a tile in different sets of the cache
        skipped = skipped_sources(flow, sources, t)
        rows = skipped_rows = skipped_blocks = 0
        for s in range(len(sources)):
            if s < skipped:
                skipped_rows += sources[s].C
                skipped_blocks += (sources[s].C + step - 1) // step
            rows += sources[s].C
        for n in range(count):
            b, tile = (first + n) // work.tiles, (first + n) % work.tiles
            ty, tx = tile // work.tiles_x * m, tile % work.tiles_x * m
            for i in range(m):
                for j in range(m):
                    outside = ty + i >= work.HO or tx + j >= work.WO
                    pixels[n * side + i * m + j] = -1 if outside else (ty + i) * work.WO + tx + j
            block_n = simd.shift(inputs, n // chunk * chunk_size + (n % chunk + skipped_blocks * chunk) * step)
            for s in range(skipped, len(sources)):
                src = sources[s]
                frame = simd.at(like, source_at(flow, sources, s, b, t))
                transform_tile(m, k, src, frame, ty - src.top, tx - src.left, block_n, chunk * step, point, patch)
                block_n = simd.shift(block_n, (src.C + step - 1) // step * chunk * step)
        blocks = len(channels) - skipped_blocks
        counts = simd.shift(simd.pointer(channels), skipped_blocks)
        for g in range(group0, group1):
            group = groups[g]
            vectors = group[1]
            tile_size = ((vectors + 1) // 2 * 2 * points + 1) * step  # one vector more, against powers of two
            group_bias = simd.shift(simd.pointer(bias), group[5])
            panel = rows * 2 * step
            panel_weights = simd.shift(simd.pointer(weights), group[0])
            for p in range(points):
                for v in range(0, vectors, 2):
                    ahead = simd.shift(panel_weights, panel)
                    used = simd.shift(panel_weights, skipped_rows * 2 * step)
                    for q in range(chunks):
                        rows_in = simd.shift(inputs, p * point + q * chunk_size + skipped_blocks * chunk * step)
                        result = simd.shift(products, q * chunk * tile_size + v * points * step + p * step)
                        _multiply(chunk, rows_in, used, counts, blocks, result, tile_size, points * step,
                                  simd.shift(ahead, q % 2 * step))  # fmt: skip
                    panel_weights = ahead
            held = 0  # pixels whose columns wait for `finish`
            at_once = line_pixels(group[4], step)
            for n in range(count):
                b = (first + n) // work.tiles
                if flow.masked and not mask[b, t]:
                    skip_step(like, flow, cell, group, simd.shift(pixels, n * side), side, b, t)
                    continue
                for v in range(vectors):
                    tile_products = simd.shift(products, n * tile_size + v * points * step)
                    vector_bias, target = simd.shift(group_bias, v * step), simd.shift(z, (held * vectors + v) * step)
                    transform_output(m, k, tile_products, vector_bias, target, vectors * step)
                held += side
                if n + 1 == count or (first + n + 1) // work.tiles != b or held + side > at_once:
                    begun = simd.shift(pixels, (n + 1) * side - held)
                    finish(like, flow, cell, group, lines, z, begun, held, b, t)
                    held = 0

    def run(m, k, job, worker, flows, works, sources, neighbours, channels, groups, weights, bias, cells, mask):
        flow = flows[0]
        scratch = worker_scratch(flow, worker)
        repeat_peepholes(weights, cells[0], groups, simd.at(weights, scratch + works[0].z))
        unit, piece, helped = first_piece()
        while True:
            unit, piece, helped = next_piece(flow, job, unit, piece, helped)
            if unit < 0:
                break
            t, block, part = place(flow, piece)
            wait_for_neighbours(flow, job, sources, neighbours, unit, block, t)
            run_block(m, k, flow, works[0], sources, groups, channels, weights, bias, cells[0], mask, scratch,
                       unit, t, block, part)  # fmt: skip
            piece_done(flow, job, sources, unit, block)

    return run


RUN = {name: kernel(_run(finish), f"winograd.{name}") for name, finish in FINISHES.items()}
"""Compute a piece of a sequence with F(m×m, k×k), by what becomes of the columns."""

"""Winograd convolution F(m_y×m_x, k_y×k_x): fewer multiplications.

Each tile of m_y×m_x outputs is Aᵀ[(G w Gᵀ) ∘ (Bᵀ x B)]A (Lavin & Gray 2016), each axis with matrices of its own. Bᵀ x B
of a block of tiles, for all channels, is written once; then for each group of columns one matrix product a point (an
element of the α_y×α_x transformed tile, α = m + k − 1) runs over the channels, and the transform Aᵀ · A hands
pre-activations straight to the gates. A piece of a larger kernel, and a lattice of a strided one, is a source of its
own, with its origin: further channels of the same product. The outputs of a tile are a dilation apart, the pixels that
it reads as many strides.
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
from fastclstm.engines.cpu.kernels.gates import FINISHES, line_pixels, prefetch_zx, repeat_peepholes, skip_step, z_after
from fastclstm.engines.cpu.kernels.padding import clear_run
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

BLOCK_TILES = (12, 20), (18, 32)
"""Tiles of one block, at least and at most, with near weights, and with far ones, each of which is to be used more
often; but of a unit with fewer they are one block.

Few enough for the second-level cache. Of 24, 16, 12 and 8 tiles 16 were the fastest, or within 2 %, in twelve of
fourteen cells with 0.3 to 19 MB of weights on a Zen 4 (1 MB of L2), 2 to 9 % faster than 24; 22 took 6 to 11 % longer
than 16 with 2 to 5 MB, and 16 took 9 % longer than 32 with 19 MB.
"""

MOST_TILES = 48
"""Tiles of one block, at most."""

CHUNKS = (13, 11, 8, 4) if simd.REGISTERS == 32 else (6, 5, 4, 3)
"""Tiles that one matrix product keeps in registers, times up to two vectors: the choices."""

CHUNK0, CHUNK1, CHUNK2, CHUNK3 = CHUNKS

MASKS = simd.VECTOR_BYTES > 16
"""Whether reading all lanes of a vector under a mask takes no longer than without."""

WORK = np.dtype([(name, np.int64) for name in (
    "HO", "WO",
    "tiles_x", "tiles",  # tiles of an image
    "unit_tiles",  # of the images of one unit
    "block_tiles",
    "chunk",
    "inputs", "products", "z", "pixels", "zeros", "addresses",  # places in the scratch memory
)])  # fmt: skip


class Transforms(NamedTuple):
    """The matrices of F(m, k): output = Aᵀ[(G w) ∘ (Bᵀ x)] in one dimension."""

    A_T: np.ndarray
    G: np.ndarray
    B_T: np.ndarray


@lru_cache(maxsize=32)
def transforms(m: int, k: int) -> Transforms:
    """Compute the matrices (m, α), (α, k) and (α, α) exactly, by Cook and Toom's algorithm, and round them once."""
    if k == 1:
        return Transforms(np.eye(m), np.ones((m, 1)), np.eye(m))
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


def emit_transform(builder, down, across, tile):
    """Down · tile · acrossᵀ for a rectangle of vectors."""
    columns = [_apply(builder, down, [row[j] for row in tile]) for j in range(len(tile[0]))]
    return [_apply(builder, across, [column[i] for column in columns]) for i in range(len(down))]


def _emit_transformed(builder, down, across, tile, target, point):
    """Write Down · tile · acrossᵀ to the target, `point` scalars between the results."""
    for n, value in enumerate(v for line in emit_transform(builder, down, across, tile) for v in line):
        simd.emit_store(builder, value, builder.gep(target, [builder.mul(point, simd.INT64(n))]))


def _emit_read(builder, pointer, vector, masked, count):
    return simd.emit_load_some(builder, pointer, vector, count) if masked else simd.emit_load(builder, pointer, vector)


def _read_and_transform(down, across, masked, ahead):
    """Codegen of a transform that reads a rectangle of pixels and asks for the `ahead` pixels right of it."""
    height, width = down.shape[1], across.shape[1]

    def codegen(context, builder, sig, args):
        origin, row, column, count, target, point = args[5:]
        vector = simd.llvm_vector(sig.args[5].dtype)

        def at(base, step, index):
            return builder.gep(base, [builder.mul(step, simd.INT64(index))])

        tile = [[_emit_read(builder, at(at(origin, row, i), column, j), vector, masked, count) for j in range(width)]
                for i in range(height)]  # fmt: skip
        for i in range(height):
            for j in range(width, width + ahead):
                simd.emit_prefetch(builder, at(at(origin, row, i), column, j), 3)
        _emit_transformed(builder, down, across, tile, target, point)
        return context.get_dummy_value()

    return codegen


def _read_listed_and_transform(down, across, masked):
    """Codegen of a transform that reads a rectangle of pixels whose addresses are listed."""
    height, width = down.shape[1], across.shape[1]

    def codegen(context, builder, sig, args):
        addresses, channel, count, target, point = args[5:]
        pointer = context.get_value_type(sig.args[8])
        vector = simd.llvm_vector(sig.args[8].dtype)

        def read(n):
            pixel = builder.inttoptr(builder.load(builder.gep(addresses, [simd.INT64(n)])), pointer)
            return _emit_read(builder, builder.gep(pixel, [channel]), vector, masked, count)

        tile = [[read(i * width + j) for j in range(width)] for i in range(height)]
        _emit_transformed(builder, down, across, tile, target, point)
        return context.get_dummy_value()

    return codegen


def matrices(name, m_y, m_x, k_y, k_x):
    """One of the matrices for both axes, by literal numbers."""
    axes = (m_y.literal_value, k_y.literal_value), (m_x.literal_value, k_x.literal_value)
    return [getattr(transforms(m, k), name) for m, k in axes]


@intrinsic(prefer_literal=True)
def transform_input(typingctx, m_y, m_x, k_y, k_x, some, origin, row, column, count, target, point):
    """target[p] = (Bᵀ x B)[p] of the α_y×α_x pixels at origin, for a vector of channels (`some`: the first `count`).

    row, column: scalars between pixels; point: scalars between the results.
    """
    # The tile to the right begins m_x pixels on: those of its pixels that are not read here will be wanted.
    down, across = matrices("B_T", m_y, m_x, k_y, k_x)
    codegen = _read_and_transform(down, across, bool(some.literal_value), m_x.literal_value)
    return types.void(m_y, m_x, k_y, k_x, some, origin, types.intp, types.intp, types.intp, target, types.intp), codegen


@intrinsic(prefer_literal=True)
def transform_listed_input(typingctx, m_y, m_x, k_y, k_x, some, addresses, channel, count, target, point):
    """target[p] = (Bᵀ x B)[p] of the α_y×α_x pixels at these addresses, for a vector of channels from one on."""
    down, across = matrices("B_T", m_y, m_x, k_y, k_x)
    codegen = _read_listed_and_transform(down, across, bool(some.literal_value))
    return types.void(m_y, m_x, k_y, k_x, some, addresses, types.intp, types.intp, target, types.intp), codegen


@intrinsic(prefer_literal=True)
def transform_gradient(typingctx, m_y, m_x, k_y, k_x, some, origin, row, column, count, target, point):
    """target[p] = (A dy Aᵀ)[p] of the m_y×m_x gradients at origin, as `transform_input`."""
    down, across = matrices("A_T", m_y, m_x, k_y, k_x)
    codegen = _read_and_transform(down.T, across.T, bool(some.literal_value), m_x.literal_value)
    return types.void(m_y, m_x, k_y, k_x, some, origin, types.intp, types.intp, types.intp, target, types.intp), codegen


@intrinsic(prefer_literal=True)
def transform_listed_gradient(typingctx, m_y, m_x, k_y, k_x, some, addresses, channel, count, target, point):
    """target[p] = (A dy Aᵀ)[p] of the m_y×m_x gradients at these addresses, as `transform_listed_input`."""
    down, across = matrices("A_T", m_y, m_x, k_y, k_x)
    codegen = _read_listed_and_transform(down.T, across.T, bool(some.literal_value))
    return types.void(m_y, m_x, k_y, k_x, some, addresses, types.intp, types.intp, target, types.intp), codegen


@intrinsic(prefer_literal=True)
def transform_output(typingctx, m_y, m_x, k_y, k_x, products, bias, target, pixel):
    """target[i·m_x + j] = (Aᵀ M A)[i, j] + bias of the vectors M at products; pixel: scalars between the results."""
    down, across = matrices("A_T", m_y, m_x, k_y, k_x)
    height, width = down.shape[1], across.shape[1]
    vector = simd.llvm_vector(products.dtype)

    def codegen(context, builder, sig, args):
        products, bias, target, pixel = args[4:]
        tile = [[simd.emit_load(builder, products, vector, i * width + j) for j in range(width)] for i in range(height)]
        added = simd.emit_load(builder, bias, vector)
        for i in (
            range(height) if k_y.literal_value == 1 else (ONE,)
        ):  # an axis that is not transformed has no such point
            for j in range(width) if k_x.literal_value == 1 else (ONE,):
                tile[i][j] = builder.fadd(tile[i][j], added)
        for i, line in enumerate(emit_transform(builder, down, across, tile)):
            for j, value in enumerate(line):
                place = builder.gep(target, [builder.mul(pixel, simd.INT64(i * len(across) + j))])
                simd.emit_store(builder, value, place)
        return context.get_dummy_value()

    return types.void(m_y, m_x, k_y, k_x, products, bias, target, types.intp), codegen


@intrinsic(prefer_literal=True)
def multiply(typingctx, rows, vectors, inputs, weights, channels, blocks, result, row, column, prefetch):
    """result[r, v] = Σ inputs[r, c] · weights[c, v] for rows × vectors in registers.

    inputs: `blocks` blocks of rows × one vector of channels, of which channels[b] count; row and column: scalars
    between the results' rows and vectors; prefetch: weights that the next product needs.
    """
    nr, nv = rows.literal_value, vectors.literal_value
    vector = simd.llvm_vector(inputs.dtype)

    def codegen(context, builder, sig, args):
        inputs, weights, channels, blocks, result, row, column, prefetch = args[2:]
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

    return types.void(
        rows, vectors, inputs, weights, channels, types.intp, result, types.intp, types.intp, weights
    ), codegen


@inline
def _multiply(chunk, vectors, inputs, weights, channels, blocks, result, row, column, prefetch):
    if chunk == CHUNK0:
        multiply(CHUNK0, vectors, inputs, weights, channels, blocks, result, row, column, prefetch)
    elif chunk == CHUNK1:
        multiply(CHUNK1, vectors, inputs, weights, channels, blocks, result, row, column, prefetch)
    elif chunk == CHUNK2:
        multiply(CHUNK2, vectors, inputs, weights, channels, blocks, result, row, column, prefetch)
    else:
        multiply(CHUNK3, vectors, inputs, weights, channels, blocks, result, row, column, prefetch)


@inline
def corner(m, dilation, index):
    """First output of a tile on an axis: `dilation` interleaved ones, then those m outputs of each further on."""
    return index * m if dilation == 1 else index // dilation * (m * dilation) + index % dilation


@inline
def _is_inside(src, y0, x0, height, width):
    """Whether height×width pixels, a dilation apart, are all on the frame."""
    y1, x1 = y0 + (height - 1) * src.dilation_y, x0 + (width - 1) * src.dilation_x
    return y0 >= 0 and x0 >= 0 and y1 < src.H and x1 < src.W


@inline
def _list_pixels(src, frame, y0, x0, height, width, zeros, addresses):
    """List where the height×width pixels from (y0, x0) on are, or what padding holds in their place."""
    first, nothing = simd.address(frame), simd.address(zeros)
    size = simd.address(simd.shift(frame, src.C)) - first
    for i in range(height):
        y = y0 + i * src.dilation_y
        if src.circular:
            y = y % src.H
        on_frame = y >= 0 and y < src.H
        for j in range(width):
            x = x0 + j * src.dilation_x
            if src.circular:
                x = x % src.W
            inside = on_frame and x >= 0 and x < src.W
            addresses[i * width + j] = first + (y * src.W + x) * size if inside else nothing


@inline
def clear_channels(sources, zeros):
    """Make the zeros that stand for the channels of a pixel that is not there."""
    for s in range(len(sources)):
        clear_run(zeros, sources[s].C)


def _transform(near, listed):
    """Return the function that transforms a tile, its pixels `near` each other or, at the frame's border, `listed`."""

    @inline
    def transform(m_y, m_x, k_y, k_x, height, width, src, frame, y0, x0, inputs, block_size, point, zeros, addresses):
        step = simd.vector_lanes(inputs)
        inside = _is_inside(src, y0, x0, height, width)
        if not inside:
            _list_pixels(src, frame, y0, x0, height, width, zeros, addresses)
        row, column = src.dilation_y * src.W * src.C, src.dilation_x * src.C
        for c in range(0, src.C, step):
            count = min(step, src.C - c)
            target = simd.shift(inputs, c // step * block_size)
            origin = simd.shift(frame, (y0 * src.W + x0) * src.C + c)
            if inside and count == step:
                near(m_y, m_x, k_y, k_x, 0, origin, row, column, count, target, point)
            elif inside:
                near(m_y, m_x, k_y, k_x, 1, origin, row, column, count, target, point)
            elif MASKS or count < step:
                listed(m_y, m_x, k_y, k_x, 1, addresses, c, count, target, point)
            else:
                listed(m_y, m_x, k_y, k_x, 0, addresses, c, count, target, point)

    return transform


_transform_input = _transform(transform_input, transform_listed_input)
_transform_gradient = _transform(transform_gradient, transform_listed_gradient)


@inline
def transform_tile(m_y, m_x, k_y, k_x, src, frame, y0, x0, inputs, block_size, point, zeros, addresses):
    """Transform the α_y×α_x pixels of a frame from (y0, x0) on, all channels, a block of channels at a time.

    zeros: as of `clear_channels`; addresses: memory for one of each pixel.
    """
    _transform_input(m_y, m_x, k_y, k_x, m_y + k_y - 1, m_x + k_x - 1, src, frame, y0, x0, inputs, block_size, point,
                     zeros, addresses)  # fmt: skip


@inline
def transform_gradient_tile(m_y, m_x, k_y, k_x, src, frame, y0, x0, inputs, block_size, point, zeros, addresses):
    """Transform the m_y×m_x gradients of a frame from (y0, x0) on, as `transform_tile`."""
    _transform_gradient(m_y, m_x, k_y, k_x, m_y, m_x, src, frame, y0, x0, inputs, block_size, point, zeros, addresses)


def _run(finish):
    """Return the kernel that ends with `finish`, one of `gates.FINISHES`."""

    @inline
    def run_block(
        m_y, m_x, k_y, k_x, flow, work, sources, groups, channels, weights, bias, cell, mask, scratch, unit, t, block,
        part, backwards,
    ):  # fmt: skip
        """Compute one block of tiles of a unit at step t, for a part of the groups, the last one first if backwards."""
        like = weights
        group0, group1 = len(groups) * part // flow.parts, len(groups) * (part + 1) // flow.parts
        total = flow.B * work.tiles
        first = unit * work.unit_tiles + block * work.block_tiles
        count = min(work.block_tiles, work.unit_tiles - block * work.block_tiles, total - first)
        if count <= 0:
            return
        chunk = work.chunk
        side = m_y * m_x
        points = (m_y + k_y - 1) * (m_x + k_x - 1)
        inputs, products = simd.at(like, scratch + work.inputs), simd.at(like, scratch + work.products)
        lines, zeros = simd.at(like, scratch + work.z), simd.at(like, scratch + work.zeros)
        addresses = simd.at(channels, scratch + work.addresses)
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
        HO, WO, tiles_x = work.HO, work.WO, work.tiles_x
        d_y, d_x = sources[0].dilation_y // sources[0].stride_y, sources[0].dilation_x // sources[0].stride_x
        for n in range(count):
            b, tile = (first + n) // work.tiles, (first + n) % work.tiles
            ty, tx = corner(m_y, d_y, tile // tiles_x), corner(m_x, d_x, tile % tiles_x)
            for i in range(m_y):
                for j in range(m_x):
                    y, x = ty + i * d_y, tx + j * d_x
                    pixels[n * side + i * m_x + j] = y * WO + x if y < HO and x < WO else -1
            block_n = simd.shift(inputs, n // chunk * chunk_size + (n % chunk + skipped_blocks * chunk) * step)
            for s in range(skipped, len(sources)):
                src = sources[s]
                frame = simd.at(like, source_at(flow, sources, s, b, t))
                y0, x0 = ty * src.stride_y - src.top, tx * src.stride_x - src.left
                transform_tile(m_y, m_x, k_y, k_x, src, frame, y0, x0, block_n, chunk * step, point, zeros,
                               addresses)  # fmt: skip
                block_n = simd.shift(block_n, (src.C + step - 1) // step * chunk * step)
        if count % chunk > 0:  # what was in this memory may be denormal, which takes a hundred times as long
            for p in range(points):
                last = simd.shift(inputs, p * point + (chunks - 1) * chunk_size)
                for c in range(skipped_blocks, len(channels)):
                    for n in range(count % chunk, chunk):
                        row = simd.shift(last, (c * chunk + n) * step)
                        simd.store(row, simd.zeros(row))
        blocks = len(channels) - skipped_blocks
        counts = simd.shift(simd.pointer(channels), skipped_blocks)
        for g in range(group0, group1):
            group = groups[group0 + group1 - 1 - g if backwards else g]
            vectors = group[1]
            tile_size = (vectors * points + 1) * step  # one vector more, against powers of two
            group_bias = simd.shift(simd.pointer(bias), group[5])
            panel_weights = simd.shift(simd.pointer(weights), group[0])
            if flow.zx != 0:
                prefetch_zx(like, flow, cell, group, pixels, first, count, side, work.tiles, t)
            for p in range(points):
                for v in range(0, vectors, 2):
                    lanes = min(2, vectors - v) * step
                    ahead = simd.shift(panel_weights, rows * lanes)
                    used = simd.shift(panel_weights, skipped_rows * lanes)
                    for q in range(chunks):
                        rows_in = simd.shift(inputs, p * point + q * chunk_size + skipped_blocks * chunk * step)
                        result = simd.shift(products, q * chunk * tile_size + v * points * step + p * step)
                        later = simd.shift(ahead, q % 2 * step)
                        if lanes == step:
                            _multiply(chunk, 1, rows_in, used, counts, blocks, result, tile_size, points * step, later)
                        else:
                            _multiply(chunk, 2, rows_in, used, counts, blocks, result, tile_size, points * step, later)
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
                    transform_output(m_y, m_x, k_y, k_x, tile_products, vector_bias, target, vectors * step)
                held += side
                if n + 1 == count or (first + n + 1) // work.tiles != b or held + side > at_once:
                    begun = simd.shift(pixels, (n + 1) * side - held)
                    finish(like, flow, cell, group, lines, z, begun, held, b, t)
                    held = 0

    def run(
        m_y, m_x, k_y, k_x, job, worker, flows, works, sources, neighbours, channels, groups, weights, bias, cells, mask
    ):
        flow = flows[0]
        scratch = worker_scratch(flow, worker)
        repeat_peepholes(weights, cells[0], groups, simd.at(weights, scratch + works[0].z))
        clear_channels(sources, simd.at(weights, scratch + works[0].zeros))
        unit, piece, helped = first_piece()
        backwards = False
        while True:
            unit, piece, helped = next_piece(flow, job, unit, piece, helped)
            if unit < 0:
                break
            t, block, part = place(flow, piece)
            wait_for_neighbours(flow, job, sources, neighbours, unit, block, t)
            run_block(m_y, m_x, k_y, k_x, flow, works[0], sources, groups, channels, weights, bias, cells[0], mask,
                      scratch, unit, t, block, part, backwards)  # fmt: skip
            backwards = not backwards  # what was read last may still be in the core's own cache
            piece_done(flow, job, sources, unit, block)

    return run


RUN = {name: kernel(_run(finish), f"winograd.{name}") for name, finish in FINISHES.items()}
"""Compute a piece of a sequence with F(m_y×m_x, k_y×k_x), by what becomes of the columns."""

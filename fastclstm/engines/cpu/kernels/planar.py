"""Convolutions of few columns: the lanes of a vector are tiles of pixels, not filters.

Where 4F columns leave most of a vector empty, a vector takes one pixel of each of as many tiles as it has lanes, from
anywhere in a block of padded images: `lanes` transposes what the tiles read, each weight meets all of them at once, and
the gates have planes of i, f, g and o. The tiles are Winograd's, or for direct convolution any rectangles. Every output
is the same sum in the same order as in `direct` and `winograd`, to the bit: which of them runs is a matter of speed.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import gates, simd
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.gates import FINISHES, GATES
from fastclstm.engines.cpu.kernels.lanes import gather, scatter
from fastclstm.engines.cpu.kernels.padding import copy_patch
from fastclstm.engines.cpu.kernels.schedule import (
    c_after,
    c_before,
    first_piece,
    gates_at,
    h_after,
    next_piece,
    piece_done,
    place,
    skipped_sources,
    source_at,
    wait_for_neighbours,
    worker_scratch,
    y_at,
    zx_at,
)
from fastclstm.engines.cpu.kernels.winograd import corner, transform_input, transform_output

QUAD = 4
"""Columns that are computed together: the gates of a filter; of what is stored, four filters."""

ROWS = 4 if simd.REGISTERS == 32 else 2
"""Pixels, each of a vector of tiles, that meet a quad of columns in registers."""

PANEL = 3 * QUAD
"""Numbers of a quad: where each column is and how far it is to the next row of weights, then to the next point."""

M_X = 4
"""Pixels of a line of a direct convolution's tile: few, so that narrow frames fill lanes; a multiple of `ROWS`."""

WORK = np.dtype([(name, np.int64) for name in (
    "HO", "WO", "m_y", "m_x",
    "dilation_y", "dilation_x",  # outputs of a tile are so many pixels apart
    "tiles_x", "tiles_y",  # tiles of an image
    "images", "band",  # images of a unit, rows of tiles of a block
    "rows",  # of the weights
    "at_once",  # vectors of tiles, at most
    "inputs", "points", "products", "z", "c", "h", "zx", "peepholes", "line", "tiles", "nowhere",  # in the scratch
)])  # fmt: skip

READ = np.dtype([(name, np.int64) for name in (
    "height", "width",  # of the padded patch of a block
    "size",  # scalars of the patch of an image
    "rows", "columns",  # pixels that a tile reads
    "step_y", "step_x",  # pixels between those
    "planes",  # where they are, transposed, in vectors
    "first_segment",
)])  # fmt: skip
"""What a block and its tiles read of a source, beside `padding.SOURCE`."""

ZX, C_OLD, C_NEW, H_NEW, Y, KEPT, PEEPHOLE = range(7)
"""Arrays of an image that tiles are read from or written to; from the last on: weights of i, f and o."""


@intrinsic(prefer_literal=True)
def _multiply_directly(
    typingctx, pixels, planes, first, last, segments, line, pixel, weights, columns, bias, gap, result, plane, apart
):
    """result[q·plane + r·apart] = bias[q·gap] + Σ planes · weights[q·gap], for `pixels` vectors r and a quad q.

    segments (first vector, weight row, length, vectors to the next pixel of a tile, to its next line): of them those in
    [first, last), for the pixels from the `pixel`-th on of a line; columns: scalars between the rows of weights.
    """
    nr = pixels.literal_value

    def codegen(context, builder, sig, args):
        planes, first, last, segments, line, pixel, weights, columns, bias, gap, result, plane, apart = args[1:]
        vector = simd.llvm_vector(sig.args[1].dtype)
        gaps = [builder.mul(gap, simd.INT64(q)) for q in range(QUAD)]
        begin = [simd.splat(builder, builder.load(builder.gep(bias, [g]))) for g in gaps]

        def segment(builder, s, sums):
            field = builder.gep(segments, [builder.mul(s, simd.INT64(5))])
            at, row, length, to_pixel, to_line = (builder.load(builder.gep(field, [simd.INT64(n)])) for n in range(5))
            at = builder.add(at, builder.add(builder.mul(line, to_line), builder.mul(pixel, to_pixel)))
            offsets = [builder.add(at, builder.mul(to_pixel, simd.INT64(r))) for r in range(nr)]
            runs = [builder.gep(planes, [builder.mul(o, simd.INT64(vector.count))]) for o in offsets]
            start = builder.gep(weights, [builder.mul(row, columns)])
            panels = [builder.gep(start, [g]) for g in gaps]

            def step(builder, k, sums):
                along = builder.mul(k, columns)
                values = [simd.emit_load(builder, builder.gep(run, [builder.mul(k, simd.INT64(vector.count))]), vector)
                          for run in runs]  # fmt: skip
                new = list(sums)
                for q in range(QUAD):
                    w = simd.splat(builder, builder.load(builder.gep(panels[q], [along])))
                    for r in range(nr):
                        new[r * QUAD + q] = simd.emit_fma(builder, values[r], w, new[r * QUAD + q])
                return new

            return simd.emit_loop(builder, simd.INT64(0), length, 1, sums, step)

        for n, value in enumerate(simd.emit_loop(builder, first, last, 1, begin * nr, segment)):
            r, q = divmod(n, QUAD)
            offset = builder.add(builder.mul(plane, simd.INT64(q)), builder.mul(apart, simd.INT64(r)))
            simd.emit_store(builder, value, builder.gep(result, [offset]))
        return context.get_dummy_value()

    number = types.intp
    return types.void(pixels, planes, number, number, segments, number, number, weights, number, bias, number, result,
                      number, number), codegen  # fmt: skip


@intrinsic(prefer_literal=True)
def _multiply(typingctx, vectors, quads, across, inputs, count, step, weights, panels, result, gap):
    """result[((n·vectors + v)·QUAD + q)·gap] = Σ over `count` of inputs[v] · weights[n, q], for vectors and quads n.

    step: scalars from inputs to inputs; panels (where, scalars from row to row) of each column of the first quad, from
    which that of the next quad is `across` scalars away.
    """
    nv = vectors.literal_value
    columns = [divmod(column, QUAD) for column in range(QUAD * quads.literal_value)]

    def codegen(context, builder, sig, args):
        inputs, count, step, weights, panels, result, gap = args[3:]
        vector = simd.llvm_vector(sig.args[3].dtype)
        fields = [builder.load(builder.gep(panels, [simd.INT64(n)])) for n in range(2 * QUAD)]
        lines = [builder.gep(weights, [at]) for at in fields[::2]]

        def body(builder, k, carried):
            base, lines, sums = carried[0], carried[1 : 1 + QUAD], list(carried[1 + QUAD :])
            values = [simd.emit_load(builder, base, vector, v) for v in range(nv)]
            for column, (n, q) in enumerate(columns):
                w = simd.splat(builder, builder.load(builder.gep(lines[q], [simd.INT64(n * across.literal_value)])))
                for v in range(nv):
                    sums[column * nv + v] = simd.emit_fma(builder, values[v], w, sums[column * nv + v])
            following = [builder.gep(line, [gap]) for line, gap in zip(lines, fields[1::2], strict=True)]
            return [builder.gep(base, [step]), *following, *sums]

        zeros = [simd.constant(vector, 0.0)] * (nv * len(columns))
        carried = simd.emit_loop(builder, simd.INT64(0), count, 1, [inputs, *lines, *zeros], body)
        sums = iter(carried[1 + QUAD :])
        for n, q in columns:
            for v in range(nv):
                offset = builder.mul(gap, simd.INT64((n * nv + v) * QUAD + q))
                simd.emit_store(builder, next(sums), builder.gep(result, [offset]))
        return context.get_dummy_value()

    number = types.intp
    return types.void(vectors, quads, across, inputs, number, number, weights, panels, result, number), codegen


# -------------------------------------------------------------------------------------------- what tiles read and write


@inline
def _list_tiles(work, tiles, first, lanes, rows, total):
    """Write image, row and column of the first pixel of the tiles of one vector, behind the last once more that one.

    tiles: [3][lanes] and the count of those that there are. Of each image there are so many `rows` of tiles.
    """
    count = min(lanes, total - first)
    tile = first
    image, rest = tile // (rows * work.tiles_x), tile % (rows * work.tiles_x)
    ty, tx = rest // work.tiles_x, rest % work.tiles_x
    for lane in range(lanes):
        tiles[lane] = image
        tiles[lanes + lane] = corner(work.m_y, work.dilation_y, ty)
        tiles[2 * lanes + lane] = corner(work.m_x, work.dilation_x, tx)
        if lane + 1 < count:
            tx += 1
            if tx == work.tiles_x:
                tx = 0
                ty += 1
                if ty == rows:
                    ty = 0
                    image += 1
    tiles[3 * lanes] = count


@inline
def _read_tiles(like, src, read, tiles, addresses, patches, planes):
    """Transpose what a vector of tiles reads of a source: planes[row][column][channel][tile]."""
    lanes = simd.vector_lanes(planes)
    itemsize = simd.VECTOR_BYTES // lanes
    C = src.C
    for lane in range(lanes):
        y, x = tiles[lanes + lane] * src.stride_y, tiles[2 * lanes + lane] * src.stride_x
        scalar = tiles[lane] * read.size + (y * read.width + x) * C
        addresses[lane] = patches + scalar * itemsize
    parts = 1 if read.step_x == 1 else read.columns
    run = read.columns // parts * C
    for row in range(read.rows):
        for part in range(parts):
            offset = (row * read.step_y * read.width + part * read.step_x) * C * itemsize
            gather(addresses, offset, run, simd.shift(planes, (row * read.columns * C + part * run) * lanes))


@inline
def _array_of(flow, cell, which, b, t):
    """Address of an array of image b at step t; 0: there is none."""
    if which == ZX:
        return zx_at(flow, b, t)
    if which == C_OLD:
        return c_before(flow, b, t)
    if which == C_NEW:
        return c_after(flow, b, t)
    if which == H_NEW:
        return h_after(flow, b, t)
    if which == Y:
        return y_at(flow, b, t)
    if which == KEPT:
        return gates_at(flow, b, t)
    if which == PEEPHOLE:
        return cell.peephole_i
    return cell.peephole_f if which == PEEPHOLE + 1 else cell.peephole_o


def _exchanging(move):
    """Return the function that brings planes to or from the arrays, by `gather` or `scatter`."""

    @inline
    def exchange(here, group, which, each, tiles, addresses, nowhere, whole, planes, pitch):
        """Move the filters of a group, `each` scalars a filter and pixel, of the pixels of a vector of tiles.

        planes: [pixel][each][filter][tile], `pitch` of them a pixel. What is not there, or is masked, goes nowhere.
        whole: all pixels are there, those of a line side by side.
        """
        flow, work, cell, t, b0, y0, mask = here
        lanes = simd.vector_lanes(planes)
        itemsize = simd.VECTOR_BYTES // lanes
        first, filters, F = group[3], group[4], cell.F
        side = work.m_y * work.m_x
        places, parts, run = side, each, filters
        if whole:
            places, parts, run = work.m_y, 1, work.m_x * each * F
        line = pitch * (work.m_x if whole else 1)
        for n in range(places):
            i, j = (n, 0) if whole else (n // work.m_x, n % work.m_x)
            offset = 0
            if whole and n > 0:
                offset = i * work.dilation_y * work.WO * each * F * itemsize
            else:
                known, base = -1, np.int64(0)
                for lane in range(lanes):
                    y = y0 + tiles[lanes + lane] + i * work.dilation_y
                    x = tiles[2 * lanes + lane] + j * work.dilation_x
                    b = b0 + tiles[lane]
                    if b != known:  # this takes divisions
                        known, base = b, np.int64(_array_of(flow, cell, which, b, t))
                    if lane < tiles[3 * lanes] and y < work.HO and x < work.WO and not (flow.masked and not mask[b, t]):
                        addresses[lane] = base + ((y * work.WO + x) * each * F + first) * itemsize
                    else:
                        addresses[lane] = nowhere
            for part in range(parts):
                to = simd.shift(planes, (n * line + part * filters) * lanes)
                move(addresses, offset + part * F * itemsize, run, to)

    return exchange


_bring, _take_away = _exchanging(gather), _exchanging(scatter)


@inline
def _is_whole(here, group, tiles, lanes):
    """Whether all pixels of a vector of tiles are there, those of a line with all filters side by side."""
    flow, work, cell, t, b0, y0, mask = here
    if group[4] != cell.F or work.dilation_x > 1 or tiles[3 * lanes] < lanes:
        return False
    for lane in range(lanes):
        y, x = y0 + tiles[lanes + lane] + (work.m_y - 1) * work.dilation_y, tiles[2 * lanes + lane] + work.m_x - 1
        if y >= work.HO or x >= work.WO or (flow.masked and not mask[b0 + tiles[lane], t]):
            return False
    return True


# ---------------------------------------------------------------------------------------------- the two kinds of tiles


@inline
def _keep_tile(m_y, m_x, k_y, k_x, src, read, planes, points, vector, vectors, row, point):
    """Nothing: tiles are convolved as they are."""


@inline
def _no_products(m_y, m_x, k_y, k_x, work, points, skipped_rows, vectors, quads, weights, panels, products):
    """Nothing: a quad is convolved where its sums are wanted."""


@inline
def _sum_directly(
    m_y, m_x, k_y, k_x, work, planes, first, segments, weights, columns, products, bias, gap, line, result, plane, apart
):
    """Convolve for a quad of columns."""
    for i in range(work.m_y):
        for j in range(0, work.m_x, ROWS):
            to = simd.shift(result, (i * work.m_x + j) * apart)
            _multiply_directly(ROWS, planes, first, len(segments), simd.pointer(segments), i, j, weights, columns, bias,
                               gap, to, plane, apart)  # fmt: skip


@inline
def _transform_tile(m_y, m_x, k_y, k_x, src, read, planes, points, vector, vectors, row, point):
    """Transform the tiles of a source, a channel at a time: the inputs of a product for each point."""
    lanes = simd.vector_lanes(planes)
    for c in range(src.C):
        origin, target = simd.shift(planes, c * lanes), simd.shift(points, ((row + c) * vectors + vector) * lanes)
        transform_input(m_y, m_x, k_y, k_x, 0, origin, read.columns * src.C * lanes, src.C * lanes, lanes, target,
                        point)  # fmt: skip


def _multiplying(across):
    """Return the function that multiplies; across: columns from a quad to the next."""

    @inline
    def multiply(m_y, m_x, k_y, k_x, work, points, skipped_rows, vectors, quads, weights, panels, products):
        """Multiply the inputs of all points with the weights of some quads of columns."""
        lanes = simd.vector_lanes(points)
        count = (m_y + k_y - 1) * (m_x + k_x - 1)
        step, gap = vectors * lanes, (count + 1) * lanes
        rows, point = work.rows - skipped_rows, work.rows * step + lanes
        for p in range(count):
            inputs, result = simd.shift(points, p * point + skipped_rows * step), simd.shift(products, p * lanes)
            if vectors == ROWS:
                _multiply(ROWS, 1, across, inputs, rows, step, weights, panels, result, gap)
            elif quads == ROWS:
                _multiply(1, ROWS, across, inputs, rows, step, weights, panels, result, gap)
            elif vectors == 2 and quads == 2:
                _multiply(2, 2, across, inputs, rows, step, weights, panels, result, gap)
            elif vectors == 2:
                _multiply(2, 1, across, inputs, rows, step, weights, panels, result, gap)
            elif quads == 2:
                _multiply(1, 2, across, inputs, rows, step, weights, panels, result, gap)
            else:
                _multiply(1, 1, across, inputs, rows, step, weights, panels, result, gap)
            for q in range(QUAD):
                panels[2 * q] += panels[2 * QUAD + q]

    return multiply


@inline
def _transform_products(
    m_y, m_x, k_y, k_x, work, planes, first, segments, weights, columns, products, bias, gap, line, result, plane, apart
):
    """Make outputs of the products of a quad of columns."""
    lanes = simd.vector_lanes(products)
    size = ((m_y + k_y - 1) * (m_x + k_x - 1) + 1) * lanes
    for q in range(QUAD):
        simd.store(line, simd.broadcast(simd.zeros(line), bias[q * gap]))
        transform_output(m_y, m_x, k_y, k_x, simd.shift(products, q * size), line, simd.shift(result, q * plane),
                         apart)  # fmt: skip


@inline
def _find_columns(work, panels, first, quads, across, gap, columns, skipped_rows, lanes):
    """Note where a quad of columns, `gap` apart, is in a group's panels for Winograd; return how many quads go with it.

    Columns of the others are in the same pair of vectors.
    """
    wide = 2 * lanes
    for q in range(QUAD):
        column = first + q * gap
        pair, within = column // wide, column % wide
        length = min(wide, columns - pair * wide)
        panels[2 * q] = pair * wide * work.rows + within + skipped_rows * length
        panels[2 * q + 1] = length
        panels[2 * QUAD + q] = columns * work.rows
        if within + (quads - 1) * across >= wide:
            quads = 1
    return quads


# ------------------------------------------------------------------------------------------------- what becomes of sums


@inline
def _no_gates(cell, peeps, z_i, z_f, z_g, z_o, c):
    return c, c, z_i, z_f, z_g, z_o


@inline
def _find_trouble(flow, group, tiles, b0, planes, count, line):
    """Note the images of which anything in so many planes is infinite or NaN."""
    lanes = simd.vector_lanes(planes)
    zero = simd.zeros(planes)
    unusual = zero
    for n in range(count):
        unusual = simd.fma(simd.load(simd.shift(planes, n * lanes)), zero, unusual)
    if simd.horizontal_sum(unusual) != 0.0:
        simd.store(line, unusual)
        for lane in range(tiles[3 * lanes]):
            if line[lane] != 0.0:
                simd.at(group, flow.trouble)[b0 + tiles[lane]] = 1


@inline
def _skip_masked(like, here, group, tiles, lanes, pixels):
    """Carry on the states of the images that are masked."""
    flow, work, cell, t, b0, y0, mask = here
    for lane in range(tiles[3 * lanes]):
        b = b0 + tiles[lane]
        if not mask[b, t]:
            for i in range(work.m_y):
                for j in range(work.m_x):
                    y = y0 + tiles[lanes + lane] + i * work.dilation_y
                    x = tiles[2 * lanes + lane] + j * work.dilation_x
                    pixels[i * work.m_x + j] = y * work.WO + x if y < work.HO and x < work.WO else -1
            gates.skip_step(like, flow, cell, group, pixels, work.m_y * work.m_x, b, t)


def _run(finish, transformed):
    """Return the kernel that ends with `finish`, gates and whether they can be kept, on Winograd's tiles or others."""
    has_gates = finish is not None
    gates_of, keeps = finish or (_no_gates, False)
    take_in, give_out = (_transform_tile, _transform_products) if transformed else (_keep_tile, _sum_directly)
    across = 1 if has_gates else QUAD
    multiply = _multiplying(across) if transformed else _no_products

    @inline
    def update(work, cell, filters, f, z, c, h, zx, peepholes, has_zx, keep):
        """Make new states of filter f in the planes of c and h, and of zx, where they are kept, gates."""
        lanes, side = simd.vector_lanes(z), work.m_y * work.m_x
        plane, gap, size = side * lanes, filters * lanes, side * filters * lanes
        for pixel in range(side):
            z_v, at = simd.shift(z, pixel * lanes), (pixel * filters + f) * lanes
            z_i, z_f = simd.load(z_v), simd.load(simd.shift(z_v, plane))
            z_g, z_o = simd.load(simd.shift(z_v, 2 * plane)), simd.load(simd.shift(z_v, 3 * plane))
            gate = simd.shift(zx, (4 * pixel * filters + f) * lanes)
            if has_zx:
                z_i, z_f = z_i + simd.load(gate), z_f + simd.load(simd.shift(gate, gap))
                z_g, z_o = z_g + simd.load(simd.shift(gate, 2 * gap)), z_o + simd.load(simd.shift(gate, 3 * gap))
            peep = simd.shift(peepholes, at if cell.peephole_pixel != 0 else f * lanes)
            peeps = peep, simd.shift(peep, size), simd.shift(peep, 2 * size)
            c_at = simd.shift(c, at)
            c_new, h_new, i, g_f, g, o = gates_of(cell, peeps, z_i, z_f, z_g, z_o, simd.load(c_at))
            simd.store(c_at, c_new)
            simd.store(simd.shift(h, at), h_new)
            if keeps and keep:
                simd.store(gate, i)
                simd.store(simd.shift(gate, gap), g_f)
                simd.store(simd.shift(gate, 2 * gap), g)
                simd.store(simd.shift(gate, 3 * gap), o)

    @inline
    def read_states(like, here, group, scratch, tiles, addresses, v, size):
        """Bring the cell states of a vector of tiles, and what else the gates want, to planes of `size` scalars."""
        flow, work, cell, t, b0 = here[:5]
        c, zx = simd.at(like, scratch + work.c), simd.at(like, scratch + work.zx)
        peepholes = simd.at(like, scratch + work.peepholes)
        filters, lanes = group[4], simd.vector_lanes(c)
        whole = _is_whole(here, group, tiles, lanes)
        for which in range(PEEPHOLE + 3):
            each, to = 1, simd.shift(c, v * size)
            if which == ZX:
                each, to = 4, simd.shift(zx, v * 4 * size)
            elif which >= PEEPHOLE:
                to = simd.shift(peepholes, (3 * v + which - PEEPHOLE) * size)
            is_there = which == C_OLD or (which == ZX and flow.zx != 0)
            if is_there or (which >= PEEPHOLE and cell.peephole_pixel != 0):
                _bring(here, group, which, each, tiles, addresses, np.int64(scratch + work.nowhere), whole, to,
                       each * filters)  # fmt: skip
        if v == 0 and cell.peephole_i != 0 and cell.peephole_pixel == 0:
            for n in range(3):
                origin = simd.at(like, _array_of(flow, cell, PEEPHOLE + n, b0, t))
                for f in range(filters):
                    to = simd.shift(peepholes, n * size + f * lanes)
                    simd.store(to, simd.broadcast(simd.zeros(to), origin[group[3] + f]))

    @inline
    def write_results(like, here, group, scratch, tiles, addresses, v, size, pitch):
        """Bring what was made of a vector of tiles from planes to where it belongs."""
        flow, work = here[:2]
        c, zx = simd.shift(simd.at(like, scratch + work.c), v * size), simd.at(like, scratch + work.zx)
        h = simd.shift(simd.at(like, scratch + work.h), v * size)
        lanes = simd.vector_lanes(c)
        whole = _is_whole(here, group, tiles, lanes) and pitch == group[4]
        if not has_gates:
            line = simd.at(like, scratch + work.line)
            _find_trouble(flow, group, tiles, here[4], h, work.m_y * work.m_x * pitch, line)
        for which in range(C_NEW, PEEPHOLE):
            each, origin = 1, c if which == C_NEW else h
            is_there = has_gates or which == H_NEW
            if which == Y:
                is_there = flow.y != 0
            elif which == KEPT:
                each, origin = 4, simd.shift(zx, v * 4 * size)
                is_there = keeps and flow.gates != 0
            if is_there:
                _take_away(here, group, which, each, tiles, addresses, np.int64(scratch + work.nowhere), whole, origin,
                           each * pitch)  # fmt: skip

    @inline
    def run_tiles(
        m_y, m_x, k_y, k_x, here, sources, reads, segments, groups, weights, bias, scratch, first_tile, total, rows,
        vectors, skipped,
    ):  # fmt: skip
        """Compute some vectors of tiles, of which each image has so many rows."""
        flow, work, cell = here[:3]
        like = weights
        planes, points = simd.at(like, scratch + work.inputs), simd.at(like, scratch + work.points)
        products, z = simd.at(like, scratch + work.products), simd.at(like, scratch + work.z)
        peepholes, line = simd.at(like, scratch + work.peepholes), simd.at(like, scratch + work.line)
        c, h, zx = simd.at(like, scratch + work.c), simd.at(like, scratch + work.h), simd.at(like, scratch + work.zx)
        lanes, side = simd.vector_lanes(z), work.m_y * work.m_x
        addresses = simd.at(segments, scratch + work.tiles)
        panels, pixels = simd.shift(addresses, lanes), simd.shift(addresses, lanes + PANEL)
        lists, listed = simd.shift(pixels, side), 3 * lanes + 1
        count = (m_y + k_y - 1) * (m_x + k_x - 1)
        most_quads = ROWS // vectors if transformed else 1
        skipped_rows = first_segment = 0
        for s in range(skipped):
            skipped_rows += sources[s].C
        if skipped > 0:
            first_segment = reads[skipped].first_segment if skipped < len(sources) else len(segments)
        for v in range(vectors):
            tiles = simd.shift(lists, v * listed)
            _list_tiles(work, tiles, first_tile + v * lanes, lanes, rows, total)
            row = skipped_rows
            for s in range(skipped, len(sources)):
                src, read = sources[s], reads[s]
                to = simd.shift(planes, read.planes * lanes)
                _read_tiles(like, src, read, tiles, addresses, np.int64(scratch) + src.scratch, to)
                take_in(m_y, m_x, k_y, k_x, src, read, to, points, v, vectors, row, (work.rows * vectors + 1) * lanes)
                row += src.C
        for g in range(len(groups)):
            group = groups[g]
            filters, columns, gap = group[4], group[1] * lanes, group[2] if has_gates else 1
            quads = filters if has_gates else (filters + QUAD - 1) // QUAD
            pitch = filters if has_gates else QUAD * quads
            size = side * pitch * lanes
            group_weights, group_bias = (
                simd.shift(simd.pointer(weights), group[0]),
                simd.shift(simd.pointer(bias), group[5]),
            )
            if has_gates:
                for v in range(vectors):
                    read_states(like, here, group, scratch, simd.shift(lists, v * listed), addresses, v, size)
            first = 0
            while first < quads:
                some = min(most_quads, quads - first)
                some = _find_columns(work, panels, first * across, 2 if some == 3 else some, across, gap, columns,
                                     skipped_rows, lanes)  # fmt: skip
                multiply(m_y, m_x, k_y, k_x, work, points, skipped_rows, vectors, some, group_weights, panels, products)
                for v in range(vectors):
                    for n in range(some):
                        start = (first + n) * across
                        result, plane, apart = z, side * lanes, lanes
                        if not has_gates:
                            result, plane, apart = simd.shift(h, v * size + start * lanes), lanes, pitch * lanes
                        own = simd.shift(products, (n * vectors + v) * QUAD * (count + 1) * lanes)
                        give_out(m_y, m_x, k_y, k_x, work, planes, first_segment, segments,
                                 simd.shift(group_weights, start), columns, own, simd.shift(group_bias, start), gap,
                                 line, result, plane, apart)  # fmt: skip
                        if has_gates:
                            own = peepholes if cell.peephole_pixel == 0 else simd.shift(peepholes, 3 * v * size)
                            update(work, cell, filters, first + n, z, simd.shift(c, v * size), simd.shift(h, v * size),
                                   simd.shift(zx, v * 4 * size), own, flow.zx != 0, flow.gates != 0)  # fmt: skip
                first += some
            for v in range(vectors):
                tiles = simd.shift(lists, v * listed)
                write_results(like, here, group, scratch, tiles, addresses, v, size, pitch)
                if flow.masked:
                    _skip_masked(like, here, group, tiles, lanes, pixels)

    @inline
    def run_block(
        m_y, m_x, k_y, k_x, flow, work, sources, reads, segments, groups, weights, bias, cell, mask, scratch, unit, t,
        block,
    ):  # fmt: skip
        """Compute one block of tiles of the images of a unit at step t."""
        like = weights
        b0, first_row = unit * work.images, block * work.band
        images, rows = min(work.images, flow.B - b0), min(work.band, work.tiles_y - first_row)
        y0 = first_row * work.m_y  # a band has whole rows of interleaved tiles
        skipped = skipped_sources(flow, sources, t)
        for s in range(skipped, len(sources)):
            src, read = sources[s], reads[s]
            for n in range(images):
                frame = simd.at(like, source_at(flow, sources, s, b0 + n, t))
                to = simd.shift(simd.at(like, scratch + src.scratch), n * read.size)
                copy_patch(src, frame, y0 * src.stride_y - src.top, -src.left, read.height, read.width, to)
        here = flow, work, cell, t, b0, y0, mask
        lanes = simd.vector_lanes(simd.at(like, scratch))
        total = images * rows * work.tiles_x
        tile = 0
        while tile < total:
            most = min((total - tile + lanes - 1) // lanes, work.at_once)
            vectors = ROWS if most >= ROWS else 2 if most >= 2 else 1
            run_tiles(m_y, m_x, k_y, k_x, here, sources, reads, segments, groups, weights, bias, scratch, tile, total,
                      rows, vectors, skipped)  # fmt: skip
            tile += vectors * lanes

    def run(
        m_y, m_x, k_y, k_x, job, worker, flows, works, sources, reads, neighbours, segments, groups, weights, bias,
        cells, mask,
    ):  # fmt: skip
        flow = flows[0]
        scratch = worker_scratch(flow, worker)
        unit, piece, helped = first_piece()
        while True:
            unit, piece, helped = next_piece(flow, job, unit, piece, helped)
            if unit < 0:
                break
            t, block, _ = place(flow, piece)
            wait_for_neighbours(flow, job, sources, neighbours, unit, block, t)
            run_block(m_y, m_x, k_y, k_x, flow, works[0], sources, reads, segments, groups, weights, bias, cells[0],
                      mask, scratch, unit, t, block)  # fmt: skip
            piece_done(flow, job, sources, unit, block)

    return run


DIRECT = {name: kernel(_run(GATES.get(name), False), f"planar_direct.{name}") for name in FINISHES}
WINOGRAD = {name: kernel(_run(GATES.get(name), True), f"planar_winograd.{name}") for name in FINISHES}
"""Compute a piece of a sequence directly, or with F(m_y×m_x, k_y×k_x), by what becomes of the columns."""

"""Plans of a time step: which algorithm, how the work is cut, and the tables that its kernel reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from fastclstm.engines.cpu import tiles
from fastclstm.engines.cpu.kernels import direct, gates, simd, winograd
from fastclstm.engines.cpu.kernels import planar as planar_kernels
from fastclstm.engines.cpu.kernels.entry import table
from fastclstm.engines.cpu.kernels.padding import SOURCE, source
from fastclstm.engines.cpu.kernels.schedule import Plan
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.spec import ConvSpec


def fits(specs: tuple[ConvSpec, ...]) -> bool:
    """Whether tiles can compute the convolutions together: of any kernels and strides, with one dilation."""
    return tiles.interleaved(specs) is not None


def alike(specs: tuple[ConvSpec, ...]) -> bool:
    """Whether the convolutions have kernels of one size, stride 1 and one dilation."""
    first = specs[0]
    return fits(specs) and all((s.KH, s.KW, *s.strides) == (first.KH, first.KW, 1, 1) for s in specs)


def choose(
    specs: tuple[ConvSpec, ...], algorithm: str, itemsize: int, *, gates: bool = False, remember: bool = True
) -> Tile | None:
    """Winograd's tile; None: direct, also where tiles cannot compute the convolutions together.

    gates: the columns are those of a ConvLSTM's gates, which become states at once; else they are stored.

    "auto" takes the smallest estimate of the costs. "winograd" chooses the tile as for a single image, so that its
    results do not depend on how a batch is split. remember: else the kernels are packed for this call alone.
    """
    if algorithm == "direct" or not fits(specs):
        return None
    sizes = {(spec.KH, spec.KW): None for spec in tiles.dense(specs)}
    choices = tiles.choices(*sizes)
    if algorithm == "winograd":
        return _cheapest(tuple(spec.with_batch(1) for spec in specs), choices, itemsize, gates)
    return None if {*sizes} == {(1, 1)} else _cheapest(specs, (None, *choices), itemsize, gates, remember)


class Ways(NamedTuple):
    """The algorithms of a ConvLSTM's convolutions, as of `choose`."""

    h: Tile | None
    x: Tile | None
    before: bool = False
    """Whether x is convolved beforehand, many steps at once; else it shares h's algorithm, transforms and sums."""

    @property
    def transform(self) -> bool:
        """Whether either is Winograd's."""
        return bool(self.h or self.x)


DIRECT = Ways(None, None)
"""What forbids the transforms."""


AHEAD = 8
"""Steps of x that are convolved at once, for the estimate: the length of the sequence must not change the choice."""

TRANSFER = 80
"""Writing a vector of what x gives beforehand and reading it again takes as long as so many multiply-adds."""

PACKING = 100
"""Bringing a vector of kernels to where, and for tiles to what, they are read takes as long as so many multiply-adds.

That counts, shared among the steps `AHEAD`, where kernels are packed for one call, as in training. Measured on Zen 5:
128→256 filters, 8², 2 images, 6 steps, on two threads, forward and back 50 ms with F(4, 3), whose kernels are 57, 38
and 19 MB, 31 with F(2, 3), 54 directly.
"""

CALLS = 80_000
"""Starting another kernel takes as long as so many multiply-adds of vectors, shared among the steps `AHEAD`.

The two were fitted to 42 cells of 8 steps, timed both ways on one and two threads of a Zen 4: frames of 8² to 64², 1 to
4 images, 1 to 512 channels, 16 to 256 filters, kernels 1 to 7, of one size and not, strides 1 and 2. The choice loses
0.8 % (two threads: 0.4 %) against the better way in the geometric mean, at most 13 %, alike for 60 to 100 of `TRANSFER`
and half to twice of this; 24, which an Emerald Rapids gave where only kernels of one size and stride 1 could go
together, lost 3.5 %. Together takes 0.67 (16→16, 64²) to 0.97 of apart where the geometries agree, but up to 1.27 at 8²
with one image and much to convolve; 0.74 to 1.1 with strides or kernels of two sizes, more where one has one tap.
"""


@lru_cache(maxsize=256)
def choose_ways(recurrent: ConvSpec, inputs: ConvSpec, algorithm: str, itemsize: int, remember: bool = True) -> Ways:
    """Choose the algorithm of each convolution of a ConvLSTM, or one for both; see `choose`.

    "winograd" takes the transforms wherever they fit: for h, whose stride is 1, always. "direct" does nothing
    beforehand.
    """
    if algorithm == "direct":
        return DIRECT
    both = recurrent, inputs
    if algorithm == "winograd":
        both = recurrent.with_batch(1), inputs.with_batch(1)
    one, many = both[:1], (both[1].with_batch(AHEAD * both[1].B),)
    h, x, together = (choose(specs, algorithm, itemsize, gates=gates, remember=remember)
                      for specs, gates in ((one, True), (many, False), (both, True)))  # fmt: skip
    vectors = both[0].B * recurrent.HO * recurrent.WO * -(-recurrent.F // simd.lanes(itemsize))
    # as it was measured; with near weights a valid call on 11², that took both together, was half as long again
    estimate = partial(cost, itemsize=itemsize, near=False)
    apart = estimate(one, h, gates=True) + estimate(many, x) / AHEAD + TRANSFER * vectors + CALLS
    before = estimate(both, together, gates=True) > apart or (algorithm == "winograd" and not fits(both))
    return Ways(h, x, before=True) if before else Ways(together, together)


@lru_cache(maxsize=256)
def _cheapest(
    specs: tuple[ConvSpec, ...], choices: tuple[Tile | None, ...], itemsize: int, gates: bool, remember: bool = True
) -> Tile | None:
    packing = 0.0 if remember else PACKING / AHEAD

    def of(tile: Tile | None) -> float:
        return cost(specs, tile, itemsize, gates) + packing * _packed_vectors(specs, tile, itemsize)

    return min(choices, key=of)


def _packed_vectors(specs: tuple[ConvSpec, ...], tile: Tile | None, itemsize: int) -> int:
    size = weight_bytes(specs, tile, itemsize) if tile else sum(s.KH * s.KW * s.C * s.F for s in specs) * itemsize
    return size // simd.VECTOR_BYTES


def cost(
    specs: tuple[ConvSpec, ...], tile: Tile | None, itemsize: int, gates: bool = False, *, near: bool = True
) -> float:  # fmt: skip
    """Estimate the work of one step in multiply-adds of vectors, with Winograd's tiles or directly (None).

    near: few weights are taken for near (`NEAR_BYTES`).
    """
    images = specs[0].B
    by_filters = winograd_cost(specs, tile, images, itemsize, near) if tile else direct_cost(specs, images, itemsize)
    return min(by_filters + finish_cost(specs, itemsize, gates), planar_cost(specs, tile, itemsize, gates))


def is_planar(specs: tuple[ConvSpec, ...], tile: Tile | None, itemsize: int, gates: bool) -> bool:
    """Whether the lanes of vectors are tiles, not filters, for speed alone: the results are the same, bit by bit."""
    return planar_cost(specs, tile, itemsize, gates) <= cost(specs, tile, itemsize, gates)


@lru_cache(maxsize=512)
def plan(
    specs: tuple[ConvSpec, ...], tile: Tile | None, finish: str, groups: int, itemsize: int, threads: int,
    planar: bool | None = None,
) -> Plan:  # fmt: skip
    """Plan the sum of convolutions, with Winograd's tiles or directly (None), for up to so many threads.

    planar: whether tiles are the lanes of vectors; None: as `is_planar` says.
    """
    if is_planar(specs, tile, itemsize, finish != "store") if planar is None else planar:
        return planar_plan(specs, tile, finish, itemsize, threads)
    if tile:
        return winograd_plan(specs, tile, finish, groups, itemsize, threads)
    return direct_plan(specs, finish, groups, itemsize, threads)


# ---------------------------------------------------------------------------------------------------- what it costs

STREAMING_ROWS = 8
"""Reading a vector of weights from the cache takes as long as so many multiply-adds with it."""

NEAR_BYTES = 8 << 20
"""Tiles whose weights are no more than this have them as near as `NEAR_ROWS` says.

Timed with 8 steps of frames of 4² and 8² on Zen 4, one thread: F(4, 3) takes 0.70 to 0.78 of the time of F(2, 3) with
1 to 7 MB, as long with 9.5.
"""

FAR_BYTES, FAR_ROWS = 32 << 20, 20
"""Weights that no cache holds come from memory in each step: reading one takes as long as so many multiply-adds."""

DIRECT_VECTORS = 0, 2, 3, 3.8
"""Vectors of four at a time that take as long as a group of fewer, of which the loads are the work."""

TRANSFORM_INPUTS, TRANSFORM_OUTPUTS = 11, 5
"""Transforming a vector of channels, or of columns, of a tile: of each point, if these are six by six.

With the numbers for planes below fitted to 256 cells of 4² to 128², 1 to 16 images, 1 to 512 channels, mostly 1 to 16
filters, kernels of 2 to 7, timed each way on one thread of a Zen 4. Of 106 others, drawn afterwards, the choice loses
2.4 % against the best way in the geometric mean, and at most 21 % where that was timed again.
"""

INPUTS = 12, 40
"""Transforming a vector of channels of a tile, of each point, where all points fit `POINTS_BYTES`, and where not."""

NEAR_ROWS = 5
"""Multiply-adds with a weight of a cache that cores share in whose time the next one comes, if no neighbour is there.

Measured on Zen 4: 110 of 116 GFLOP/s a core with 4, from 4 MB a thread; with others at work on that cache less.
"""

VISIT = 1.5
"""What each further visit of a weight takes, in multiply-adds."""

WAIT = 2000
"""What waiting for each other in a step takes, in multiply-adds of vectors."""


def direct_cost(specs: tuple[ConvSpec, ...], images: int, itemsize: int) -> float:
    """Estimate the work of one step in multiply-adds of vectors, from measurements.

    The gates, which cost every algorithm the same, are left out.
    """
    spec = specs[0]
    whole, rest = divmod(-(-spec.F // simd.lanes(itemsize)), 4)
    vectors = 4 * whole + DIRECT_VECTORS[rest]
    rows = max(images * spec.HO * spec.WO, STREAMING_ROWS)
    return rows * sum(s.KH * s.KW * s.C for s in specs) * vectors / 0.85


def winograd_cost(specs: tuple[ConvSpec, ...], tile: Tile, images: int, itemsize: int, near: bool) -> float:
    """Estimate the work of one step in multiply-adds of vectors, from measurements (see `direct_cost`)."""
    lanes = simd.lanes(itemsize)
    count = images * math.prod(grid(specs, tile))
    vectors = -(-specs[0].F // lanes)
    channels, runs = channels_of(specs, tile), channels_of(specs, tile, lanes)
    size = weight_bytes(specs, tile, itemsize)
    streaming = FAR_ROWS if size >= FAR_BYTES else NEAR_ROWS if near and size <= NEAR_BYTES else STREAMING_ROWS
    rows = max(-(-count // winograd.CHUNKS[-1]) * winograd.CHUNKS[-1], streaming)
    transforms = _transform_cost(tile) * count * tile.points * (TRANSFORM_INPUTS * runs + TRANSFORM_OUTPUTS * vectors)
    return rows * tile.points * channels * vectors / 0.8 + transforms


def _transform_cost(tile: Tile) -> float:
    """What a point of a tile's transforms takes, as a multiple of a point of six by six."""
    return (tile.m_y + tile.k_y + tile.m_x + tile.k_x - 2) / 12


FEW = 1500, 300
"""What states, or stored columns, of the pixels of a vector take longer where their filters fill no vector."""

PLANAR_MOST = 32
"""Filters, at most, where tiles may be the lanes."""

PLANAR_READ = 100
"""Transposing a row of what each of the tiles of a vector reads, for a vector of scalars of it."""

PLANAR_INPUT, PLANAR_OUTPUT = 13, 2
"""Transforming a channel, or a column, of a vector of tiles: as `TRANSFORM_INPUTS`."""

PLANAR_PRODUCT = 1.0, 1.5
"""Multiply-adds of a vector, directly and with Winograd's tiles."""

PLANAR_FINISH = 64, 15
"""What states, or stored columns, of a vector of pixels take for each filter, beyond what they take without planes."""

PLANAR_BESIDE = 60
"""What states of a vector of a tile's pixels that are beside the frame take for each filter: elsewhere there are none.
"""


def finish_cost(specs: tuple[ConvSpec, ...], itemsize: int, gates: bool) -> float:
    """Estimate what few filters add to the gates' work, or to storing, where they are the lanes (see `direct_cost`)."""
    spec, lanes = specs[0], simd.lanes(itemsize)
    filters = spec.F // 4 if gates else spec.F
    return (filters < lanes) * FEW[not gates] * spec.B * spec.HO * spec.WO / lanes


@lru_cache(maxsize=1024)
def planar_cost(specs: tuple[ConvSpec, ...], tile: Tile | None, itemsize: int, gates: bool) -> float:
    """Estimate the work of one step in multiply-adds of vectors, where tiles are the lanes (see `direct_cost`)."""
    spec, lanes = specs[0], simd.lanes(itemsize)
    filters = spec.F // 4 if gates else spec.F
    if filters > PLANAR_MOST or spec.B == 0 or not any(s.C for s in specs):
        return math.inf
    columns = -(-spec.F // planar_kernels.QUAD) * planar_kernels.QUAD
    m = tile or _direct_tile(specs)
    tiles_y, tiles_x = _tiles_of(specs, m, bool(tile))
    images, band = _cut(spec.B, tiles_y, tiles_x, interleaved(specs)[0] if tile else 1, lanes, 1)
    vectors = -(-spec.B // images) * -(-tiles_y // band) * -(-images * band * tiles_x // lanes)
    outputs = vectors * m.outputs
    beside = outputs - spec.B * spec.HO * spec.WO / lanes
    work: float = outputs * (60 + PLANAR_FINISH[not gates] * filters) + gates * PLANAR_BESIDE * filters * beside
    transform = _transform_cost(tile) if tile else 0.0
    for s in tiles.dense(specs) if tile else specs:
        pieces = len(tiles.pieces(s.KH, s.KW, tile)) if tile else 1
        reads_y, reads_x = (
            m_ + k - 1 if tile else (m_ - 1) * stride + (k - 1) * dilation + 1
            for m_, k, stride, dilation in zip(
                m[:2], m[2:] if tile else (s.KH, s.KW), s.strides, s.dilation, strict=True
            )
        )
        if not tile and reads_y * reads_x * s.C * simd.VECTOR_BYTES > 8 * READ_BYTES:
            return math.inf
        work += vectors * pieces * reads_y * -(-reads_x * s.C // lanes) * lanes / 16 * PLANAR_READ
        products = tile.points * pieces if tile else m.outputs * s.KH * s.KW
        work += vectors * products * s.C * (columns * PLANAR_PRODUCT[bool(tile)] + PLANAR_INPUT * transform)
    return work + (vectors * tile.points * columns * PLANAR_OUTPUT * transform if tile else 0)


# ------------------------------------------------------------------------------------------------- direct convolution


def direct_plan(specs: tuple[ConvSpec, ...], finish: str, groups: int, itemsize: int, threads: int) -> Plan:
    """Plan the sum of the convolutions `specs` (same output grid, own inputs) for a number of groups and threads."""
    B, HO, WO = specs[0].B, specs[0].HO, specs[0].WO
    width = -(-WO // -(-WO // 96))
    height = _block_height(B * -(-WO // width), HO, max(1, direct.BLOCK_PIXELS // width), threads)
    blocks_x, blocks_y = -(-WO // width), -(-HO // height)
    segments, passes, panels = _weight_order(specs, width)

    sources = np.zeros(len(specs), SOURCE)
    at = 0
    for n, spec in enumerate(specs):
        sources[n] = source(spec, hidden=n == 0 and (finish != "store" or len(specs) > 1))
        sources[n]["scratch"] = at
        rows = (height - 1) * spec.strides[0] + (spec.KH - 1) * spec.dilation[0] + 1
        columns = (width - 1) * spec.strides[1] + (spec.KW - 1) * spec.dilation[1] + 1
        at += _aligned(rows * columns * spec.C * itemsize)
    work = np.zeros(1, direct.WORK)
    indices = _aligned((height * width + direct.MAX_ROWS) * 8)
    tile_rows = height * width + direct.MAX_ROWS if len(panels) > 2 else direct.MAX_ROWS
    z, pixels = at, at + _aligned(gates.z_bytes(tile_rows, itemsize))
    parts = min(groups, -(-threads // max(1, B * blocks_x * blocks_y)))
    work[0] = (HO, WO, height, width, blocks_x, z, pixels, pixels + indices, pixels + 2 * indices)
    reach = -(-_reach(specs[0])[0] // height)
    rows_of_blocks = np.arange(blocks_y).repeat(blocks_x)
    if specs[0].padding_mode == "circular":
        reach = blocks_y
    neighbours = np.stack([np.maximum(rows_of_blocks - reach, 0), np.minimum(rows_of_blocks + reach + 1, blocks_y)], 1)
    tables = table(work, sources, neighbours * blocks_x, panels, passes, segments)
    return Plan(direct.RUN[finish], (), work, tables, pixels + 3 * indices, B, blocks_x * blocks_y, parts)


def _aligned(size: int) -> int:
    return -(-size // 64) * 64 + 64


def _block_height(columns_of_blocks: int, HO: int, most: int, threads: int) -> int:
    """Rows of a block, at most `most`, that give every thread about the same number of rows."""
    fewest = -(-HO // most)

    def load(count: int) -> float:
        height = -(-HO // count)
        return -(-columns_of_blocks * -(-HO // height) // threads) * (height + 0.25)

    return -(-HO // min(range(fewest, min(HO, fewest + threads) + 1), key=load))


def _weight_order(specs: Sequence[ConvSpec], block_width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return segments (offset in the patch, first weight row, length), passes (source, segments), panels (passes)."""
    longest = direct.PANEL_BYTES // (4 * simd.VECTOR_BYTES)
    segments: list[tuple[int, int, int]] = []
    passes: list[tuple[int, int, int]] = []
    panels = [0]
    row = filled = 0
    for n, spec in enumerate(specs):
        pitch = ((block_width - 1) * spec.strides[1] + (spec.KW - 1) * spec.dilation[1] + 1) * spec.C
        taps = 1 if spec.dilation[1] == 1 else spec.KW
        run = spec.KW * spec.C // taps
        begun = len(segments)
        for ky in range(spec.KH):
            for tap in range(taps):
                offset = ky * spec.dilation[0] * pitch + tap * spec.dilation[1] * spec.C
                pieces = -(-run // longest)
                for piece in range(pieces):
                    lo, hi = run * piece // pieces, run * (piece + 1) // pieces
                    if filled and filled + hi - lo > longest:  # this panel is full
                        if len(segments) > begun:
                            passes.append((n, begun, len(segments)))
                        panels.append(len(passes))
                        begun, filled = len(segments), 0
                    segments.append((offset + lo, row + lo, hi - lo))
                    filled += hi - lo
                row += run
        passes.append((n, begun, len(segments)))
    panels.append(len(passes))
    return np.array(segments, np.int64), np.array(passes, np.int64), np.array(panels, np.int64)


# ----------------------------------------------------------------------------------------------------------- Winograd


def interleaved(specs: tuple[ConvSpec, ...]) -> tuple[int, int]:
    """Outputs from one to the next of a tile, of convolutions that `fits`."""
    apart = tiles.interleaved(specs)
    assert apart is not None
    return apart


def grid(specs: tuple[ConvSpec, ...], tile: Tile) -> tuple[int, int]:
    """Rows and columns of the tiles of an image."""
    d_y, d_x = interleaved(specs)
    return tiles.along(specs[0].HO, tile.m_y, d_y), tiles.along(specs[0].WO, tile.m_x, d_x)


def channels_of(specs: tuple[ConvSpec, ...], tile: Tile, lanes: int = 1) -> int:
    """Channels, or vectors of so many lanes, of the pieces of all kernels."""
    return sum(-(-s.C // lanes) * len(tiles.pieces(s.KH, s.KW, tile)) for s in tiles.dense(specs))


def weight_bytes(specs: tuple[ConvSpec, ...], tile: Tile, itemsize: int) -> int:
    """Size of the transformed kernels."""
    return tile.points * channels_of(specs, tile) * specs[0].F * itemsize


def tile_sources(specs: tuple[ConvSpec, ...], tile: Tile, *, hidden: bool = False) -> np.ndarray:
    """What the tiles read: of each convolution, piece by piece, a `SOURCE`; hidden: the first one reads h."""
    sources = []
    for n, spec in enumerate(specs):
        d_y, d_x = (apart * stride for apart, stride in zip(interleaved(specs), spec.strides, strict=True))
        for lattice in tiles.dense((spec,)):
            (top, bottom), (left, right) = lattice.padding
            for y, x in tiles.pieces(lattice.KH, lattice.KW, tile):
                pads = (top - y.first * d_y, bottom), (left - x.first * d_x, right)
                piece = replace(lattice, padding=pads, dilation=(d_y, d_x))
                sources.append(source(piece, hidden and n == 0))
    return np.array(sources, SOURCE)


def _counting_blocks(specs: tuple[ConvSpec, ...], tile: Tile, blocks: np.ndarray) -> tuple[int, int]:
    """How many of the blocks of channels, the first ones, count at points whose y is 0, and at those whose x is 0.

    The transform of taps that begin with a zero is 0 there. `blocks`: of each of `tile_sources`.
    """
    whole = [
        (y.skipped == 0, x.skipped == 0)
        for spec in tiles.dense(specs) for y, x in tiles.pieces(spec.KH, spec.KW, tile)
    ]  # fmt: skip
    up_to = np.cumsum(blocks)
    y, x = (max(up_to[n] if piece[axis] else 0 for n, piece in enumerate(whole)) for axis in (0, 1))
    return int(y), int(x)


def winograd_plan(
    specs: tuple[ConvSpec, ...], tile: Tile, finish: str, groups: int, itemsize: int, threads: int
) -> Plan:
    """Plan the sum of the convolutions `specs` (same output grid, own inputs) in Winograd's tiles."""
    B, HO, WO = specs[0].B, specs[0].HO, specs[0].WO
    lanes = simd.lanes(itemsize)
    tiles_y, tiles_x = grid(specs, tile)
    count = tiles_y * tiles_x
    if B * count <= winograd.MOST_TILES * threads:
        images, blocks, parts = _cut_of_few(specs, tile, groups, itemsize, threads)
        units, unit_tiles = -(-B // images), images * count
    else:
        bounds = winograd.BLOCK_TILES[weight_bytes(specs, tile, itemsize) > NEAR_BYTES]
        images = min(B, -(-sum(bounds) // (2 * count)))
        units = -(-B // images)
        by_unit = units % threads == 0 or units >= 8 * threads
        if not by_unit:
            images, units = B, 1
        unit_tiles = images * count
        blocks = _blocks(unit_tiles, bounds, 1 if by_unit else threads)
        parts = min(groups, -(-threads // (units * blocks)))
    block_tiles = -(-unit_tiles // blocks)
    blocks = -(-unit_tiles // block_tiles)
    chunk = min(winograd.CHUNKS, key=partial(_rows, block_tiles))

    sources = tile_sources(specs, tile, hidden=finish != "store" or len(specs) > 1)
    channels = [min(lanes, C - c) for C in sources["C"].tolist() for c in range(0, C, lanes)]
    blocks_y, blocks_x = _counting_blocks(specs, tile, -(-sources["C"] // lanes))
    points, chunks, side = tile.points, -(-block_tiles // chunk), tile.outputs
    vector = lanes * itemsize
    sizes = (points * (chunks * chunk * len(channels) + 1) * vector, chunks * chunk * (4 * points + 1) * vector,
             gates.z_bytes(side, itemsize), block_tiles * side * 8, int(sources["C"].max()) * itemsize,
             points * 8)  # fmt: skip
    places = np.concatenate([[0], np.cumsum([-(-size // 64) * 64 + 64 for size in sizes])])
    work = np.zeros(1, winograd.WORK)
    work[0] = (HO, WO, tiles_x, count, unit_tiles, block_tiles, chunk, blocks_y, blocks_x,
               *places[:6])  # fmt: skip
    reach = _reach_of_tiles(sources, tile, tiles_y)
    neighbours = _neighbours_of_tiles(reach, interleaved(specs)[0], tiles_x, count, unit_tiles, block_tiles)
    tables = table(work, sources, neighbours, np.array(channels, np.int64))
    return Plan(winograd.RUN[finish], tuple(tile), work, tables, int(places[6]), units, len(neighbours),
                parts)  # fmt: skip


def _blocks(tiles: int, bounds: tuple[int, int], threads: int) -> int:
    """Return into how many blocks to cut the tiles of a unit that threads share; bounds: as of `BLOCK_TILES`."""
    least, most = bounds

    def load(blocks: int) -> float:
        return -(-blocks // threads) * (VISIT + min(_rows(-(-tiles // blocks), chunk) for chunk in winograd.CHUNKS))

    fewest = -(-tiles // most)
    return min(range(fewest, max(fewest, tiles // least) + 1), key=load)


def _rows(count: int, chunk: int) -> float:
    """What tiles, so many in registers at a time, take with a weight, in multiply-adds."""
    return -(-count // chunk) * (chunk + 0.75)


def _cut_of_few(
    specs: tuple[ConvSpec, ...], tile: Tile, groups: int, itemsize: int, threads: int
) -> tuple[int, int, int]:
    """Images of a unit, blocks of a unit, and parts of the columns, where tiles are few for the threads.

    Threads that share the tiles of a step read all weights each. Those that share the columns transform all tiles each,
    and groups may not divide among them.
    """
    spec, lanes = specs[0], simd.lanes(itemsize)
    B, count, vectors = spec.B, math.prod(grid(specs, tile)), -(-spec.F // lanes)
    channels, runs = channels_of(specs, tile), channels_of(specs, tile, lanes)
    least = NEAR_ROWS if weight_bytes(specs, tile, itemsize) < FAR_BYTES else FAR_ROWS

    def load(cut: tuple[int, int, int]) -> float:
        """Estimate the work of whoever has most, in multiply-adds of vectors."""
        images, blocks, parts = cut
        some, own = -(-images * count // blocks), min(vectors, 4 * -(-groups // parts))
        rows = max(least, VISIT + min(_rows(some, chunk) for chunk in winograd.CHUNKS))
        inputs = INPUTS[some * tile.points * channels * itemsize > POINTS_BYTES] * runs
        piece = tile.points * (some * (inputs + 5 * own) + rows * channels * own / 0.8)
        whole, rest = divmod(-(-B // images), threads)  # whose units are left over is shared
        return (whole * blocks * parts + -(-rest * blocks * parts // threads)) * piece + (rest > 0) * WAIT

    cuts = []
    for images in sorted({-(-B // units) for units in range(1, B + 1)}, reverse=True):
        fewest = -(-images * count // winograd.MOST_TILES)
        for blocks in range(fewest, min(images * count, fewest + threads - 1) + 1):
            shared = -(-threads // (-(-B // images) * blocks))
            cuts += [(images, blocks, parts) for parts in sorted({1, min(groups, shared)})]
    return min(cuts, key=load)


def _reach_of_tiles(sources: np.ndarray, tile: Tile, rows: int) -> int:
    """How many rows of tiles away from its own a tile reads h, at most; sources: as of `tile_sources`."""
    hidden = sources[sources["hidden"] == 1]
    if not len(hidden):
        return 0
    if hidden["circular"].any():
        return rows
    down = (tile.k_y - 1) * hidden["dilation_y"] - hidden["top"]
    return int(np.max(-(-np.maximum(hidden["top"], down) // (tile.m_y * hidden["dilation_y"]))))


def _neighbours_of_tiles(
    reach: int, interleaved: int, tiles_x: int, count: int, unit_tiles: int, block_tiles: int
) -> np.ndarray:
    """Of each block of tiles (image by image, row by row) the blocks with tiles that its convolution reaches."""
    first = np.arange(0, unit_tiles, block_tiles)
    last = np.minimum(first + block_tiles, unit_tiles) - 1
    rows = count // tiles_x

    def row(index: np.ndarray, step: int) -> np.ndarray:
        """First row of tiles of the band, `interleaved` rows, that many steps away."""
        return np.clip((index % count // tiles_x // interleaved + step) * interleaved, 0, rows)

    start = first // count * count + row(first, -reach) * tiles_x
    stop = np.minimum(last // count * count + row(last, reach + 1) * tiles_x, unit_tiles)
    return np.stack([start // block_tiles, -(-stop // block_tiles)], 1)


def _reach(spec: ConvSpec) -> tuple[int, int]:
    """How many rows and columns away from its own an output reads, or is read, at most."""
    up, across = (
        max(before, (size - 1) * dilation - before)
        for size, dilation, (before, _) in zip((spec.KH, spec.KW), spec.dilation, spec.padding, strict=True)
    )
    return up, across


# ------------------------------------------------------------------------------------------------ tiles in the lanes

READ_BYTES = 256 << 10
"""Size of what a vector of tiles reads, or of the inputs of all points: no more tiles at once than it holds."""

POINTS_BYTES = 512 << 10
"""Size of the transformed inputs of the vectors of tiles that are multiplied together, at most."""

BLOCK_VECTORS = 16
"""Vectors of tiles of a block, about, at most."""


def planar_plan(specs: tuple[ConvSpec, ...], tile: Tile | None, finish: str, itemsize: int, threads: int) -> Plan:
    """Plan the sum of the convolutions `specs` (same output grid, own inputs), a tile in each lane of a vector."""
    spec, lanes = specs[0], simd.lanes(itemsize)
    B, HO, WO = spec.B, spec.HO, spec.WO
    has_gates = finish != "store"
    F = spec.F // 4 if has_gates else spec.F
    hidden = has_gates or len(specs) > 1
    if tile:
        m, sources, (d_y, d_x) = tile, tile_sources(specs, tile, hidden=hidden), interleaved(specs)
        sources["KH"], sources["KW"] = tile.k_y, tile.k_x
    else:
        sources = np.array([source(s, hidden and n == 0) for n, s in enumerate(specs)], SOURCE)
        m, d_y, d_x = _direct_tile(specs), 1, 1
    side, points = m.outputs, m.points
    tiles_y, tiles_x = _tiles_of(specs, m, bool(tile))
    images, band = _cut(B, tiles_y, tiles_x, d_y, lanes, threads)
    units, blocks = -(-B // images), -(-tiles_y // band)
    reads = _planar_reads(sources, m, ((band, d_y), (tiles_x, d_x)), bool(tile))
    volumes = reads["rows"] * reads["columns"] * sources["C"]
    inputs = volumes.max() if tile else volumes.sum()
    segments = np.zeros((0, 5), np.int64) if tile else _planar_segments(specs, sources, reads)
    rows = int(sources["C"].sum())
    at_once = 1
    if tile:
        most = POINTS_BYTES // (points * rows * lanes * itemsize)
        at_once = max(n for n in (1, 2, planar_kernels.ROWS) if n <= max(1, most))
    places, at = {}, 0
    for n, scalars in enumerate(reads["size"].tolist()):
        sources[n]["scratch"] = at
        at += _aligned(scalars * images * itemsize)
    pitch = F if has_gates else -(-F // planar_kernels.QUAD) * planar_kernels.QUAD
    vectors = {
        "inputs": inputs + lanes,
        "points": (points * (rows * at_once + 1)) if tile else 0,
        "products": planar_kernels.ROWS * planar_kernels.QUAD * (points + 1) if tile else 0,
        "z": 4 * side,
        "c": at_once * side * pitch + lanes if has_gates else 0,
        "h": at_once * side * pitch + lanes,
        "zx": 4 * at_once * side * F + lanes if has_gates else 0,
        "peepholes": 3 * at_once * side * F + lanes if has_gates else 0,
        "line": 1,
        "tiles": 8 * (lanes + planar_kernels.PANEL + side + at_once * (3 * lanes + 1)) // (lanes * itemsize) + 1,
        "nowhere": 4 * m.m_x * F // lanes + 2,
    }
    for name, count in vectors.items():
        places[name] = at
        at += _aligned(int(count) * lanes * itemsize)
    work = np.zeros(1, planar_kernels.WORK)
    work[0] = (HO, WO, m.m_y, m.m_x, d_y, d_x, tiles_x, tiles_y, images, band, rows, at_once, *places.values())
    if tile:
        reach = -(-_reach_of_tiles(sources, tile, tiles_y) // band)
    else:
        reach = tiles_y if spec.padding_mode == "circular" else -(-_reach(spec)[0] // (band * m.m_y))
    order = np.arange(blocks)
    neighbours = np.stack([np.maximum(order - reach, 0), np.minimum(order + reach + 1, blocks)], 1)
    tables = table(work, sources, reads, neighbours, segments)
    kernel = (planar_kernels.WINOGRAD if tile else planar_kernels.DIRECT)[finish]
    return Plan(kernel, tuple(tile or (0, 0, 0, 0)), work, tables, at, units, blocks, 1)


def _planar_reads(
    sources: np.ndarray, tile: Tile, cut: tuple[tuple[int, int], tuple[int, int]], transformed: bool
) -> np.ndarray:
    """What a block and its tiles read of each source; cut: tiles of a block and their dilation, on both axes."""
    reads = np.zeros(len(sources), planar_kernels.READ)
    names = ("height", "rows", "y", "KH"), ("width", "columns", "x", "KW")
    for (size, own, axis, kernel), (count, apart), m in zip(names, cut, tile[:2], strict=True):
        stride, dilation, taps = sources[f"stride_{axis}"], sources[f"dilation_{axis}"], sources[kernel] - 1
        reads[size] = (-(-count // apart) * m * apart - 1) * stride + taps * dilation + 1
        reads[own] = m + taps if transformed else (m - 1) * stride + taps * dilation + 1
        reads[f"step_{axis}"] = dilation if transformed else 1
    reads["size"] = reads["height"] * reads["width"] * sources["C"]
    if not transformed:  # transformed tiles of one source take the place of the one before
        volumes = reads["rows"] * reads["columns"] * sources["C"]
        reads["planes"] = np.cumsum(volumes) - volumes
    return reads


def _direct_tile(specs: tuple[ConvSpec, ...]) -> Tile:
    """Pixels of a tile of direct convolution, as many lines as `READ_BYTES` hold."""

    def read(m_y: int) -> int:
        return sum(
            ((m_y - 1) * s.strides[0] + (s.KH - 1) * s.dilation[0] + 1)
            * ((planar_kernels.M_X - 1) * s.strides[1] + (s.KW - 1) * s.dilation[1] + 1) * s.C
            for s in specs
        )  # fmt: skip

    lines = range(min(4, specs[0].HO), 1, -1)
    return Tile(next((m for m in lines if read(m) * simd.VECTOR_BYTES <= READ_BYTES), 1), planar_kernels.M_X, 1, 1)


def _tiles_of(specs: tuple[ConvSpec, ...], tile: Tile, interleaved: bool) -> tuple[int, int]:
    """Rows and columns of the tiles of an image; `interleaved` where the convolution is dilated."""
    return grid(specs, tile) if interleaved else (-(-specs[0].HO // tile.m_y), -(-specs[0].WO // tile.m_x))


def _cut(B: int, tiles_y: int, tiles_x: int, dilation: int, lanes: int, threads: int) -> tuple[int, int]:
    """Images of a unit and rows of tiles of a block.

    Of small frames a vector has tiles of several. Else a block has rows that fill vectors, and gives every thread about
    the same number of them.
    """
    count = tiles_y * tiles_x
    if count < 2 * lanes and B > 1:
        images = max(1, min(-(-4 * lanes // max(1, count)), -(-B // threads)))
        if images > 1:
            return images, tiles_y

    def load(band: int) -> float:
        return -(-B * -(-tiles_y // band) // threads) * (-(-band * tiles_x // lanes) + 0.3)

    most = min(max(dilation, BLOCK_VECTORS * lanes // max(1, tiles_x)), tiles_y + dilation)
    return 1, min(range(dilation, most + 1, dilation), key=load)


def _planar_segments(specs: tuple[ConvSpec, ...], sources: np.ndarray, reads: np.ndarray) -> np.ndarray:
    """Return (first vector, weight row, length, vectors to the next pixel, to the next line) of the kernels' runs."""
    segments: list[tuple[int, ...]] = []
    row = 0
    for n, spec in enumerate(specs):
        reads[n]["first_segment"] = len(segments)
        line = int(reads[n]["columns"]) * spec.C
        taps = 1 if spec.dilation[1] == 1 else spec.KW
        run = spec.KW * spec.C // taps
        for ky in range(spec.KH):
            for tap in range(taps):
                at = int(reads[n]["planes"]) + ky * spec.dilation[0] * line + tap * spec.dilation[1] * spec.C
                segments.append((at, row, run, spec.strides[1] * spec.C, spec.strides[0] * line))
                row += run
    return np.array(segments, np.int64)

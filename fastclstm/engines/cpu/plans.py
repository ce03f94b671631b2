"""Plans of a time step: which algorithm, how the work is cut, and the tables that its kernel reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastclstm.engines.cpu import tiles
from fastclstm.engines.cpu.kernels import direct, gates, simd, winograd
from fastclstm.engines.cpu.kernels.entry import table
from fastclstm.engines.cpu.kernels.padding import SOURCE, source
from fastclstm.engines.cpu.kernels.schedule import Plan
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.spec import ConvSpec


def fits(specs: tuple[ConvSpec, ...]) -> bool:
    """Whether tiles can compute the convolutions together: kernels of one size, stride 1 and one dilation."""
    first = specs[0]
    return all(
        (spec.KH, spec.KW) == (first.KH, first.KW)
        and max(spec.strides) == 1
        and tiles.dilation(spec) == tiles.dilation(first)
        for spec in specs
    )


def choose(
    op: str, specs: tuple[ConvSpec, ...], algorithm: str, itemsize: int, *, remember: bool = True
) -> Tile | None:
    """Winograd's tile; None: direct. Raises ValueError where Winograd was asked for in vain.

    "auto" takes the smallest estimate of the costs. "winograd" chooses the tile as for a single image, so that its
    results do not depend on how a batch is split. remember: else the kernels are packed for this call alone.
    """
    if algorithm == "direct" or (algorithm == "auto" and not fits(specs)):
        return None
    if not fits(specs):
        raise ValueError(
            f"{op}: algorithm='winograd' needs stride 1, and one kernel size and dilation for all convolutions, "
            f"got {[(s.KH, s.KW, s.strides, s.dilation) for s in specs]}; use 'auto' or 'direct'"
        )
    choices = tiles.choices(specs[0].KH, specs[0].KW)
    if algorithm == "winograd":
        return _cheapest(tuple(spec.with_batch(1) for spec in specs), choices, itemsize)
    return None if specs[0].KH == specs[0].KW == 1 else _cheapest(specs, (None, *choices), itemsize, remember)


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

TRANSFER = 24
"""Writing a vector of what x gives beforehand and reading it again takes as long as so many multiply-adds."""

PACKING = 100
"""Bringing a vector of kernels to where, and for tiles to what, they are read takes as long as so many multiply-adds.

That counts, shared among the steps `AHEAD`, where kernels are packed for one call, as in training. Measured on Zen 5:
128→256 filters, 8², 2 images, 6 steps, on two threads, forward and back 50 ms with F(4, 3), whose kernels are 57, 38
and 19 MB, 31 with F(2, 3), 54 directly.
"""

CALLS = 40_000
"""Starting another kernel takes as long as so many multiply-adds of vectors, shared among the steps `AHEAD`.

The two were fitted to 160 cells of 8 steps, timed both ways on one thread of an Emerald Rapids: frames of 8² to 64², 1
to 8 images, 1 to 256 channels, 4 to 128 filters, kernels 1, 3 and 5, strides, dilations. The choice loses 1.1 % against
the better way in the geometric mean, at most 13 % (64→16, k5, 8²). Where the geometries agree together is faster by 5 %
(256→64) to 45 % (4→16) on frames of 32² and more, apart by 7 % to 33 % at 8² with one image and much to convolve
(64→64: 0.93, 256→64: 0.77; k5 0.81, 0.73). Where they do not, apart takes 0.30 to 0.99 of direct convolution; of small
cells with strides (16²: 1→16, 64→16) 1.2 to 1.3, and is not taken.
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
    h, x = (
        choose("convlstm2d", convs, algorithm if fits(convs) else "auto", itemsize, remember=remember)
        for convs in (one, many)
    )
    if algorithm == "winograd" and not fits(both):
        return Ways(h, x, before=True)
    together = choose("convlstm2d", both, algorithm, itemsize, remember=remember)
    vectors = both[0].B * recurrent.HO * recurrent.WO * -(-recurrent.F // simd.lanes(itemsize))
    apart = cost(one, h, itemsize) + cost(many, x, itemsize) / AHEAD + TRANSFER * vectors + CALLS
    return Ways(together, together) if cost(both, together, itemsize) <= apart else Ways(h, x, before=True)


@lru_cache(maxsize=256)
def _cheapest(
    specs: tuple[ConvSpec, ...], choices: tuple[Tile | None, ...], itemsize: int, remember: bool = True
) -> Tile | None:
    packing = 0.0 if remember else PACKING / AHEAD
    return min(choices, key=lambda tile: cost(specs, tile, itemsize) + packing * _packed_vectors(specs, tile, itemsize))


def _packed_vectors(specs: tuple[ConvSpec, ...], tile: Tile | None, itemsize: int) -> int:
    size = weight_bytes(specs, tile, itemsize) if tile else sum(s.KH * s.KW * s.C * s.F for s in specs) * itemsize
    return size // simd.VECTOR_BYTES


def cost(specs: tuple[ConvSpec, ...], tile: Tile | None, itemsize: int) -> float:
    """Estimate the work of one step in multiply-adds of vectors, with Winograd's tiles or directly (None)."""
    images = specs[0].B
    return winograd_cost(specs, tile, images, itemsize) if tile else direct_cost(specs, images, itemsize)


def plan(specs: tuple[ConvSpec, ...], tile: Tile | None, finish: str, groups: int, itemsize: int, threads: int) -> Plan:
    """Plan the sum of convolutions, with Winograd's tiles or directly (None), for up to so many threads."""
    if tile:
        return winograd_plan(specs, tile, finish, groups, itemsize, threads)
    return direct_plan(specs, finish, groups, itemsize, threads)


# ---------------------------------------------------------------------------------------------------- what it costs

STREAMING_ROWS = 8
"""Reading a vector of weights from the cache takes as long as so many multiply-adds with it."""

FAR_BYTES, FAR_ROWS = 32 << 20, 20
"""Weights that no cache holds come from memory in each step: reading one takes as long as so many multiply-adds."""

DIRECT_VECTORS = 0, 2, 3, 3.8
"""Vectors of four at a time that take as long as a group of fewer, of which the loads are the work."""

CACHE_BYTES = 2 << 20
"""Size of a core's own cache, about: larger weights come from farther away in each step."""


def direct_cost(specs: tuple[ConvSpec, ...], images: int, itemsize: int) -> float:
    """Estimate the work of one step in multiply-adds of vectors, from measurements.

    The gates, which cost every algorithm the same, are left out.
    """
    spec = specs[0]
    whole, rest = divmod(-(-spec.F // simd.lanes(itemsize)), 4)
    vectors = 4 * whole + DIRECT_VECTORS[rest]
    rows = max(images * spec.HO * spec.WO, STREAMING_ROWS)
    return rows * sum(s.KH * s.KW * s.C for s in specs) * vectors / 0.85


def winograd_cost(specs: tuple[ConvSpec, ...], tile: Tile, images: int, itemsize: int) -> float:
    """Estimate the work of one step in multiply-adds of vectors, from measurements (see `direct_cost`)."""
    lanes, spec = simd.lanes(itemsize), specs[0]
    count = images * math.prod(grid(spec, tile))
    pieces = len(tiles.pieces(spec.KH, spec.KW, tile))
    vectors = -(-spec.F // lanes)
    streaming = STREAMING_ROWS if weight_bytes(specs, tile, itemsize) < FAR_BYTES else FAR_ROWS
    rows = max(-(-count // winograd.CHUNKS[-1]) * winograd.CHUNKS[-1], streaming)
    products = rows * tile.points * pieces * sum(s.C for s in specs) * vectors / 0.8
    inputs = 30 * count * tile.points * pieces * sum(-(-s.C // lanes) for s in specs)
    outputs = 5 * count * tile.points * vectors
    return products + inputs + outputs


# ------------------------------------------------------------------------------------------------- direct convolution


@lru_cache(maxsize=256)
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


def grid(spec: ConvSpec, tile: Tile) -> tuple[int, int]:
    """Rows and columns of the tiles of an image."""
    d_y, d_x = tiles.dilation(spec)
    return tiles.along(spec.HO, tile.m_y, d_y), tiles.along(spec.WO, tile.m_x, d_x)


def weight_bytes(specs: tuple[ConvSpec, ...], tile: Tile, itemsize: int) -> int:
    """Size of the transformed kernels."""
    channels = sum(spec.C * len(tiles.pieces(spec.KH, spec.KW, tile)) for spec in specs)
    return tile.points * channels * specs[0].F * itemsize


def tile_sources(specs: tuple[ConvSpec, ...], tile: Tile, *, hidden: bool = False) -> np.ndarray:
    """What the tiles read: of each convolution, piece by piece, a `SOURCE`; hidden: the first one reads h."""
    sources = []
    for n, spec in enumerate(specs):
        d_y, d_x = tiles.dilation(spec)
        (_, after_y), (_, after_x) = spec.padding
        for y, x in tiles.pieces(spec.KH, spec.KW, tile):
            pads = ((spec.padding[0][0] - y.first * d_y, after_y), (spec.padding[1][0] - x.first * d_x, after_x))
            piece = replace(spec, padding=pads, dilation=(d_y, d_x))
            sources.append(source(piece, hidden and n == 0))
    return np.array(sources, SOURCE)


@lru_cache(maxsize=256)
def winograd_plan(
    specs: tuple[ConvSpec, ...], tile: Tile, finish: str, groups: int, itemsize: int, threads: int
) -> Plan:
    """Plan the sum of the convolutions `specs` (same output grid, own inputs) in Winograd's tiles."""
    B, HO, WO = specs[0].B, specs[0].HO, specs[0].WO
    lanes = simd.lanes(itemsize)
    tiles_y, tiles_x = grid(specs[0], tile)
    count = tiles_y * tiles_x
    images = min(B, -(-winograd.BLOCK_TILES // count))  # of one unit
    units = -(-B // images)
    by_unit = units % threads == 0 or units >= 8 * threads
    if not by_unit:
        images, units = B, 1
    unit_tiles = images * count
    blocks = max(1, round(unit_tiles / winograd.BLOCK_TILES))
    if B * count <= 2 * winograd.BLOCK_TILES * threads and weight_bytes(specs, tile, itemsize) > CACHE_BYTES:
        # All tiles share the weights of their group: each thread reads a part of them, and each of them once.
        images, units, unit_tiles, blocks = B, 1, B * count, -(-B * count // (2 * winograd.BLOCK_TILES))
    elif not by_unit and blocks < 4 * threads:
        blocks = -(-blocks // threads) * threads
    block_tiles = -(-unit_tiles // blocks)
    blocks = -(-unit_tiles // block_tiles)
    parts = min(groups, -(-threads // (units * blocks)))
    chunk = min(winograd.CHUNKS, key=lambda rows: -(-block_tiles // rows) * (rows + 0.75))

    sources = tile_sources(specs, tile, hidden=finish != "store" or len(specs) > 1)
    channels = [min(lanes, C - c) for C in sources["C"].tolist() for c in range(0, C, lanes)]
    points, chunks, side = tile.points, -(-block_tiles // chunk), tile.outputs
    vector = lanes * itemsize
    sizes = (points * (chunks * chunk * len(channels) + 1) * vector, chunks * chunk * (4 * points + 1) * vector,
             gates.z_bytes(side, itemsize), block_tiles * side * 8, points * vector)  # fmt: skip
    places = np.concatenate([[0], np.cumsum([-(-size // 64) * 64 + 64 for size in sizes])])
    work = np.zeros(1, winograd.WORK)
    work[0] = (HO, WO, tiles_x, count, unit_tiles, block_tiles, chunk, *places[:5])
    neighbours = _neighbours_of_tiles(specs[0], tile, tiles_x, count, unit_tiles, block_tiles)
    tables = table(work, sources, neighbours, np.array(channels, np.int64))
    return Plan(winograd.RUN[finish], tuple(tile), work, tables, int(places[5]), units, len(neighbours),
                parts)  # fmt: skip


def _neighbours_of_tiles(
    spec: ConvSpec, tile: Tile, tiles_x: int, count: int, unit_tiles: int, block_tiles: int
) -> np.ndarray:
    """Of each block of tiles (image by image, row by row) the blocks with tiles that its convolution reaches."""
    first = np.arange(0, unit_tiles, block_tiles)
    last = np.minimum(first + block_tiles, unit_tiles) - 1
    interleaved = tiles.dilation(spec)[0]
    rows = count // tiles_x
    bands = rows if spec.padding_mode == "circular" else -(-_reach(spec)[0] // (tile.m_y * interleaved))

    def row(index: np.ndarray, step: int) -> np.ndarray:
        """First row of tiles of the band, `interleaved` rows, that many steps away."""
        return np.clip((index % count // tiles_x // interleaved + step) * interleaved, 0, rows)

    start = first // count * count + row(first, -bands) * tiles_x
    stop = np.minimum(last // count * count + row(last, bands + 1) * tiles_x, unit_tiles)
    return np.stack([start // block_tiles, -(-stop // block_tiles)], 1)


def _reach(spec: ConvSpec) -> tuple[int, int]:
    """How many rows and columns away from its own an output reads, or is read, at most."""
    up, across = (
        max(before, (size - 1) * dilation - before)
        for size, dilation, (before, _) in zip((spec.KH, spec.KW), spec.dilation, spec.padding, strict=True)
    )
    return up, across

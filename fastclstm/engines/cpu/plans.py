"""Plans of a time step: which algorithm, how the work is cut, and the tables that its kernel reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastclstm.engines.cpu.kernels import direct, simd, winograd
from fastclstm.engines.cpu.kernels.entry import table
from fastclstm.engines.cpu.kernels.padding import SOURCE, source
from fastclstm.engines.cpu.kernels.schedule import Plan
from fastclstm.spec import ConvSpec

SIZES = (3, 5)
"""Sizes of kernels that have Winograd's transforms."""

TILES = (2, 4)
"""Outputs of a Winograd tile on each axis: the choices of m."""


def fits(specs: tuple[ConvSpec, ...]) -> bool:
    """Whether the convolutions can be computed together: square kernels of one size, 3 or 5, stride and dilation 1."""
    size = specs[0].KH
    return size in SIZES and all(
        (size, size) == (spec.KH, spec.KW) and max(*spec.strides, *spec.dilation) == 1 for spec in specs
    )


def choose(op: str, specs: tuple[ConvSpec, ...], algorithm: str, itemsize: int) -> int:
    """Outputs of a Winograd tile on each axis; 0: direct. Raises ValueError where Winograd was asked for in vain.

    "auto" takes the smallest estimate of the costs. "winograd" chooses the tile as for a single image, so that its
    results do not depend on how a batch is split.
    """
    if algorithm == "direct" or (algorithm == "auto" and not fits(specs)):
        return 0
    if not fits(specs):
        raise ValueError(
            f"{op}: algorithm='winograd' needs square kernels of 3 or 5, one size for all convolutions, with stride "
            f"and dilation 1, got {[(s.KH, s.KW, s.strides, s.dilation) for s in specs]}; use 'auto' or 'direct'"
        )
    if algorithm == "winograd":
        specs = tuple(spec.with_batch(1) for spec in specs)
    choices = TILES if algorithm == "winograd" else (*TILES, 0)
    return min(choices, key=lambda m: cost(specs, m, itemsize))


class Ways(NamedTuple):
    """The algorithms of a ConvLSTM's convolutions, as of `choose`."""

    h: int
    x: int | None
    """None: as that of h, whose transforms and sums it shares. Else x is convolved beforehand, many steps at once."""

    @property
    def of_x(self) -> int:
        """The algorithm that x takes, however."""
        return self.h if self.x is None else self.x

    @property
    def transform(self) -> bool:
        """Whether either is Winograd's."""
        return bool(self.h or self.x)


DIRECT = Ways(0, None)
"""What forbids the transforms."""


AHEAD = 8
"""Steps of x that are convolved at once, for the estimate: the length of the sequence must not change the choice."""

TRANSFER = 24
"""Writing a vector of what x gives beforehand and reading it again takes as long as so many multiply-adds."""

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
def choose_ways(recurrent: ConvSpec, inputs: ConvSpec, algorithm: str, itemsize: int) -> Ways:
    """Choose the algorithm of each convolution of a ConvLSTM, or one for both; see `choose`.

    "winograd" takes the transforms wherever they fit, and is in vain where they fit neither convolution. "direct" does
    nothing beforehand.
    """
    both = recurrent, inputs
    fitting = [fits((conv,)) for conv in both]
    if algorithm == "direct" or not any(fitting):
        return Ways(choose("convlstm2d", both, algorithm, itemsize), None)
    if algorithm == "winograd":
        both = recurrent.with_batch(1), inputs.with_batch(1)
    one, many = both[:1], (both[1].with_batch(AHEAD * both[1].B),)
    h, x = (
        choose("convlstm2d", convs, algorithm if fit else "auto", itemsize)
        for convs, fit in zip((one, many), fitting, strict=True)
    )
    if algorithm == "winograd" and not fits(both):
        return Ways(h, x)
    together = choose("convlstm2d", both, algorithm, itemsize)
    vectors = both[0].B * recurrent.HO * recurrent.WO * -(-recurrent.F // simd.lanes(itemsize))
    apart = cost(one, h, itemsize) + cost(many, x, itemsize) / AHEAD + TRANSFER * vectors + CALLS
    return Ways(together, None) if cost(both, together, itemsize) <= apart else Ways(h, x)


def cost(specs: tuple[ConvSpec, ...], m: int, itemsize: int) -> float:
    """Estimate the work of one step in multiply-adds of vectors, with Winograd tiles of m×m or directly (m = 0)."""
    images = specs[0].B
    return winograd_cost(specs, m, images, itemsize) if m else direct_cost(specs, images, itemsize)


def plan(specs: tuple[ConvSpec, ...], m: int, finish: str, groups: int, itemsize: int, threads: int) -> Plan:
    """Plan the sum of convolutions, with Winograd tiles of m×m or directly (m = 0), for up to so many threads."""
    if m:
        return winograd_plan(specs, m, finish, groups, itemsize, threads)
    return direct_plan(specs, finish, groups, itemsize, threads)


# ---------------------------------------------------------------------------------------------------- what it costs

STREAMING_ROWS = 8
"""Reading a vector of weights from the cache takes as long as so many multiply-adds with it."""


def direct_cost(specs: tuple[ConvSpec, ...], images: int, itemsize: int) -> float:
    """Estimate the work of one step in multiply-adds of vectors, from measurements.

    The gates, which cost every algorithm the same, are left out.
    """
    spec = specs[0]
    vectors = -(-spec.F // simd.lanes(itemsize))
    rows = max(images * spec.HO * spec.WO, STREAMING_ROWS)
    return rows * sum(s.KH * s.KW * s.C for s in specs) * vectors / 0.85


def winograd_cost(specs: tuple[ConvSpec, ...], m: int, images: int, itemsize: int) -> float:
    """Estimate the work of one step in multiply-adds of vectors, from measurements (see `direct_cost`)."""
    lanes = simd.lanes(itemsize)
    spec = specs[0]
    tiles = images * -(-spec.HO // m) * -(-spec.WO // m)
    points = (m + spec.KH - 1) ** 2
    vectors = -(-spec.F // (2 * lanes)) * 2
    rows = max(-(-tiles // winograd.CHUNKS[-1]) * winograd.CHUNKS[-1], STREAMING_ROWS)
    products = rows * points * sum(s.C for s in specs) * vectors / 0.9
    inputs = 30 * tiles * points * sum(-(-s.C // lanes) for s in specs)
    outputs = 5 * tiles * points * vectors
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
        sources[n] = source(spec, hidden=n == 0 and finish != "store")
        sources[n]["scratch"] = at
        rows = (height - 1) * spec.strides[0] + (spec.KH - 1) * spec.dilation[0] + 1
        columns = (width - 1) * spec.strides[1] + (spec.KW - 1) * spec.dilation[1] + 1
        at += _aligned(rows * columns * spec.C * itemsize)
    work = np.zeros(1, direct.WORK)
    indices = _aligned((height * width + direct.MAX_ROWS) * 8)
    tile_rows = height * width + direct.MAX_ROWS if len(panels) > 2 else direct.MAX_ROWS
    z, pixels = at, at + _aligned((tile_rows + 4) * 4 * simd.VECTOR_BYTES)
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


def points(m: int, k: int) -> int:
    """Count of the points of F(m×m, k×k): α²."""
    return (m + k - 1) ** 2


@lru_cache(maxsize=256)
def winograd_plan(specs: tuple[ConvSpec, ...], m: int, finish: str, groups: int, itemsize: int, threads: int) -> Plan:
    """Plan the sum of the convolutions `specs` (same output grid, own inputs) in tiles of m×m outputs."""
    B, HO, WO, k = specs[0].B, specs[0].HO, specs[0].WO, specs[0].KH
    lanes = simd.lanes(itemsize)
    tiles_y, tiles_x = -(-HO // m), -(-WO // m)
    tiles = tiles_y * tiles_x
    images = min(B, -(-winograd.BLOCK_TILES // tiles))  # of one unit
    units = -(-B // images)
    by_unit = units % threads == 0 or units >= 8 * threads
    if not by_unit:
        images, units = B, 1
    unit_tiles = images * tiles
    blocks = max(1, round(unit_tiles / winograd.BLOCK_TILES))
    if not by_unit and blocks < 4 * threads:
        blocks = -(-blocks // threads) * threads
    block_tiles = -(-unit_tiles // blocks)
    blocks = -(-unit_tiles // block_tiles)
    parts = min(groups, -(-threads // (units * blocks)))
    chunk = min(winograd.CHUNKS, key=lambda rows: -(-block_tiles // rows) * (rows + 0.75))

    hidden = [n == 0 and finish != "store" for n in range(len(specs))]
    sources = np.array([source(*pair) for pair in zip(specs, hidden, strict=True)], SOURCE)
    channels = [min(lanes, spec.C - c) for spec in specs for c in range(0, spec.C, lanes)]
    points, chunks = (m + k - 1) ** 2, -(-block_tiles // chunk)
    vector = lanes * itemsize
    sizes = (points * (chunks * chunk * len(channels) + 1) * vector, chunks * chunk * (4 * points + 1) * vector,
             (m * m + 1) * 4 * vector, block_tiles * m * m * 8, points * vector)  # fmt: skip
    places = np.concatenate([[0], np.cumsum([-(-size // 64) * 64 + 64 for size in sizes])])
    work = np.zeros(1, winograd.WORK)
    work[0] = (HO, WO, tiles_x, tiles, unit_tiles, block_tiles, chunk, *places[:5])
    neighbours = _neighbours_of_tiles(specs[0], m, tiles_x, tiles, unit_tiles, block_tiles)
    tables = table(work, sources, neighbours, np.array(channels, np.int64))
    return Plan(winograd.RUN[finish], (m, k), work, tables, int(places[5]), units, len(neighbours),
                parts)  # fmt: skip


def _neighbours_of_tiles(
    spec: ConvSpec, m: int, tiles_x: int, tiles: int, unit_tiles: int, block_tiles: int
) -> np.ndarray:
    """Of each block of tiles (image by image, row by row) the blocks with tiles that its convolution reaches."""
    first = np.arange(0, unit_tiles, block_tiles)
    last = np.minimum(first + block_tiles, unit_tiles) - 1
    rows = -(-_reach(spec)[0] // m)
    if spec.padding_mode == "circular":
        rows = tiles // tiles_x

    def row(tile: np.ndarray, step: int) -> np.ndarray:
        return np.clip(tile % tiles // tiles_x + step, 0, tiles // tiles_x - 1)

    start = first // tiles * tiles + row(first, -rows) * tiles_x
    stop = np.minimum(last // tiles * tiles + row(last, rows) * tiles_x + tiles_x, unit_tiles)
    return np.stack([start // block_tiles, -(-stop // block_tiles)], 1)


def _reach(spec: ConvSpec) -> tuple[int, int]:
    """How many rows and columns away from its own an output reads, or is read, at most."""
    up, across = (
        max(before, (size - 1) * dilation - before)
        for size, dilation, (before, _) in zip((spec.KH, spec.KW), spec.dilation, spec.padding, strict=True)
    )
    return up, across

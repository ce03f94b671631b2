"""Gradients of convolution kernels: which algorithm, how the work is cut, and the sums that grow."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastclstm.engines import lending
from fastclstm.engines.cpu import launch, plans, threads, tiles, transforms
from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.kernels.entry import Kernel, Table, table
from fastclstm.engines.cpu.kernels.padding import SOURCE, source
from fastclstm.engines.cpu.kernels.schedule import Slots
from fastclstm.engines.cpu.kernels.weight_gradient import FRAMES, WORK, add_direct, add_winograd
from fastclstm.engines.cpu.kernels.winograd import CHUNKS
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.spec import ConvSpec

BLOCK_PIXELS = 512
"""Pixels of one block of the direct algorithm, at most."""

BLOCK_TILES = 64
"""Tiles between two visits of the sums, at most: many make the visits rare."""

PULLED_BACK = 400
"""Making a vector of sums and bringing it back to the taps takes as long as so many multiply-adds: much for few tiles.

128→256 channels on 12 frames of 8²: 48 ms of the 72 that Winograd's way took on two threads, one of them shared.
"""

SHARES, SHARE_BYTES, SHARE_TILES = 16, 128 << 10, 32
"""How many sums Winograd's way has where one is at most so large, and has so many tiles, which is also a block of them.

2 and 1 threads of a Zen 4, ms, before and after: 20 frames of 64², 1→4 1.9 and 3.5, 1.3 and 3.2; 1→12 4.1 and 6.8, 3.1
and 6.3; 4 frames of 256², 1→8 9.6 and 13.1, 6.9 and 12.1. With 32 filters, whose sums are 860 KB, there was no gain.
"""

SCRATCH_BYTES = 12 << 20
"""Size of the gathered blocks or tiles, about: small enough for the last-level cache."""


class _Plan(NamedTuple):
    kernel: Kernel
    variant: tuple[int, ...]
    tables: Table
    """`WORK`, the sources and the runs."""
    runs: np.ndarray
    items: int
    """Blocks or tiles of a frame."""
    gathered: int
    """How many of them at once."""
    sums_shape: tuple[int, ...]
    scratch_scalars: int
    own_scalars: int
    """Of scratch memory that each worker has."""


class WeightGradient:
    """The growing gradients of the kernels of convolutions `specs` (same output grid, own inputs) of up to T steps."""

    def __init__(self, specs: tuple[ConvSpec, ...], dtype: np.dtype, T: int, algorithm: str = "auto"):
        self._specs, self._dtype = specs, dtype
        self._tile = choose(specs, T, algorithm, dtype.itemsize)
        frames = specs[0].B * T
        self._plan = (_winograd_plan(specs, self._tile, frames, dtype.itemsize) if self._tile else
                      _direct_plan(specs, frames, dtype.itemsize))  # fmt: skip
        self._sums = lending.lend(self._plan.sums_shape, dtype)
        self._sums.fill(0)

    def add(self, inputs: tuple[Slots, ...], dz: Slots, B: int, T: int, team: int) -> None:
        """Add what T steps of B images contribute: inputs (B, T, H, W, C) of each convolution, dz (B, T, HO, WO, F).

        Much work is done in pieces, between which Python gets to answer a Ctrl-C.
        """
        plan = self._plan
        frames = np.zeros(1, FRAMES)
        itemsize = self._dtype.itemsize
        places = (*dz[:3], *(field for slot in (*inputs, *inputs)[:2] for field in slot[:3]))
        address, memory = launch.borrow((plan.scratch_scalars + team * plan.own_scalars) * itemsize)
        flops = sum(spec.flops // max(1, spec.B) for spec in self._specs) / plan.items
        piece = max(1, int(launch.PIECE_FLOPS / max(1, flops) / plan.gathered)) * plan.gathered
        for first in range(0, B * T * plan.items, piece):
            frames[0] = (T, first, min(first + piece, B * T * plan.items), *places, address)
            threads.run(plan.kernel, team, plan.variant, frames, plan.tables, self._sums.reshape(-1))
        launch.give_back(address, memory)

    def result(self) -> list[np.ndarray]:
        """Return the gradients (KH, KW, C, F) of the kernels."""
        if self._tile:
            gradients = [np.empty((spec.KH, spec.KW, spec.C, spec.F), self._dtype) for spec in self._specs]
            transforms.pull_back(self._sums.sum(0) if len(self._sums) > 1 else self._sums[0], self._tile, gradients)
            return gradients
        pairs, rows, width = self._sums.shape
        matrix = self._sums.swapaxes(0, 1).reshape(rows, pairs * width)[:, : self._specs[0].F]
        return [
            np.concatenate([matrix[row : row + length] for source, _, length, _, row in self._plan.runs if source == s])
            .reshape(spec.KH, spec.KW, spec.C, spec.F)
            for s, spec in enumerate(self._specs)
        ]  # fmt: skip


def of_kernels(
    recurrent: ConvSpec, inputs: ConvSpec, algorithm: str, frames: int, dtype: np.dtype, *, one_dz: bool = True
) -> list[tuple[tuple[str, ...], WeightGradient]]:
    """The gradients to gather of a ConvLSTM's kernels, by name, in up to so many frames.

    Of both together, or apart where tiles cannot do both or where they do not see the same dz.
    """
    specs = {"recurrent_kernel": recurrent, "kernel": inputs}
    together = one_dz and plans.alike((recurrent, inputs))
    jobs = [tuple(specs)] if together else [(name,) for name in specs]
    return [(names, WeightGradient(tuple(specs[n] for n in names), dtype, frames, algorithm)) for names in jobs]


def choose(specs: tuple[ConvSpec, ...], T: int, algorithm: str, itemsize: int) -> Tile | None:
    """Winograd's tile; None: direct."""
    is_pointwise = specs[0].KH == specs[0].KW == 1
    if algorithm == "direct" or not plans.alike(specs) or (algorithm == "auto" and is_pointwise):
        return None
    costs: dict[Tile | None, float] = {
        tile: _winograd_cost(specs, tile, T, itemsize) for tile in tiles.choices((specs[0].KH, specs[0].KW))
    }
    if algorithm == "auto":
        costs[None] = T * plans.direct_cost(specs, specs[0].B, itemsize)
    return min(costs, key=lambda tile: costs[tile])


def _winograd_cost(specs: tuple[ConvSpec, ...], tile: Tile, T: int, itemsize: int) -> float:
    """Estimate the work in multiply-adds of vectors (see `plans.direct_cost`)."""
    lanes, spec = simd.lanes(itemsize), specs[0]
    count, pieces = T * spec.B * math.prod(plans.grid(specs, tile)), len(tiles.pieces(spec.KH, spec.KW, tile))
    rows, vectors = pieces * sum(s.C for s in specs), -(-spec.F // lanes)
    transforms = 10 * count * tile.points * (vectors + pieces * sum(-(-s.C // lanes) for s in specs))
    visits = (4 * -(-count // BLOCK_TILES) + PULLED_BACK) * tile.points * rows * vectors
    return count * tile.points * rows * vectors / 0.9 + transforms + visits


def _chunk(rows: int) -> int:
    return min(CHUNKS, key=lambda chunk: -(-rows // chunk) * (chunk + 0.75))


def _pairs(columns: int, itemsize: int) -> int:
    return -(-columns // (2 * simd.lanes(itemsize)))


def _record(**fields: int) -> np.ndarray:
    """One `WORK` with some fields."""
    work = np.zeros(1, WORK)
    for name, value in fields.items():
        work[0][name] = value
    return work


def _round_up(count: int) -> int:
    return -(-count // 16) * 16 + 16


@lru_cache(maxsize=64)
def _direct_plan(specs: tuple[ConvSpec, ...], frames: int, itemsize: int) -> _Plan:
    spec = specs[0]
    height = min(spec.HO, max(1, BLOCK_PIXELS // spec.WO))
    sources = np.array([source(s) for s in specs], SOURCE)
    runs, at, row = [], 0, 0
    for n, s in enumerate(specs):
        sources[n]["scratch"] = at
        columns = (spec.WO - 1) * s.strides[1] + (s.KW - 1) * s.dilation[1] + 1
        taps = 1 if s.dilation[1] == 1 else s.KW
        length = s.KW * s.C // taps
        chunk = _chunk(length)
        for ky in range(s.KH):
            for tap in range(taps):
                offset = at + (ky * s.dilation[0] * columns + tap * s.dilation[1]) * s.C
                runs.append((n, offset, length, chunk, row))
                row += -(-length // chunk) * chunk
        at += _round_up(((height - 1) * s.strides[0] + (s.KH - 1) * s.dilation[0] + 1) * columns * s.C)
    pairs = _pairs(spec.F, itemsize)
    width = 2 * simd.lanes(itemsize)
    item = at + _round_up(pairs * height * spec.WO * width)
    parts = -(-spec.HO // height)
    count = max(1, min(frames * parts, SCRATCH_BYTES // (item * itemsize)))
    work = _record(HO=spec.HO, WO=spec.WO, columns=spec.F, height=height, parts=parts, count=count, rows=row,
                   pairs=pairs, item=item, gradients=at)  # fmt: skip
    listed = np.array(runs, np.int64)
    tables = table(work, sources, listed)
    return _Plan(add_direct, (), tables, listed, parts, count, (pairs, row, width), item * count, 0)


@lru_cache(maxsize=64)
def _winograd_plan(specs: tuple[ConvSpec, ...], tile: Tile, frames: int, itemsize: int) -> _Plan:
    spec, lanes = specs[0], simd.lanes(itemsize)
    points, pairs, width = tile.points, _pairs(spec.F, itemsize), 2 * lanes
    gradient = ConvSpec(spec.B, spec.HO, spec.WO, spec.F, 1, 1, 1, spec.HO, spec.WO, (1, 1), plans.interleaved(specs),
                        ((0, 0), (0, 0)), "zeros")  # fmt: skip
    inputs = plans.tile_sources(specs, tile)
    sources = np.append(inputs, np.array([source(gradient)], SOURCE))
    channels = int(inputs["C"].sum())
    chunk = _chunk(channels)
    rows = -(-channels // chunk) * chunk
    pitch = (-(-channels // lanes) + 1 | 1) * lanes  # an odd number of vectors: tiles in different sets of the cache
    tiles_y, tiles_x = plans.grid(specs, tile)
    total, size = frames * tiles_x * tiles_y, points * (pitch + pairs * width)
    small = points * pairs * rows * width * itemsize <= SHARE_BYTES
    shares = SHARES if small and total >= SHARES * SHARE_TILES else 1
    most = SHARE_TILES if shares > 1 else BLOCK_TILES
    count = max(8, min(total, most, SCRATCH_BYTES // (size * itemsize)))
    gradients = count * pitch + lanes
    point = (gradients + pairs * count * width) // lanes * lanes + 2 * lanes
    zeros = -(-max(*inputs["C"].tolist(), spec.F) // 16) * 16
    common, own = points * point, zeros + -(-points // 8) * 8 * 8 // itemsize
    if shares > 1:  # each worker has scratch memory of its own
        common, own = 0, common + own
    work = _record(HO=spec.HO, WO=spec.WO, columns=spec.F, tiles_x=tiles_x, tiles=tiles_x * tiles_y,
                   pieces=len(inputs) // len(specs), count=count, rows=rows, pairs=pairs, point=point, pitch=pitch,
                   gradients=gradients, zeros=points * point, zeros_size=0 if shares > 1 else own, addresses=zeros,
                   shares=shares, own=own if shares > 1 else 0)  # fmt: skip
    runs = np.array([(0, 0, channels, chunk, 0)], np.int64)
    tables = table(work, sources, runs)
    return _Plan(add_winograd, tuple(tile), tables, runs, tiles_x * tiles_y, count,
                 (shares, points, pairs, rows, width), common, own)  # fmt: skip

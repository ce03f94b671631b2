"""Which tiling computes a product on the device at hand: the one that takes least time by a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastclstm.engines.cuda import product, wgmma
from fastclstm.engines.cuda.device import Device
from fastclstm.engines.cuda.product import KINDS, Tiling, Window
from fastclstm.spec import Pair

RATES = {KINDS["simt"]: 128, KINDS["tf32"]: 512, KINDS["float32"]: 512 / 3, KINDS["bfloat16"]: 1024,
         KINDS["float16"]: 1024}  # fmt: skip
"""Multiply-adds of a multiprocessor in a clock, as Ampere has them; wgmma makes twice as many, float64 half as many."""

BYTES = 24
"""That a multiprocessor gets from the second-level cache in a clock: 5.5 TB/s of an H100. Assumed; no GPU was asked."""

BESIDE = 0.25
"""The share of the shorter of computing and fetching that does not hide behind the longer. A guess, too."""

FEWEST_BLOCKS = 8
"""Of depth in a share: fewer do not hide that the first ones are waited for."""

MOST_SHARES = 16

FEWEST_TAPS = 4
"""For which a tile keeps its halo: fewer do not read a pixel often."""

LAUNCH = 3000
"""Clocks that one more launch, which adds shares, takes. A guess, too."""

SUBCORES = 4
"""Of a multiprocessor: so many warps are needed to use all of it."""


def choose(
    kind: int, dtype: np.dtype, device: Device, pixels: int, columns: int, *, depth: int | None = None,
    frame: Pair = (0, 0), windows: Sequence[Window | None] = (), cutting: float = 0,
) -> Tiling:  # fmt: skip
    """Return the fastest tiling that works, of those that compute least in vain beside the columns.

    Of equals the larger. Those of wgmma are for the architecture that has it. With `depth`, its number of steps, it may
    be cut into `shares`, which costs `cutting` clocks beside what they take. With the `windows` that each pixel of a
    `frame` reads, tiles may keep their halos.
    """
    candidates = product.tilings(kind, dtype.itemsize)
    most = product.WASTE * min(tiling.padded(columns) for tiling in candidates)
    if device.architecture == product.WARPGROUPS:
        candidates = product.warpgroup_tilings(kind) + candidates
        plain = tuple(window for window in windows if window is not None and window.taps >= FEWEST_TAPS)
        if plain and len(plain) == len(windows):
            halos = product.halo_tilings(kind, frame, plain)
            candidates = [tiling for tiling in halos if tiling.shared_bytes <= device.shared_bytes] + candidates

    def time(tiling: Tiling) -> float:
        if depth is None:
            return clocks(tiling, dtype, device.multiprocessors, pixels, columns)
        return _cut(tiling, dtype, device, pixels, columns, -(-depth // tiling.depth), cutting)[0]

    fitting = sorted((tiling for tiling in candidates if tiling.padded(columns) <= most), key=time)
    return next(tiling for tiling in fitting if not tiling.on_warpgroups or wgmma.works(device, tiling))


def choose_cut(
    kind: int, dtype: np.dtype, device: Device, pixels: int, columns: int, depth: int, *, frame: Pair,
    windows: Sequence[Window | None],
) -> tuple[Tiling, int]:  # fmt: skip
    """Return a tiling, and into how many shares its depth is cut: 1, where that spares less than the launches cost."""
    tiling = choose(kind, dtype, device, pixels, columns, depth=depth, frame=frame, windows=windows, cutting=LAUNCH)
    return tiling, _cut(tiling, dtype, device, pixels, columns, -(-depth // tiling.depth), LAUNCH)[1]


def _cut(
    tiling: Tiling, dtype: np.dtype, device: Device, pixels: int, columns: int, blocks: int, cutting: float
) -> tuple[float, int]:  # fmt: skip
    """Return how many clocks a product takes, and in how many shares."""

    def time(count: int) -> float:
        return clocks_of_shares(tiling, dtype, device.multiprocessors, pixels, columns, blocks, count)

    count = shares(tiling, dtype, device, pixels, columns, blocks)
    return min((time(1), 1), (time(count) + (cutting if count > 1 else 0), count))


def shares(tiling: Tiling, dtype: np.dtype, device: Device, pixels: int, columns: int, blocks: int) -> int:
    """Return into how many shares the `blocks` of depth are best cut: some, where rows and columns make few tiles."""

    def time(count: int) -> float:
        return clocks_of_shares(tiling, dtype, device.multiprocessors, pixels, columns, blocks, count)

    units = -(-blocks // tiling.unit)
    best = min(range(1, max(1, min(MOST_SHARES, units, blocks // FEWEST_BLOCKS)) + 1), key=time)
    return -(-units // -(-units // best))  # none is empty


def clocks_of_shares(
    tiling: Tiling, dtype: np.dtype, multiprocessors: int, pixels: int, columns: int, blocks: int, count: int
) -> float:  # fmt: skip
    """Return about how many clocks a product takes whose depth is cut into shares, with adding them."""
    share = -(-blocks // (tiling.unit * count)) * tiling.unit
    multiplying = clocks(tiling, dtype, multiprocessors, pixels, columns, count) * min(share, blocks) * tiling.depth
    written = pixels * columns * dtype.itemsize / (multiprocessors * BYTES)
    return multiplying + (LAUNCH + 2 * count * written if count > 1 else 0)


def clocks(
    tiling: Tiling, dtype: np.dtype, multiprocessors: int, pixels: int, columns: int, shares: int = 1
) -> float:  # fmt: skip
    """Return about how many clocks a step of depth takes: of the blocks of the multiprocessor that has most of them."""
    down, across = tiling.grid(pixels, columns)
    blocks = -(-down * across * shares // multiprocessors)
    itemsize = product.operand_type(tiling.kind, dtype).itemsize
    rate = RATES[tiling.kind] * (2 if tiling.on_warpgroups else 1) * (0.5 if dtype == np.float64 else 1)
    idle = max(1, SUBCORES / (tiling.threads // 32 * blocks))
    computing = tiling.rows * tiling.columns / rate * idle
    fetching = (tiling.fetched + tiling.columns * tiling.parts) * itemsize / BYTES
    return blocks * (max(computing, fetching) + BESIDE * min(computing, fetching))

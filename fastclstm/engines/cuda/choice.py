"""Which tiling computes a product on the device at hand."""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cuda import product, wgmma
from fastclstm.engines.cuda.device import Device

FILLED = 0.75
"""The share of the multiprocessors that blocks of wgmma must fill: each of them computes more than with mma.sync."""


def choose(kind: int, dtype: np.dtype, device: Device, pixels: int, columns: int) -> product.Tiling:
    """Return the largest tiling that fills the GPU, of those that compute least in vain beside the columns.

    Those of wgmma come first, on the architecture that has it, where they fill three quarters of the GPU and work.
    """
    candidates = product.tilings(kind, dtype.itemsize)
    most = product.WASTE * min(tiling.padded(columns) for tiling in candidates)
    if device.architecture == product.WARPGROUPS:
        candidates = product.warpgroup_tilings(kind) + candidates
    fitting = [tiling for tiling in candidates if tiling.padded(columns) <= most]
    for tiling in fitting:
        down, across = tiling.grid(pixels, columns)
        share = FILLED if tiling.on_warpgroups else 1
        fills = down * across >= share * device.multiprocessors
        if fills and (not tiling.on_warpgroups or wgmma.works(device, tiling)):
            return tiling
    return fitting[-1]

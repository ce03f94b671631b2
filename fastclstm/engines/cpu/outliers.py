"""Samples that Winograd's transforms would spoil: fill values among ordinary ones, infinities, NaN."""

from __future__ import annotations

import itertools

import numpy as np

from fastclstm.engines.cpu import launch, threads
from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.kernels.outliers import CHUNK, measure
from fastclstm.engines.cpu.tiles import Tile

BOUND = 256.0
"""A sample is computed directly where its largest |x| is above that, and far larger than some of the others.

What a tile errs is relative to its largest |x|, wherever in the tile that is: with kernels that make outputs of order 1
of inputs of order 1, measured in float32 next to a corner of fill values M, F(4×4, 3×3) 4e-7·M and F(4×4, 5×5) 6e-7·M,
in windows that hold none of them. So M = 256 costs 1e-4 and 1.6e-4, where inputs of order 1 cost 5e-6 and 2e-5 anyway;
−999 would cost 4e-4, −9999 4e-3, 1e5 4e-2. Images of 8 bits, as they are, stay below. F(2×2, k×k) errs nowhere else:
each pixel at a tile's rim has a point of its own.
"""

RATIOS = BOUND, 2.0**12, 2.0**20, 2.0**40
RARE = 16.0
"""What "far larger than some" is: by one of these ratios than more than the share RARE / ratio of a sample's scalars.

What is large all together, as kelvins or counts are, stays fast, and so do scaled gradients: of a normal distribution
about 4 / ratio is that small. The more harm fill values do, the fewer others need be left: −9999 is found where more
than a sixteenth of a sample is ordinary (a 256th, where that is below 2.4), 1e20 beside a single scalar. A ratio that
the largest |x| itself does not reach is not looked at: next to 300 even zeros get no error above 1.2e-4.
"""

SMALL = 1 << 16
"""Scalars that NumPy reads twice before a kernel has been started."""

FLOPS = 8
"""Reading a scalar takes as long as so many operations, for the number of threads."""


def spoil(tile: Tile | None) -> bool:
    """Whether such values reach beyond their receptive fields: on an axis of one tap nothing is transformed."""
    return tile is not None and max(m for m, k in ((tile.m_y, tile.k_y), (tile.m_x, tile.k_x), (0, 2)) if k > 1) > 2


def find(array: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Which samples (B,) of an array (B, …) hold such values, where the mask (B, T) of their steps is true.

    Whether one does depends on no other: so a batch may be split.
    """
    B, T = (len(array), 1) if mask is None else mask.shape
    if all_ordinary(array):
        return np.zeros(B, np.bool_)
    counted = np.ones((B, T), np.bool_) if mask is None else mask
    frames = array.reshape(B, T, -1)
    largest, _ = _measure(frames, np.where(counted, 0, -1))
    extreme = ~np.isfinite(largest)
    for ratio in RATIOS:
        suspect = (largest > ratio) & ~extreme
        if suspect.any():
            limits = np.where(suspect, largest, -ratio)[:, np.newaxis] / ratio
            _, below = _measure(frames, np.where(counted, limits, -1))
            extreme |= below > RARE / ratio * counted.sum(1) * frames.shape[2]
    return extreme


def runs(spoilt: np.ndarray) -> list[tuple[slice, bool]]:
    """Samples one after another that all are, or all are not, among the `spoilt`."""
    edges = [0, *(np.flatnonzero(np.diff(spoilt)) + 1).tolist(), len(spoilt)] if len(spoilt) else []
    return [(slice(a, b), bool(spoilt[a])) for a, b in itertools.pairwise(edges)]


def all_ordinary(array: np.ndarray) -> bool:
    """Whether no magnitude is above the bound: of most calls all that is looked at."""
    if not array.size:
        return True
    if array.size <= SMALL:
        return bool(-BOUND <= array.min() <= array.max() <= BOUND)
    return bool(_run(array.reshape(1, -1), np.zeros(1, array.dtype)).max() <= BOUND)


def _measure(frames: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of samples (B, T, scalars) the largest magnitudes, and how many are below the limits (B, T) of their frames."""
    B, T, size = frames.shape
    result = _run(frames.reshape(B * T, size), limits.astype(frames.dtype).ravel())
    found = result.reshape(B, -1, *result.shape[2:])
    padded = (limits > 0).sum(1) * (-size % result.shape[-1])
    return found[:, :, 0].max((1, 2)), found[:, :, 1].sum((1, 2), np.float64) - padded


def _run(frames: np.ndarray, limits: np.ndarray) -> np.ndarray:
    result = np.zeros((len(frames), -(-frames.shape[1] // CHUNK), 2, simd.lanes(frames.itemsize)), frames.dtype)
    threads.run(measure, launch.team_size(FLOPS * frames.size), (), frames, limits, result)
    return result

"""Blocks (…, T, H, W, C) as networks take them: a batch of samples, channels where they want them; and back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastclstm import dispatch
from fastclstm.layers import Layer
from fastclstm.layers.container import parts


def of_samples(channels_first: bool, block: np.ndarray, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return what `compute` makes of the samples of a block, channels last where it makes frames."""
    lead, x = block.shape[:-4], block.reshape(-1, *block.shape[-4:])
    y = compute(dispatch.contiguous(np.moveaxis(x, -1, 2)) if channels_first else x)
    if channels_first and y.ndim in (4, 5):
        y = dispatch.contiguous(np.moveaxis(y, y.ndim - 3, -1))
    return y.reshape(*lead, *y.shape[1:])


def is_channels_first(network: Layer) -> bool:
    """Return whether a network takes sequences (B, T, C, H, W)."""
    return any(getattr(part, "data_format", None) == "channels_first" for part in parts(network))


def made_of(op: str, network: Layer, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of what a network makes of a sample (T, H, W, C), channels last.

    Raises ValueError where that is no single array.
    """
    T, H, W, C = sizes
    first = is_channels_first(network)
    made = network.output_shape((1, T, C, H, W) if first else (1, T, H, W, C))
    if not (isinstance(made, tuple) and all(isinstance(n, int) for n in made) and 2 <= len(made) <= 5):
        raise ValueError(f"{op}: {type(network).__name__} makes {made} of each sample, which is no DataArray's; "
                         f"give a network of one array of frames or features")  # fmt: skip
    _, *own = made
    if first and len(own) >= 3:
        *before, C, H, W = own
        own = [*before, H, W, C]
    return tuple(own)

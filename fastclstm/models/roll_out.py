"""Forecasts by any network that makes the next frame."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastclstm.layers import Layer
from fastclstm.models.forecasting import Forecasting
from fastclstm.nn.names import with_article


def roll_out(network: Layer, frames: np.ndarray, steps: int) -> Any:
    """Return the `steps` frames that follow (B, T, H, W, C): each is made from the last T, those made included.

    Raises
    ------
    ValueError
        The network makes no frames like those it is given.
    """
    if isinstance(network, Forecasting):
        return network.forecast(frames, steps)
    T, run = frames.shape[1], getattr(network, "predict", network)
    film: Any = frames
    for _ in range(steps):
        y = run(film[:, -T:])
        shape = getattr(y, "shape", ())
        if shape not in ((len(film), *film.shape[2:]), (len(film), T, *film.shape[2:])):
            raise ValueError(f"forecast: {with_article(type(network))} made {shape or type(y).__name__} of frames "
                             f"{film[:, -T:].shape}, but one that foretells makes frames of the same size")  # fmt: skip
        film = np.concatenate([film, y[:, -1:] if y.ndim == film.ndim else y[:, np.newaxis]], 1)
    return film[:, T:]

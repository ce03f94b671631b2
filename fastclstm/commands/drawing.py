"""Pictures of a film and of what a layer makes of it: a PNG of all steps, or a GIF that moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastclstm import viz

PANEL, GAP = 1.1, 0.1  # inches


def draw_png(path: Path, frames: np.ndarray, hidden: np.ndarray, pooled: np.ndarray, window: int) -> None:
    """Draw frames (T, H, W), hidden maps (T, H, W, F) and, under the `window` steps it covers, each pooled map."""
    windows = min(len(pooled), 5)
    steps = windows * window
    channels = _telling(hidden, 4)
    maps = [viz.Row(f"hidden {channel}", hidden[:steps, ..., channel], "signed") for channel in channels]
    pool = viz.Row(f"pooled {channels[0]}", pooled[:windows, ..., channels[0]], "signed", span=window)
    figure = viz.filmstrip(Figure(), [viz.Row("frame", frames[:steps], limit=1), *maps, pool])
    figure.savefig(path, format="png")


def draw_gif(path: Path, frames: np.ndarray, hidden: np.ndarray, pooled: np.ndarray, window: int) -> None:
    """Animate frames (T, H, W) above a pooled map that covers `window` steps, beside hidden maps (T, H, W, F)."""
    channels = _telling(hidden, 16)
    columns = 2 + -(-len(channels) // 4)
    width, height = PANEL * columns + GAP, PANEL * 4 + GAP
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("none")
    edges = {"left": GAP / width, "right": 1 - GAP / width, "bottom": GAP / height, "top": 1 - GAP / height}
    grid = figure.add_gridspec(4, columns, wspace=0.06, hspace=0.06, **edges)
    steady = pooled[..., channels[0]].repeat(window, axis=0)
    places: list[tuple[np.ndarray, Any, str]] = [(frames, grid[:2, :2], "frames"), (steady, grid[2:, :2], "signed")]
    places += [(hidden[..., channel], grid[n % 4, 2 + n // 4], "signed") for n, channel in enumerate(channels)]
    images = [viz.show(figure.add_subplot(place), film[0], kind, 1 if kind == "frames" else float(np.abs(film).max()))
              for film, place, kind in places]  # fmt: skip

    def update(t: int) -> None:
        for (film, _, _), image in zip(places, images, strict=True):
            image.set_data(film[min(t, len(film) - 1)])

    viz.animate(path, figure, update, len(frames))


def _telling(hidden: np.ndarray, count: int) -> list[int]:
    """Return the channels of hidden maps (T, H, W, F) that show most, each beyond what those before it show."""
    unseen = hidden.reshape(-1, hidden.shape[-1]).copy()
    channels: list[int] = []
    for _ in range(min(count, unseen.shape[1])):
        channels.append(int(np.square(unseen).sum(axis=0).argmax()))
        seen = unseen[:, channels[-1]] / max(np.linalg.norm(unseen[:, channels[-1]]), 1e-30)
        unseen -= np.outer(seen, seen @ unseen)
    return channels

"""Pictures of a film and of what a layer makes of it: a PNG of all steps, or a GIF that moves."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

INK, PAPER, ZERO = "#c9d4e3", "#171c26", "#0a0d13"
GREYS = LinearSegmentedColormap.from_list("greys", (ZERO, "#ffffff"))
MAPS = LinearSegmentedColormap.from_list(
    "maps", ("#a5e9ff", "#2f8fd0", "#16395c", ZERO, "#6b2a1c", "#e0703a", "#ffdca6")
)
"""Colours of frames, and of maps from negative to positive."""

PANEL, GAP = 1.1, 0.1  # inches
FRAME_MILLISECONDS = 160


def draw_png(path: Path, frames: np.ndarray, hidden: np.ndarray, pooled: np.ndarray, window: int) -> None:
    """Draw frames (T, H, W), hidden maps (T, H, W, F) and, under the `window` steps it covers, each pooled map."""
    windows = min(len(pooled), 5)
    channels = _telling(hidden, 4)
    sheet = _Sheet(len(channels) + 2, windows * window, left=0.9, top=0.4)
    for t in range(windows * window):
        sheet.panel(0, t, frames[t], 1, GREYS, title=f"t = {t}")
    sheet.label(0, "frame")
    for row, channel in enumerate(channels, 1):
        limit = np.abs(hidden[..., channel]).max()
        for t in range(windows * window):
            sheet.panel(row, t, hidden[t, ..., channel], limit, MAPS)
        sheet.label(row, f"hidden {channel}")
    limit = np.abs(pooled[..., channels[0]]).max()
    for t in range(windows):
        sheet.panel(-1, slice(t * window, (t + 1) * window), pooled[t, ..., channels[0]], limit, MAPS)
    sheet.label(len(channels) + 1, f"pooled {channels[0]}")
    sheet.figure.savefig(path, format="png", dpi=150)


def draw_gif(path: Path, frames: np.ndarray, hidden: np.ndarray, pooled: np.ndarray, window: int) -> None:
    """Animate frames (T, H, W) above a pooled map that covers `window` steps, beside hidden maps (T, H, W, F)."""
    channels = _telling(hidden, 16)
    sheet = _Sheet(4, 2 + -(-len(channels) // 4))
    steady = pooled[..., channels[0]].repeat(window, axis=0)
    films = [(frames, sheet.panel(slice(0, 2), slice(0, 2), frames[0], 1, GREYS)),
             (steady, sheet.panel(slice(2, 4), slice(0, 2), steady[0], np.abs(steady).max(), MAPS))]  # fmt: skip
    for n, channel in enumerate(channels):
        film = hidden[..., channel]
        films.append((film, sheet.panel(n % 4, 2 + n // 4, film[0], np.abs(film).max(), MAPS)))

    shots = []
    for t in range(len(frames)):
        for film, image in films:
            image.set_data(film[min(t, len(film) - 1)])
        shot = BytesIO()
        sheet.figure.savefig(shot, format="png", dpi=100)
        shots.append(Image.open(shot).convert("RGB"))
    shots[0].save(path, format="GIF", save_all=True, append_images=shots[1:], duration=FRAME_MILLISECONDS, loop=0)


def _telling(hidden: np.ndarray, count: int) -> list[int]:
    """Return the channels of hidden maps (T, H, W, F) that show most, each beyond what those before it show."""
    unseen = hidden.reshape(-1, hidden.shape[-1]).copy()
    channels: list[int] = []
    for _ in range(min(count, unseen.shape[1])):
        channels.append(int(np.square(unseen).sum(axis=0).argmax()))
        seen = unseen[:, channels[-1]] / max(np.linalg.norm(unseen[:, channels[-1]]), 1e-30)
        unseen -= np.outer(seen, seen @ unseen)
    return channels


class _Sheet:
    """A dark figure of square panels."""

    def __init__(self, rows: int, columns: int, *, left: float = GAP, top: float = GAP):
        width, height = PANEL * columns + left + GAP, PANEL * rows + top + GAP
        self.figure = Figure(figsize=(width, height), facecolor=PAPER)
        edges = {"left": left / width, "right": 1 - GAP / width, "bottom": GAP / height, "top": 1 - top / height}
        self.grid = self.figure.add_gridspec(rows, columns, wspace=0.06, hspace=0.06, **edges)

    def panel(self, row: Any, column: Any, image: np.ndarray, limit: float, colors: Any, title: str = "") -> Any:
        """Show `image`; the ends of the colours are `limit` and, for maps, ``-limit``."""
        axes = self.figure.add_subplot(self.grid[row, column])
        axes.set_axis_off()
        axes.set_title(title, color=INK, fontsize=9)
        return axes.imshow(image, colors, vmin=0 if colors is GREYS else -limit, vmax=limit, interpolation="nearest")

    def label(self, row: int, text: str) -> None:
        """Write `text` left of a row."""
        place = self.grid[row, 0].get_position(self.figure)
        self.figure.text(place.x0 - GAP / self.figure.get_figwidth(), (place.y0 + place.y1) / 2, text,
                         color=INK, fontsize=9, ha="right", va="center")  # fmt: skip

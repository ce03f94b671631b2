"""One style for pictures: two themes, colour maps that eyes read evenly, strips and films of frames with their keys.

A theme is a dict of Matplotlib's settings, so that it is used as any style is: for good, ``plt.style.use(theme())``, or
for a while, ``with plt.style.context(theme("dark")):``. What the functions here draw follows the theme in force. All
need ``pip install 'fastclstm[viz]'``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from fastclstm.io.files import replacing
from fastclstm.spec import choice, integers

try:
    import matplotlib
    from cycler import cycler
    from matplotlib.colors import ListedColormap, to_rgba, to_rgba_array
except ImportError as error:
    raise ImportError(f"fastclstm.viz needs Matplotlib: pip install 'fastclstm[viz]' ({error})") from error

__all__ = ["FRAME_MILLISECONDS", "SERIES", "THEMES", "Row", "animate", "colours", "filmstrip", "repaint",
           "show", "theme"]  # fmt: skip

THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1f2937", "muted": "#64748b", "grid": "#e5e9f0", "missing": "#cbd5e1"},
    "dark": {"paper": "#171c26", "ink": "#c9d4e3", "muted": "#94a3b8", "grid": "#2a3240", "missing": "#3d4757"},
}
"""Colours of what is drawn around data, and of data that are missing."""

SERIES = {
    "light": ("#c2410c", "#1d6fb8", "#64748b", "#0f8a6c", "#8b3fa8", "#a16207", "#be3a64", "#4d7c0f"),
    "dark": ("#fb8a4c", "#5eb3f0", "#94a3b8", "#3fc9a2", "#c98be6", "#e6b84a", "#f27d9f", "#a3d15c"),
}
"""Colours of lines and bars, in their order; the first is ours, the third what needs no training."""

FRAME_MILLISECONDS = 160
WIDTH = 8.0  # inches: at this width 9 points are read where a page shows 800 pixels
_LETTER, _TOP, _KEY, _GAP = 0.077, 0.3, 0.75, 0.06  # inches of a letter, above a strip, right of it, between images

_CAMERA = "#0a0d13", "#ffffff"
_ANCHORS: dict[str, dict[str, tuple[str, ...]]] = {
    "frames": {"light": _CAMERA, "dark": _CAMERA},  # what is black is black on any paper
    "amounts": {"light": ("#ffffff", "#a9dcf2", "#3f9bd8", "#1f5fa8", "#2b2a6e", "#1a1033"),
                "dark": ("#171c26", "#1d3f74", "#2580c4", "#55bde0", "#b8ecec", "#fdfff2")},
    "signed": {"light": ("#123a63", "#2f8fd0", "#a5dbf3", "#eff3f7", "#ffcf9f", "#e0703a", "#6b2113"),
               "dark": ("#b9f0ff", "#2f8fd0", "#143656", "#0a0d13", "#582214", "#e0703a", "#ffe0b0")},
}  # fmt: skip
"""From nothing to much, and from negative over zero to positive."""


def _even(anchors: Sequence[str], steps: int) -> np.ndarray:
    """Return `steps` colours (steps, 3) on the line through `anchors`, whose lightness rises or falls.

    It changes by equal steps as eyes see it (in OKLab, Ottosson 2020): no value stands out that is not larger than its
    neighbours, and grey prints tell the same.
    """
    to_cones = np.array([[0.4122214708, 0.5363325363, 0.0514459929],
                         [0.2119034982, 0.6806995451, 0.1073969566],
                         [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
    to_lab = np.array([[0.2104542553, 0.7936177850, -0.0040720468],
                       [1.9779984951, -2.4285922050, 0.4505937099],
                       [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip
    rgb = to_rgba_array(anchors)[:, :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lab = np.cbrt(linear @ to_cones.T) @ to_lab.T
    at = np.linspace(lab[0, 0], lab[-1, 0], steps)
    order = np.argsort(lab[:, 0])
    lab = np.stack([np.interp(at, lab[order, 0], lab[order, axis]) for axis in range(3)], axis=1)
    linear = (lab @ np.linalg.inv(to_lab).T) ** 3 @ np.linalg.inv(to_cones).T
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.abs(linear) ** (1 / 2.4) - 0.055).clip(0, 1)


for _kind, _themes in _ANCHORS.items():
    for _name, _anchors in _themes.items():
        _colours = _even(_anchors, 256)
        if _kind == "signed":
            _colours = np.concatenate([_even(_anchors[:4], 129), _even(_anchors[3:], 129)[1:]])
        _map = ListedColormap(_colours, f"fastclstm-{_kind}-{_name}")
        matplotlib.colormaps.register(_map.with_extremes(bad=THEMES[_name]["missing"]), force=True)


def theme(name: str = "light") -> dict[str, Any]:
    """Return Matplotlib's settings of a theme, "light" or "dark".

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> with plt.style.context(theme("dark")):
    ...     figure, axes = plt.subplots()
    >>> plt.close(figure)
    """
    choice("theme", "name", name, (*THEMES,))
    paper, ink, muted, grid, _ = THEMES[name].values()
    return {
        "figure.facecolor": paper, "axes.facecolor": paper, "savefig.facecolor": "auto", "text.color": ink,
        "axes.labelcolor": ink, "axes.edgecolor": muted, "xtick.color": muted, "ytick.color": muted,
        "xtick.labelcolor": ink, "ytick.labelcolor": ink, "grid.color": grid, "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": cycler(color=SERIES[name]),
        "axes.titlelocation": "left", "axes.titlesize": 10, "font.size": 9, "legend.frameon": False,
        "legend.fontsize": 9, "lines.linewidth": 1.8, "lines.markersize": 4, "image.interpolation": "nearest",
        "image.cmap": f"fastclstm-amounts-{name}", "figure.figsize": (WIDTH, 3.6), "figure.dpi": 100,
        "savefig.dpi": 160, "figure.constrained_layout.use": True,
    }  # fmt: skip


def _in_force(paper: Any = None) -> str:
    """Return the theme with that colour of the paper, by default that of the settings; else the light one."""
    paper = to_rgba(matplotlib.rcParams["figure.facecolor"] if paper is None else paper)
    return next((name for name, parts in THEMES.items() if to_rgba(parts["paper"]) == paper), "light")


def colours(kind: str) -> Any:
    """Return a colour map of the theme in force.

    Parameters
    ----------
    kind : "frames", "amounts" or "signed"
        Of what a camera sees; from nothing to much, such as rain; from negative over zero to positive.
    """
    choice("colours", "kind", kind, (*_ANCHORS,))
    return matplotlib.colormaps[f"fastclstm-{kind}-{_in_force()}"]


@dataclass(frozen=True)
class Row:
    """A row of a film strip.

    Parameters
    ----------
    label : str
        What is written on its left.
    images : array (T, H, W)
        NaN is drawn as missing.
    kind : "frames", "amounts" or "signed"
        Its colours, see `colours`.
    limit : float, optional
        The value at the end of the colours, which begin at 0 or, with "signed", at −limit; the largest if None.
    unit : str
        Of the values, written beside the key of the colours.
    first, span : int
        Column of the first image, and columns that each of them covers.
    """

    label: str
    images: np.ndarray
    kind: str = "frames"
    limit: float | None = None
    unit: str = ""
    first: int = 0
    span: int = 1

    def __post_init__(self) -> None:
        images = np.asarray(self.images)
        if images.ndim != 3 or 0 in images.shape or images.dtype.kind not in "biuf":
            raise ValueError(f"Row {self.label!r}: images must be real numbers (T, H, W), at least one image, got "
                             f"{images.dtype} {images.shape}; of channels take one, images[..., 0]")  # fmt: skip
        object.__setattr__(self, "images", images)
        for name, least in (("first", 0), ("span", 1)):
            integers(f"Row {self.label!r}", name, getattr(self, name), 1, least)

    @property
    def end(self) -> float:
        """The value at the end of the colours."""
        largest = float(np.max(np.abs(self.images.astype(float)), initial=0, where=np.isfinite(self.images)))
        return self.limit if self.limit is not None else largest or 1.0

    def columns(self) -> Iterator[slice]:
        """Yield the columns of each image."""
        for start in range(self.first, self.first + self.span * len(self.images), self.span):
            yield slice(start, start + self.span)


def show(axes: Any, image: np.ndarray, kind: str = "frames", limit: float = 1.0) -> Any:
    """Draw an image (H, W) without axes in the colours of a `kind`, whose end is `limit`; return Matplotlib's image."""
    axes.set_axis_off()
    low = -limit if kind == "signed" else 0
    return axes.imshow(image, colours(kind), vmin=low, vmax=limit, aspect="auto")


def filmstrip(figure: Any, rows: Sequence[Row], titles: Sequence[str] | None = None, width: float = WIDTH) -> Any:
    """Draw rows of images, one column a time step, with a key of the colours for each run of rows that share them.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        An empty one; its size is set.
    rows : sequence of Row
    titles : sequence of str, optional
        One a column; by default t = 0, 1, ….
    width : float
        Of the figure, in inches.

    Returns
    -------
    The figure.

    Raises
    ------
    ValueError
        No rows, another number of titles, more columns than the width has room for.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> rain = np.random.default_rng(0).random((6, 32, 32))
    >>> figure = filmstrip(Figure(), [Row("radar", 20 * rain, "amounts", unit="mm/h")])
    """
    if not rows or not all(isinstance(row, Row) for row in rows):
        raise ValueError("filmstrip: rows must have at least one Row, and nothing else")
    count = max(columns.stop for row in rows for columns in row.columns())
    if titles is not None and len(titles) != count:
        raise ValueError(f"filmstrip: titles must be one for each of {count} columns, got {len(titles)}")
    label = 0.2 + _LETTER * max(len(row.label) for row in rows)
    side = (width - label - _KEY) / count - _GAP
    if side <= 0:
        raise ValueError(f"filmstrip: {count} columns and the labels do not fit a width of {width:g} inches; give a "
                         f"larger one, or every other image")  # fmt: skip
    wide = [(side + _GAP) * row.span - _GAP for row in rows]
    heights = [width * row.images.shape[1] / row.images.shape[2] for row, width in zip(rows, wide, strict=True)]
    height = _TOP + sum(heights) + _GAP * (len(rows) + 1)
    figure.set_layout_engine("none")
    figure.set_size_inches(width, height)

    def place(left: float, bottom: float, wide: float, high: float) -> Any:
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    top = height - _TOP
    keys: list[tuple[Any, float, float, Any]] = []  # colours, from where, to where, an image
    for n, row in enumerate(rows):
        bottom = top - heights[n]
        for image, columns in zip(row.images, row.columns(), strict=True):
            left = label + (side + _GAP) * columns.start
            drawn = show(place(left, bottom, wide[n], heights[n]), image, row.kind, row.end)
        figure.text((label - 0.1) / width, (top + bottom) / 2 / height, row.label, ha="right", va="center")
        key = (row.kind, row.end, row.unit)
        if keys and keys[-1][0] == key:
            top = keys.pop()[1]  # one key for both
        keys.append((key, top, bottom, drawn))
        top = bottom - _GAP
    for n in range(count):
        told = f"t = {n}" if titles is None else titles[n]
        middle = label + (side + _GAP) * n + side / 2
        figure.text(middle / width, 1 - 0.6 * _TOP / height, told, ha="center", va="center", fontsize=8)
    for (_, _, unit), top, bottom, drawn in keys:
        bar = figure.colorbar(drawn, cax=place(width - _KEY + 0.05, bottom + _GAP, 0.09, top - bottom - 2 * _GAP))
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7, length=2)
        bar.ax.grid(visible=False)
        bar.locator = matplotlib.ticker.MaxNLocator(2 if top - bottom < 1 else 4)
        bar.set_label(unit, fontsize=8)
    return figure


def animate(
    path: Path, figure: Any, update: Callable[[int], Any], count: int, milliseconds: int = FRAME_MILLISECONDS
) -> None:
    """Save a GIF of a figure at the times 0 … count - 1, to each of which `update` brings it for some milliseconds.

    The file is written whole or not at all.
    """
    from PIL import Image

    shots = []
    for t in range(*integers("animate", "count", count, 1, 1)):
        update(t)
        shot = BytesIO()
        figure.savefig(shot, format="png", dpi=100)
        shots.append(Image.open(shot).convert("RGB"))
    with replacing(path) as new:
        shots[0].save(new, format="GIF", save_all=True, append_images=shots[1:], duration=milliseconds, loop=0)


def repaint(figure: Any, name: str) -> None:
    """Bring a figure from the theme that it was drawn in to another, where it is: for pages that come in both."""
    choice("repaint", "name", name, (*THEMES,))
    old = _in_force(figure.get_facecolor())
    new = dict(zip(_palette(old), _palette(name), strict=True))
    figure.canvas.draw()  # now all ticks are there
    for artist in figure.findobj():
        for part in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            if hasattr(artist, f"get_{part}") and hasattr(artist, f"set_{part}"):
                before = getattr(artist, f"get_{part}")()
                rgba = [tuple(colour) for colour in to_rgba_array(before).tolist()]
                swapped = [(*new.get(colour[:3], colour[:3]), colour[3]) for colour in rgba]
                if swapped != rgba:
                    getattr(artist, f"set_{part}")(swapped if np.ndim(before) == 2 else swapped[0])
        kind = artist.get_cmap().name if hasattr(artist, "get_cmap") else ""
        if kind.startswith("fastclstm-"):
            artist.set_cmap(kind.removesuffix(old) + name)


def _palette(name: str) -> list[tuple[float, ...]]:
    return [to_rgba(colour)[:3] for colour in (*THEMES[name].values(), *SERIES[name])]

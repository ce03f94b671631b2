"""Pictures of nowcasts in the theme in force: a forecast, still or moving, and a page of its verification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fastclstm import viz
from fastclstm.io.files import replacing

LINES = {"ConvLSTM": "C0", "flow": "C1", "last": "C2"}
NAMES = {"ConvLSTM": "ConvLSTM", "flow": "optical flow", "last": "persistence"}


def draw_forecast(path: Path, nowcast: Any, frames: Any, made: Any) -> None:
    """Draw the last frames given and those made, side by side (PNG) or one after the other (GIF)."""
    info, axes = nowcast.info, nowcast.axes(frames)
    last = frames.isel({axes.time: slice(-info.steps_in, None)})
    given, films = (np.asarray(_first(axes, part), float) for part in (last, made))
    leads, film = nowcast.leads(frames, len(films)), np.concatenate([given, films])
    before = [f"{n} steps" for n in range(1 - info.steps_in, 0)]
    titles = [*before, "now", *leads]
    look = _Look.of(nowcast, frames, film)
    with replacing(path) as new:
        if path.suffix.lower() == ".png":
            shown = sorted({round(n) for n in np.linspace(0, len(films) - 1, 6)})
            figure, panels = _panels(1, len(shown) + 1, film.shape[1:])
            for axis, n in zip(panels[0], [info.steps_in - 1, *(info.steps_in + n for n in shown)], strict=False):
                image = look.show(axis, film[n], titles[n])
            look.key(figure, image, panels, 0.9)
            figure.savefig(new, format="png")
            return
        figure, panels = _panels(1, 1, film.shape[1:], large=True)
        axis = panels[0][0]
        image = look.show(axis, film[0], "")
        look.key(figure, image, panels, 0.9)

        def update(n: int) -> None:
            image.set_data(info.transform(film[n]))
            axis.set_title(f"{'observed' if n < info.steps_in else 'forecast'}, {titles[n]}")

        viz.animate(new, figure, update, len(film), 2 * viz.FRAME_MILLISECONDS)


def draw_verification(
    path: Path, table: Any, leads: list[str], nowcast: Any, frames: Any, shown: dict[str, np.ndarray]
) -> None:
    """Draw scores by lead time, and one forecast beside what was observed."""
    info = nowcast.info
    methods = table.methods
    times = sorted({round(n) for n in np.linspace(0, len(leads) - 1, 5)})
    figure = Figure(figsize=(13, 14))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.15), squeeze=False)[:, 0]
    level = len(table.thresholds) // 2
    told = f"≥ {table.thresholds[level]:g} {info.units}"
    scores: list[tuple[str, Any]] = [
        (f"CSI ≥ {value:g} {info.units}", ("CSI", n)) for n, value in enumerate(table.thresholds)
    ][:3]
    scores += [(f"POD {told}", ("POD", level)), (f"FAR {told}", ("FAR", level)),
               (f"FSS {told}, {table.scale} pixels", ("FSS", level)), ("mean squared error", ("MSE", None)),
               ("mean absolute error", ("MAE", None)), ("SSIM", ("SSIM", None))]  # fmt: skip
    for axis, (title, (name, n)) in zip(top.subplots(3, 3).ravel(), scores, strict=False):
        for method in methods:
            values = table.scores(method, name)
            axis.plot(range(1, len(leads) + 1), values if n is None else values[:, n], color=LINES.get(method),
                      marker=".", label=NAMES.get(method, method))  # fmt: skip
        if name not in ("MSE", "MAE", "SSIM"):
            axis.set_ylim(0, 1)
        axis.set_title(title)
        ticks = [n + 1 for n in times]
        axis.set_xticks(ticks, [leads[n] for n in times], fontsize=8)
    figure.axes[0].legend()
    rows = ("observed", *methods)
    look = _Look.of(nowcast, frames, np.concatenate([shown["given"][..., 0], shown["observed"][..., 0]]))
    panels = bottom.subplots(len(rows), len(times) + 1, squeeze=False)
    for row, name in zip(panels, rows, strict=True):
        first = shown["given"][-1, ..., 0]
        film = [first, *(shown[name][n, ..., 0] for n in times)]
        for column, (axis, frame) in enumerate(zip(row, film, strict=True)):
            title = ("now" if column == 0 else leads[times[column - 1]]) if name == "observed" else ""
            image = look.show(axis, frame, title)
            if column == 0:
                axis.set_ylabel(NAMES.get(name, name))
    look.key(bottom, image, panels, 0.7)
    figure.savefig(path, format="png", dpi=100)


@dataclass
class _Look:
    """How frames are shown: colours that go with the transform, and north up."""

    info: Any
    norm: Normalize
    origin: Literal["lower", "upper"]

    @classmethod
    def of(cls, nowcast: Any, frames: Any, film: np.ndarray) -> _Look:
        """Return the look of a film, whose values the colours span."""
        info, axes = nowcast.info, nowcast.axes(frames)
        there = film[~np.isnan(film)]
        ends = (there.min(), there.max()) if there.size else (0, 0)  # where all is missing
        least, most = (float(info.transform(end)) for end in ends)
        rows = frames[axes.y].values if axes.y in frames.coords else np.empty(0)
        north = rows.size > 1 and rows[0] < rows[-1]
        return cls(info, Normalize(least, max(most, least + 1e-6)), "lower" if north else "upper")

    def show(self, axis: Any, frame: np.ndarray, title: str) -> Any:
        """Show a frame."""
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set(visible=True, color=matplotlib.rcParams["grid.color"])
        axis.set_title(title, fontsize=9)
        return axis.imshow(self.info.transform(frame), viz.colours("amounts"), norm=self.norm, origin=self.origin)

    def key(self, figure: Any, image: Any, panels: Any, shrink: float) -> None:
        """Draw the key of the colours: it tells values, not what they are transformed to."""
        info = self.info
        bar = figure.colorbar(image, ax=panels, shrink=shrink, pad=0.02)
        least, most = (float(info.transform.inverse(np.float64(end))) for end in (bar.vmin, bar.vmax))
        if info.transform.kind == "log":
            decades = [m * 10.0**n for n in range(-8, 9) for m in (1, 3)]
            values = [0.0] * (least <= 0) + [v for v in decades if max(least, info.transform.offset) <= v <= most]
        else:
            values = np.linspace(least, most, 5).tolist()
        bar.set_ticks([float(info.transform(np.float64(v))) for v in values], labels=[f"{v:.3g}" for v in values])
        bar.ax.tick_params(labelsize=8)
        bar.ax.grid(visible=False)
        bar.set_label(f"{info.variable} ({info.units})" if info.units else info.variable)
        bar.outline.set_visible(False)


def _first(axes: Any, frames: Any) -> Any:
    """Return frames (T, H, W) of the first sample and channel."""
    data = axes.data(frames)
    return data[(0,) * (data.ndim - 4)][..., 0]


def _panels(rows: int, columns: int, size: tuple[int, ...], *, large: bool = False) -> tuple[Figure, Any]:
    height = 4.5 if large else 2.2
    width = min(3.0, max(0.4, size[1] / size[0])) * height
    figure = Figure(figsize=(columns * width + 1.0, rows * height + 0.4))
    return figure, figure.subplots(rows, columns, squeeze=False)

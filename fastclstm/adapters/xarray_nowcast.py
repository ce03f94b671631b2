"""Nowcasts: a network, and all that is to be known of the frames it was trained on, so that nothing is told twice.

The network makes what is to be added to the last frame given: it starts as persistence, and learns what changes.

`Nowcast.save` writes both into one file. What is known: the variable and its units, the step of time, how many frames
are given and foretold, how values are transformed, what stands for those that are missing, and which way rows and
columns go: frames that lie the other way round are turned. A forecast refuses frames that do not fit, before it
computes anything, and comes back in the units that went in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import xarray

from fastclstm import baselines
from fastclstm.adapters.xarray import Windows, padded
from fastclstm.adapters.xarray_axes import Axes, seconds
from fastclstm.adapters.xarray_samples import is_channels_first, of_samples
from fastclstm.io import weights
from fastclstm.layers import Layer
from fastclstm.models.loading import load as load_network
from fastclstm.models.roll_out import roll_out
from fastclstm.nn import Options
from fastclstm.nn.described import describe, restore
from fastclstm.nn.names import with_article
from fastclstm.nn.transforms import KINDS, Transform
from fastclstm.spec import choice
from fastclstm.verification import Verification

RATES = {
    "mm h-1": 1.0, "mm/h": 1.0, "mm/hr": 1.0, "mm hr-1": 1.0, "mm hour-1": 1.0, "mm/hour": 1.0, "mm h^-1": 1.0,
    "kg m-2 h-1": 1.0, "mm s-1": 3600.0, "mm/s": 3600.0, "kg m-2 s-1": 3600.0, "kg/m2/s": 3600.0,
    "kg m**-2 s**-1": 3600.0,
    "m s-1": 3.6e6, "m/s": 3.6e6, "mm d-1": 1 / 24, "mm/d": 1 / 24, "mm day-1": 1 / 24, "mm/day": 1 / 24,
}  # fmt: skip
"""Units of rates of precipitation, in mm/h. Speeds have some of them: see `_is_rain`."""
DEPTHS = ("mm", "kg m-2", "kg/m2", "kg m**-2")
"""Units of precipitation summed up over a step."""
RAIN_WORDS = ("rain", "precip", "snowfall", "hydrometeor")

SENSITIVITY = 0.1
"""Offset of the logarithm in mm/h."""
RAIN_LEVELS = (0.1, 1.0, 5.0)
"""Thresholds of rain in mm/h."""
QUANTILES = (0.5, 0.75, 0.9)
"""Thresholds of other variables, of what is above the least."""
LOOKED_AT = 64
"""Frames that quantiles are taken of."""
SLACK = 0.1
"""Share by which a step of time may differ from that trained on."""


@dataclass(frozen=True)
class FramesInfo(Options):
    """What is to be known of the frames that a network was trained on.

    Parameters
    ----------
    variable, units : str
    dims : (str, str, str)
        Of time, rows and columns.
    step : float, optional
        Of time: in seconds, or in the units of times that are no dates. None: there were no times.
    steps_in, steps_out : int
        Frames given and frames foretold in training.
    transform : Transform
    missing : float
        What the network reads where there is nothing, transformed.
    multiple : (int, int)
        Rows and columns of frames must be multiples of these; others are padded for the network.
    thresholds : tuple of float
        For verification, in `units`.
    rising : (bool or None, bool or None), optional
        Whether the coordinates of rows and of columns go up; None: not known. Frames that lie the other way round are
        turned for the network.
    """

    variable: str
    units: str
    dims: Any
    step: float | None
    steps_in: int
    steps_out: int
    transform: Any
    missing: float
    multiple: Any
    thresholds: Any
    rising: Any = None


class Nowcast:
    """A network that foretells frames, and what it knows of them.

    Parameters
    ----------
    network : Layer
        See `adapters.xarray.forecast`; what it makes is added to the last frame given.
    info : FramesInfo
    """

    def __init__(self, network: Layer, info: FramesInfo):
        self.network, self.info = network, info

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write network and `info` to a safetensors file, which `fastclstm.load` reads as the network."""
        self.network.save(path, {"frames": describe(self.info)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return what `save` wrote.

        Raises
        ------
        OSError
            The file is missing or cannot be read.
        ValueError
            A damaged file, or a network without `info`.
        """
        told = weights.load(path)[1].get("about", {})
        network = load_network(path)
        if "frames" not in told:
            raise ValueError(f"{os.fspath(path)} holds {with_article(type(network))} but not what it was "
                             f"trained on, as train --data FILES.nc writes it; for arrays without names, give a .npy "
                             f"as input, or call fastclstm.adapters.xarray.forecast")  # fmt: skip
        return cls(network, restore(told["frames"]))

    def forecast(self, frames: xarray.DataArray, steps: int | None = None) -> xarray.DataArray:
        """Return the frames that follow, from the last `steps_in`, in the same units and on the same grid.

        Parameters
        ----------
        frames : DataArray
            Of the variable trained on; any size of frames. NaN is missing.
        steps : int, optional
            None: as many as in training.

        Returns
        -------
        DataArray of float32
            NaN where no frame given has a value.

        Raises
        ------
        ValueError
            Frames unlike those trained on: units, step of time; too few, or with a gap among the last ones.
        """
        axes, info = self.check(frames), self.info
        turned = self._turned(frames, axes)
        frames = frames.isel(turned)
        last = frames.isel({axes.time: slice(-info.steps_in, None)})
        if axes.breaks(last, info.step).size:
            times = last[axes.time].values
            raise ValueError(f"forecast: the last {info.steps_in} frames, {times[0]} to {times[-1]}, have a gap "
                             f"between them; give frames that follow on one another")  # fmt: skip
        coords = axes.following(last, info.steps_out if steps is None else steps)
        films = np.asarray(axes.data(last))
        if not np.isfinite(films).any():
            raise ValueError(f"forecast: the last {info.steps_in} frames hold no value, all is missing; give others")
        made = self.foretell(np.asarray(info.transform(films), np.float32), info.steps_out if steps is None else steps)
        result = axes.made(frames, info.transform.inverse(made), 4, coords).isel(turned)
        result.encoding = {key: value for key, value in frames.encoding.items() if key == "grid_mapping"}
        return result

    def foretell(self, films: np.ndarray, steps: int) -> np.ndarray:
        """Return the frames that follow films (…, T, H, W, C), transformed both; NaN where a film has none."""
        H, W = films.shape[-3:-1]
        there = np.isfinite(films)
        whole = padded(np.where(there, films, np.nan), self.info.multiple)
        x = np.where(np.isnan(whole), films.dtype.type(self.info.missing), whole)
        made = of_samples(is_channels_first(self.network), x, lambda batch: roll_out(self.network, batch, steps))
        made = made + x[..., -1:, :, :, :]
        seen = there.any((-4, -1), keepdims=True)
        return np.where(seen, made[..., :H, :W, :], made.dtype.type(np.nan))

    def _turned(self, frames: xarray.DataArray, axes: Axes) -> dict[Any, slice]:
        """Return what turns frames to where the network's have north and east, and back."""
        trained = zip((axes.y, axes.x), self.info.rising or (), strict=False)
        return {dim: slice(None, None, -1) for dim, rising in trained if {rising, _rises(frames, dim)} == {True, False}}

    def axes(self, frames: xarray.DataArray) -> Axes:
        """Return the dims of frames: those of the training where they are there, else as they are known."""
        told = set(self.info.dims) <= set(frames.dims)
        time, *space = self.info.dims if told else (None,)
        return Axes.of("forecast", frames, time, space or None)

    def check(self, frames: xarray.DataArray) -> Axes:
        """Return the dims of frames; raise ValueError where they are unlike those trained on."""
        info, op = self.info, "forecast"
        axes = self.axes(frames)
        units = str(frames.attrs.get("units", ""))
        if units != info.units and not _same_units(units, info.units):
            raise ValueError(f"{op}: {frames.name} is in {units or 'no units'!r}, but the network was trained on "
                             f"{info.units or 'no units'!r}; convert the values, "
                             f"{_how(units, info.units)}")  # fmt: skip
        if frames.sizes[axes.time] < info.steps_in:
            raise ValueError(f"{op}: {frames.name} has {frames.sizes[axes.time]} frames, but the network is given "
                             f"{info.steps_in}; give more files or a longer one")  # fmt: skip
        step = step_of(frames, axes)
        if step is not None and info.step is not None and abs(step - info.step) > SLACK * abs(info.step):
            has, wanted = (told_step(n, frames, axes) for n in (step, info.step))
            raise ValueError(f"{op}: {frames.name} has a step of {has}, but the network was trained on {wanted}; "
                             f"select or interpolate to that")  # fmt: skip
        return axes

    def verify(
        self, frames: xarray.DataArray, *, steps: int | None = None, thresholds: Sequence[float] | None = None,
        scale: int = 9, most: int = 200, batch_size: int = 8, flow: str | None = None,
        watch: Callable[[int, int], Any] | None = None,
    ) -> tuple[Verification, dict[str, np.ndarray]]:  # fmt: skip
        """Return the scores of forecasts from frames, of persistence's and of optical flow's, by lead time.

        Parameters
        ----------
        frames : DataArray
        steps : int, optional
            None: as many as in training.
        thresholds, scale
            As of `Verification`; None: those of `info`.
        most : int
            Forecasts at most of each sample; they start a quarter of `steps` apart, or more.
        batch_size : int
        flow : "own" or "pysteps", optional
            See `baselines.extrapolation`, which sees transformed values.
        watch : function, optional
            Called with the number of batches done and that of all.

        Returns
        -------
        Verification
            Of the methods "ConvLSTM", "flow" and "last" (persistence).
        dict of arrays (steps, H, W, C)
            Of the forecast with most events in what came: "given" (steps_in, H, W, C), "observed", and each method's.

        Raises
        ------
        ValueError
            Frames unlike those trained on, or fewer than one forecast needs.
        """
        axes, info = self.check(frames), self.info
        turned = self._turned(frames, axes)
        frames = frames.isel(turned)
        steps = info.steps_out if steps is None else steps
        starts = frames.sizes[axes.time] - info.steps_in - steps + 1
        every = max(1, steps // 4, -(-starts // most))
        windows = Windows(frames, info.steps_in, steps, every=every, batch_size=batch_size, time=axes.time,
                          space=(axes.y, axes.x), missing=np.nan)  # fmt: skip
        table = Verification(info.thresholds if thresholds is None else thresholds, scale, similar=info.transform)
        shown, most_events = {}, -1
        middle = table.thresholds[len(table.thresholds) // 2]
        for n, (given, observed, _) in enumerate(windows):
            x = np.asarray(info.transform(given), np.float32)
            made = {
                "ConvLSTM": self.foretell(x, steps), "flow": baselines.extrapolation(x, steps, engine=flow),
                "last": baselines.persistence(x, steps),
            }  # fmt: skip
            films = {name: info.transform.inverse(film) for name, film in made.items()}
            table.add(observed, films)
            events = (observed >= middle).sum((1, 2, 3, 4))
            if events.max() > most_events:
                best, most_events = int(events.argmax()), int(events.max())
                shown = {name: film[best] for name, film in {"given": given, "observed": observed, **films}.items()}
            if watch is not None:
                watch(n + 1, len(windows))
        back = tuple(axis for axis, dim in ((-3, axes.y), (-2, axes.x)) if dim in turned)
        return table, {name: np.flip(film, back) for name, film in shown.items()}

    def leads(self, frames: xarray.DataArray, steps: int) -> list[str]:
        """Return the names of lead times: after how long a frame follows."""
        axes = self.axes(frames)
        step = step_of(frames, axes)
        if step is None:
            return [f"step {n}" for n in range(1, steps + 1)]
        return [f"+{told_step(n * step, frames, axes)}" for n in range(1, steps + 1)]


def describe_frames(
    op: str, frames: xarray.DataArray, axes: Axes, *, steps_in: int, steps_out: int, kind: str, offset: float | None,
    multiple: tuple[int, int], thresholds: Sequence[float] | None,
) -> FramesInfo:  # fmt: skip
    """Return what is to be known of frames to train on.

    Parameters
    ----------
    frames : DataArray
        The part to train on alone: the scale of the transform is of it.
    kind : "auto", "log", "linear" or "none"
        "auto": "log" of rates and depths of precipitation, as the units and names say, else "linear".
    offset : float, optional
        Of "log". None: 0.1 mm/h in the units of the frames; where these are not known, a thousandth of the largest.
    thresholds : sequence of float, optional
        None: of precipitation 0.1, 1 and 5 mm/h; else quantiles.

    Raises
    ------
    ValueError
        Frames without values, with one value only, or negative ones for a logarithm.
    """
    choice(op, "transform", kind, ("auto", *KINDS))
    low, high, mean = (float(value) for value in _computed(frames.min(), frames.max(), frames.mean()))
    name = frames.name
    if np.isnan(low):
        raise ValueError(f"{op}: {name} holds no value in the time to train on, all is missing; give other files")
    if low == high:
        raise ValueError(f"{op}: {name} holds the value {low:g} only in the time to train on; there is nothing to "
                         f"learn")  # fmt: skip
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{op}: {name} holds Inf; make it NaN, which is missing")
    rate = _rate(frames, step_of(frames, axes))
    if kind == "auto":
        kind = "linear" if rate is None else "log"
    if kind == "log":
        least = offset if offset is not None else 1e-3 * high if rate is None else SENSITIVITY / rate
        if low < -least:
            raise ValueError(f"{op}: {name} goes down to {low:g}, of which there is no logarithm; if that stands for "
                             f"what is missing, give --missing {low:g}, else --transform linear")  # fmt: skip
        transform, missing = Transform("log", 0.0, high, least), 0.0
    else:
        transform = Transform("linear", low, high) if kind == "linear" else Transform()
        missing = float(transform(mean))
    if thresholds is None:
        thresholds = _quantiles(frames, axes, low) if rate is None else [level / rate for level in RAIN_LEVELS]
    units = str(frames.attrs.get("units", ""))
    dims = tuple(str(dim) for dim in (axes.time, axes.y, axes.x))
    return FramesInfo(str(name), units, dims, step_of(frames, axes), steps_in, steps_out, transform, missing, multiple,
                      tuple(float(level) for level in thresholds),
                      (_rises(frames, axes.y), _rises(frames, axes.x)))  # fmt: skip


def step_of(frames: xarray.DataArray, axes: Axes) -> float | None:
    """Return the usual step of time, in seconds or in the units of numbers; None without times."""
    if axes.time not in frames.coords or frames.sizes[axes.time] < 2:
        return None
    return float(np.median(seconds(frames[axes.time].values)))


def _rises(frames: xarray.DataArray, dim: Any) -> bool | None:
    """Return whether the coordinate of a dim goes up, but for where it begins anew; None where it does neither."""
    if dim not in frames.coords or frames.sizes[dim] < 2 or frames[dim].dtype.kind not in "iuf":
        return None
    steps = np.diff(frames[dim].values.astype(float))
    usual = np.nanmedian(steps) if np.isfinite(steps).any() else 0
    return bool(usual > 0) if usual else None


def told_step(step: float, frames: xarray.DataArray, axes: Axes) -> str:
    """Return a span of time for people."""
    times = frames[axes.time]
    if times.dtype.kind in "fiu":
        return f"{step:g} {times.attrs.get('units', '')}".strip()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if abs(step) >= (2 if unit != "min" else 1) * length or (abs(step) >= length and step % length == 0):
            return f"{round(step / length, 2):g} {unit}"
    return f"{step:g} s"


def _computed(*values: Any) -> tuple[Any, ...]:
    lazy = [value for value in values if hasattr(value.data, "__dask_graph__")]
    if not lazy:
        return values
    import dask

    return dask.compute(*values)


def _rate(frames: xarray.DataArray, step: float | None) -> float | None:
    """Return what a unit of the frames is in mm/h, where they are of precipitation."""
    units = " ".join(str(frames.attrs.get("units", "")).split())
    words = " ".join(str(frames.attrs.get(key, "")) for key in ("standard_name", "long_name")) + f" {frames.name}"
    rain = any(word in words.lower() for word in RAIN_WORDS)
    if units in RATES and (rain or units.startswith(("mm", "kg"))):
        return RATES[units]
    if units in DEPTHS and rain and step:
        return 3600 / step
    return None


def _same_units(a: str, b: str) -> bool:
    return a in RATES and b in RATES and RATES[a] == RATES[b]


def _how(units: str, wanted: str) -> str:
    if units in RATES and wanted in RATES:
        return f"times {RATES[units] / RATES[wanted]:g}, and set their attribute units"
    return "or, if they are in these units, set their attribute units"


def _quantiles(frames: xarray.DataArray, axes: Axes, low: float) -> list[float]:
    times = np.unique(np.linspace(0, frames.sizes[axes.time] - 1, LOOKED_AT).astype(int))
    values = np.asarray(frames.isel({axes.time: times}).data).ravel()
    levels = np.quantile(values[values > low], QUANTILES)
    return [float(f"{level:.3g}") for level in levels]


class Changes:
    """Windows for `fit` whose frames to be foretold are told as what is to be added to the last one given."""

    def __init__(self, windows: Windows):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        return self._of(iter(self.windows))

    def __call__(self, epoch: int = 0) -> Iterator[tuple[np.ndarray, ...]]:
        """Return the batches of an epoch."""
        return self._of(self.windows(epoch))

    def _of(self, batches: Iterator[tuple[np.ndarray, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
        for x, y, weighed in batches:
            yield x, y - x[:, -1:], weighed


def weights_of(info: FramesInfo, factor: float) -> Callable[[np.ndarray], Any] | None:
    """Return what weighs pixels for the loss: the more, the more there is; None where all weigh the same."""
    if factor == 0 or info.transform.kind != "log":
        return None
    return lambda frames: 1 + factor * np.square(frames.clip(0)).mean(-1)


def periods(op: str, frames: xarray.DataArray, axes: Axes, window: int, share: float) -> Mapping[str, xarray.DataArray]:
    """Return the frames to train on, those after them for validation, and the last, for verification.

    No frame is in two of them, so no window is.

    Raises
    ------
    ValueError
        Fewer frames than that needs.
    """
    T = frames.sizes[axes.time]
    held = max(window, round(share * T))
    if 2 * held + window > T:
        raise ValueError(f"{op}: {frames.name} has {T} frames, but one forecast is of {window}, and three periods, to "
                         f"train, to validate and to verify, need {3 * window} at least; give more files, or fewer "
                         f"--steps-in and --steps-out")  # fmt: skip
    first, last = T - 2 * held, T - held
    cuts = {"train": slice(None, first), "validation": slice(first, last), "test": slice(last, None)}
    return {name: frames.isel({axes.time: cut}) for name, cut in cuts.items()}

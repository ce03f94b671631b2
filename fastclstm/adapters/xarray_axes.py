"""Which dims of a DataArray are time, space and channels, and which coordinates a result has."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xarray

TIMES = ("time", "valid_time", "t", "step", "lead_time")
CHANNELS = ("channel", "channels", "band", "variable")
ROWS = ("y", "lat", "latitude", "northing", "projection_y_coordinate", "south_north", "height", "row", "rows")
COLUMNS = ("x", "lon", "longitude", "easting", "projection_x_coordinate", "west_east", "width", "col", "cols", "column")
STANDARD = {
    "y": ("latitude", "projection_y_coordinate", "grid_latitude"),
    "x": ("longitude", "projection_x_coordinate", "grid_longitude"),
}
"""Standard names of the CF conventions."""


@dataclass(frozen=True)
class Axes:
    """The dims of sequences of frames: samples, then time, rows, columns and, if there is one, channels."""

    op: str
    samples: tuple[Hashable, ...]
    time: Hashable
    y: Hashable
    x: Hashable
    channel: Hashable | None

    @classmethod
    def of(cls, op: str, frames: Any, time: Any = None, space: Any = None, channel: Any = None) -> Axes:
        """Return the dims of `frames` as told; what is not told is known by usual names, or by the conventions' marks.

        Raises
        ------
        TypeError
            No DataArray.
        ValueError
            A dim that is not there, or one that is not told and not known.
        """
        if isinstance(frames, xarray.Dataset):
            raise TypeError(f"{op}: frames is a Dataset; give one of its variables ({_names(frames.data_vars)}), or "
                            "all as channels: frames.to_dataarray('channel')")  # fmt: skip
        if not isinstance(frames, xarray.DataArray):
            raise TypeError(f"{op}: frames must be an xarray.DataArray, got {type(frames).__name__}; a layer itself "
                            "takes arrays")  # fmt: skip
        if frames.dtype.kind not in "fiub":
            raise TypeError(f"{op}: frames has dtype {frames.dtype} but must hold real numbers")
        told = {"time": time, "channel": channel}
        if space is not None:
            if isinstance(space, str) or not isinstance(space, Sequence) or len(space) != 2:
                raise ValueError(f"{op}: space must be two dims, of rows and of columns, got {space!r}")
            told |= {"y": space[0], "x": space[1]}
        for name, dim in told.items():
            if dim is not None and dim not in frames.dims:
                raise ValueError(f"{op}: {name}={dim!r} is no dim of frames, which has {_names(frames.dims)}")
        known: dict[str, Any] = {name: dim for name, dim in told.items() if dim is not None}
        for name, find in (("time", time_dim), ("y", _rows), ("x", _columns), ("channel", _channel)):
            if name not in known:
                known[name] = find(frames, [dim for dim in frames.dims if dim not in known.values()])
        missing = [name for name in ("time", "y", "x") if known[name] is None]
        if missing:
            raise ValueError(f"{op}: which dim of frames ({_names(frames.dims)}) is {' and '.join(missing)}? Give "
                             f"time='…' and space=('…', '…'), rows and columns")  # fmt: skip
        if len(set(known.values())) < len(known):
            raise ValueError(f"{op}: time, space and channel must be different dims, got {known}")
        samples = tuple(dim for dim in frames.dims if dim not in known.values())
        return cls(op, samples, known["time"], known["y"], known["x"], known["channel"])

    def data(self, frames: xarray.DataArray) -> Any:
        """Return the values (…, T, H, W, C), of NumPy or Dask."""
        last = [] if self.channel is None else [self.channel]
        data = frames.transpose(*self.samples, self.time, self.y, self.x, *last).data
        return data if last else data[..., None]

    def made(
        self, frames: xarray.DataArray, values: Any, kept: int, coords: Mapping[Any, Any] | None = None
    ) -> xarray.DataArray:
        """Return values (samples …, what a network made of each) as a DataArray, coordinates as far as they fit.

        kept: number of axes that are not the samples': time, space and channels; one less without time; time and
        features; features. `coords` replace those of `frames`.
        """
        channel = "channel" if self.channel is None else self.channel
        dims = {4: (self.time, self.y, self.x, channel), 3: (self.y, self.x, channel), 2: (self.time, "feature"),
                1: ("feature",)}[kept]  # fmt: skip
        if dims[-1] == channel and self.channel is None and values.shape[-1] == 1:
            values, dims = values[..., 0], dims[:-1]
        dims = (*self.samples, *dims)
        sizes = dict(zip(dims, values.shape, strict=True))
        new = dict(coords or {})
        fit = {
            name: coord for name, coord in frames.coords.items()
            if name not in new and not set(coord.dims) & set(new)
            and all(sizes.get(dim) == n for dim, n in zip(coord.dims, coord.shape, strict=True))
        }  # fmt: skip
        return xarray.DataArray(values, fit | new, dims, frames.name, frames.attrs)

    def breaks(self, frames: xarray.DataArray, usual: float | None = None) -> np.ndarray:
        """Return where a time does not follow on the one before, as positions: after a gap, or out of order.

        A step may differ from the usual one (None: the median) by up to a half: scans are late, months differ.
        """
        times = frames.sizes[self.time]
        if self.time not in frames.coords or times < 2:
            return np.empty(0, np.intp)
        steps = seconds(frames[self.time].values)
        usual = float(np.median(steps)) if usual is None else usual
        return np.flatnonzero(~(np.abs(steps - usual) <= abs(usual) / 2)) + 1

    def following(self, frames: xarray.DataArray, steps: int) -> dict[Hashable, xarray.DataArray]:
        """Return the coordinate of the `steps` times that follow, in the units and calendar of those before.

        Raises
        ------
        ValueError
            One time alone, or times that are no steps of one size, nor of one frequency such as months.
        """
        if self.time not in frames.coords:
            return {}
        coord, index = frames[self.time], frames.indexes[self.time]
        if len(index) < 2:
            raise ValueError(f"{self.op}: of one time alone ({index[0]}) the step to the next is not known; give more "
                             f"frames, or leave the coordinate {self.time!r} out")  # fmt: skip
        step = index[-1] - index[-2]
        if all(b - a == step for a, b in pairwise(index)) or _is_even(coord.values):
            times: Any = [index[-1] + step * n for n in range(1, steps + 1)]
            values = np.array(times, coord.dtype) if coord.dtype.kind in "Mmfiu" else np.array(times, object)
        else:
            frequency = xarray.infer_freq(coord) if len(index) > 2 else None
            if frequency is None:
                raise ValueError(f"{self.op}: the times of frames are no steps of one size, so those that follow are "
                                 f"not known: {_first_uneven(index)}; select or interpolate even ones")  # fmt: skip
            calendar = getattr(index, "calendar", None)
            options = {} if calendar is None else {"calendar": calendar, "use_cftime": True}
            values = xarray.date_range(index[-1], periods=steps + 1, freq=frequency, **options)[1:]
        made = xarray.DataArray(values, dims=(self.time,), attrs=coord.attrs, name=self.time)
        made.encoding = {key: value for key, value in coord.encoding.items() if key in ("units", "calendar", "dtype")}
        return {self.time: made}


def seconds(times: np.ndarray) -> np.ndarray:
    """Return the steps between times in seconds; of times that are not dates but numbers, in their units."""
    steps = np.diff(times)
    if steps.dtype.kind == "m":
        return steps / np.timedelta64(1, "s")
    return np.array([step.total_seconds() if hasattr(step, "total_seconds") else step for step in steps], float)


def time_dim(frames: xarray.DataArray, dims: Sequence[Hashable]) -> Hashable | None:
    """Return which of `dims` is time, by its coordinate or by its name, if one is."""
    dated = [dim for dim in dims if dim in frames.coords and _is_dated(frames[dim])]
    return _one(dated) if dated else _named(dims, TIMES)


def _rows(frames: xarray.DataArray, dims: Sequence[Hashable]) -> Hashable | None:
    return _spatial(frames, dims, "y", ROWS)


def _columns(frames: xarray.DataArray, dims: Sequence[Hashable]) -> Hashable | None:
    return _spatial(frames, dims, "x", COLUMNS)


def _channel(frames: xarray.DataArray, dims: Sequence[Hashable]) -> Hashable | None:
    return _named(dims, CHANNELS)


def _spatial(frames: xarray.DataArray, dims: Sequence[Hashable], axis: str, names: Sequence[str]) -> Hashable | None:
    marks = {dim: frames[dim].attrs for dim in dims if dim in frames.coords}
    marked = [
        dim for dim, attrs in marks.items()
        if str(attrs.get("axis")).lower() == axis or attrs.get("standard_name") in STANDARD[axis]
    ]  # fmt: skip
    return _one(marked) if marked else _named(dims, names)


def _named(dims: Sequence[Hashable], names: Sequence[str]) -> Hashable | None:
    return next((dim for name in names for dim in dims if str(dim).lower() == name), None)


def _one(dims: Sequence[Hashable]) -> Hashable | None:
    return dims[0] if len(dims) == 1 else None


def _is_dated(coord: xarray.DataArray) -> bool:
    return coord.dtype.kind == "M" or (coord.dtype.kind == "O" and hasattr(coord.to_index(), "calendar"))


def _is_even(values: np.ndarray) -> bool:
    """Whether numbers go up in steps that differ by rounding alone."""
    if values.dtype.kind != "f":
        return False
    steps = np.diff(values)
    return bool(np.allclose(steps, steps[0], rtol=1e-6, atol=0))


def _first_uneven(index: Any) -> str:
    steps = [b - a for a, b in pairwise(index)]
    place = next(n for n, step in enumerate(steps) if step != steps[0])
    return f"{index[0]} to {index[1]}, but {index[place]} to {index[place + 1]}"


def _names(names: Any) -> str:
    return ", ".join(map(repr, names))

"""Networks over DataArrays of xarray: dims, coordinates and attributes go in and come out, and Dask arrays stay lazy.

Which dim is time, rows, columns or channels is told, or known by its name, by the CF conventions' marks or by being
dated; all other dims are samples. Chunks of samples are blocks that are computed independently; chunks of time are
computed one after the other, with the states handed on; chunks of space with as much around them as the network sees,
which is cut off again. All three give what the whole array would; where a network cannot do it, as it sees all steps or
all pixels at once, an error says so before anything is computed. The graph holds the network once.

Missing values are NaN. With ``missing=VALUE`` the network reads VALUE there, steps of which nothing is there are masked
where the network has recurrent layers (they skip them), and pixels that no step has are NaN in the result too, as
outside of a radar's range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import xarray

from fastclstm.adapters.xarray_axes import Axes
from fastclstm.adapters.xarray_samples import is_channels_first, made_of, of_samples
from fastclstm.layers import Layer
from fastclstm.layers.container import parts
from fastclstm.models.forecasting import Forecasting
from fastclstm.models.network import masked, reverses
from fastclstm.models.roll_out import roll_out
from fastclstm.spec import integers

__all__ = ["Windows", "apply", "forecast"]


def apply(
    network: Layer, frames: xarray.DataArray, *, time: Any = None, space: Any = None, channel: Any = None,
    missing: float | None = None,
) -> xarray.DataArray:  # fmt: skip
    """Return what a layer or network makes of frames, with their dims, coordinates, attributes and name.

    Parameters
    ----------
    network : Layer
        Of one array in and out.
    frames : DataArray
        With dims of time, rows and columns, maybe of channels; any others are samples. Held by Dask it stays lazy.
    time, channel : str, optional
        Their dims. None: see the module.
    space : (str, str), optional
        The dims of rows and columns.
    missing : float, optional
        What the network reads where frames is NaN. None: NaN is an error.

    Returns
    -------
    DataArray
        Dims: samples, time, rows, columns and channels, without what the network makes an end of. A dim "channel" is
        new where the network makes several of one; "feature" is what a network without frames at its end makes.
        Coordinates are kept where sizes are.

    Raises
    ------
    TypeError
        No DataArray, no real numbers.
    ValueError
        Dims that are not there or not known, shapes that do not fit the network, NaN without `missing` (of lazy frames
        when they are computed), chunks of time or space that the network needs at once.

    Examples
    --------
    >>> import numpy as np, xarray
    >>> from fastclstm import Conv2D, ConvLSTM2D, Sequential
    >>> network = Sequential([ConvLSTM2D(1, 4, 3, seed=0), Conv2D(4, 1, 1, seed=1)])
    >>> rain = xarray.DataArray(np.ones((6, 8, 8)), {"time": np.arange(6)}, ("time", "y", "x"), "rain")
    >>> apply(network, rain).dims
    ('time', 'y', 'x')
    >>> lazy = apply(network, rain.chunk(time=2, y=4))
    >>> bool(np.allclose(lazy.compute(), apply(network, rain), atol=1e-6))
    True
    """
    op = "apply"
    axes = Axes.of(op, frames, time, space, channel)
    _check(op, network)
    data = axes.data(frames)
    made = made_of(op, network, data.shape[-4:])
    data, valid, seen = _read(op, data, missing, hides=any(masked(network)))
    dtype = np.dtype(getattr(next(iter(network.parameters.values()), data), "dtype", data.dtype))
    if _is_lazy(data):
        from fastclstm.adapters.xarray_blocks import over_blocks

        values = over_blocks(op, network, _run, data, valid, made, dtype)
    else:
        values = _run(network, data, valid)
    if reverses(network) and len(made) in (2, 4):
        values = np.flip(values, values.ndim - len(made))
    if seen is not None and len(made) >= 3 and made[-3:-1] == data.shape[-3:-1]:
        values = _where(seen if len(made) == 4 else seen[..., 0, :, :, :], values)
    return axes.made(frames, values, len(made))


def forecast(
    network: Layer, frames: xarray.DataArray, steps: int, *, time: Any = None, space: Any = None, channel: Any = None,
    missing: float | None = None,
) -> xarray.DataArray:  # fmt: skip
    """Return the `steps` frames that follow, at the times that follow: of the same step, units and calendar.

    Parameters
    ----------
    network : Layer
        An EncoderForecaster, or any that returns the next frame, of all steps or of the last; then each frame made is
        appended to those before it.
    frames, time, space, channel, missing
        As of `apply`; of a Dask array the samples may have chunks, and space for an EncoderForecaster of one scale, in
        whole patches; else time and space are brought into one each.
    steps : int

    Raises
    ------
    TypeError, ValueError
        As of `apply`; times that are no steps of one size.

    Examples
    --------
    >>> import numpy as np, xarray
    >>> from fastclstm import EncoderForecaster
    >>> times = np.datetime64("2026-07-01T12:00") + np.arange(4) * np.timedelta64(5, "m")
    >>> rain = xarray.DataArray(np.zeros((4, 8, 8)), {"time": times}, ("time", "y", "x"), "rain", {"units": "mm/h"})
    >>> made = forecast(EncoderForecaster(1, 2, 3, seed=0), rain, 2)
    >>> str(made.time.values[-1])[:16], made.units
    ('2026-07-01T12:25', 'mm/h')
    """
    op = "forecast"
    axes = Axes.of(op, frames, time, space, channel)
    (steps,) = integers(op, "steps", steps, 1, 1)
    _check(op, network)
    coords = axes.following(frames, steps)
    data, _, seen = _read(op, axes.data(frames), missing, hides=False)
    if _is_lazy(data):
        from fastclstm.adapters.xarray_blocks import over_forecasts

        dtype = next(iter(network.parameters.values())).dtype
        values = over_forecasts(op, network, data, steps, _foretell, dtype)
    else:
        values = _foretell(data, network=network, steps=steps)
    return axes.made(frames, values if seen is None else _where(seen, values), 4, coords)


class Windows:
    """Samples for `fit`, cut out of long sequences: some frames, and those that follow. A batch at a time is in memory.

    It is a function of the epoch, which decides in which order they come, and an iterable of the same in their order.
    With `missing` a batch has weights too: pixels to be foretold that are NaN weigh nothing, in loss and metrics.
    Windows that would bridge a gap in the times are left out.

    Parameters
    ----------
    frames : DataArray
        As of `apply`, held by NumPy, by Dask or in a file.
    length, steps : int
        Frames given, and frames to foretell.
    every : int
        Steps from the start of one window to that of the next.
    batch_size : int
    seed : int, optional
        Of the order, another one in every epoch. None: as they are.
    time, space, channel, missing
        As of `apply`.
    multiple : int or (int, int)
        Frames whose rows and columns are none of these numbers get as many more, at the end, that are missing.
    weigh : function, optional
        From frames to be foretold (B, steps, H, W, C), without NaN, to factors of the pixels' weights (B, steps, H, W):
        such that loss looks at what is rare too. It asks for `missing`.

    Raises
    ------
    TypeError, ValueError
        As of `apply`; fewer frames, or fewer without a gap, than a window has.

    Examples
    --------
    >>> import numpy as np, xarray
    >>> from fastclstm import EncoderForecaster
    >>> rain = xarray.DataArray(np.random.default_rng(0).random((20, 8, 8)), dims=("time", "y", "x"))
    >>> windows = Windows(rain, 4, 2, batch_size=5, seed=0)
    >>> len(windows), [array.shape for array in next(iter(windows))]
    (3, [(5, 4, 8, 8, 1), (5, 2, 8, 8, 1)])
    >>> history = EncoderForecaster(1, 2, 3, seed=0).fit(windows, epochs=2, quiet=True)
    """

    def __init__(
        self, frames: xarray.DataArray, length: int, steps: int, *, every: int = 1, batch_size: int = 8,
        seed: int | None = None, time: Any = None, space: Any = None, channel: Any = None, missing: float | None = None,
        multiple: Any = 1, weigh: Callable[[np.ndarray], Any] | None = None,
    ):  # fmt: skip
        op = "Windows"
        self._axes = Axes.of(op, frames, time, space, channel)
        for name, value in (("length", length), ("steps", steps), ("every", every), ("batch_size", batch_size)):
            integers(op, name, value, 1, 1)
        self._data, self.length, self.steps, self.every = self._axes.data(frames), length, steps, every
        self.batch_size, self.seed, self.missing, self.weigh = batch_size, seed, missing, weigh
        self.multiple = integers(op, "multiple", multiple, 2, 1)
        if missing is None and (weigh is not None or self.multiple != (1, 1)):
            raise ValueError(f"{op}: weigh and multiple ask for weights, which there are with missing=VALUE; give that")
        T = self._data.shape[-4]
        starts: Sequence[int] = range(0, T - length - steps + 1, every)
        if not starts:
            raise ValueError(f"{op}: a window has {length} + {steps} frames, but frames has {T} times")
        broken = np.zeros(T + 1, int)  # how many gaps there are up to each time
        broken[self._axes.breaks(frames)] = 1
        broken = broken.cumsum()
        starts = [start for start in starts if broken[start] == broken[start + length + steps - 1]]
        if not starts:
            raise ValueError(f"{op}: a window has {length} + {steps} frames, but no so many of the {T} times follow on "
                             f"one another without a gap; give shorter windows")  # fmt: skip
        self._places = [(*index, start) for index in np.ndindex(*self._data.shape[:-4]) for start in starts]

    def __len__(self) -> int:
        return -(-len(self._places) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        return self._batches(range(len(self._places)))

    def __call__(self, epoch: int = 0) -> Iterator[tuple[np.ndarray, ...]]:
        """Return the batches of an epoch."""
        if self.seed is None:
            return iter(self)
        return self._batches(np.random.default_rng([self.seed, epoch]).permutation(len(self._places)))

    def _batches(self, order: Any) -> Iterator[tuple[np.ndarray, ...]]:
        for first in range(0, len(order), self.batch_size):
            places = [self._places[n] for n in order[first : first + self.batch_size]]
            cut = [self._data[(*index, slice(start, start + self.length + self.steps))] for *index, start in places]
            if _is_lazy(self._data):
                import dask

                cut = dask.compute(*cut)
            films = padded(np.stack([np.asarray(film) for film in cut]), self.multiple)
            x, y = films[:, : self.length], films[:, self.length :]
            if self.missing is None:
                _refuse_nan("Windows", films)
                yield x, y
            else:
                weights = np.isfinite(y).all(-1).astype(y.dtype if y.dtype.kind == "f" else np.float32)
                y = _filled(y, self.missing)
                if self.weigh is not None:
                    weights = (weights * self.weigh(y)).astype(weights.dtype)
                yield _filled(x, self.missing), y, weights


def padded(films: np.ndarray, multiple: Sequence[int]) -> np.ndarray:
    """Return films (…, H, W, C) whose H and W are multiples of two numbers: what is new is NaN, at the end."""
    more = [-n % m for n, m in zip(films.shape[-3:-1], multiple, strict=True)]
    if not any(more):
        return films
    kind = films if films.dtype.kind == "f" else films.astype(np.float32)
    return np.pad(kind, [*[(0, 0)] * (films.ndim - 3), *((0, n) for n in more), (0, 0)], constant_values=np.nan)


def _check(op: str, network: Any) -> None:
    if not isinstance(network, Layer):
        raise TypeError(f"{op}: network must be a layer or network of fastclstm, got {type(network).__name__}")
    if op == "apply" and isinstance(network, Forecasting):
        raise TypeError("apply: a forecaster is to be told how many frames to make; call forecast")
    if why := network._several_outputs():
        raise ValueError(f"{op}: {type(network).__name__} returns more than one array; {why}")
    if any(getattr(part, "time_major", False) for part in parts(network)):
        raise ValueError(f"{op}: the network has time_major layers; set time_major=False")


def _read(op: str, data: Any, missing: float | None, *, hides: bool) -> tuple[Any, Any, Any]:
    """Return data (…, T, H, W, C) without NaN, which steps are there, and which pixels any step has.

    The steps as (…, T, 1, 1, 1), the pixels as (…, 1, H, W, 1), or None where all count.
    """
    frames = tuple(range(data.ndim - 3, data.ndim))
    if data.dtype.kind != "f":
        return data, (data[..., :1, :1, :1] == data[..., :1, :1, :1]), None
    if missing is None:
        if _is_lazy(data):
            checked = data.map_blocks(_checked, op=op, dtype=data.dtype, meta=np.empty((0,) * data.ndim, data.dtype))
        else:
            checked = _checked(data, op=op)
        return checked, np.ones_like(data[..., :1, :1, :1], dtype=bool), None
    there = ~np.isnan(data)
    valid = there.any(frames, keepdims=True)
    if not hides:
        valid = np.ones_like(valid)
    seen = there.any((data.ndim - 4, data.ndim - 1), keepdims=True)
    return _filled(data, missing), valid, seen


def _filled(data: Any, value: float) -> Any:
    """Return data with a value where it is NaN."""
    return np.where(np.isnan(data), data.dtype.type(value), data)


def _where(seen: Any, values: Any) -> Any:
    """Return values, NaN where nothing was seen."""
    return np.where(seen, values, values.dtype.type(np.nan))


def _checked(data: np.ndarray, *, op: str) -> np.ndarray:
    _refuse_nan(op, data)
    return data


def _refuse_nan(op: str, data: np.ndarray) -> None:
    count = int(np.isnan(data).sum()) if data.dtype.kind == "f" else 0
    if count:
        raise ValueError(f"{op}: {count} of {data.size} values are NaN; missing=VALUE is what the network reads there, "
                         f"such as missing=0.0")  # fmt: skip


def _run(network: Layer, block: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return what a network makes of each sample of a block (…, T, H, W, C)."""
    options: dict[str, Any] = {} if valid.all() else {"mask": valid.reshape(-1, valid.shape[-4])}
    return of_samples(is_channels_first(network), block, lambda x: network(x, **options))


def _foretell(block: np.ndarray, *, network: Layer, steps: int) -> np.ndarray:
    return of_samples(is_channels_first(network), block, lambda x: roll_out(network, x, steps))


def _is_lazy(data: Any) -> bool:
    return hasattr(data, "__dask_graph__")

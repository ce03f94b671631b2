"""Pooling of frames, and over everything between batch and channels."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch, functional
from fastclstm.layers.array_layer import ArrayLayer, FrameLayer, Pullback
from fastclstm.spec import DATA_FORMATS, PoolSpec, Shape, choice, flag, integers


@dataclass(eq=False, repr=False)
class _Pooling2D(FrameLayer):
    """The options of both poolings of frames."""

    pool_size: Any = (2, 2)
    stride: Any = None
    _: KW_ONLY
    padding: Any = "valid"
    ceil_mode: bool = False
    data_format: str = "channels_last"

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        flag(op, "ceil_mode", self.ceil_mode)
        self.pool_size = integers(op, "pool_size", self.pool_size, 2, 1)
        if self.stride is not None:
            self.stride = integers(op, "stride", self.stride, 2, 1)
        if isinstance(self.padding, tuple) and len(self.padding) != 2:
            raise ValueError(f"{op}: padding must be 'same', 'valid', an int, 2 ints or 2 pairs, got {self.padding!r}")
        self._geometry((1, *self.pool_size, 1))  # wrong options are errors now, not at the first call

    def _frame_shape(self, frame: Shape) -> Shape:
        return self._geometry((1, *frame)).output_shape[2:]

    def _geometry(self, shape: Shape) -> PoolSpec:
        """Return the geometry, with one time step, for frames (N, H, W, C)."""
        N, H, W, C = shape
        return PoolSpec.infer((N, 1, H, W, C), **self._options(), op=type(self).__name__)

    def _options(self) -> dict[str, Any]:
        """Options of `functional.max_pool3d` for frames that are volumes of one time step."""
        padding = self.padding
        if not isinstance(padding, str):
            padding = (0, *(padding if isinstance(padding, tuple) else (padding, padding)))
        return {
            "pool_size": (1, *self.pool_size),
            "strides": None if self.stride is None else (1, *self.stride),
            "padding": padding,
            "ceil_mode": self.ceil_mode,
        }


@dataclass(eq=False, repr=False)
class MaxPooling2D(_Pooling2D):
    """Maximum over windows of frames: (B, H, W, C) to (B, HO, WO, C), or of sequences of them, frame by frame.

    Valid: ``HO = (H − p) // s + 1``; same: ``HO = ceil(H / s)``. NaN wins its window; of equal values the first in
    (h, w) order takes the gradient.

    Parameters
    ----------
    pool_size : int or (int, int)
        The window on height and width.
    stride : int or (int, int), optional
        None: the window itself. Smaller strides overlap.
    padding : "valid", "same", int, (int, int) or ((top, bottom), (left, right))
        Padded positions never win.
    ceil_mode : bool
        Keep a last, partial window that starts inside the input.
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, H, W) and (B, T, C, H, W).
    engine : str, optional
        "cpu" (the default), "cuda" or "reference". None: where x is.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> MaxPooling2D(engine="reference")(np.arange(16.0).reshape(1, 4, 4, 1)).ravel()
    array([ 5.,  7., 13., 15.])
    """

    _: KW_ONLY
    engine: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        dispatch.check_engine(self.engine)

    def _knows_gpu(self, training: bool) -> bool:
        return True

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        volumes, options = x[:, np.newaxis], self._options() | {"engine": self.engine}
        if not training:  # which needs no indices
            return functional.max_pool3d(volumes, **options)[:, 0], lambda dy: dy
        y, pull = functional.max_pool3d_vjp(volumes, **options)
        return y[:, 0], lambda dy: pull(dy[:, np.newaxis])["x"][:, 0]


@dataclass(eq=False, repr=False)
class AveragePooling2D(_Pooling2D):
    """Mean over windows of frames; what is padded does not count.

    Parameters
    ----------
    pool_size, stride, padding, ceil_mode, data_format
        As in `MaxPooling2D`.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> AveragePooling2D()(np.arange(16.0).reshape(1, 4, 4, 1)).ravel()
    array([ 2.5,  4.5, 10.5, 12.5])
    """

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        spec = self._geometry(x.shape)
        counts = np.zeros((1, spec.HO, spec.WO, 1), x.dtype)
        for tap in _taps(spec, _surround(spec, np.ones((1, spec.H, spec.W, 1), x.dtype))):
            counts += tap
        sums = np.zeros((len(x), spec.HO, spec.WO, spec.C))  # in float64, as those of large float32 overflow
        for tap in _taps(spec, _surround(spec, x)):
            sums += tap

        def pullback(dy: np.ndarray) -> np.ndarray:
            share, dx = dy / counts, _surround(spec, np.zeros_like(x))
            for tap in _taps(spec, dx):
                tap += share
            _, (top, _), (left, _) = spec.padding
            return np.ascontiguousarray(dx[:, top : top + spec.H, left : left + spec.W])

        return (sums / counts).astype(x.dtype, copy=False), pullback


@dataclass(eq=False, repr=False)
class _GlobalPooling(ArrayLayer):
    """The options of both global poolings."""

    data_format: str = "channels_last"
    _: KW_ONLY
    keep_dims: bool = False
    channel_axis: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        flag(op, "keep_dims", self.keep_dims)
        if self.channel_axis is not None:
            try:
                self.channel_axis = operator.index(self.channel_axis)
            except TypeError:
                raise TypeError(f"{op}: channel_axis must be an integer or None, got {self.channel_axis!r}") from None

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return the shape of the output for an x of `input_shape`; raise ValueError where that does not fit."""
        axes = self._axes(input_shape)
        if any(input_shape[axis] < 1 for axis in axes):
            raise ValueError(f"{type(self).__name__}: x of shape {tuple(input_shape)} has no pixels")
        return tuple(1 if axis in axes else n for axis, n in enumerate(input_shape)
                     if self.keep_dims or axis not in axes)  # fmt: skip

    def _axes(self, shape: Sequence[int]) -> Shape:
        """Return the axes between batch and channels."""
        rank, first = len(shape), self.data_format == "channels_first"
        given = self.channel_axis
        axis = given if given is not None else -3 if first else -1
        if rank < 3 or (given is None and first and rank not in (4, 5)) or not -rank < axis < rank or axis == 0:
            axes = "(batch, …, channels) with at least one axis between"
            if given is not None:
                axes = f"of at least 3 axes, the first that of the batch and channel_axis={given} another one"
            elif first:
                axes = ("(batch, channels, height, width) or (batch, time, channels, height, width), or, with "
                        "channel_axis=1, (batch, channels, time, height, width)")  # fmt: skip
            raise ValueError(f"{type(self).__name__}: x must be {axes}; got {rank}D {tuple(shape)}")
        return tuple(other for other in range(1, rank) if other != axis % rank)


@dataclass(eq=False, repr=False)
class GlobalAveragePooling(_GlobalPooling):
    """Mean over all axes between batch and channels: (B, …, C) to (B, C).

    Parameters
    ----------
    data_format : "channels_last" or "channels_first"
        The latter: frames (B, C, H, W) and sequences of them (B, T, C, H, W).
    keep_dims : bool
        Keep those axes, with size 1.
    channel_axis : int, optional
        Where the channels are, whatever data_format says: 1 for the channels-first volumes (B, C, T, H, W) of Conv3D
        and MaxPooling3D.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> GlobalAveragePooling()(np.arange(8.0).reshape(1, 2, 2, 2))
    array([[3., 4.]])
    """

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        axes = self._axes(x.shape)
        y = x.mean(axes, keepdims=True, dtype=np.float64).astype(x.dtype)
        count = math.prod(x.shape[axis] for axis in axes)
        return y.reshape(self.output_shape(x.shape)), lambda dy: np.ascontiguousarray(
            np.broadcast_to(dy.reshape(y.shape) / count, x.shape)
        )


@dataclass(eq=False, repr=False)
class GlobalMaxPooling(_GlobalPooling):
    """Maximum over all axes between batch and channels: (B, …, C) to (B, C).

    NaN wins; of equal values the first takes the gradient.

    Parameters
    ----------
    data_format, keep_dims, channel_axis
        As in `GlobalAveragePooling`.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> GlobalMaxPooling()(np.arange(8.0).reshape(1, 2, 2, 2))
    array([[6., 7.]])
    """

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        axes = self._axes(x.shape)
        last = np.moveaxis(x, [axis for axis in range(x.ndim) if axis not in axes], [0, 1])  # batch, channels, pixels
        flat = last.reshape(*last.shape[:2], math.prod(last.shape[2:]))
        winner = flat.argmax(-1)[..., np.newaxis]

        def pullback(dy: np.ndarray) -> np.ndarray:
            dx = np.zeros(x.shape, x.dtype)
            pixels = np.unravel_index(winner[..., 0], last.shape[2:])
            B, C = np.indices(winner.shape[:2])
            np.moveaxis(dx, [axis for axis in range(x.ndim) if axis not in axes], [0, 1])[B, C, *pixels] = dy.reshape(
                winner.shape[:2]
            )
            return dx

        return np.take_along_axis(flat, winner, -1).reshape(self.output_shape(x.shape)), pullback


def _surround(spec: PoolSpec, frames: np.ndarray) -> np.ndarray:
    """Surround frames (N, H, W, C) by zeros as far as the windows reach."""
    pads = [
        (before, max((count - 1) * s + k - n - before, 0))
        for count, s, k, n, (before, _) in zip(
            (spec.HO, spec.WO), spec.strides[1:], spec.pool_size[1:], (spec.H, spec.W), spec.padding[1:], strict=True
        )
    ]
    return np.pad(frames, ((0, 0), *pads, (0, 0)))


def _taps(spec: PoolSpec, frames: np.ndarray) -> Iterator[np.ndarray]:
    """Yield views (N, HO, WO, C) of surrounded frames: the first pixel of every window, the second, …."""
    _, sh, sw = spec.strides
    for h, w in np.ndindex(spec.pool_size[1:]):
        yield frames[:, h::sh, w::sw][:, : spec.HO, : spec.WO]

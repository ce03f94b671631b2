"""Larger frames and volumes: repeated or interpolated pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.layers.array_layer import FrameLayer, Pullback, VolumeLayer
from fastclstm.spec import DATA_FORMATS, Shape, choice, flag, integers

INTERPOLATIONS = {2: ("nearest", "bilinear"), 3: ("nearest", "trilinear")}


@dataclass(eq=False, repr=False)
class _UpSampling(FrameLayer):
    """The options of both."""

    size: Any = 2
    interpolation: str = "nearest"
    _: KW_ONLY
    align_corners: bool = False
    data_format: str = "channels_last"

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        self.size = integers(op, "size", self.size, self._rank, 1)
        choice(op, "interpolation", self.interpolation, INTERPOLATIONS[self._rank])
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        flag(op, "align_corners", self.align_corners)
        if self.align_corners and self.interpolation == "nearest":
            raise ValueError(f"{op}: align_corners=True needs interpolation={INTERPOLATIONS[self._rank][1]!r}, got "
                             f"'nearest'")  # fmt: skip

    def _frame_shape(self, frame: Shape) -> Shape:
        return (*(n * factor for n, factor in zip(frame, self.size, strict=False)), frame[-1])

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        if self.interpolation == "nearest":
            stretch, squeeze = _repeat, _sum_repeated
        elif self.align_corners:
            stretch, squeeze = _between_corners, _between_corners_back
        else:
            stretch, squeeze = _interpolate, _interpolate_back
        axes = [(axis, factor) for axis, factor in enumerate(self.size, 1) if factor > 1]

        def along(function: Callable[..., np.ndarray], array: np.ndarray) -> np.ndarray:
            for axis, factor in axes:
                array = function(array, axis, factor)
            return array if axes else array.copy()

        return along(stretch, x), lambda dy: along(squeeze, dy)


@dataclass(eq=False, repr=False)
class UpSampling(_UpSampling):
    """Frames made larger by whole factors: (B, H, W, C) to (B, H·sh, W·sw, C), or sequences of them, frame by frame.

    Its name in Keras, UpSampling2D, stands for it too.

    Parameters
    ----------
    size : int or (int, int)
        The factors of height and width.
    interpolation : "nearest" or "bilinear"
        Repeat every pixel, or interpolate between the pixels' centres, the border pixels being continued outwards (as
        Keras does, and PyTorch with ``align_corners=False``).
    align_corners : bool
        With "bilinear": the centres of the first and of the last pixel stay where they are, and the others lie evenly
        between, as PyTorch's ``align_corners=True``.
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, H, W) and (B, T, C, H, W).

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([0.0, 4.0]).reshape(1, 1, 2, 1)
    >>> UpSampling((1, 2), "bilinear")(x).ravel()
    array([0., 1., 3., 4.])
    >>> UpSampling((1, 2), "bilinear", align_corners=True)(x).ravel().round(2)
    array([0.  , 1.33, 2.67, 4.  ])
    """

    size: Any = (2, 2)


UpSampling2D = UpSampling


@dataclass(eq=False, repr=False)
class UpSampling3D(VolumeLayer, _UpSampling):
    """Volumes made larger by whole factors: (B, T, H, W, C) to (B, T·st, H·sh, W·sw, C).

    Parameters
    ----------
    size : int or (int, int, int)
        The factors of time, height and width.
    interpolation : "nearest" or "trilinear"
        As in `UpSampling`, on all three axes.
    align_corners : bool
        As in `UpSampling`.
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, T, H, W), other than layers of frames, whose sequences are (B, T, C, H, W).

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> UpSampling3D((2, 1, 2))(np.zeros((1, 3, 4, 4, 2))).shape
    (1, 6, 4, 8, 2)
    """

    size: Any = (2, 2, 2)


def _repeat(x: np.ndarray, axis: int, factor: int) -> np.ndarray:
    """Repeat every element along an axis."""
    return x.repeat(factor, axis)


def _sum_repeated(dy: np.ndarray, axis: int, factor: int) -> np.ndarray:
    """Pull dy back through `_repeat`."""
    return dy.reshape(*dy.shape[:axis], dy.shape[axis] // factor, factor, *dy.shape[axis + 1 :]).sum(axis + 1)


def _interpolate(x: np.ndarray, axis: int, factor: int) -> np.ndarray:
    """Interpolate linearly along an axis; each input element has `factor` output elements, centred on it."""
    x = np.moveaxis(x, axis, 0)
    y = np.empty((len(x) * factor, *x.shape[1:]), x.dtype)
    for phase, offset in enumerate(_offsets(factor)):
        near, far = x.dtype.type(1 - abs(offset)), x.dtype.type(abs(offset))
        y[phase::factor] = near * x
        if offset:  # else no neighbour counts, be it NaN
            y[phase::factor] += far * _neighbours(x, offset)
    return np.moveaxis(y, 0, axis)


def _interpolate_back(dy: np.ndarray, axis: int, factor: int) -> np.ndarray:
    """Pull dy back through `_interpolate`: its transpose."""
    dy = np.moveaxis(dy, axis, 0)
    dx = np.zeros((len(dy) // factor, *dy.shape[1:]), dy.dtype)
    for phase, offset in enumerate(_offsets(factor)):
        near, far = dy.dtype.type(1 - abs(offset)), dy.dtype.type(abs(offset))
        part = dy[phase::factor]
        dx += near * part
        if offset < 0:
            dx[:-1] += far * part[1:]
            dx[:1] += far * part[:1]
        elif offset > 0:
            dx[1:] += far * part[:-1]
            dx[-1:] += far * part[-1:]
    return np.ascontiguousarray(np.moveaxis(dx, 0, axis))


def _neighbours(x: np.ndarray, offset: float) -> np.ndarray:
    """Return the element before each (offset < 0) or after it; the border ones are their own neighbours."""
    return np.concatenate([x[:1], x[:-1]] if offset < 0 else [x[1:], x[-1:]])


def _offsets(factor: int) -> list[float]:
    """Return where the outputs of an input element lie from its centre, in units of the input's spacing."""
    return [(phase + 0.5) / factor - 0.5 for phase in range(factor)]


def _between_corners(x: np.ndarray, axis: int, factor: int) -> np.ndarray:
    """Interpolate linearly along an axis, to as many times as many elements, the first and last being those of x."""
    x = np.moveaxis(x, axis, 0)
    low, share = _corners(len(x), factor, x)
    high = np.minimum(low + 1, len(x) - 1)
    y = np.where(share == 0, x[low], (1 - share) * x[low] + share * x[high])  # 0 · NaN would be NaN
    return np.ascontiguousarray(np.moveaxis(y, 0, axis))


def _between_corners_back(dy: np.ndarray, axis: int, factor: int) -> np.ndarray:
    """Pull dy back through `_between_corners`: its transpose."""
    dy = np.moveaxis(dy, axis, 0)
    count = len(dy) // factor
    low, share = _corners(count, factor, dy)
    starts = np.searchsorted(low, np.arange(count))  # every element of x is the lower one of some
    dx = np.add.reduceat((1 - share) * dy, starts, 0)
    dx[1:] += np.add.reduceat(np.where(share == 0, 0, share * dy), starts, 0)[:-1]
    return np.ascontiguousarray(np.moveaxis(dx, 0, axis))


def _corners(count: int, factor: int, like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each output element the input element before it, and its distance from there, to broadcast."""
    numerator = np.arange(count * factor) * (count - 1)
    low, rest = np.divmod(numerator, count * factor - 1)
    share = (rest / (count * factor - 1)).astype(like.real.dtype)
    return low, share.reshape(-1, *(1,) * (like.ndim - 1))

"""Larger frames: repeated or interpolated pixels, and zeros around."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.layers.array_layer import FrameLayer, Pullback
from fastclstm.spec import DATA_FORMATS, Shape, choice, integers

INTERPOLATIONS = ("nearest", "bilinear")


@dataclass(eq=False, repr=False)
class UpSampling(FrameLayer):
    """Frames made larger by whole factors: (B, H, W, C) to (B, H·sh, W·sw, C), or sequences of them, frame by frame.

    Parameters
    ----------
    size : int or (int, int)
        The factors of height and width.
    interpolation : "nearest" or "bilinear"
        Repeat every pixel, or interpolate between the pixels' centres, the border pixels being continued outwards (as
        Keras does, and PyTorch with ``align_corners=False``).
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, H, W) and (B, T, C, H, W).

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> UpSampling((1, 2), "bilinear")(np.array([0.0, 4.0]).reshape(1, 1, 2, 1)).ravel()
    array([0., 1., 3., 4.])
    """

    size: Any = (2, 2)
    interpolation: str = "nearest"
    _: KW_ONLY
    data_format: str = "channels_last"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.size = integers("UpSampling", "size", self.size, 2, 1)
        choice("UpSampling", "interpolation", self.interpolation, INTERPOLATIONS)
        choice("UpSampling", "data_format", self.data_format, DATA_FORMATS)

    def _frame_shape(self, frame: Shape) -> Shape:
        H, W, C = frame
        return H * self.size[0], W * self.size[1], C

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        stretch, squeeze = _FUNCTIONS[self.interpolation]
        y = stretch(stretch(x, 1, self.size[0]), 2, self.size[1])
        return y, lambda dy: squeeze(squeeze(dy, 2, self.size[1]), 1, self.size[0])


@dataclass(eq=False, repr=False)
class ZeroPadding2D(FrameLayer):
    """Zeros around frames: (B, H, W, C) to (B, top + H + bottom, left + W + right, C), or sequences of them.

    Parameters
    ----------
    padding : int, (int, int) or ((top, bottom), (left, right))
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, H, W) and (B, T, C, H, W).

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> ZeroPadding2D((0, 1))(np.ones((1, 1, 1, 1))).ravel()
    array([0., 1., 0.])
    """

    padding: Any = 1
    _: KW_ONLY
    data_format: str = "channels_last"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("ZeroPadding2D", "data_format", self.data_format, DATA_FORMATS)
        pair = self.padding if isinstance(self.padding, tuple) else (self.padding, self.padding)
        if len(pair) != 2:
            raise ValueError(f"ZeroPadding2D: padding must be an int, 2 ints or 2 pairs of ints, got {self.padding!r}")
        self._pads = [
            integers("ZeroPadding2D", f"padding of the {axis}", item, 2, 0)
            for axis, item in zip(("height", "width"), pair, strict=True)
        ]

    def _frame_shape(self, frame: Shape) -> Shape:
        H, W, C = frame
        return H + sum(self._pads[0]), W + sum(self._pads[1]), C

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        (top, bottom), (left, right) = self._pads
        _, H, W, _ = x.shape
        y = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
        return y, lambda dy: np.ascontiguousarray(dy[:, top : top + H, left : left + W])


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


_Axiswise = Callable[[np.ndarray, int, int], np.ndarray]
_FUNCTIONS: dict[str, tuple[_Axiswise, _Axiswise]] = {
    "nearest": (_repeat, _sum_repeated),
    "bilinear": (_interpolate, _interpolate_back),
}

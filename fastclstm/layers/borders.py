"""Zeros around frames and volumes, and borders cut off them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np

from fastclstm.layers.array_layer import FrameLayer, Pullback, VolumeLayer
from fastclstm.spec import DATA_FORMATS, Shape, choice, integers

_AXES = {2: ("height", "width"), 3: ("time", "height", "width")}


@dataclass(eq=False, repr=False)
class _Borders(FrameLayer):
    """What all have: amounts (before, after) of each axis."""

    _amounts: ClassVar[str]
    """Name of the option that holds them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        op, name, count = type(self).__name__, self._amounts, self._rank
        choice(op, "data_format", self.options["data_format"], DATA_FORMATS)
        given = self.options[name]
        items = given if isinstance(given, tuple) else (given,) * count
        if len(items) != count:
            raise ValueError(f"{op}: {name} must be an int, {count} ints or {count} pairs of ints, got {given!r}")
        self._pairs = [
            integers(op, f"{name} of the {axis}", item, 2, 0)
            for axis, item in zip(_AXES[count], items, strict=True)
        ]  # fmt: skip

    def _add(self, x: np.ndarray) -> np.ndarray:
        """Surround frames by zeros."""
        return np.pad(x, ((0, 0), *self._pairs, (0, 0)))

    def _cut(self, x: np.ndarray) -> np.ndarray:
        """Cut the borders off frames."""
        sizes = x.shape[1:-1]
        inner = tuple(slice(before, n - after) for n, (before, after) in zip(sizes, self._pairs, strict=True))
        return np.ascontiguousarray(x[(slice(None), *inner)])


@dataclass(eq=False, repr=False)
class _ZeroPadding(_Borders):
    padding: Any = 1
    _: KW_ONLY
    data_format: str = "channels_last"

    _amounts = "padding"

    def _frame_shape(self, frame: Shape) -> Shape:
        return (*(n + sum(pair) for n, pair in zip(frame, self._pairs, strict=False)), frame[-1])

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        return self._add(x), self._cut


@dataclass(eq=False, repr=False)
class _Cropping(_Borders):
    cropping: Any = 1
    _: KW_ONLY
    data_format: str = "channels_last"

    _amounts = "cropping"

    def _frame_shape(self, frame: Shape) -> Shape:
        sizes = [n - sum(pair) for n, pair in zip(frame, self._pairs, strict=False)]
        for axis, n, left in zip(_AXES[self._rank], frame, sizes, strict=False):
            if left < 1:
                raise ValueError(
                    f"{type(self).__name__}: cropping {self.cropping!r} leaves nothing of the {axis} of {n}"
                )
        return (*sizes, frame[-1])

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        return self._cut(x), self._add


@dataclass(eq=False, repr=False)
class ZeroPadding2D(_ZeroPadding):
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


@dataclass(eq=False, repr=False)
class ZeroPadding3D(VolumeLayer, _ZeroPadding):
    """Zeros around volumes (B, T, H, W, C).

    Parameters
    ----------
    padding : int, (int, int, int) or three pairs (before, after)
        Of time, height and width.
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, T, H, W), other than layers of frames, whose sequences are (B, T, C, H, W).

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> ZeroPadding3D((1, 0, 0))(np.ones((1, 1, 1, 1, 1))).ravel()
    array([0., 1., 0.])
    """


@dataclass(eq=False, repr=False)
class Cropping2D(_Cropping):
    """Frames without their borders: (B, H, W, C) to (B, H − top − bottom, W − left − right, C), or sequences of them.

    Parameters
    ----------
    cropping : int, (int, int) or ((top, bottom), (left, right))
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, H, W) and (B, T, C, H, W).

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> Cropping2D(((1, 0), (0, 2)))(np.zeros((1, 5, 5, 3))).shape
    (1, 4, 3, 3)
    """


@dataclass(eq=False, repr=False)
class Cropping3D(VolumeLayer, _Cropping):
    """Volumes (B, T, H, W, C) without their borders.

    Parameters
    ----------
    cropping : int, (int, int, int) or three pairs (before, after)
        Of time, height and width.
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, T, H, W), other than layers of frames, whose sequences are (B, T, C, H, W).

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> Cropping3D(((2, 0), (0, 0), (0, 0)))(np.zeros((1, 5, 4, 4, 3))).shape
    (1, 3, 4, 4, 3)
    """

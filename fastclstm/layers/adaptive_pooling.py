"""Pooling to frames of a given size."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.layers.array_layer import FrameLayer, Pullback
from fastclstm.spec import DATA_FORMATS, Shape, choice, integers


@dataclass(eq=False, repr=False)
class AdaptiveAveragePooling2D(FrameLayer):
    """Means that make frames of a given size: (B, H, W, C) to (B, HO, WO, C), or sequences of them, frame by frame.

    Output row i is the mean of the rows from ``floor(i·H / HO)`` up to ``ceil((i + 1)·H / HO)``, likewise columns: as
    PyTorch's AdaptiveAvgPool2d.

    Parameters
    ----------
    output_size : int or (int or None, int or None)
        HO and WO; None: H or W itself.
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, H, W) and (B, T, C, H, W).

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> AdaptiveAveragePooling2D((None, 2))(np.arange(3.0).reshape(1, 1, 3, 1)).ravel()
    array([0.5, 1.5])
    """

    output_size: Any
    _: KW_ONLY
    data_format: str = "channels_last"

    def __post_init__(self) -> None:
        super().__post_init__()
        op, given = "AdaptiveAveragePooling2D", self.output_size
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        sizes = integers(op, "output_size", tuple(1 if n is None else n for n in given) if isinstance(given, tuple)
                         else given, 2, 1)  # fmt: skip
        nones = given if isinstance(given, tuple) else sizes
        self.output_size = tuple(None if none is None else n for n, none in zip(sizes, nones, strict=True))

    def _frame_shape(self, frame: Shape) -> Shape:
        H, W, C = frame
        if min(H, W) < 1:
            raise ValueError(f"AdaptiveAveragePooling2D: frames of {H} × {W} have no pixels")
        HO, WO = (n if size is None else size for n, size in zip((H, W), self.output_size, strict=True))
        return HO, WO, C

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        precise = np.result_type(x, np.float64)
        y = x.astype(precise, copy=False)
        for axis, count in enumerate(self._frame_shape(x.shape[1:])[:2], 1):
            rows = np.moveaxis(y, axis, 0)
            means = np.empty((count, *rows.shape[1:]), precise)
            for row, (start, stop) in enumerate(_windows(len(rows), count)):
                means[row] = rows[start:stop].mean(0)
            y = np.moveaxis(means, 0, axis)

        def pullback(dy: np.ndarray) -> np.ndarray:
            dx = dy.astype(precise, copy=False)
            for axis in (1, 2):
                means = np.moveaxis(dx, axis, 0)
                rows = np.zeros((x.shape[axis], *means.shape[1:]), precise)
                for row, (start, stop) in enumerate(_windows(len(rows), len(means))):
                    rows[start:stop] += means[row] / (stop - start)
                dx = np.moveaxis(rows, 0, axis)
            return np.ascontiguousarray(dx, dy.dtype)

        return np.ascontiguousarray(y, x.dtype), pullback


def _windows(size: int, count: int) -> list[tuple[int, int]]:
    """Return (start, stop) of what each of `count` outputs is the mean of."""
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]

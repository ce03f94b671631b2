"""Pooling over windows of frames, and the mean over those of volumes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch, functional
from fastclstm.layers.array_layer import FrameLayer, Pullback, VolumeLayer
from fastclstm.spec import DATA_FORMATS, PoolSpec, Shape, choice, flag, integers


@dataclass(eq=False, repr=False)
class _Pooling(FrameLayer):
    """The options of all poolings over windows."""

    pool_size: Any = 2
    stride: Any = None
    _: KW_ONLY
    padding: Any = "valid"
    ceil_mode: bool = False
    data_format: str = "channels_last"

    def __post_init__(self) -> None:
        super().__post_init__()
        op, count = type(self).__name__, self._rank
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        flag(op, "ceil_mode", self.ceil_mode)
        self.pool_size = integers(op, "pool_size", self.pool_size, count, 1)
        if self.stride is not None:
            self.stride = integers(op, "stride", self.stride, count, 1)
        if isinstance(self.padding, tuple) and len(self.padding) != count:
            raise ValueError(f"{op}: padding must be 'same', 'valid', an int, {count} ints or {count} pairs, got "
                             f"{self.padding!r}")  # fmt: skip
        self._geometry((*self.pool_size, 1))  # wrong options are errors now, not at the first call

    def _frame_shape(self, frame: Shape) -> Shape:
        return self._geometry(frame).output_shape[-len(frame) :]

    def _geometry(self, frame: Shape) -> PoolSpec:
        """Return the geometry for frames (H, W, C), which are volumes of one time step, or volumes (T, H, W, C)."""
        return PoolSpec.infer((1, *(1,) * (3 - self._rank), *frame), **self._options(), op=type(self).__name__)

    def _options(self) -> dict[str, Any]:
        """Options of `functional.max_pool3d`, for volumes."""
        padding, window, stride = self.padding, self.pool_size, self.stride
        if self._rank == 2:
            if not isinstance(padding, str):
                padding = (0, *(padding if isinstance(padding, tuple) else (padding, padding)))
            window, stride = (1, *window), None if stride is None else (1, *stride)
        return {"pool_size": window, "strides": stride, "padding": padding, "ceil_mode": self.ceil_mode}


@dataclass(eq=False, repr=False)
class MaxPooling2D(_Pooling):
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

    pool_size: Any = (2, 2)
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
class _AveragePooling(_Pooling):
    _: KW_ONLY
    count_include_pad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag(type(self).__name__, "count_include_pad", self.count_include_pad)

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        spec = self._geometry(x.shape[1:])
        volumes = x.reshape(len(x), spec.T, *x.shape[-3:])
        counts = np.zeros((1, spec.TO, spec.HO, spec.WO, 1), x.dtype)
        pads = spec.padding if self.count_include_pad else ((0, 0),) * 3
        counted = np.pad(np.ones((1, spec.T, spec.H, spec.W, 1), x.dtype), ((0, 0), *pads, (0, 0)), constant_values=1)
        for tap in _taps(spec, _surround(spec, counted, inside=self.count_include_pad)):
            counts += tap
        sums = np.zeros((len(x), *counts.shape[1:4], spec.C), np.result_type(x, np.float64))  # float32 might overflow
        for tap in _taps(spec, _surround(spec, volumes)):
            sums += tap

        def pullback(dy: np.ndarray) -> np.ndarray:
            share, dx = dy.reshape(sums.shape) / counts, _surround(spec, np.zeros_like(volumes))
            for tap in _taps(spec, dx):
                tap += share
            sizes = zip((spec.T, spec.H, spec.W), spec.padding, strict=True)
            inner = tuple(slice(before, before + n) for n, (before, _) in sizes)
            return np.ascontiguousarray(dx[(slice(None), *inner)]).reshape(x.shape)

        return (sums / counts).astype(x.dtype, copy=False).reshape(len(x), *self._frame_shape(x.shape[1:])), pullback


@dataclass(eq=False, repr=False)
class AveragePooling2D(_AveragePooling):
    """Mean over windows of frames, or of sequences of them, frame by frame.

    Parameters
    ----------
    pool_size, stride, padding, ceil_mode, data_format
        As in `MaxPooling2D`.
    count_include_pad : bool
        Whether what is padded counts, as zeros: PyTorch's default, but not Keras's.

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

    pool_size: Any = (2, 2)


@dataclass(eq=False, repr=False)
class AveragePooling3D(VolumeLayer, _AveragePooling):
    """Mean over windows of time, height and width: (B, T, H, W, C) to (B, TO, HO, WO, C).

    Parameters
    ----------
    pool_size, stride, padding, ceil_mode, data_format
        As in `MaxPooling3D`.
    count_include_pad : bool
        As in `AveragePooling2D`.

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> AveragePooling3D()(np.arange(8.0).reshape(1, 2, 2, 2, 1)).ravel()
    array([3.5])
    """

    pool_size: Any = (2, 2, 2)


def _surround(spec: PoolSpec, volumes: np.ndarray, *, inside: bool = False) -> np.ndarray:
    """Surround volumes (N, T, H, W, C), those with the padding `inside` behind it, by zeros as far as windows reach."""
    pads = []
    sizes = zip(
        (spec.TO, spec.HO, spec.WO), spec.strides, spec.pool_size, spec.padding, volumes.shape[1:4], strict=True
    )
    for count, s, k, (padded, _), n in sizes:
        before = 0 if inside else padded
        pads.append((before, max((count - 1) * s + k - n - before, 0)))
    return np.pad(volumes, ((0, 0), *pads, (0, 0)))


def _taps(spec: PoolSpec, volumes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield views (N, TO, HO, WO, C) of surrounded volumes: the first pixel of every window, the second, …."""
    st, sh, sw = spec.strides
    for t, h, w in np.ndindex(spec.pool_size):
        yield volumes[:, t::st, h::sh, w::sw][:, : spec.TO, : spec.HO, : spec.WO]

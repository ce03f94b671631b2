"""Dropout of single values, and of whole channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.layers.array_layer import ArrayLayer, FrameLayer, Pullback, VolumeLayer
from fastclstm.spec import DATA_FORMATS, Shape, choice, integers, rate


@dataclass(eq=False, repr=False)
class Dropout(ArrayLayer):
    """While training, sets values to zero at random, NaN too, and scales the others by ``1 / (1 - rate)``; else x.

    Parameters
    ----------
    rate : float
        Probability that a value is dropped, between 0 and 1.
    noise_shape : tuple of int or None, optional
        Shape of what is drawn, broadcast against x, where None is x's own size: ``(None, 1, 1, None)`` drops whole
        channels of frames. None: x's shape.
    seed : int or numpy.random.Generator, optional

    Raises
    ------
    ValueError, TypeError
        A rate outside [0, 1], a noise_shape that x does not fit.

    References
    ----------
    Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15 (2014).

    Examples
    --------
    >>> import numpy as np
    >>> Dropout(0.5, seed=0)(np.ones(6), training=True)
    array([2., 2., 2., 0., 0., 0.])
    """

    rate: float
    _: KW_ONLY
    noise_shape: Any = None
    seed: int | np.random.Generator | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rate("Dropout", "rate", self.rate, one=True)
        if self.noise_shape is not None:
            if not isinstance(self.noise_shape, tuple):
                raise TypeError(f"Dropout: noise_shape must be a tuple of sizes or None, got {self.noise_shape!r}")
            for size in self.noise_shape:
                if size is not None:
                    integers("Dropout", "noise_shape's sizes", size, 1, 1)
        self._rng = np.random.default_rng(self.seed)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return `input_shape`."""
        if self.noise_shape is not None:
            fits = len(self.noise_shape) == len(input_shape) and all(
                size in (None, 1, n) for size, n in zip(self.noise_shape, input_shape, strict=True)
            )
            if not fits:
                raise ValueError(
                    f"Dropout: noise_shape {self.noise_shape} does not broadcast against x of shape "
                    f"{tuple(input_shape)}; each size must be None, 1 or that of x"
                )
        return tuple(input_shape)

    def _knows_gpu(self, training: bool) -> bool:
        return True

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        sizes = self.noise_shape or (None,) * x.ndim
        shape = tuple(n if size is None else size for size, n in zip(sizes, x.shape, strict=True))
        return dropped(x, self.rate if training else 0, shape, self._rng)


def dropped(x: Any, rate: float, shape: Shape, rng: np.random.Generator) -> tuple[Any, Pullback]:
    """Return x with what is drawn, of a shape that broadcasts against x's, set to zero, and the pullback."""
    if rate == 0:
        return x, lambda dy: dy
    kept = rng.random(shape, np.float32) >= rate
    zero, factor = x.dtype.type(0), x.dtype.type(1 / (1 - rate) if rate < 1 else 0)

    def drop(array: Any) -> Any:
        return np.where(kept, array * factor, zero)

    return drop(x), drop


@dataclass(eq=False, repr=False)
class _SpatialDropout(FrameLayer):
    """The options of both."""

    rate: float
    _: KW_ONLY
    data_format: str = "channels_last"
    seed: int | np.random.Generator | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        rate(op, "rate", self.rate, one=True)
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        self._rng = np.random.default_rng(self.seed)

    def _frame_shape(self, frame: Shape) -> Shape:
        return frame

    def _knows_gpu(self, training: bool) -> bool:
        return True

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        channels = -self._rank - 1 if self.data_format == "channels_first" else -1
        pixels = [axis for axis in range(-self._rank - 1, 0) if axis != channels]
        shape = list(x.shape)
        for axis in pixels:
            shape[axis] = 1
        return dropped(x, self.rate if training else 0, tuple(shape), self._rng)


@dataclass(eq=False, repr=False)
class SpatialDropout2D(_SpatialDropout):
    """`Dropout` of whole channels of frames (B, H, W, C), or of each frame of sequences (B, T, H, W, C).

    Parameters
    ----------
    rate : float
        Probability that a channel of a frame is dropped, between 0 and 1.
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, H, W) and (B, T, C, H, W).
    seed : int or numpy.random.Generator, optional

    Raises
    ------
    ValueError, TypeError
        A rate outside [0, 1]; shapes that do not fit.

    References
    ----------
    Tompson et al., "Efficient Object Localization Using Convolutional Networks", CVPR 2015.

    Examples
    --------
    >>> import numpy as np
    >>> SpatialDropout2D(0.5, seed=1)(np.ones((1, 1, 2, 3)), training=True)
    array([[[[0., 2., 2.],
             [0., 2., 2.]]]])
    """


@dataclass(eq=False, repr=False)
class SpatialDropout3D(VolumeLayer, _SpatialDropout):
    """`Dropout` of whole channels of volumes (B, T, H, W, C), of all steps at once.

    Parameters
    ----------
    rate, seed
        As in `SpatialDropout2D`.
    data_format : "channels_last" or "channels_first"
        The latter: (B, C, T, H, W), other than layers of frames, whose sequences are (B, T, C, H, W).

    Raises
    ------
    ValueError, TypeError
        A rate outside [0, 1]; shapes that do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> SpatialDropout3D(0.5, seed=1)(np.ones((1, 2, 1, 1, 3)), training=True)[0, :, 0, 0]
    array([[0., 2., 2.],
           [0., 2., 2.]])
    """

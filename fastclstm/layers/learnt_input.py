"""An input that is learnt: what a forecaster reads where it is given no frames."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.layers.array_layer import FrameLayer, Pullback
from fastclstm.layers.base import Parameter, layer_dtype
from fastclstm.spec import DATA_FORMATS, Shape, choice, integers


@dataclass(eq=False, repr=False)
class LearntInput(FrameLayer):
    """Adds a learnt number a channel to frames (B, H, W, C), or sequences of them, such as of zeros.

    Parameters
    ----------
    in_channels : int
        C.
    initializer : str or function
        As `fastclstm.nn.initializers.get` takes them.
    data_format : "channels_last" or "channels_first"
    dtype : "float32" or "float64"
    seed : int or numpy.random.Generator, optional

    Attributes
    ----------
    value : array (C,)

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> layer = LearntInput(2, initializer="ones")
    >>> layer(np.zeros((1, 5, 4, 4, 2)))[0, 0, 0, 0]
    array([1., 1.], dtype=float32)
    """

    in_channels: int
    _: KW_ONLY
    initializer: Any = "zeros"
    data_format: str = "channels_last"
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None

    value = Parameter()

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        (self.in_channels,) = integers(op, "in_channels", self.in_channels, 1, 1)
        self.dtype = layer_dtype(op, self.dtype)
        choice(op, "data_format", self.data_format, DATA_FORMATS)
        self._add_parameter(
            "value", (self.in_channels,), self.initializer, np.random.default_rng(self.seed), self.dtype
        )

    def _frame_shape(self, frame: Shape) -> Shape:
        if frame[-1] != self.in_channels:
            raise ValueError(f"LearntInput: x has {frame[-1]} channels but in_channels is {self.in_channels}")
        return frame

    def _frames(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        def pullback(dy: np.ndarray) -> np.ndarray | None:
            self._keep_gradients({"value": dy.sum((0, 1, 2))})
            return dy if self.input_gradient else None

        return x + self.value, pullback

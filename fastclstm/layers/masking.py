"""Values that stand for what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.array_layer import ArrayLayer, Pullback
from fastclstm.nn import is_number
from fastclstm.spec import Shape


@dataclass(eq=False, repr=False)
class Masking(ArrayLayer):
    """Sets to zero what equals a value along the whole last axis, as Keras's.

    Of sequences (B, T, N) that are time steps; of sequences of frames (B, T, H, W, C) it is every pixel for itself, not
    time steps. Other than in Keras the mask is not handed on by itself: give it to the layers that are to skip steps,
    ``LSTM(…)(x, mask=masking.compute_mask(x))``. (Keras hands a mask (B, T, H, W) to a ConvLSTM2D too, whose states
    then stay pixel by pixel; ours has masks of steps alone.)

    Parameters
    ----------
    mask_value : float

    Raises
    ------
    ValueError
        Anything but a number.

    Examples
    --------
    >>> Masking(-1.0)([[[-1.0, -1.0], [-1.0, 2.0]]])
    array([[[-0., -0.],
            [-1.,  2.]]])
    """

    mask_value: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.mask_value):
            raise ValueError(f"Masking: mask_value must be a finite number, got {self.mask_value!r}")

    def compute_mask(self, x: Any) -> np.ndarray:
        """Return the mask of x (…, N): (…), False where all N values are mask_value."""
        array = dispatch.as_numpy("Masking", "x", x)
        self.output_shape(array.shape)
        return (array != array.dtype.type(self.mask_value)).any(-1)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return `input_shape`; raise ValueError where that does not fit."""
        if len(input_shape) < 2:
            raise ValueError(f"Masking: x must be (batch, …, features), got shape {tuple(input_shape)}")
        return tuple(input_shape)

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        kept = (x != x.dtype.type(self.mask_value)).any(-1, keepdims=True).astype(x.dtype)
        return x * kept, lambda dy: dy * kept

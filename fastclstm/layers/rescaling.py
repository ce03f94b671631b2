"""Values in other units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm.layers.array_layer import ArrayLayer, Pullback
from fastclstm.nn import is_number
from fastclstm.spec import Shape


@dataclass(eq=False, repr=False)
class Rescaling(ArrayLayer):
    """``x · scale + offset``, such as pixels of 0 to 255 brought to 0 to 1.

    Parameters
    ----------
    scale, offset : float or tuple of float
        For all values, or one for each of the last axis.

    Raises
    ------
    ValueError, TypeError
        Anything but numbers, or another count of them than the last axis has.

    Examples
    --------
    >>> Rescaling(1 / 255)([0.0, 127.5, 255.0])
    array([0. , 0.5, 1. ])
    """

    scale: Any
    offset: Any = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scale", "offset"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or not all(map(is_number, numbers)):
                raise ValueError(f"Rescaling: {name} must be a finite number or a tuple of them, got {value!r}")

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return `input_shape`; raise ValueError where that does not fit."""
        for name in ("scale", "offset"):
            value = getattr(self, name)
            if isinstance(value, tuple) and (not input_shape or len(value) not in (1, input_shape[-1])):
                raise ValueError(f"Rescaling: {name} has {len(value)} numbers, which the last axis of x, of shape "
                                 f"{tuple(input_shape)}, must have too")  # fmt: skip
        return tuple(input_shape)

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        scale, offset = (np.asarray(value, x.real.dtype) for value in (self.scale, self.offset))
        return x * scale + offset, lambda dy: dy * scale

"""Dropout of whole time steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.layers.array_layer import ArrayLayer, Pullback
from fastclstm.spec import Shape, integers, rate


@dataclass(eq=False, repr=False)
class TimeDistributionCalculator(ArrayLayer):
    """Draws which time steps are kept, and sets the others to zero.

    Every step is kept with probability ``1 - dropout_rate``, independently, the same steps for the whole batch. What is
    kept is not scaled. As a layer, ``layer(x, training=True)`` is `apply_dropout`, ``layer(x)`` is x: the array itself
    where that is contiguous and of float32 or float64.

    Parameters
    ----------
    dropout_rate : float
        Between 0 (keep all) and 1 (drop all).
    num_timesteps : int
        T.
    seed : int or numpy.random.Generator, optional

    Raises
    ------
    ValueError, TypeError
        A rate that is no number in [0, 1], less than one step.

    Examples
    --------
    >>> import numpy as np
    >>> calculator = TimeDistributionCalculator(0.5, 6, seed=1)
    >>> calculator.calculate_time_distribution()
    array([1, 1, 0, 1, 0, 0])
    >>> TimeDistributionCalculator(1.0, 2).apply_dropout(np.ones((1, 2, 3))).sum()
    np.float64(0.0)
    """

    dropout_rate: float
    num_timesteps: int
    _: KW_ONLY
    seed: int | np.random.Generator | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "TimeDistributionCalculator"
        rate(op, "dropout_rate", self.dropout_rate, one=True)
        self.dropout_rate = float(self.dropout_rate)
        (self.num_timesteps,) = integers(op, "num_timesteps", self.num_timesteps, 1, 1)
        self._rng = np.random.default_rng(self.seed)

    def calculate_time_distribution(self) -> np.ndarray:
        """Draw a vector (T,) of int64: 1 for each step kept, 0 for each one dropped."""
        return (self._rng.random(self.num_timesteps) >= self.dropout_rate).astype(np.int64)

    def apply_dropout(self, x: Any) -> Any:
        """Return x (B, T, …) with the steps that a newly drawn vector drops set to zero.

        In float32 or float64, as x's kind of array. NaN and Inf are dropped too.

        Raises
        ------
        ValueError
            x has no time axis, or another number of steps than num_timesteps.
        TypeError
            x is not a real array.
        """
        return self.forward(x, training=True)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return the shape of the output: that of the input."""
        if len(input_shape) < 2 or input_shape[1] != self.num_timesteps:
            raise ValueError(
                f"TimeDistributionCalculator: x must be (batch, {self.num_timesteps}, …) since num_timesteps is "
                f"{self.num_timesteps}, got shape {tuple(input_shape)}"
            )
        return tuple(input_shape)

    def _knows_gpu(self, training: bool) -> bool:
        return True

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        if not training:
            return x, lambda dy: dy
        kept = self.calculate_time_distribution().reshape(-1, *(1,) * (x.ndim - 2)) != 0
        zero = x.dtype.type(0)
        return np.where(kept, x, zero), lambda dy: np.where(kept, dy, zero)

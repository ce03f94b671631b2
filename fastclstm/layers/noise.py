"""Noise while training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np

from fastclstm.layers.array_layer import ArrayLayer, Pullback
from fastclstm.nn import is_number
from fastclstm.spec import Shape


@dataclass(eq=False, repr=False)
class GaussianNoise(ArrayLayer):
    """While training, adds normally distributed noise of mean 0 to every value; else x.

    Parameters
    ----------
    stddev : float
        Standard deviation of the noise, at least 0.
    seed : int or numpy.random.Generator, optional

    Raises
    ------
    ValueError, TypeError
        A stddev that is no number or below 0.

    Examples
    --------
    >>> GaussianNoise(0.1, seed=0)([1.0, 2.0]), GaussianNoise(0.1, seed=0)([1.0, 2.0], training=True).round(3)
    (array([1., 2.]), array([1.013, 1.987]))
    """

    stddev: float
    _: KW_ONLY
    seed: int | np.random.Generator | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.stddev) and self.stddev >= 0):
            raise ValueError(f"GaussianNoise: stddev must be a number >= 0, got {self.stddev!r}")
        self._rng = np.random.default_rng(self.seed)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return `input_shape`."""
        return tuple(input_shape)

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        if not training or self.stddev == 0:
            return x, lambda dy: dy
        return x + (self.stddev * self._rng.standard_normal(x.shape)).astype(x.dtype), lambda dy: dy

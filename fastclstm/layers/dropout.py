"""Dropout of single values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.layers.array_layer import ArrayLayer, Pullback
from fastclstm.spec import Shape, integers, rate


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
        if not training or self.rate == 0:
            return x, lambda dy: dy
        sizes = self.noise_shape or (None,) * x.ndim
        shape = tuple(n if size is None else size for size, n in zip(sizes, x.shape, strict=True))
        kept = self._rng.random(shape, np.float32) >= self.rate
        zero, factor = x.dtype.type(0), x.dtype.type(1 / (1 - self.rate) if self.rate < 1 else 0)

        def drop(array: np.ndarray) -> np.ndarray:
            return np.where(kept, array * factor, zero)

        return drop(x), drop

"""Rectified linear units with options, and with slopes that are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.layers.array_layer import ArrayLayer, Pullback
from fastclstm.layers.base import Parameter, layer_dtype
from fastclstm.nn import is_number
from fastclstm.spec import Shape, integers


@dataclass(eq=False, repr=False)
class ReLU(ArrayLayer):
    """x from a threshold up to a largest value, ``negative_slope · (x − threshold)`` below, as Keras's.

    Parameters
    ----------
    max_value : float, optional
        What larger values become, at least 0; 6 makes it relu6.
    negative_slope : float
        At least 0.
    threshold : float
        At least 0.

    Raises
    ------
    ValueError
        Anything but such numbers.

    Examples
    --------
    >>> ReLU(6.0, negative_slope=0.5)([-2.0, 3.0, 8.0])
    array([-1.,  3.,  6.])
    """

    max_value: float | None = None
    negative_slope: float = 0.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_value", "negative_slope", "threshold"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0) and not (name == "max_value" and value is None):
                or_none = " or None" if name == "max_value" else ""
                raise ValueError(f"ReLU: {name} must be a number >= 0{or_none}, got {value!r}")

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return `input_shape`."""
        return tuple(input_shape)

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        kind = x.real.dtype.type
        slope, threshold = kind(self.negative_slope), kind(self.threshold)
        above = x >= kind(np.inf if self.max_value is None else self.max_value)
        below = slope * (x - threshold) if slope else np.zeros_like(x)  # as 0 · Inf is NaN
        y = np.where(x < threshold, below, x)
        if self.max_value is not None:
            y = np.where(above, kind(self.max_value), y)
        one, zero = kind(1), kind(0)
        factor = np.where(above & (self.max_value is not None), zero, np.where(x > threshold, one, slope))
        return y, lambda dy: dy * factor


@dataclass(eq=False, repr=False)
class PReLU(ArrayLayer):
    """x where it is above zero, else ``alpha · x``, with slopes alpha that are learnt.

    Parameters
    ----------
    shape : int or tuple of int
        Sizes of alpha, broadcast against x's last axes: ``C`` for a slope a channel, ``(1, 1, C)`` as Keras has it with
        shared_axes=[1, 2], ``(H, W, C)`` without, ``(C, 1, 1)`` for channels-first frames, 1 for all. PyTorch's
        alpha_initializer is 0.25.
    alpha_initializer : str or function
        As `fastclstm.nn.initializers.get` takes them.
    alpha_regularizer, alpha_constraint : optional
        As `fastclstm.nn.regularizers.get` and `fastclstm.nn.constraints.get` take them.
    dtype : "float32" or "float64"
        Of parameters and results; inputs are converted to it.
    seed : int or numpy.random.Generator, optional

    Attributes
    ----------
    alpha : array of `shape`

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    References
    ----------
    He et al., "Delving Deep into Rectifiers", ICCV 2015.

    Examples
    --------
    >>> PReLU(1, alpha_initializer="ones")([[-4.0, 2.0]])
    array([[-4.,  2.]], dtype=float32)
    """

    shape: Any = 1
    _: KW_ONLY
    alpha_initializer: Any = "zeros"
    alpha_regularizer: Any = None
    alpha_constraint: Any = None
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None

    alpha = Parameter()

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.shape) if isinstance(self.shape, tuple) else 1
        self.shape = integers("PReLU", "shape", self.shape, max(count, 1), 1)
        self.dtype = layer_dtype("PReLU", self.dtype)
        self._add_parameter("alpha", self.shape, self.alpha_initializer, np.random.default_rng(self.seed), self.dtype,
                            regularizer=self.alpha_regularizer, constraint=self.alpha_constraint)  # fmt: skip

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return `input_shape`; raise ValueError where that does not fit."""
        last = tuple(input_shape[-len(self.shape) :])
        fits = len(last) == len(self.shape) and all(n in (1, m) for n, m in zip(self.shape, last, strict=True))
        if not fits:
            raise ValueError(f"PReLU: alpha of shape {self.shape} does not broadcast against the last axes of x, of "
                             f"shape {tuple(input_shape)}")  # fmt: skip
        return tuple(input_shape)

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        above, alpha = x > 0, self.alpha

        def pullback(dy: np.ndarray) -> np.ndarray:
            given = np.where(above, dy.dtype.type(0), dy * x)
            lead = x.ndim - alpha.ndim
            axes = (*range(lead), *(lead + axis for axis, n in enumerate(alpha.shape) if n == 1))
            precise = np.result_type(given, np.float64)
            self._keep_gradients({"alpha": given.sum(axes, dtype=precise).reshape(alpha.shape).astype(given.dtype)})
            return np.where(above, dy, alpha * dy)

        return np.where(above, x, alpha * x), pullback

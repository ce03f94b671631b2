"""Constraints: where a parameter is brought back to after each step of an optimizer, by name, as Keras 3 has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm.nn import Options, look_up
from fastclstm.spec import expect_shape

Constraint = Callable[[np.ndarray], np.ndarray]

_TINY = 1e-7
"""Added to norms that divide."""


@dataclass(frozen=True)
class NonNeg(Options):
    """Negative values become 0."""

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """Return the array constrained, of the same shape and dtype."""
        return np.maximum(array, 0)


@dataclass(frozen=True)
class MinMaxNorm(Options):
    """Norms between two bounds.

    Parameters
    ----------
    min_value, max_value : float
        The bounds.
    rate : float
        How much of the way to the bounds is gone at each step, 0 to 1.
    axis : int or tuple of int
        What a norm is taken over: 0 in a matrix (inputs, outputs), (0, 1, 2) for the filters of a kernel
        (KH, KW, C, F).

    Examples
    --------
    >>> MinMaxNorm(min_value=1, max_value=2)(np.array([[3.0], [4.0]])).round(6)
    array([[1.2],
           [1.6]])
    """

    min_value: float = 0
    max_value: float = 1
    rate: float = 1
    axis: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("min_value", 0)
        self._check_number("max_value", self.min_value)
        self._check_number("rate", 0, 1)
        _check_axis(self)

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """Return the array constrained, of the same shape and dtype."""
        norms = _norms(self, array)
        wanted = self.rate * np.clip(norms, self.min_value, self.max_value) + (1 - self.rate) * norms
        return _scaled(array, wanted / (_TINY + norms))


@dataclass(frozen=True)
class MaxNorm(Options):
    """Norms of at most `max_value`, over `axis` as in `MinMaxNorm`."""

    max_value: float = 2
    axis: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("max_value", 0)
        _check_axis(self)

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """Return the array constrained, of the same shape and dtype."""
        norms = _norms(self, array)
        return _scaled(array, np.minimum(norms, self.max_value) / (_TINY + norms))


@dataclass(frozen=True)
class UnitNorm(Options):
    """Norms of 1, over `axis` as in `MinMaxNorm`; zeros stay zeros."""

    axis: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_axis(self)

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """Return the array constrained, of the same shape and dtype."""
        return _scaled(array, 1 / (_TINY + _norms(self, array)))


def _check_axis(constraint: Any) -> None:
    axis = constraint.axis
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not axes or any(type(item) is not int for item in axes) or len(set(axes)) < len(axes):
        constraint._refuse("axis", "an integer or a tuple of distinct integers")


def _norms(constraint: Any, array: np.ndarray) -> np.ndarray:
    """Return the norms in float64, over the constraint's axes, which stay with length 1."""
    try:
        return np.sqrt(np.square(array.astype(np.float64)).sum(constraint.axis, keepdims=True))
    except (np.exceptions.AxisError, ValueError):
        name = type(constraint).__name__
        raise ValueError(
            f"{name}: axis {constraint.axis} does not fit an array of {array.ndim} axes {array.shape}; "
            f"give {name}(axis=…)"
        ) from None


def _scaled(array: np.ndarray, factor: np.ndarray) -> np.ndarray:
    return (array * factor).astype(array.dtype)


class _Function:
    """A caller's own function."""

    def __init__(self, function: Callable[[np.ndarray], Any]):
        self._function = function

    def __call__(self, array: np.ndarray) -> np.ndarray:
        result = np.asarray(self._function(array), array.dtype)
        expect_shape("constraint", "result", result.shape, array.shape, "that of the array constrained")
        return result


TABLE: dict[str, Constraint] = {
    "max_norm": MaxNorm(),
    "non_neg": NonNeg(),
    "unit_norm": UnitNorm(),
    "min_max_norm": MinMaxNorm(),
    "min_max": MinMaxNorm(),
}
"""The constraints by name."""


def get(spec: Any) -> Constraint:
    """Return the constraint that `spec` means: a name or a function from array to array.

    The objects of this module are such functions. The results of a caller's own are brought to the dtype they came in.

    Raises
    ------
    ValueError
        An unknown name; when called, a function whose result has another shape.
    TypeError
        Anything else.

    Examples
    --------
    >>> get("non_neg")(np.array([-1.0, 2.0]))
    array([0., 2.])
    """
    if isinstance(spec, str):
        return look_up("constraint", TABLE, spec)
    if isinstance(spec, Options) and callable(spec):
        return spec
    if callable(spec):
        return _Function(spec)
    raise TypeError(f"a constraint must be a name ({', '.join(TABLE)}) or a function array -> array, got {spec!r}")

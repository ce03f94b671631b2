"""Regularizers: penalties on a parameter or an output, and their gradients, by name, as Keras 3 has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm.nn import Options, look_up
from fastclstm.spec import choice, expect_shape

_TINY = 1e-7
"""Rows and columns are divided by no less than this."""


class Regularizer:
    """A penalty: ``regularizer(array)`` is a number, ``regularizer.gradient(array)`` its gradient."""

    def __call__(self, array: np.ndarray) -> float:
        """Return the penalty on `array`, summed in float64."""
        raise NotImplementedError

    def gradient(self, array: np.ndarray) -> np.ndarray:
        """Return the penalty's gradient, of the shape and dtype of `array`."""
        raise NotImplementedError


@dataclass(frozen=True)
class L1L2(Options, Regularizer):
    """``l1 * sum(|x|) + l2 * sum(x²)``.

    Examples
    --------
    >>> L1L2(l1=1, l2=10)(np.array([-1.0, 2.0]))
    53.0
    """

    l1: float = 0.01
    l2: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("l1", 0)
        self._check_number("l2", 0)

    def __call__(self, array: np.ndarray) -> float:
        """Return the penalty."""
        return _l1_l2(array, self.l1, self.l2)

    def gradient(self, array: np.ndarray) -> np.ndarray:
        """Return its gradient; at zero, where ``|x|`` has none, that is 0."""
        return _l1_l2_gradient(array, self.l1, self.l2)


@dataclass(frozen=True)
class L1(Options, Regularizer):
    """``l1 * sum(|x|)``."""

    l1: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("l1", 0)

    def __call__(self, array: np.ndarray) -> float:
        """Return the penalty."""
        return _l1_l2(array, self.l1, 0)

    def gradient(self, array: np.ndarray) -> np.ndarray:
        """Return its gradient; at zero, where ``|x|`` has none, that is 0."""
        return _l1_l2_gradient(array, self.l1, 0)


@dataclass(frozen=True)
class L2(Options, Regularizer):
    """``l2 * sum(x²)``: without the half that some give it."""

    l2: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("l2", 0)

    def __call__(self, array: np.ndarray) -> float:
        """Return the penalty."""
        return _l1_l2(array, 0, self.l2)

    def gradient(self, array: np.ndarray) -> np.ndarray:
        """Return its gradient."""
        return _l1_l2_gradient(array, 0, self.l2)


@dataclass(frozen=True)
class OrthogonalRegularizer(Options, Regularizer):
    """`factor` times the mean over all pairs of rows, or of columns, of the absolute cosine of the angle between them.

    An array of more than two axes, such as a kernel (KH, KW, C, F), is taken as the matrix (KH·KW·C, F): mode
    "columns" then makes filters differ from one another. A single row or column has no pairs, and no penalty.

    Examples
    --------
    >>> OrthogonalRegularizer(factor=1)(np.array([[1.0, 0.0], [1.0, 1.0]]))
    0.7071067811865475
    """

    factor: float = 0.01
    mode: str = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("factor", 0)
        choice("OrthogonalRegularizer", "mode", self.mode, ("rows", "columns"))

    def __call__(self, array: np.ndarray) -> float:
        """Return the penalty."""
        _, _, cosines, factor = self._cosines(array)
        return float(factor * np.abs(cosines).sum())

    def gradient(self, array: np.ndarray) -> np.ndarray:
        """Return its gradient; where two vectors are orthogonal, and its absolute cosine has none, that is 0."""
        lengths, units, cosines, factor = self._cosines(array)
        dunits = 2 * factor * np.sign(cosines) @ units
        along = np.where(lengths > _TINY, (dunits * units).sum(1, keepdims=True), 0)
        gradient = (dunits - along * units) / lengths
        gradient = gradient.T if self.mode == "columns" else gradient
        return gradient.reshape(array.shape).astype(array.dtype)

    def _cosines(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Return the vectors' lengths (n, 1), the unit vectors (n, m), their cosines (n, n) and the sum's factor."""
        if array.ndim < 2:
            raise ValueError(f"OrthogonalRegularizer: an array of at least two axes is needed, got shape {array.shape}")
        vectors = array.reshape(-1, array.shape[-1]).astype(np.float64)
        vectors = vectors.T if self.mode == "columns" else vectors
        count = len(vectors)
        lengths = np.maximum(np.sqrt((vectors**2).sum(1, keepdims=True)), _TINY)
        units = vectors / lengths
        cosines = units @ units.T
        np.fill_diagonal(cosines, 0)
        return lengths, units, cosines, self.factor / max(1, count * (count - 1))


class _Functions(Regularizer):
    """A caller's own pair of functions."""

    def __init__(self, penalty: Callable[[np.ndarray], Any], gradient: Callable[[np.ndarray], Any]):
        self._penalty, self._gradient = penalty, gradient

    def __call__(self, array: np.ndarray) -> float:
        return float(self._penalty(array))

    def gradient(self, array: np.ndarray) -> np.ndarray:
        gradient = np.asarray(self._gradient(array), array.dtype)
        expect_shape("regularizer", "gradient", gradient.shape, array.shape, "that of the array penalized")
        return gradient


def _l1_l2(array: np.ndarray, l1: float, l2: float) -> float:
    x = np.asarray(array, np.float64)
    return float(l1 * np.abs(x).sum() + l2 * np.square(x).sum())


def _l1_l2_gradient(array: np.ndarray, l1: float, l2: float) -> np.ndarray:
    return l1 * np.sign(array) + 2 * l2 * array


TABLE: dict[str, Regularizer] = {
    "l1": L1(),
    "l2": L2(),
    "l1_l2": L1L2(),
    "orthogonal": OrthogonalRegularizer(),
}
"""The regularizers by name, with factors of 0.01."""


def get(spec: Any) -> Regularizer:
    """Return the regularizer that `spec` means: a name, a `Regularizer`, or a pair of functions of an array.

    The first of the pair returns the penalty, a number, the second its gradient, an array of the same shape.

    Raises
    ------
    ValueError
        An unknown name; when called, a gradient of another shape.
    TypeError
        Anything else.

    Examples
    --------
    >>> get("l2").gradient(np.array([3.0]))
    array([0.06])
    """
    if isinstance(spec, Regularizer):
        return spec
    if isinstance(spec, str):
        return look_up("regularizer", TABLE, spec)
    if isinstance(spec, tuple | list) and len(spec) == 2 and all(map(callable, spec)):
        return _Functions(*spec)
    hint = "; a penalty alone has no gradient to train with: give (penalty, gradient)" if callable(spec) else ""
    raise TypeError(
        f"a regularizer must be a name ({', '.join(TABLE)}), a Regularizer or a pair of functions (penalty, "
        f"gradient), got {spec!r}{hint}"
    )

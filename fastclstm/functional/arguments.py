"""What the operations ask of their arguments: reading mappings and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.spec import expect_shape

Gradients = dict[str, Any]
Reader = Callable[[str, Any], Any]


def read_cotangent(
    op: str, name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype, read: Reader | None = None
) -> np.ndarray | None:
    """Return the gradient of an output of `shape`, native, or None for zeros; raise ValueError for another shape."""
    if value is None:
        return None
    array = dispatch.as_numpy(op, name, value) if read is None else read(name, value)
    expect_shape(op, name, array.shape, shape, "the shape of the output whose gradient it is")
    return dispatch.native(array, dtype)


def check_structure(op: str, cotangents: Any, structure: str, count: int) -> None:
    """Raise ValueError where `cotangents` is no tuple of `count`."""
    if not isinstance(cotangents, tuple | list) or len(cotangents) != count:
        raise ValueError(f"{op}: pullback takes the outputs' structure {structure}, got {type(cotangents).__name__}")


def read_mapping(op: str, name: str, value: Any, read: Reader) -> dict[str, np.ndarray] | None:
    """Read a mapping from names to arrays."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"{op}: {name} must be a mapping from names to arrays, got {type(value).__name__}")
    return {k: read(f"{name} {k!r}", array) for k, array in value.items()}


def shapes_of(arrays: Mapping[str, np.ndarray] | None) -> dict[str, tuple[int, ...]] | None:
    """Return the shape of each array of a mapping."""
    return None if arrays is None else {name: array.shape for name, array in arrays.items()}


def is_pair(value: Any) -> bool:
    """Return whether `value` is a tuple or list of two."""
    return isinstance(value, tuple | list) and len(value) == 2


GRADIENTS = "x", "kernel", "bias"
"""What a convolution's backward pass returns gradients of."""


def asked_for(input_gradient: bool, bias: Any) -> tuple[str, ...]:
    """Return of what a convolution's gradients are wanted."""
    return GRADIENTS[not input_gradient : 2 if bias is None else 3]

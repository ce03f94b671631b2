"""Options and shapes as operations take them: checked, and errors that name what was given and what is expected."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

Pair = tuple[int, int]
Shape = tuple[int, ...]

PADDING_MODES = ("zeros", "circular")
DATA_FORMATS = ("channels_last", "channels_first")

LARGEST = 2**31 - 1
"""Of all sizes, strides and paddings: kernels multiply them in 64 bits."""


def integers(op: str, name: str, value: Any, count: int, minimum: int) -> Shape:
    """Return `value`, an integer or a sequence of `count` integers, as a tuple of `count` integers >= `minimum`."""
    if type(value) is int and minimum <= value <= LARGEST:
        return (value,) * count
    several = f" or {count} of them" if count > 1 else ""
    expected = f"{op}: {name} must be an integer >= {minimum}{several}, got {value!r}"
    items = list(value) if np.iterable(value) else [value] * count
    try:
        result = tuple(operator.index(item) for item in items)
    except TypeError:
        raise TypeError(expected) from None
    fits = len(result) == count and all(minimum <= n <= LARGEST for n in result)
    if not fits or any(isinstance(item, bool | np.bool_) for item in items):
        raise ValueError(expected)
    return result


def choice(op: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def rate(op: str, name: str, value: Any, *, one: bool = False) -> None:
    """Raise ValueError unless `value`, the share that is dropped, is in [0, 1), or with `one` in [0, 1]."""
    if not (_is_real(value) and (0 <= value < 1 or (one and value == 1))):
        interval = "[0, 1]" if one else "[0, 1)"
        raise ValueError(f"{op}: {name} must be a number in {interval}, the share that is dropped; got {value!r}")


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def flag(op: str, name: str, value: Any) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{op}: {name} must be True or False, got {value!r}")


def positive_or_none(op: str, name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a positive real number or None."""
    if value is not None and not (_is_real(value) and value > 0):
        raise ValueError(f"{op}: {name} must be a positive number or None, got {value!r}")


def expect_shape(op: str, name: str, shape: Shape, expected: Shape, why: str) -> None:
    """Raise ValueError unless `shape` is `expected`."""
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{op}: {name} has shape {tuple(shape)} but must be {tuple(expected)} ({why})")


def refuse_masked(op: str, name: str, value: Any, missing: str = "value") -> None:
    """Raise TypeError for a masked array, whose mask would be lost; missing: what to fill it with."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{op}: {name} is a masked array, whose mask would be lost; pass {name}.filled({missing})")

"""The states (h, c) of recurrent layers that callers give."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastclstm.layers.layout import Layout
from fastclstm.spec import Shape

State = tuple[np.ndarray | None, ...]
"""The arrays that a cell carries from one step to the next, h first; None is zeros."""

LastStates = list[tuple[np.ndarray, ...]]

_NAMES = "hc"


def is_pair(value: Any) -> bool:
    """Whether `value` is a tuple or list of two."""
    return isinstance(value, list | tuple) and len(value) == 2


def read_state(layout: Layout, what: str, pair: tuple[Any, Any], shape: Shape) -> State:
    """Check (h, c), each of which may be None, and return them channels-last."""
    why = "the shape of the layer's states"
    return tuple(layout.read_like(what, name, value, shape, why) for name, value in zip(_NAMES, pair, strict=True))


def read_states(layout: Layout, name: str, value: Any, shapes: list[Shape], each: str) -> list[State]:
    """Return one pair of channels-last states a cell, of `shapes`; `each` says what they are one of."""
    count = len(shapes)
    if value is None:
        return [(None, None)] * count
    pairs = [value] if count == 1 and is_pair(value) else value
    expect_states(layout.op, name, pairs, count, each)
    return [
        read_state(layout, f"{layout.op}: {name} {index}", pair or (None, None), shape)
        for index, (pair, shape) in enumerate(zip(pairs, shapes, strict=True))
    ]


def expect_states(op: str, name: str, pairs: Any, count: int, each: str) -> None:
    """Raise ValueError unless there are `count` pairs, or None in their places."""
    fits = isinstance(pairs, list | tuple) and len(pairs) == count
    if not fits or not all(pair is None or is_pair(pair) for pair in pairs):
        came = f"{len(pairs)} items" if isinstance(pairs, list | tuple) else type(pairs).__name__
        pair = "pairs" if count > 1 else "pair"
        raise ValueError(f"{op}: {name} must be a list of {count} {pair} (h, c), {each}; got {came}")

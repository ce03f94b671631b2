"""The states of recurrent layers that callers give: (h, c) of an LSTM, (h,) of a GRU, where h itself will do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastclstm.layers.layout import Layout
from fastclstm.layers.symbolic import is_shape
from fastclstm.spec import Shape

State = tuple[np.ndarray | None, ...]
"""The arrays that a cell carries from one step to the next, h first; None is zeros."""

LastStates = list[tuple[np.ndarray, ...]]


def is_pair(value: Any) -> bool:
    """Whether `value` is a tuple or list of two."""
    return isinstance(value, list | tuple) and len(value) == 2


def _is_bare(value: Any) -> bool:
    """Whether `value` is an array, a symbol or a shape, rather than several in a tuple or list."""
    known = is_shape(value) and any(n is not None for n in value)
    return value is not None and (known or not isinstance(value, list | tuple))


def _is_tuple(value: Any, names: Sequence[str]) -> bool:
    return isinstance(value, list | tuple) and len(value) == len(names) and not _is_bare(value)


def is_state(value: Any, names: Sequence[str]) -> bool:
    """Whether `value` is one state: arrays, shapes or symbols by these names, and no list of states."""
    if _is_bare(value):
        return len(names) == 1
    return _is_tuple(value, names) and all(item is None or _is_bare(item) for item in value)


def each_state(op: str, name: str, value: Any, names: Sequence[str], count: int, each: str) -> list[Any]:
    """Return what a caller gave for `count` cells as a list of one tuple, or None, a cell.

    Raises ValueError where it is none; `each` says what the states are one of.
    """
    lists = isinstance(value, list | tuple) and not any(isinstance(item, tuple) for item in value)  # arrays as lists
    one = is_state(value, names) or (len(names) > 1 and lists and _is_tuple(value, names))
    states = [value] if count == 1 and one else value
    bare = [len(names) == 1 and _is_bare(state) for state in states] if isinstance(states, list | tuple) else []
    if len(bare) != count or not all(
        state is None or alone or _is_tuple(state, names) for state, alone in zip(states, bare, strict=True)
    ):
        came = f"{len(states)} items" if isinstance(states, list | tuple) else type(states).__name__
        letters = f"({', '.join(names)}{',' * (len(names) == 1)})"
        kind = ("pair" if len(names) == 2 else "tuple") + "s" * (count > 1)
        raise ValueError(f"{op}: {name} must be a list of {count} {kind} {letters}, {each}; got {came}")
    return [(state,) if alone else state for state, alone in zip(states, bare, strict=True)]


def read_state(layout: Layout, what: str, state: Sequence[Any], shape: Shape, names: Sequence[str] = "hc") -> State:
    """Check the arrays of a state, each of which may be None, and return them channels-last."""
    why = "the shape of the layer's states"
    return tuple(layout.read_like(what, name, value, shape, why) for name, value in zip(names, state, strict=False))


def read_states(
    layout: Layout, name: str, value: Any, shapes: list[Shape], each: str, names: Sequence[str]
) -> list[State]:  # fmt: skip
    """Return channels-last states, of `shapes`, one a cell; `each` says what they are one of."""
    nothing = (None,) * len(names)
    if value is None:
        return [nothing] * len(shapes)
    states = each_state(layout.op, name, value, names, len(shapes), each)
    return [
        read_state(layout, f"{layout.op}: {name} {index}", state or nothing, shape, names)
        for index, (state, shape) in enumerate(zip(states, shapes, strict=True))
    ]

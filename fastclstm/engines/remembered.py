"""What engines make of weights, packed or on a GPU, remembered for as long as the weights stay what they are."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np

MOST = 64
"""Values that are remembered: those made last."""

_remembered: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()


class _Entry(NamedTuple):
    """A value and how to tell that it still belongs to its arrays."""

    owners: list[weakref.ref[np.ndarray]]
    contents: list[np.ndarray | None]
    """A copy of each array that somebody may write to; None for those that nobody can."""

    value: Any

    def belongs_to(self, arrays: list[np.ndarray]) -> bool:
        """Whether these are the same arrays with the same bits."""
        return all(
            owner() is array and (content is None or np.array_equal(content, _bits(array)))
            for owner, array, content in zip(self.owners, arrays, self.contents, strict=True)
        )


def _bits(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint32)


def _frozen(array: np.ndarray) -> bool:
    """Whether the memory of `array` is that of bytes: a read-only flag alone can be taken back."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, bytes)


def immutable(array: np.ndarray) -> np.ndarray:
    """Return a copy in memory that nobody can make writable again: nobody need look whether it is still the same."""
    return np.ndarray(array.shape, array.dtype, array.tobytes())


def remember(arrays: tuple[np.ndarray | None, ...], key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """Return ``make()``, and the same object again for the same arrays and key, as long as their bits are the same."""
    present = [array for array in arrays if array is not None]
    full_key = (*(id(array) for array in arrays), *key)
    found = _remembered.get(full_key)
    if found is not None and found.belongs_to(present):
        return found.value
    contents = [None if _frozen(array) else _bits(array).copy() for array in present]
    value = make()

    def forget(_: Any, remembered: OrderedDict[Any, _Entry] = _remembered) -> None:  # also when the interpreter ends
        remembered.pop(full_key, None)

    _remembered[full_key] = _Entry([weakref.ref(array, forget) for array in present], contents, value)
    while len(_remembered) > MOST:
        _remembered.popitem(last=False)
    return value


_passing: ContextVar[dict[tuple[Any, ...], tuple[Any, Any]] | None] = ContextVar("_passing", default=None)


@contextmanager
def for_a_while() -> Iterator[None]:
    """Let `passing` remember until the end: for calls with the same weights, one after the other, as in a roll-out."""
    token = _passing.set({} if _passing.get() is None else _passing.get())
    try:
        yield
    finally:
        _passing.reset(token)


def passing(arrays: tuple[np.ndarray | None, ...], key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """Return ``make()``, of which others than immutable arrays are made anew, or the same object `for_a_while`."""
    kept = _passing.get()
    if kept is None or not all(array is None or _frozen(array) for array in arrays):
        return make()
    full_key = (*(id(array) for array in arrays), *key)
    if full_key not in kept:
        kept[full_key] = arrays, make()  # the arrays too, so that no other has their id
    return kept[full_key][1]

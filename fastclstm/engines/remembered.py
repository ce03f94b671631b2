"""What engines make of weights, packed or on a GPU, remembered for as long as the weights stay what they are."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

MOST = 64
"""Values that are remembered: those made last."""

_remembered: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()


class _Entry(NamedTuple):
    """A value and how to tell that it still belongs to its arrays."""

    owners: list[weakref.ref[np.ndarray]]
    contents: list[bytearray | None]
    """A copy of each array that somebody may write to, of a type that compares memory; None for what nobody can."""

    value: Any

    def belongs_to(self, arrays: list[np.ndarray]) -> bool:
        """Whether these are the same arrays with the same bits."""
        return all(
            owner() is array and (content is None or content == bits(array))
            for owner, array, content in zip(self.owners, arrays, self.contents, strict=True)
        )


def bits(array: np.ndarray) -> memoryview:
    """Return the memory of a C-contiguous array: a bytearray of it compares at once, another memoryview by the byte."""
    return array.reshape(-1).view(np.uint8).data


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
    contents = [None if _frozen(array) else bytearray(bits(array)) for array in present]
    value = make()

    def forget(_: Any, remembered: OrderedDict[Any, _Entry] = _remembered) -> None:  # also when the interpreter ends
        remembered.pop(full_key, None)

    _remembered[full_key] = _Entry([weakref.ref(array, forget) for array in present], contents, value)
    while len(_remembered) > MOST:
        _remembered.popitem(last=False)
    return value


@dataclass
class Passage:
    """What engines keep from one to the next of several calls with the same weights, as in a roll-out."""

    steps: int
    """About how many calls there are."""
    more: bool = True
    """Whether calls of the same kind follow: then a gradient may be None, and a later one has it in its sum."""
    made: dict[tuple[Any, ...], tuple[Any, Any]] = field(default_factory=dict)
    """By the arrays' ids and a key: the arrays, so that no others have their ids, and what was made of them."""
    sums: dict[tuple[Any, ...], tuple[Any, Any]] = field(default_factory=dict)
    """What grows until there are no more calls, likewise."""


_passage: ContextVar[Passage | None] = ContextVar("_passage", default=None)


@contextmanager
def passage(steps: int) -> Iterator[Passage]:
    """Tell engines that about so many calls with the same weights come, one after the other."""
    here = Passage(steps)
    token = _passage.set(here)
    try:
        yield here
    finally:
        _passage.reset(token)


def current(arrays: tuple[np.ndarray | None, ...]) -> Passage | None:
    """Return the `passage` that there is, if any, and if nobody can change the arrays on the way."""
    return _passage.get() if all(array is None or _frozen(array) for array in arrays) else None


def passing(arrays: tuple[np.ndarray | None, ...], key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """Return ``make()``; in a `passage` the same object again for the same arrays, where nobody can change them."""
    here = current(arrays)
    if here is None:
        return make()
    full_key = (*(id(array) for array in arrays), *key)
    if full_key not in here.made:
        here.made[full_key] = arrays, make()
    return here.made[full_key][1]

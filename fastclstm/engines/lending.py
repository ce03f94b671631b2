"""Memory for arrays: aligned, or used again, for until a system has given new pages whoever writes waits for it."""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np

LENT_BYTES = 1 << 18, 64 << 20
"""Size of what `lend` takes from what was given back, at least, and of all of that, at most."""

_spare: deque[np.ndarray] = deque()
"""Memory that nobody uses."""


def aligned_empty(count: int, dtype: np.dtype) -> np.ndarray:
    """Uninitialised array whose data starts at a multiple of 64 bytes."""
    size = count * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype)


class _Loan:
    """Memory that goes to `_spare` when no array refers to it any more: fresh pages cost as much as writing to them."""

    def __init__(self, memory: np.ndarray, count: int, dtype: np.dtype):
        self._memory, address = memory, memory.ctypes.data
        self.__array_interface__ = {
            "shape": (count,), "typestr": dtype.str, "data": (address + -address % 64, False), "version": 3,
        }  # fmt: skip

    def __del__(self, spare: deque[np.ndarray] = _spare, most: int = LENT_BYTES[1]) -> None:
        spare.append(self._memory)
        try:  # at the end of Python too, when this module's names are gone
            while sum(memory.nbytes for memory in spare) > most:
                spare.popleft()
        except (IndexError, RuntimeError):  # another thread may be at it
            pass


def lend(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised array as of `aligned_empty`; if large, of memory that is used again when the array is gone."""
    count = math.prod(shape)
    size = count * dtype.itemsize + 64
    if size < LENT_BYTES[0]:
        return aligned_empty(count, dtype).reshape(shape)
    memory = None
    for _ in range(len(_spare)):
        with suppress(IndexError):
            one = _spare.popleft()
            if memory is None and size <= one.nbytes <= 2 * size:
                memory = one
            else:
                _spare.append(one)
    loan: Any = _Loan(np.empty(size, np.uint8) if memory is None else memory, count, dtype)
    return np.asarray(loan).reshape(shape)

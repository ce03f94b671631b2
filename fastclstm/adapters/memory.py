"""Large arrays whose memory is used again: until a system has given new pages, a copy into them waits for it."""

from __future__ import annotations

import weakref

import numpy as np

LARGE_BYTES = 1 << 18
"""Smaller ones are the C library's affair."""
SPARE_BYTES = 64 << 20
"""What waits to be used again, at most."""

_spare: dict[int, list[np.ndarray]] = {}
"""Memory that nobody has, by its size."""


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array of any values, in memory that comes back when nobody has the array or a view of it."""
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    if size < LARGE_BYTES:
        return np.empty(shape, dtype)
    try:
        memory = _spare[size].pop()
    except (KeyError, IndexError):
        memory = np.empty(size, np.uint8)
    array = np.frombuffer(memory.data, dtype)  # what all views of it keep alive
    weakref.finalize(array, _give_back, memory).atexit = False
    return array.reshape(shape)


def _give_back(memory: np.ndarray) -> None:
    if sum(size * len(arrays) for size, arrays in list(_spare.items())) + memory.nbytes > SPARE_BYTES:
        _spare.clear()
    if memory.nbytes <= SPARE_BYTES:
        _spare.setdefault(memory.nbytes, []).append(memory)

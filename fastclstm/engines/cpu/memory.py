"""Arrays copied from one order in memory to another, and compared."""

from __future__ import annotations

import math
from array import array
from functools import lru_cache

import numba
import numpy as np

from fastclstm.engines.cpu import threads
from fastclstm.engines.cpu.kernels import memory
from fastclstm.engines.cpu.kernels.entry import Table, table
from fastclstm.engines.remembered import bits

SMALL_BYTES = 1 << 14
"""Size of what NumPy copies, at most, before a kernel has been started."""

PARALLEL_BYTES = 1 << 19
"""Bytes that are worth a second thread."""

RUN, SQUARE = 1 << 14, 64
"""Neighbours that one table lists, unless they are of one axis, and scalars that are turned together, at least."""

KEPT = 1 << 22
"""Scalars of the largest arrays whose tables are kept: these have at most 256 KB and are made in little of a copy."""

_CALL = table(np.zeros(3, np.int64))
"""The first array of `kernels.memory.transpose`."""


def copy(origin: np.ndarray, target: np.ndarray, *, negated: bool = False) -> None:
    """Write an array, or minus that, to one of its shape that is in another order in memory.

    Where each has its neighbours on an axis of its own, as frames with the channels first and last have, that is done
    in squares, so that of both no line of the cache is touched twice; everything else NumPy does.
    """
    turn, dtype = None, origin.dtype
    known = dtype.char in "fd" and dtype.isnative and dtype == target.dtype and not numba.config.DISABLE_JIT
    if known and origin.nbytes > SMALL_BYTES and origin.flags.aligned and target.flags.aligned:
        make = _kept_turn if origin.size <= KEPT else _turn
        turn = make(origin.shape, origin.strides, target.strides, dtype)
    if turn is None:
        if negated:
            np.negative(origin, out=target)
        else:
            np.copyto(target, origin)
        return
    call = array("q", (origin.ctypes.data, target.ctypes.data, negated))
    tables = _CALL._replace(place=(call.buffer_info()[0], 3)), *turn
    threads.run(memory.transpose, _team(origin.nbytes), (), *tables)


def contents(array: np.ndarray) -> bytearray:
    """Return a copy of a C-contiguous array's memory, for `is_in`."""
    return bytearray(bits(array))


def is_in(array: np.ndarray, copied: bytearray) -> bool:
    """Whether a C-contiguous array has the bits of `contents` that were as many."""
    team = _team(array.nbytes)
    if team == 1 or array.nbytes % 4 or numba.config.DISABLE_JIT:
        return copied == bits(array)
    return are_words(array, copied, team)


def are_words(array: np.ndarray, copied: bytearray, team: int) -> bool:
    """Do what `is_in` does by a kernel, for a whole number of words."""
    different = np.zeros(1, np.int64)
    words = (array.reshape(-1).view(np.int32), np.frombuffer(copied, np.int32))
    threads.run(memory.compare, team, (), *words, different)
    return not different[0]


def _team(size: int) -> int:
    return max(1, min(threads.usable_threads(), size // PARALLEL_BYTES)) if size >= 2 * PARALLEL_BYTES else 1


def _turn(
    shape: tuple[int, ...], origin_strides: tuple[int, ...], target_strides: tuple[int, ...], dtype: np.dtype
) -> tuple[Table, ...] | None:
    """Return how arrays of these strides are transposed, as the further arrays of `kernels.memory.transpose`.

    None where neighbours of both are on the same axis.
    """
    itemsize = dtype.itemsize
    if any(stride % itemsize for stride in (*origin_strides, *target_strides)):
        return None
    axes = [(length, start // itemsize, end // itemsize)
            for length, start, end in zip(shape, origin_strides, target_strides, strict=True)
            if length > 1]  # fmt: skip
    columns = _run([axis for axis in axes if axis[2] != 1], 0)
    rows = _run([axis for axis in axes if axis not in columns], 1)
    if not columns or not rows or math.prod(length for length, *_ in (*columns, *rows)) < SQUARE:
        return None
    outer = [axis for axis in axes if axis not in columns and axis not in rows]
    pairs = np.stack([_offsets(outer, 0), _offsets(outer, 1)])
    return tuple(map(table, (pairs, _offsets(rows, 0), _offsets(columns, 1), np.empty(0, dtype))))


_kept_turn = lru_cache(maxsize=64)(_turn)


def _run(axes: list[tuple[int, int, int]], which: int) -> list[tuple[int, int, int]]:
    """Return the axes, the innermost last, along which one of the two arrays lies in memory without a gap."""
    run: list[tuple[int, int, int]] = []
    length = 1
    while found := [axis for axis in axes if axis[1 + which] == length and (not run or length * axis[0] <= RUN)]:
        run.insert(0, found[0])
        length *= found[0][0]
    return run


def _offsets(axes: list[tuple[int, int, int]], which: int) -> np.ndarray:
    """Return where in one of the two arrays each index of some axes lies, the last axis the fastest."""
    offsets = np.zeros(1, np.int64)
    for length, *strides in axes:
        offsets = np.add.outer(offsets, strides[which] * np.arange(length)).ravel()
    return offsets

"""Weights in the order the kernels read them, packed once for as long as the arrays cannot change."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastclstm.engines.cpu import simd


class Columns(NamedTuple):
    """The columns of a weight matrix in groups of up to four vectors.

    groups[g] = (index into weights, vectors, width, first filter, filters, index into bias).
    """

    groups: np.ndarray
    weights: np.ndarray
    bias: np.ndarray


def aligned_empty(count: int, dtype: np.dtype) -> np.ndarray:
    """Uninitialised array whose data starts at a multiple of 64 bytes."""
    size = count * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype)


def plain_columns(matrices: np.ndarray, bias: np.ndarray | None) -> Columns:
    """Pack matrices (P, K, F) and bias (F,) in groups of four vectors of filters, the last as narrow as it can be."""
    F = matrices.shape[-1]
    lanes = simd.lanes(matrices.itemsize)
    widths = [min(4 * lanes, F - first) for first in range(0, F, 4 * lanes)]
    return _pack(matrices[:, :, None], bias if bias is None else bias[None], [-(-w // lanes) * lanes for w in widths],
                 [4 * lanes * g for g in range(len(widths))], widths, lanes)  # fmt: skip


def gate_columns(matrices: np.ndarray, bias: np.ndarray | None) -> Columns:
    """Pack matrices (P, K, 4, F) and bias (4, F) in groups of the four gates of up to one vector of filters."""
    F = matrices.shape[-1]
    lanes = simd.lanes(matrices.itemsize)
    quarter = max(lanes // 4, 1)
    counts = [min(lanes, F - first) for first in range(0, F, lanes)]
    return _pack(matrices, bias, [-(-n // quarter) * quarter for n in counts],
                 [lanes * g for g in range(len(counts))], counts, lanes)  # fmt: skip


def _pack(
    matrices: np.ndarray, bias: np.ndarray | None, widths: list[int], firsts: list[int], counts: list[int], lanes: int
) -> Columns:
    P, K, gates, _ = matrices.shape
    vectors = [-(-gates * width // lanes) for width in widths]
    columns = [v * lanes for v in vectors]
    weights = aligned_empty(P * K * sum(columns) + 8 * 4 * lanes, matrices.dtype)
    weights[-8 * 4 * lanes :] = 0  # a prefetch or an overlong load reads past the last panel
    biases = np.zeros(sum(columns), matrices.dtype)
    groups, at, bias_at = [], 0, 0
    for width, first, count, nv, n in zip(widths, firsts, counts, vectors, columns, strict=True):
        panel = weights[at : at + P * K * n].reshape(P, K, n)
        panel[...] = 0
        for gate in range(gates):
            block = slice(gate * width, gate * width + count)
            panel[:, :, block] = matrices[:, :, gate, first : first + count]
            if bias is not None:
                biases[bias_at : bias_at + n][block] = bias[gate, first : first + count]
        groups.append((at, nv, width, first, count, bias_at))
        at += P * K * n
        bias_at += n
    return Columns(np.array(groups, np.int64), weights, biases)


_MAX_REMEMBERED = 64
_remembered: OrderedDict[tuple[Any, ...], tuple[list[weakref.ref[np.ndarray]], Any]] = OrderedDict()


def _frozen(array: np.ndarray) -> bool:
    """Whether nobody can write to the memory of `array` through NumPy."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        if owner.flags.writeable:
            return False
        owner = owner.base
    return owner is None


def remember(arrays: tuple[np.ndarray | None, ...], key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """Return ``make()``, and the same object again for the same read-only arrays and key while the arrays live."""
    present = [array for array in arrays if array is not None]
    if not all(map(_frozen, present)):
        return make()
    full_key = (*(id(array) for array in arrays), *key)
    found = _remembered.get(full_key)
    if found is not None and all(ref() is array for ref, array in zip(found[0], present, strict=True)):
        return found[1]
    value = make()

    def forget(_: Any) -> None:
        _remembered.pop(full_key, None)

    _remembered[full_key] = ([weakref.ref(array, forget) for array in present], value)
    while len(_remembered) > _MAX_REMEMBERED:
        _remembered.popitem(last=False)
    return value

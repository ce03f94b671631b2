"""Weights in the order the kernels read them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastclstm.engines import lending
from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.kernels.entry import Table, table


class Columns(NamedTuple):
    """The columns of a weight matrix in groups of up to four vectors.

    groups[g] = (index into weights, vectors, width, first filter, filters, index into bias).
    """

    groups: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    tables: Table
    """The three, as kernels get them."""


def lay_out(
    P: int, K: int, gates: int, F: int, bias: np.ndarray | None, dtype: np.dtype, *, paired: bool = False
) -> Columns:
    """Place P matrices (P, K, gates, F), their bias (gates, F) filled in: 4 gates of one vector a group, or 1 of four.

    A group's panel is [P][K][vectors], or with `paired` [P][pair of vectors][K][two vectors], an odd number of them
    ending with [K][one vector]. The last group is as narrow as it can be. Columns without a filter are zeros; the
    others are still to be written.
    """
    lanes = simd.lanes(dtype.itemsize)
    quarter = max(lanes // 4, 1)
    most = 4 * lanes // gates  # filters of a group
    groups: list[tuple[int, ...]] = []
    unused: list[slice] = []  # panels with columns without a filter
    at = bias_at = 0
    for first in range(0, F, most):
        count = min(most, F - first)
        width = -(-count // quarter) * quarter
        vectors = -(-gates * width // lanes)
        groups.append((at, vectors, width, first, count, bias_at))
        if gates * count < vectors * lanes:
            unused.append(slice(at, at + P * K * vectors * lanes))
        at += P * K * vectors * lanes
        bias_at += vectors * lanes
    # A prefetch or an overlong load reads past the last panel: for that there are zeros.
    weights = lending.lend((at + max(2 * K * 2, 32) * lanes,), dtype)
    for part in (*unused, slice(at, None)):
        weights[part] = 0
    biases = np.zeros(bias_at + lanes, dtype)
    if bias is not None:
        for _, _, width, first, count, start in groups:
            for gate in range(gates):
                column = start + gate * width
                biases[column : column + count] = bias[gate, first : first + count]
    columns = np.array(groups, np.int64).reshape(-1, 6), weights, biases
    return Columns(*columns, table(*columns))


def pack(matrix: np.ndarray, scales: np.ndarray, bias: np.ndarray | None) -> Columns:
    """Pack a matrix (K, gates, F) times scales (gates, F), rounded once, and a bias (gates, F): see `lay_out`."""
    K, gates, F = matrix.shape
    columns = lay_out(1, K, gates, F, bias, matrix.dtype)
    for at, vectors, width, first, count, _ in columns.groups:
        line = vectors * simd.lanes(matrix.itemsize)
        panel = columns.weights[at : at + K * line].reshape(K, line)
        f = slice(first, first + count)
        for gate in range(gates):
            panel[:, gate * width : gate * width + count] = matrix[:, gate, f] * scales[gate, f]
    return columns

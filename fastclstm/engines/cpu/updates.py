"""What cells do with pre-activations, by kernels: the methods of `engines.cell_updates.Updates`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastclstm.engines import cell_updates, lending
from fastclstm.engines.cpu import launch, threads
from fastclstm.engines.cpu.kernels import gates, updates
from fastclstm.engines.cpu.kernels.entry import Table, table
from fastclstm.spec import CellSpec

CHUNK_BYTES = 2048
"""Size of a line of a chunk, about."""

STRIP_PIXELS = 64
"""Pixels whose sums are taken together, about."""

CELL_FLOPS = 150
"""Computing one value of a new state takes as long as so many operations, for the number of threads."""


class KernelUpdates:
    """`Updates` whose arrays are contiguous from image to image."""

    def __init__(self, spec: CellSpec, codes: tuple[int, int, int], dtype: np.dtype):
        self._spec, self._dtype, self._F = spec, dtype, spec.F
        self._sigma, self._act, self._out = codes
        F, pixels = spec.F, math.prod(spec.state_shape[1:-1])
        chunk = min(max(1, CHUNK_BYTES // (F * dtype.itemsize)), pixels)
        strip = -(-STRIP_PIXELS // chunk) * chunk
        strips = -(-pixels // strip)
        self._record = np.zeros(1, updates.UPDATE)
        record = self._record[0]
        columns = (4 if spec.cell == "gru" and spec.reset_after else spec.G) * F
        for name, value in {"B": spec.B, "pixels": pixels, "F": F, "chunk": chunk, "strip": strip, "strips": strips,
                            "columns": columns}.items():  # fmt: skip
            record[name] = value
        self._team = launch.team_size(CELL_FLOPS * spec.B * pixels * F)
        pitch = -(-chunk * F // 16) * 16 + 32  # lines at different places of the cache
        rows = lending.aligned_empty(self._team * updates.LINES * pitch, dtype).reshape(self._team, -1)
        self._like, self._step, self._rows = table(np.empty(0, dtype)), table(self._record), table(rows)
        self._gathered: np.ndarray | None = None
        self._routes: dict[Any, Table] = {}

    @property
    def sums(self) -> np.ndarray | None:
        """Of the gradients of pre-activations, over samples and pixels, that have been computed so far."""
        return None if self._gathered is None else self._gathered.sum((0, 1), np.float64).astype(self._dtype)

    # The cells: lines as (activation, gate in z, gate in `other`); and of gradients (gate in z, in `other`, sum)

    def rnn(self, z: np.ndarray, z_h: np.ndarray | None, h_new: np.ndarray, y: np.ndarray | None) -> None:
        """See `Updates`."""
        self._forward(updates.RNN, ((self._act, 0, 0),), z, z_h, h=h_new, y=y)

    def rnn_back(self, z: np.ndarray, dh: np.ndarray, dy: np.ndarray | None, more: np.ndarray | None) -> None:
        """See `Updates`."""
        self._backward(updates.RNN, ((self._act, 0, -1),), ((0, -1, 0),), z, None, d=dh, dy=dy, more=more)

    def lstm(
        self, z: np.ndarray, z_h: np.ndarray | None, c: np.ndarray, c_new: np.ndarray, h_new: np.ndarray,
        y: np.ndarray | None,
    ) -> None:  # fmt: skip
        """See `Updates`."""
        lines = tuple((self._act if gate == 2 else self._sigma, gate, gate) for gate in range(4))
        self._forward(updates.LSTM, lines, z, z_h, self._out, state=c, new=c_new, h=h_new, y=y)

    def lstm_back(
        self, z: np.ndarray, c: np.ndarray, dh: np.ndarray, dc: np.ndarray, dy: np.ndarray | None,
        more: np.ndarray | None,
    ) -> None:  # fmt: skip
        """See `Updates`."""
        lines = tuple((self._act if gate == 2 else self._sigma, gate, -1) for gate in range(4))
        targets = tuple((gate, -1, gate) for gate in range(4))
        self._backward(updates.LSTM, lines, targets, z, None, self._out, state=c, d=dh, dc=dc, dy=dy, more=more)

    def gru(self, z: np.ndarray, z_h: np.ndarray, h: np.ndarray, h_new: np.ndarray, y: np.ndarray | None) -> None:
        """See `Updates`."""
        lines = (self._sigma, 0, 0), (self._sigma, 1, 1), (-1, 2, -1), (-1, -1, 2)
        self._forward(updates.GRU, lines, z, z_h, self._act, state=h, h=h_new, y=y)

    def gru_back(
        self, z: np.ndarray, z_h: np.ndarray, h: np.ndarray, dh: np.ndarray, dy: np.ndarray | None,
        more: np.ndarray | None,
    ) -> None:  # fmt: skip
        """See `Updates`."""
        lines = (self._sigma, 0, -1), (self._sigma, 1, -1), (-1, 2, -1), (-1, -1, 2)
        targets = (0, 0, 0), (1, 1, 1), (2, -1, 2), (-1, 2, 3)
        self._backward(updates.GRU, lines, targets, z, z_h, self._act, state=h, d=dh, dy=dy, more=more)

    def reset(self, z: np.ndarray, z_h: np.ndarray | None, h: np.ndarray, met: np.ndarray) -> None:
        """See `Updates`."""
        self._forward(updates.RESET, ((-1, 0, 0), (self._sigma, 1, 1)), z, z_h, state=h, h=met)

    def update(
        self, z: np.ndarray, z_n: np.ndarray | None, h: np.ndarray, h_new: np.ndarray, y: np.ndarray | None
    ) -> None:  # fmt: skip
        """See `Updates`."""
        self._forward(updates.UPDATED, ((self._sigma, 0, -1), (self._act, 2, 0)), z, z_n, state=h, h=h_new, y=y)

    def update_back(
        self, z: np.ndarray, h: np.ndarray, dh: np.ndarray, dn: np.ndarray, dy: np.ndarray | None,
        more: np.ndarray | None,
    ) -> None:  # fmt: skip
        """See `Updates`."""
        lines, targets = ((self._sigma, 0, -1), (self._act, 2, -1)), ((0, -1, 0), (2, 0, 2))
        self._backward(updates.UPDATED, lines, targets, z, dn, state=h, d=dh, dy=dy, more=more)

    def reset_back(self, z: np.ndarray, h: np.ndarray, dmet: np.ndarray, dgates: np.ndarray, dh: np.ndarray) -> None:
        """See `Updates`."""
        lines, targets = ((-1, 0, -1), (self._sigma, 1, -1)), ((-1, 0, -1), (1, 1, 1))
        self._backward(updates.RESET, lines, targets, z, dgates, state=h, d=dmet, dc=dh)

    # Kernels

    def _forward(
        self, kind: int, lines: tuple[tuple[int, int, int], ...], z: np.ndarray, other: np.ndarray | None,
        last: int = -1, **arrays: np.ndarray | None,
    ) -> None:  # fmt: skip
        if other is None:
            lines = tuple((code, gate, -1) for code, gate, _ in lines)
        self._place(kind, last, z, other, arrays)
        threads.run(updates.forward, self._team, (), self._like, self._step, self._route(lines), self._rows)

    def _backward(
        self, kind: int, lines: tuple[tuple[int, int, int], ...], targets: tuple[tuple[int, int, int], ...],
        z: np.ndarray, other: np.ndarray | None, last: int = -1, **arrays: np.ndarray | None,
    ) -> None:  # fmt: skip
        record = self._record[0]
        if self._gathered is None:
            self._gathered = np.zeros((record["B"], record["strips"], record["columns"]), self._dtype)
            record["sums"] = self._gathered.ctypes.data
        self._place(kind, last, z, other, arrays)
        to = self._route(tuple((-1, *target) for target in targets))
        threads.run(updates.backward, self._team, (), self._like, self._step, self._route(lines), to, self._rows)

    def _route(self, lines: tuple[tuple[int, ...], ...]) -> Table:
        """Return lines as the rows that kernels read."""
        if lines not in self._routes:
            route = np.full((4, updates.ROUTE_LINES), -1)
            for n, line in enumerate(lines):
                route[: len(line), n] = line
            self._routes[lines] = table(route)
        return self._routes[lines]

    def _place(
        self, kind: int, last: int, z: np.ndarray, other: np.ndarray | None, arrays: dict[str, np.ndarray | None]
    ) -> None:  # fmt: skip
        """Set what the arrays are and where."""
        record = self._record[0]
        record["kind"], record["last"] = kind, last
        record["z_pixel"], record["other_pixel"] = z.shape[-1], 0 if other is None else other.shape[-1]
        given = arrays | {"z": z, "other": other}
        for name in updates.ARRAYS:
            array = given.get(name)
            record[name] = 0 if array is None else array.ctypes.data
            record[f"{name}_image"] = 0 if array is None else array.strides[0]


def updates_of(spec: CellSpec, dtype: np.dtype) -> Any:
    """Return the updates by kernels, or where one activation is not theirs, or there is nothing, by NumPy."""
    codes = gates.activation_codes(spec)
    return cell_updates.Updates(spec) if codes is None or 0 in spec.state_shape else KernelUpdates(spec, codes, dtype)

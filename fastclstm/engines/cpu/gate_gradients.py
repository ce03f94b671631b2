"""The gates' part of backpropagation through time."""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu import threads
from fastclstm.engines.cpu.kernels.entry import table
from fastclstm.engines.cpu.kernels.gates_backward import CHUNK_PIXELS, PULL_BACK, STEP, row_length
from fastclstm.engines.cpu.kernels.schedule import Slots

_PLACES = {name: place for place, name in enumerate(STEP.names or ())}


class GateGradients:
    """The gates' part of backpropagation through time, and the sums over time that it keeps."""

    def __init__(self, kind: str, cell: np.ndarray, pixels: int, dtype: np.dtype, peephole: np.ndarray | None):
        """`cell` and its `gates.kind` as in the forward pass; peephole: the weights (3, …, F) of i, f and o."""
        F = int(cell[0]["F"])
        self._kernel, self._peephole = PULL_BACK[kind], peephole
        self._sums = np.zeros((-(-pixels // CHUNK_PIXELS), 7 * F), dtype)
        self._rows = np.empty((0, 0), dtype)
        self._elementwise = peephole is not None and peephole.ndim == 4
        self._dpeephole = np.zeros_like(peephole) if self._elementwise else None
        self._step = np.zeros(1, STEP)
        for name, value in {"pixels": pixels, "F": F, "elementwise": self._elementwise,
                            "weights": 0 if peephole is None else peephole.ctypes.data,
                            "dweights": 0 if self._dpeephole is None else self._dpeephole.ctypes.data,
                            "sums": self._sums.ctypes.data}.items():  # fmt: skip
            self._step[name] = value
        self._numbers = self._step.view(np.int64)
        self._tables = table(self._sums.reshape(-1)[:0]), table(self._step), table(cell), table(self._rows)

    def pull_back(self, B: int, team: int, dh_pitch: int = 0, /, **arrays: Slots) -> None:
        """Write dz and h of B images, and dc over dc, of the step at which the slots begin.

        They are: gates, before (the gates that left h; without them h is not written), h and c before the step, dy
        (may be missing), dh, dc and dz. With dx, which may be missing too, the C scalars that follow those of each
        pixel in dh go there; `dh_pitch` is F + C then.
        """
        self._step["B"], self._step["dh_pitch"] = B, dh_pitch or self._step["F"]
        for name, slot in arrays.items():
            self._numbers[_PLACES[name]], self._numbers[_PLACES[f"{name}_image"]] = slot.address, slot.image
        if len(self._rows) < team:
            self._rows = np.empty((team, row_length(int(self._step[0]["F"]), self._sums.itemsize)), self._sums.dtype)
            self._tables = *self._tables[:3], table(self._rows)
        threads.run(self._kernel, team, (), *self._tables)

    def result(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the gradients of the bias (4F,) and of the peepholes (3, …, F)."""
        sums = self._sums.sum(0)
        F = len(sums) // 7
        channels = None if self._peephole is None else sums[4 * F :].reshape(3, F)
        return sums[: 4 * F], self._dpeephole if self._elementwise else channels

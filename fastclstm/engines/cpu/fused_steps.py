"""The steps of a ConvLSTM, their weights packed: run from any state for any number of steps."""

from __future__ import annotations

import numpy as np

from fastclstm.engines import remembered
from fastclstm.engines.cpu import launch, packing, plans
from fastclstm.engines.cpu.kernels import gates
from fastclstm.engines.cpu.kernels.schedule import NOTHING, Slots
from fastclstm.spec import ConvLSTMSpec


class Steps:
    """The fused kernels of a ConvLSTM with Winograd tiles of m×m, or direct ones (m = 0)."""

    def __init__(
        self, spec: ConvLSTMSpec, m: int, kernels: tuple[np.ndarray, np.ndarray], bias: np.ndarray | None,
        peephole: dict[str, np.ndarray] | None, *, remember: bool,
    ):  # fmt: skip
        """Pack the recurrent and the input kernel; remember them where the same ones will come again."""
        self._spec, self._m, self._itemsize, self._peephole = spec, m, kernels[0].itemsize, peephole
        self._cell = gates.cell(spec, peephole)

        def pack() -> tuple[bool, packing.Columns]:
            if gates.is_standard(spec):
                with np.errstate(over="ignore"):
                    columns = launch.pack(kernels, bias, gates.SCALES, m, remember=False)
                if np.isfinite(columns.weights).all():
                    return True, columns
            # Weights above 1.2e38 (float64: 6e307) cannot carry the scales.
            return False, launch.pack(kernels, bias, np.ones(4), m, remember=False)

        self._standard: bool
        self._columns: packing.Columns
        key = m, gates.is_standard(spec)
        self._standard, self._columns = remembered.remember((*kernels, bias), key, pack) if remember else pack()

    def run(
        self, B: int, T: int, *, x: Slots, h_first: Slots, c_first: Slots, h: Slots, c: Slots, y: Slots = NOTHING,
        y_first: Slots = NOTHING, kept: Slots = NOTHING, fresh: bool = False, mask: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Run T steps of B images from the first states on; mask (B, T) in the order of processing, kept: gates."""
        spec = self._spec.with_batch(B)
        team = launch.team_size(spec.flops // spec.T)
        kind = gates.kind(spec) if self._standard else "any"
        finish = f"update_{kind}" if kind != "standard" else "update" if kept is NOTHING else "update_and_keep"
        plan = plans.plan(
            (spec.recurrent, spec.input), self._m, finish, len(self._columns.groups), self._itemsize, team
        )
        launch.run(plan, self._columns, self._cell, B, T, team, x=x, h=h, h_first=h_first, c=c, c_first=c_first, y=y,
                     y_first=y_first, gates=kept, fresh=fresh, mask=mask, step_flops=spec.flops // spec.T)  # fmt: skip

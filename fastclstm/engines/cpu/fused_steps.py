"""The steps of a ConvLSTM, their weights packed: run from any state for any number of steps."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fastclstm.engines import remembered
from fastclstm.engines.cpu import launch, outliers, packing, plans
from fastclstm.engines.cpu.kernels import gates
from fastclstm.engines.cpu.kernels.schedule import NOTHING, Slots
from fastclstm.spec import ConvLSTMSpec

AHEAD_BYTES = 4 << 20
"""Size of what x gives the pre-activations before the steps, at most; but one step of one image always has it.

Of 1 to 32 MB 4 to 8 were the fastest, or within 2 %, in each of seven cells; 32 MB took 4 to 15 % longer (Emerald
Rapids, 2 MB of L2), 1 MB up to 7 %. Of half to 8 MB 4 were the fastest, or within 2 %, in eight of ten: five cells, on
one and two threads (Zen 4, 1 MB of L2).
"""


class _Packed(NamedTuple):
    standard: bool
    """Whether the weights carry `gates.SCALES`."""
    steps: packing.Columns
    before: packing.Columns | None
    """Of x, where its convolution goes before the steps."""


class Steps:
    """The fused kernels of a ConvLSTM, each convolution with its algorithm."""

    def __init__(
        self, spec: ConvLSTMSpec, ways: plans.Ways, kernels: tuple[np.ndarray, np.ndarray], bias: np.ndarray | None,
        peephole: dict[str, np.ndarray] | None, *, remember: bool,
    ):  # fmt: skip
        """Pack the recurrent and the input kernel; remember them where the same ones will come again."""
        self._spec, self._ways, self._dtype, self._peephole = spec, ways, kernels[0].dtype, peephole
        self._cell = gates.cell(spec, peephole)

        def pack() -> _Packed:
            if gates.is_standard(spec):
                with np.errstate(over="ignore"):
                    packed = self._pack(kernels, bias, gates.SCALES)
                # Of most weights that they are finite follows from their sizes, which are fewer than the packed ones.
                if all(map(outliers.all_ordinary, kernels)) or all(
                    np.isfinite(columns.weights).all() for columns in packed if columns is not None
                ):
                    return _Packed(True, *packed)
            # Weights above 1.2e38 (float64: 6e307) cannot carry the scales.
            return _Packed(False, *self._pack(kernels, bias, np.ones(4)))

        key = ways, spec.input.strides, gates.is_standard(spec)
        keep = remembered.remember if remember else remembered.passing
        self._packed: _Packed = keep((*kernels, bias), key, pack)

    def run(
        self, B: int, T: int, *, x: Slots, h_first: Slots, c_first: Slots, h: Slots, c: Slots, y: Slots = NOTHING,
        y_first: Slots = NOTHING, kept: Slots = NOTHING, fresh: bool = False, mask: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Run T steps of B images from the first states on; mask (B, T) in the order of processing, kept: gates."""
        kind = gates.kind(self._spec) if self._packed.standard else "any"
        finish = f"update_{kind}" if kind != "standard" else "update" if kept is NOTHING else "update_and_keep"
        arrays = {"x": x, "h": h, "h_first": h_first, "c": c, "c_first": c_first, "y": y, "y_first": y_first,
                  "gates": kept}  # fmt: skip
        if self._packed.before is None:
            self._run(B, T, finish, mask, zx=NOTHING, fresh=fresh, **arrays)
            return
        spec = self._spec
        image = spec.HO * spec.WO * 4 * spec.F * self._dtype.itemsize
        images = min(B, max(1, AHEAD_BYTES // image))
        steps = min(T, max(1, AHEAD_BYTES // (image * images)))
        address, memory = launch.borrow(images * steps * image)
        for b in range(0, B, images):
            count = min(images, B - b)
            part = {name: array.after(b, 0) for name, array in arrays.items()}
            zx = Slots(address, image * steps, image, steps)
            self._run(count, T, finish, None if mask is None else mask[b : b + count], zx=zx, fresh=fresh, **part)
        launch.give_back(address, memory)

    def _run(self, B: int, T: int, finish: str, mask: np.ndarray | None, x: Slots, zx: Slots, **rest: Any) -> None:
        """Run T steps of B images; zx: memory for what x gives before them, where it does."""
        spec = self._spec if self._spec.B == B else self._spec.with_batch(B)
        flops = spec.flops // spec.T
        team, groups, itemsize = launch.team_size(flops), len(self._packed.steps.groups), self._dtype.itemsize
        convolve = None
        if self._packed.before is None:
            plan = plans.plan((spec.recurrent, spec.input), self._ways.h, finish, groups, itemsize, team)
        else:
            plan = plans.plan((spec.recurrent,), self._ways.h, finish, groups, itemsize, team)
            convolve = partial(self._convolve, B, team, x, zx)
            x = NOTHING
        launch.run(plan, self._packed.steps, self._cell, B, T, team, x=x, zx=zx, convolve=convolve, mask=mask,
                   step_flops=flops, **rest)  # fmt: skip

    def _convolve(self, B: int, team: int, x: Slots, zx: Slots, t: int, count: int) -> None:
        """Convolve x of some steps, as so many images where they are evenly apart in memory.

        Also frames that are masked: what they give, were it NaN, is not read.
        """
        columns, spec, steps = self._packed.before, self._spec.input, count
        assert columns is not None
        x = x.after(0, t)
        if B == 1 or (count == zx.kept and x.image == count * x.step):
            B, steps = B * count, 1
            x, zx = x._replace(image=x.step), zx._replace(image=zx.step)
        spec = spec if spec.B == B else spec.with_batch(B)
        plan = plans.plan((spec,), self._ways.x, "store", len(columns.groups), self._dtype.itemsize, team)
        launch.run(plan, columns, gates.storing(spec.F), B, steps, team, x=x, h=zx, step_flops=spec.flops)

    def _pack(
        self, kernels: tuple[np.ndarray, np.ndarray], bias: np.ndarray | None, scales: np.ndarray
    ) -> tuple[packing.Columns, packing.Columns | None]:
        """Pack the recurrent and the input kernel, each gate times its scale: together or, if x goes before, apart."""
        ways, strides = self._ways, (self._spec.recurrent.strides, self._spec.input.strides)
        pack = partial(launch.pack, remember=False)
        if not ways.before:
            return pack(kernels, bias, scales, ways.h, strides=strides), None
        recurrent, kernel = kernels
        line = np.repeat(scales, kernel.shape[3] // 4)[np.newaxis]  # what is stored has no gates
        return (pack((recurrent,), None, scales, ways.h, strides=strides[:1]),
                pack((kernel,), bias, line, ways.x, strides=strides[1:]))  # fmt: skip

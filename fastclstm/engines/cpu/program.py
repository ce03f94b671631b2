"""Launches of several kernels for each of some steps, in one parallel region: nothing between them is Python's."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from fastclstm.engines import lending
from fastclstm.engines.cpu import launch, packing, threads
from fastclstm.engines.cpu.kernels.entry import Kernel, Table, table
from fastclstm.engines.cpu.kernels.program import program
from fastclstm.engines.cpu.kernels.schedule import FLOW, LINE, Plan, Slots
from fastclstm.engines.cpu.kernels.team import HEADER, NESTED, WORKERS

_BYTE = np.dtype(np.uint8)
EVERY = slice(None)


class Course(NamedTuple):
    """Where an array is at each step of a program."""

    addresses: np.ndarray
    """(steps,) int64"""
    image: int | np.ndarray
    """Bytes to the next image, of each step where they differ."""

    def begin(self, slot: Slots) -> Course:
        """The same, but at the first step another array."""
        addresses, images = self.addresses.copy(), np.full(len(self.addresses), self.image)
        addresses[0], images[0] = slot.address, slot.image
        return Course(addresses, images)

    def after(self, images: int) -> Course:
        """The same without the first images."""
        return Course(self.addresses + images * self.image, self.image)


def course(slot: Slots, steps: np.ndarray) -> Course:
    """Where the given steps of an array are, which keeps some slots in turn."""
    return Course(slot.address + steps % slot.kept * slot.step, slot.image)


class Pace:
    """How many steps a program should have, so that Python gets to answer a Ctrl-C between two."""

    def __init__(self, flops: int, most: int):
        """flops: floating-point operations of a step; most: steps."""
        self._most = most
        self.steps = max(1, min(most, launch.PIECE_FLOPS // max(1, flops)))

    def took(self, seconds: float, steps: int) -> None:
        """Learn from the last program."""
        self.steps = max(1, min(self._most, 4 * steps, int(steps * launch.PIECE_SECONDS / max(seconds, 1e-9))))


class Program:
    """What is run at each of some steps, in the order in which it is added."""

    def __init__(self, steps: int):
        self.steps = steps
        self._entries: list[tuple[int, np.ndarray, slice]] = []
        self._convolutions: list[tuple[Plan, np.ndarray]] = []
        self._kept: list[Any] = []

    def add(
        self, kernel: Kernel, variant: tuple[int, ...], *arguments: Table | np.ndarray, where: slice = EVERY
    ) -> None:
        """Add a kernel, run at the steps `where`; of an array each step gets its row, of records a table of one."""
        tables = [
            a if isinstance(a, Table) else table(a[:1] if a.dtype.names and a.ndim == 1 else a[0]) for a in arguments
        ]
        address, _ = kernel.function(variant, tables)
        job = threads.job_of(tables)
        jobs = np.empty((self.steps, len(job)), np.int64)
        jobs[:] = job
        jobs[:, NESTED] = 1
        at = HEADER
        for argument, one in zip(arguments, tables, strict=True):
            if isinstance(argument, np.ndarray):
                jobs[:, at] += np.arange(self.steps) * argument.strides[0]
            at += len(one.place)
        self._entries.append((address, jobs, where))
        self._kept.append((arguments, tables))

    def convolve(
        self, plan: Plan, columns: packing.Columns, cell: np.ndarray, B: int, trouble: np.ndarray, *, target: Course,
        x: Course | None = None, h: Course | None = None, fresh: np.ndarray | bool = False, where: slice = EVERY,
    ) -> None:  # fmt: skip
        """Add a sum of convolutions that is stored: see `launch.run`; `trouble` (B,) int64 is set, never cleared."""
        flows = np.zeros(self.steps, FLOW)
        for name, value in (
            ("B", B), ("steps", 1), ("units", plan.units), ("blocks", plan.blocks), ("parts", plan.parts),
            ("fresh", fresh), ("h", target.addresses), ("h_image", target.image), ("h_slots", 1), ("c_slots", 1),
            ("trouble", trouble.ctypes.data),
        ):  # fmt: skip
            flows[name] = value
        for name, source in (("x", x), ("h_first", h)):
            if source is not None:
                flows[name], flows[f"{name}_image"] = source
        self._convolutions.append((plan, flows))
        self._kept.append((columns, trouble))
        self.add(plan.kernel, plan.variant, flows, plan.tables, columns.tables, table(cell), launch.NO_MASK,
                 where=where)  # fmt: skip

    def begin_again(self, *, x: Course, h: Course, fresh: bool) -> None:
        """Be as before the first run, the one convolution with other frames x and states h, zeros first if `fresh`."""
        for _, jobs, _ in self._entries:
            jobs[:, :HEADER] = 0
            jobs[:, NESTED] = 1
        ((_, flows),) = self._convolutions
        for name, source in (("x", x), ("h_first", h)):
            flows[name], flows[f"{name}_image"] = source
        flows["fresh"][0] = fresh

    def keep(self, *arrays: Any) -> None:
        """Hold what the kernels use until they have run."""
        self._kept.append(arrays)

    def run(self, team: int, pace: Pace) -> None:
        """Run all that was added, by up to `team` threads."""
        begun = time.perf_counter()
        team = min(team, threads.usable_threads())
        share = max((plan.scratch_bytes for plan, _ in self._convolutions), default=0)
        share = -(-share // 4096) * 4096 + LINE * 5  # workers at different cache sets
        address, memory = launch.borrow(share * team)
        sizes = [plan.units * (1 + plan.blocks) * LINE for plan, _ in self._convolutions]
        progress = lending.aligned_empty(sum(sizes) * self.steps if team > 1 else 0, _BYTE)
        progress.fill(0)
        at = progress.ctypes.data
        for size, (_, flows) in zip(sizes, self._convolutions, strict=True):
            flows["scratch"], flows["scratch_worker"] = address, share
            if team > 1:
                flows["progress"] = at + np.arange(self.steps) * size
                at += size * self.steps
        entries = np.zeros((self.steps, len(self._entries), 2), np.int64)
        for n, (kernel, jobs, where) in enumerate(self._entries):
            jobs[:, WORKERS] = team
            entries[where, n, 0] = kernel
            entries[:, n, 1] = jobs.ctypes.data + np.arange(self.steps) * jobs.strides[0]
        listed = table(entries.reshape(-1, 2))
        start, function = program.function((), (listed,))
        threads.start(start, function, threads.job_of((listed,)), team)
        launch.give_back(address, memory)
        pace.took(time.perf_counter() - begun, self.steps)

"""Running a plan: scratch memory, the records that kernels read, and the choice of serial or parallel."""

from __future__ import annotations

import threading

import numpy as np

from fastclstm.engines.cpu import packing, threads
from fastclstm.engines.cpu.flow import FLOW, NOTHING, Plan, Slots

NO_MASK = np.ones((0, 0), np.bool_)

_arena = threading.local()


def _scratch(size: int) -> np.ndarray:
    """Scratch memory of this Python thread, kept between calls."""
    memory = getattr(_arena, "memory", None)
    if memory is None or memory.nbytes < size:
        memory = _arena.memory = packing.aligned_empty(size, np.dtype(np.uint8))
    return memory


def run(
    plan: Plan, columns: packing.Columns, cell: np.ndarray, B: int, T: int, team: int, *,
    x: Slots, h: Slots, h_first: Slots = NOTHING, c: Slots = NOTHING, c_first: Slots = NOTHING, y: Slots = NOTHING,
    fresh: bool = True, mask: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Run T steps on B images with up to `team` threads, writing to the memory of h, c and y."""
    flow = np.zeros(1, FLOW)
    record = flow[0]
    workers = min(team, plan.units if plan.by_unit else plan.units * plan.tasks)
    record["B"], record["T"], record["workers"], record["units"], record["tasks"] = (
        B,
        T,
        workers,
        plan.units,
        plan.tasks,
    )
    record["length"] = T if plan.by_unit or workers == 1 else 1
    record["masked"], record["fresh"] = mask is not None, fresh
    for name, place in (("x", x), ("h_first", h_first), ("h", h), ("c_first", c_first), ("c", c), ("y", y)):
        record[name], record[f"{name}_image"], record[f"{name}_step"] = place[:3]
    record["h_slots"], record["c_slots"] = h.count, c.count
    share = -(-plan.scratch_bytes // 4096) * 4096 + 64 * 5  # workers at different cache sets
    memory = _scratch(share * workers)
    record["scratch"], record["scratch_worker"] = memory.ctypes.data, share
    arguments = (columns.weights[:0], flow, plan.work, plan.sources, columns.groups, *plan.tables, columns.weights,
                 columns.bias, cell, NO_MASK if mask is None else mask)  # fmt: skip
    serial, parallel = plan.kernels
    if workers == 1:
        serial(*arguments)
    else:
        with threads.team(workers):
            parallel(*arguments)

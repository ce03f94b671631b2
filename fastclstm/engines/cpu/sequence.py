"""The loop over time steps, images and blocks that conv2d (one step) and convlstm2d share, serial and parallel."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numba
import numpy as np

from fastclstm.engines.cpu import direct, frames, packing, simd, threads
from fastclstm.engines.cpu.compilation import inline, kernel

FLOW = np.dtype([
    ("B", np.int64), ("T", np.int64),
    ("workers", np.int64),
    ("by_image", np.int64),  # 1: a worker takes whole images through all steps; 0: workers share the blocks of a step
    ("parts", np.int64),  # pieces into which the groups of a block are cut
    ("masked", np.int64),
    *((f"{name}{field}", kind) for name in ("x", "h_first", "h", "c_first", "c", "y")
      for field, kind in (("", np.uint64), ("_image", np.int64), ("_step", np.int64))),  # address, strides in bytes
    ("h_slots", np.int64), ("c_slots", np.int64),  # steps kept: the t-th is in slot t % slots
    ("scratch", np.uint64), ("scratch_worker", np.int64),
])  # fmt: skip
"""Where a sequence's arrays are and how its work is shared out."""


@inline
def _carry(like, cell, work, groups, block, group0, group1, old, new):
    """Copy one block's share of (HO, WO, F) from address old (0: zeros) to address new."""
    y0, x0 = block // work.blocks_x * work.block_height, block % work.blocks_x * work.block_width
    first = groups[group0, 3]
    count = groups[group1 - 1, 3] + groups[group1 - 1, 4] - first
    for y in range(y0, min(y0 + work.block_height, work.HO)):
        for x in range(x0, min(x0 + work.block_width, work.WO)):
            index = (y * work.WO + x) * cell.F + first
            target = simd.shift(simd.at(like, new), index)
            if old == 0:
                frames.clear_run(target, count)
            else:
                frames.copy_run(target, simd.shift(simd.at(like, old), index), count)


@inline
def _address(base, image, step, b, t):
    return np.uint64(np.int64(base) + b * image + t * step)


@inline
def _task(like, flow, work, sources, groups, panels, passes, segments, weights, bias, cell, mask, scratch, b, t, task):
    block, part = task // flow.parts, task % flow.parts
    group0, group1 = len(groups) * part // flow.parts, len(groups) * (part + 1) // flow.parts
    x = _address(flow.x, flow.x_image, flow.x_step, b, t)
    if t == 0:
        h_old = _address(flow.h_first, flow.h_first_image, 0, b, 0)
        c_old = _address(flow.c_first, flow.c_first_image, 0, b, 0)
    else:
        h_old = _address(flow.h, flow.h_image, flow.h_step, b, (t - 1) % flow.h_slots)
        c_old = _address(flow.c, flow.c_image, flow.c_step, b, (t - 1) % flow.c_slots)
    h_new = _address(flow.h, flow.h_image, flow.h_step, b, t % flow.h_slots)
    c_new = _address(flow.c, flow.c_image, flow.c_step, b, t % flow.c_slots)
    y = _address(flow.y, flow.y_image, flow.y_step, b, t) if flow.y != 0 else np.uint64(0)
    if flow.masked and not mask[b, t]:
        _carry(like, cell, work, groups, block, group0, group1, h_old, h_new)
        _carry(like, cell, work, groups, block, group0, group1, c_old, c_new)
        if flow.y != 0:
            before = _address(flow.y, flow.y_image, flow.y_step, b, t - 1) if t > 0 else np.uint64(0)
            _carry(like, cell, work, groups, block, group0, group1, before, y)
    else:
        direct.run_block(like, work, sources, groups, panels, passes, segments, weights, bias, scratch, x, h_old, cell,
                         block, group0, group1, c_old, c_new, h_new, y)  # fmt: skip


@inline
def _work(like, flows, works, sources, groups, panels, passes, segments, weights, bias, cells, mask, worker, t0, t1):
    """Do a worker's share of the steps [t0, t1)."""
    flow, work, cell = flows[0], works[0], cells[0]
    scratch = np.uint64(np.int64(flow.scratch) + worker * flow.scratch_worker)
    tasks = work.blocks * flow.parts
    if flow.by_image:
        for b in range(flow.B * worker // flow.workers, flow.B * (worker + 1) // flow.workers):
            for t in range(t0, t1):
                for task in range(tasks):
                    _task(like, flow, work, sources, groups, panels, passes, segments, weights, bias, cell, mask,
                          scratch, b, t, task)  # fmt: skip
    else:
        for t in range(t0, t1):
            for n in range(flow.B * tasks * worker // flow.workers, flow.B * tasks * (worker + 1) // flow.workers):
                _task(like, flow, work, sources, groups, panels, passes, segments, weights, bias, cell, mask, scratch,
                      n // tasks, t, n % tasks)  # fmt: skip


@kernel()
def run_serial(like, flows, works, sources, groups, panels, passes, segments, weights, bias, cells, mask):
    """All steps in one thread."""
    _work(like, flows, works, sources, groups, panels, passes, segments, weights, bias, cells, mask, 0, 0, flows[0].T)


@kernel(parallel=True)
def run_parallel(like, flows, works, sources, groups, panels, passes, segments, weights, bias, cells, mask):
    """All steps, shared out among flow.workers threads: by images, or by blocks with a barrier after each step."""
    workers, T = flows[0].workers, flows[0].T
    length = T if flows[0].by_image else 1
    for t in range(0, T, length):
        for worker in numba.prange(workers):
            _work(like, flows, works, sources, groups, panels, passes, segments, weights, bias, cells, mask, worker, t,
                  t + length)  # fmt: skip


class Slots(NamedTuple):
    """An array (B, slots, HO, WO, F) or (B, HO, WO, F) as the kernels see it: address and strides in bytes."""

    address: int
    image: int
    step: int
    count: int


def slots(array: np.ndarray | None, backwards: bool = False) -> Slots:
    """Describe a contiguous array with (5D) or without (4D) a time axis; `backwards`: its last step comes first."""
    if array is None:
        return Slots(0, 0, 0, 1)
    address = array.ctypes.data
    if array.ndim == 4:
        return Slots(address, array.strides[0], 0, 1)
    step, count = array.strides[1], array.shape[1]
    return Slots(address + step * (count - 1), array.strides[0], -step, count) if backwards else Slots(
        address, array.strides[0], step, count)  # fmt: skip


_arena = threading.local()


def _scratch(size: int) -> np.ndarray:
    """Scratch memory of this Python thread, kept between calls."""
    memory = getattr(_arena, "memory", None)
    if memory is None or memory.nbytes < size:
        memory = _arena.memory = packing.aligned_empty(size, np.dtype(np.uint8))
    return memory


NO_MASK = np.ones((0, 0), np.bool_)


def run(
    steps: direct.Plan, columns: packing.Columns, cell: np.ndarray, B: int, T: int, team: int, *,
    x: Slots, h: Slots, h_first: Slots, c: Slots, c_first: Slots, y: Slots, mask: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Run T steps on B images with `team` threads, writing to the memory of h, c and y."""
    flow = np.zeros(1, FLOW)
    record = flow[0]
    tasks = int(steps.work[0]["blocks"]) * steps.parts
    by_image = B % team == 0 or 8 * team <= B
    workers = min(team, B if by_image else B * tasks)
    record["B"], record["T"], record["workers"], record["by_image"], record["parts"] = (
        B,
        T,
        workers,
        by_image,
        steps.parts,
    )
    record["masked"] = mask is not None
    for name, place in (("x", x), ("h_first", h_first), ("h", h), ("c_first", c_first), ("c", c), ("y", y)):
        record[name], record[f"{name}_image"], record[f"{name}_step"] = place[:3]
    record["h_slots"], record["c_slots"] = h.count, c.count
    share = -(-steps.scratch_bytes // 4096) * 4096 + 64 * 5
    memory = _scratch(share * workers)
    record["scratch"], record["scratch_worker"] = memory.ctypes.data, share
    arguments = (columns.weights[:0], flow, steps.work, steps.sources, columns.groups, steps.panels, steps.passes,
                 steps.segments, columns.weights, columns.bias, cell, NO_MASK if mask is None else mask)  # fmt: skip
    if workers == 1:
        run_serial(*arguments)
    else:
        with threads.team(workers):
            run_parallel(*arguments)

"""Where a sequence's arrays are in memory, step by step, and in which order the workers claim its pieces.

The images of a batch are cut into units, each unit's outputs at one step into blocks, and what a block computes into
parts (of the columns). Each worker takes a unit that nobody has, through all steps; when there is none left it helps
with those that others are at. Within a unit pieces are claimed in the order of steps and blocks, and one waits for the
blocks of the step before that it reads: those around its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels.entry import Table
from fastclstm.engines.cpu.kernels.team import add, claim, wait, workers_of

FLOW = np.dtype([
    ("B", np.int64),
    ("first_step", np.int64), ("steps", np.int64),  # of this piece of the sequence
    ("units", np.int64), ("blocks", np.int64), ("parts", np.int64),
    ("masked", np.int64),
    ("fresh", np.int64),  # 1: the sequence starts from states of zeros
    *((f"{name}{field}", kind) for name in ("x", "h_first", "h", "c_first", "c", "y_first", "y", "gates")
      for field, kind in (("", np.uint64), ("_image", np.int64), ("_step", np.int64))),  # address, strides in bytes
    ("h_slots", np.int64), ("c_slots", np.int64),  # steps kept: the t-th is in slot t % slots
    ("trouble", np.uint64),  # address of a number for each image: 1 where a stored column is infinite or NaN
    ("scratch", np.uint64), ("scratch_worker", np.int64),
    ("progress", np.int64),  # address of `LINE` counters: pieces claimed of each unit, parts done of each block
    ("zx", np.uint64), ("zx_image", np.int64), ("zx_step", np.int64),
])  # fmt: skip
"""Where a sequence's arrays are and how its work is cut."""

LINE = 64
"""Bytes between two counters: one a cache line."""


class Plan(NamedTuple):
    """How an algorithm does one time step: its kernel and variant, their tables, and how the work is cut."""

    kernel: Any
    variant: tuple[int, ...]
    work: np.ndarray
    tables: Table
    """`work`, the sources, of each block of a unit the first and last block, plus 1, that may read it or be read by it,
    and the kernel's own."""
    scratch_bytes: int
    units: int
    blocks: int
    parts: int

    @property
    def pieces(self) -> int:
        """How many workers can be at one step."""
        return self.units * self.blocks * self.parts


class Slots(NamedTuple):
    """An array (B, slots, HO, WO, F) or (B, HO, WO, F) as the kernels see it: address and strides in bytes."""

    address: int
    image: int
    step: int
    kept: int

    def after(self, images: int, steps: int) -> Slots:
        """The same array without its first images and steps."""
        return self._replace(address=self.address + images * self.image + steps * self.step)


NOTHING = Slots(0, 0, 0, 1)


def slots(array: np.ndarray | None, backwards: bool = False) -> Slots:
    """Describe a contiguous array with (5D) or without (4D) a time axis; `backwards`: its last step comes first."""
    if array is None:
        return NOTHING
    address = array.ctypes.data
    if array.ndim == 4:
        return Slots(address, array.strides[0], 0, 1)
    image, step, count = array.strides[0], array.strides[1], array.shape[1]
    return Slots(address + step * (count - 1), image, -step, count) if backwards else Slots(address, image, step, count)


@inline
def _address(base, image, step, b, t):
    return np.uint64(np.int64(base) + b * image + t * step)


@inline
def x_at(flow, b, t):
    """Address of the frame of image b that step t reads."""
    return _address(flow.x, flow.x_image, flow.x_step, b, t)


@inline
def h_before(flow, b, t):
    """Address of the hidden state of image b before step t."""
    if t == 0:
        return _address(flow.h_first, flow.h_first_image, 0, b, 0)
    return h_after(flow, b, t - 1)


@inline
def h_after(flow, b, t):
    """Address of the hidden state of image b after step t."""
    return _address(flow.h, flow.h_image, flow.h_step, b, t % flow.h_slots)


@inline
def c_before(flow, b, t):
    """Address of the cell state of image b before step t."""
    if t == 0:
        return _address(flow.c_first, flow.c_first_image, 0, b, 0)
    return c_after(flow, b, t - 1)


@inline
def c_after(flow, b, t):
    """Address of the cell state of image b after step t."""
    return _address(flow.c, flow.c_image, flow.c_step, b, t % flow.c_slots)


@inline
def source_at(flow, sources, s, b, t):
    """Address of the frame of image b that source s reads at step t."""
    return h_before(flow, b, t) if sources[s].hidden else x_at(flow, b, t)


@inline
def skipped_sources(flow, sources, t):
    """Count of the sources, the first ones, that add nothing: the hidden state where it is zeros."""
    skipped = 0
    if flow.fresh and t == 0:
        while skipped < len(sources) and sources[skipped].hidden:
            skipped += 1
    return skipped


@inline
def zx_at(flow, b, t):
    """Address of what the convolution of x, done beforehand, adds to the pre-activations of image b; 0: nothing."""
    return _address(flow.zx, flow.zx_image, flow.zx_step, b, t) if flow.zx != 0 else np.uint64(0)


@inline
def y_at(flow, b, t):
    """Address of the separate output of image b at step t; 0 where there is none."""
    if t < 0:
        return _address(flow.y_first, flow.y_first_image, 0, b, 0) if flow.y_first != 0 else np.uint64(0)
    return _address(flow.y, flow.y_image, flow.y_step, b, t) if flow.y != 0 else np.uint64(0)


@inline
def gates_at(flow, b, t):
    """Address for the activated gates of image b at step t."""
    return _address(flow.gates, flow.gates_image, flow.gates_step, b, t)


@inline
def _line(flow, n):
    """Address of a counter."""
    return flow.progress + n * LINE


@inline
def first_piece():
    """What `next_piece` is given first: no unit yet, no piece of it, and no unit that was helped with."""
    return -1, 0, -1


@inline
def next_piece(flow, job, unit, piece, helped):
    """Claim a piece: its unit, -1 where nothing is left, its number in the order of steps and tasks, and `helped`."""
    alone = workers_of(job) == 1
    count = flow.steps * flow.blocks * flow.parts
    while True:
        if unit >= 0:
            piece = piece + 1 if alone else add(_line(flow, unit), 1)
            if piece < count:
                return unit, piece, helped
        piece = -1
        if helped < 0:
            unit = claim(job)
            if unit >= flow.units:
                helped = 0
        if helped >= 0:
            unit = helped
            helped += 1
            if unit >= flow.units or alone:
                return -1, 0, helped


@inline
def place(flow, piece):
    """Step, block and part of a unit's piece."""
    tasks = flow.blocks * flow.parts
    return flow.first_step + piece // tasks, piece % tasks // flow.parts, piece % flow.parts


@inline
def wait_for_neighbours(flow, job, sources, neighbours, unit, block, t):
    """Wait for the blocks that left what this one reads at step t, or read what it will write over."""
    if t == flow.first_step or not sources[0].hidden or workers_of(job) == 1:
        return
    for n in range(neighbours[block, 0], neighbours[block, 1]):
        wait(_line(flow, flow.units + unit * flow.blocks + n), flow.parts * (t - flow.first_step))


@inline
def piece_done(flow, job, sources, unit, block):
    """Tell those that wait for a block."""
    if sources[0].hidden and workers_of(job) > 1:
        add(_line(flow, flow.units + unit * flow.blocks + block), 1)


@inline
def worker_scratch(flow, worker):
    """Address of a worker's scratch memory."""
    return np.uint64(np.int64(flow.scratch) + worker * flow.scratch_worker)

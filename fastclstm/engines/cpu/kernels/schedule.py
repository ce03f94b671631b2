"""Where a sequence's arrays are in memory, step by step, and which worker does what.

The images of a batch are cut into units, each unit's work at one step into tasks. Either a worker takes whole units
through all steps, or all workers share the tasks of one step and wait for each other after it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd

FLOW = np.dtype([
    ("B", np.int64), ("T", np.int64),
    ("workers", np.int64), ("units", np.int64), ("tasks", np.int64),
    ("length", np.int64),  # steps between two waits: T (workers own units, or one does all) or 1 (workers share tasks)
    ("grain", np.int64),  # pieces that stay together: all of a unit, or a single task
    ("masked", np.int64),
    ("fresh", np.int64),  # 1: the sequence starts from states of zeros
    *((f"{name}{field}", kind) for name in ("x", "h_first", "h", "c_first", "c", "y_first", "y")
      for field, kind in (("", np.uint64), ("_image", np.int64), ("_step", np.int64))),  # address, strides in bytes
    ("h_slots", np.int64), ("c_slots", np.int64),  # steps kept: the t-th is in slot t % slots
    ("trouble", np.uint64),  # address of a number for each image: 1 where a stored column is infinite or NaN
    ("scratch", np.uint64), ("scratch_worker", np.int64),
])  # fmt: skip
"""Where a sequence's arrays are and how many workers share its work."""

NO_GATES = np.zeros(0, np.bool_)
"""What kernels get instead of where to keep the gates (address, image, step): by its type they know when compiled.

It is no field of `FLOW`: names of compiled functions tell records of different fields apart only within a process, and
what another process left on disk may be one of them.
"""


class Plan(NamedTuple):
    """How an algorithm does one time step: its kernels (serial, parallel), their tables, and how the work is cut."""

    kernels: tuple[Any, Any]
    work: np.ndarray
    sources: np.ndarray
    tables: tuple[np.ndarray, ...]
    scratch_bytes: int
    units: int
    tasks: int
    by_unit: bool


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
    """Address of the frame of image b that source s reads at step t: of two sources h is the first, x the last."""
    return h_before(flow, b, t) if s < len(sources) - 1 else x_at(flow, b, t)


@inline
def skipped_sources(flow, sources, t):
    """Count of the sources that add nothing: 1 where the hidden state is zeros."""
    return len(sources) - 1 if flow.fresh and t == 0 else 0


@inline
def y_at(flow, b, t):
    """Address of the separate output of image b at step t; 0 where there is none."""
    if t < 0:
        return _address(flow.y_first, flow.y_first_image, 0, b, 0) if flow.y_first != 0 else np.uint64(0)
    return _address(flow.y, flow.y_image, flow.y_step, b, t) if flow.y != 0 else np.uint64(0)


@inline
def gates_at(kept, b, t):
    """Address for the activated gates of image b at step t; 0, a constant, where they are not kept."""
    base = simd.number_or_zero(kept, 0)
    if base == 0:
        return np.uint64(0)
    return _address(base, simd.number_or_zero(kept, 1), simd.number_or_zero(kept, 2), b, t)


@inline
def share(flow, worker):
    """Range of the work between two waits that is a worker's."""
    count = flow.units * flow.length * flow.tasks // flow.grain
    return count * worker // flow.workers * flow.grain, count * (worker + 1) // flow.workers * flow.grain


@inline
def place(flow, n):
    """Unit, step and task of the n-th piece of the work between two waits."""
    return n // (flow.length * flow.tasks), n // flow.tasks % flow.length, n % flow.tasks


@inline
def worker_scratch(flow, worker):
    """Address of a worker's scratch memory."""
    return np.uint64(np.int64(flow.scratch) + worker * flow.scratch_worker)

"""From shapes and weights to running kernels: the algorithm, its plan, packed weights, scratch memory and threads."""

from __future__ import annotations

import math
import threading

import numpy as np

from fastclstm.engines import remembered
from fastclstm.engines.cpu import packing, threads
from fastclstm.engines.cpu.kernels import direct, kernel_transform, winograd
from fastclstm.engines.cpu.kernels.schedule import FLOW, NO_GATES, NOTHING, Plan, Slots
from fastclstm.spec import ConvSpec

NO_MASK = np.ones((0, 0), np.bool_)

_arena = threading.local()


def scratch(size: int, name: str = "kernel") -> np.ndarray:
    """Memory of this Python thread for a purpose, kept between calls."""
    memory = getattr(_arena, name, None)
    if memory is None or memory.nbytes < size:
        memory = packing.aligned_empty(size, np.dtype(np.uint8))
        setattr(_arena, name, memory)
    return memory


def kept_copy(array: np.ndarray) -> np.ndarray:
    """Copy `array` to memory that is kept between calls: it is good until this thread's next copy."""
    copy = scratch_array(array.shape, array.dtype, "copy")
    np.copyto(copy, array)
    return copy


def scratch_array(shape: tuple[int, ...], dtype: np.dtype, name: str) -> np.ndarray:
    """Uninitialised array in `scratch` memory."""
    size = math.prod(shape) * dtype.itemsize
    return scratch(size, name)[:size].view(dtype).reshape(shape)


def choose(op: str, specs: tuple[ConvSpec, ...], algorithm: str, itemsize: int) -> int:
    """Outputs of a Winograd tile on each axis; 0: direct. Raises ValueError where Winograd was asked for in vain.

    "auto" takes the smallest estimate of the costs. "winograd" chooses the tile as for a single image, so that its
    results do not depend on how a batch is split.
    """
    if algorithm == "direct" or (algorithm == "auto" and not winograd.fits(specs)):
        return 0
    if not winograd.fits(specs):
        raise ValueError(
            f"{op}: algorithm='winograd' needs square kernels of 3 or 5, one size for all convolutions, with stride "
            f"and dilation 1, got {[(s.KH, s.KW, s.strides, s.dilation) for s in specs]}; use 'auto' or 'direct'"
        )
    if algorithm == "winograd":
        specs = tuple(spec.with_batch(1) for spec in specs)
    choices = winograd.TILES if algorithm == "winograd" else (*winograd.TILES, 0)
    return min(choices, key=lambda m: cost(specs, m, itemsize))


def cost(specs: tuple[ConvSpec, ...], m: int, itemsize: int) -> float:
    """Estimate the work of one step in multiply-adds of vectors, with Winograd tiles of m×m or directly (m = 0)."""
    images = specs[0].B
    return winograd.cost(specs, m, images, itemsize) if m else direct.cost(specs, images, itemsize)


def pack(
    kernels: tuple[np.ndarray, ...], bias: np.ndarray | None, scales: np.ndarray, m: int, *, transposed: bool = False,
    remember: bool = True,
) -> packing.Columns:  # fmt: skip
    """Pack the kernels of a sum of convolutions: the gates of the last axis times `scales`, rounded once.

    transposed: the kernels are those that pull gradients back, (KH, KW, F, C): flipped and transposed. remember: the
    same kernels will come again, so that packing them once is worth the memory.
    """
    dtype, gates = kernels[0].dtype, len(scales)

    def make() -> packing.Columns:
        taps = [k[::-1, ::-1].swapaxes(2, 3) if transposed else k for k in kernels]
        line = None if bias is None else bias.reshape(gates, -1) * scales[:, None]
        if not m:
            rows = np.concatenate([k.reshape(-1, gates, k.shape[3] // gates) for k in taps])
            return packing.pack(rows, scales, line)
        k, F = taps[0].shape[0], taps[0].shape[3] // gates
        columns = packing.lay_out(winograd.points(m, k), sum(t.shape[2] for t in taps), gates, F, line, dtype,
                                  paired=True)  # fmt: skip
        kernel_transform.transform(taps, scales, winograd.transforms(m, k).G, columns)
        return columns

    return remembered.remember((*kernels, bias), (m, transposed, *scales), make) if remember else make()


def plan(specs: tuple[ConvSpec, ...], columns: packing.Columns, m: int, itemsize: int, team: int) -> Plan:
    """Plan the sum of convolutions with packed kernels."""
    groups = len(columns.groups)
    return winograd.plan(specs, m, groups, itemsize, team) if m else direct.plan(specs, groups, itemsize, team)


def run(
    plan: Plan, columns: packing.Columns, cell: np.ndarray, B: int, T: int, team: int, *,
    x: Slots, h: Slots, h_first: Slots = NOTHING, c: Slots = NOTHING, c_first: Slots = NOTHING, y: Slots = NOTHING,
    y_first: Slots = NOTHING, gates: Slots = NOTHING, fresh: bool = True, mask: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Run T steps on B images with up to `team` threads, writing to the memory of h, c, y and gates.

    Without gates (conv2d) it returns where (B,) anything written to h is infinite or NaN.
    """
    trouble = np.zeros(B, np.int64)
    flow = np.empty(1, FLOW)
    workers = min(team, plan.units if plan.by_unit else plan.units * plan.tasks)
    share = -(-plan.scratch_bytes // 4096) * 4096 + 64 * 5  # workers at different cache sets
    memory = scratch(share * workers)
    flow[0] = (
        B, T, workers, plan.units, plan.tasks, T if plan.by_unit or workers == 1 else 1,
        T * plan.tasks if plan.by_unit else 1, mask is not None, fresh,
        *x[:3], *h_first[:3], *h[:3], *c_first[:3], *c[:3], *y_first[:3], *y[:3], h.kept, c.kept,
        trouble.ctypes.data, memory.ctypes.data, share,
    )  # fmt: skip
    kept = NO_GATES if gates is NOTHING else np.array(gates[:3], np.int64)
    threads.run(plan.kernels, workers, columns.weights[:0], flow, kept, plan.work, plan.sources, columns.groups,
                *plan.tables, columns.weights, columns.bias, cell, NO_MASK if mask is None else mask)  # fmt: skip
    return trouble != 0

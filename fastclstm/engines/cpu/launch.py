"""From a plan and weights to a running kernel: packed weights, scratch memory, and the sequence piece by piece."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from fastclstm.engines import remembered
from fastclstm.engines.cpu import packing, plans, threads, transforms
from fastclstm.engines.cpu.kernels.schedule import FLOW, LINE, NOTHING, Plan, Slots

NO_MASK = np.ones((0, 0), np.bool_)

SERIAL_FLOPS = 2_000_000
"""Below this much work a second thread costs more than it saves."""

PIECE_FLOPS = 10_000_000_000
PIECE_SECONDS = 0.15
"""Size of the first piece of a sequence that is computed in pieces, and how long the others last."""

SPARE_BYTES = 64 << 20
"""Size of the memory that is left to the next call, at most."""

_spare: deque[np.ndarray] = deque(maxlen=8)
"""Memory that no call uses."""


@contextmanager
def scratch(size: int) -> Iterator[np.ndarray]:
    """Lend a call memory of so many bytes, which nobody else has until it is given back; its contents are anything.

    A call that is interrupted does not give it back, and a call within a call (in a signal handler, or in another
    Python thread) gets other memory.
    """
    memory = None
    with suppress(IndexError):
        memory = _spare.pop()
    if memory is None or memory.nbytes < size:
        memory = packing.aligned_empty(size, np.dtype(np.uint8))
    yield memory[:size]
    if memory.nbytes <= SPARE_BYTES:
        _spare.append(memory)


def team_size(flops: int) -> int:
    """Threads for so many floating-point operations a step."""
    return max(1, min(threads.usable_threads(), flops // SERIAL_FLOPS))


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
        columns = packing.lay_out(plans.points(m, k), sum(t.shape[2] for t in taps), gates, F, line, dtype,
                                  paired=True)  # fmt: skip
        transforms.transform(taps, scales, m, columns)
        return columns

    return remembered.remember((*kernels, bias), (m, transposed, *scales), make) if remember else make()


def run(
    plan: Plan, columns: packing.Columns, cell: np.ndarray, B: int, T: int, team: int, *,
    x: Slots, h: Slots, h_first: Slots = NOTHING, c: Slots = NOTHING, c_first: Slots = NOTHING, y: Slots = NOTHING,
    y_first: Slots = NOTHING, gates: Slots = NOTHING, fresh: bool = True, mask: np.ndarray | None = None,
    step_flops: int = 0,
) -> np.ndarray:  # fmt: skip
    """Run T steps on B images with up to `team` threads, writing to the memory of h, c, y and gates.

    What only stores columns (conv2d) returns where (B,) anything written to h is infinite or NaN.

    Between pieces of the sequence Python gets to answer a Ctrl-C; step_flops, the floating-point operations of a step,
    sizes the first, the time it took the others.
    """
    trouble = np.zeros(B, np.int64)
    team = max(1, min(team, plan.pieces))
    share = -(-plan.scratch_bytes // 4096) * 4096 + LINE * 5  # workers at different cache sets
    lines = plan.units * (1 + plan.blocks) if team > 1 else 0
    flow = np.empty(1, FLOW)
    with scratch(share * team) as memory:
        progress = packing.aligned_empty(lines * LINE // 8, np.dtype(np.int64))
        flow[0] = (
            B, 0, T, plan.units, plan.blocks, plan.parts, mask is not None, fresh,
            *x[:3], *h_first[:3], *h[:3], *c_first[:3], *c[:3], *y_first[:3], *y[:3], *gates[:3], h.kept, c.kept,
            trouble.ctypes.data, memory.ctypes.data, share, progress.ctypes.data,
        )  # fmt: skip
        tables = (*plan.tables, *columns.tables, cell, NO_MASK if mask is None else np.ascontiguousarray(mask))
        t, count, seconds = 0, T, 0.0
        if step_flops * T > PIECE_FLOPS:
            count = max(1, PIECE_FLOPS // step_flops)
        while t < T:
            start = time.perf_counter()
            progress.fill(0)
            flow["first_step"], flow["steps"] = t, min(count, T - t)
            threads.run(plan.kernel, min(team, threads.usable_threads()), plan.variant, flow, *tables)
            t += count
            if t < T:
                seconds = time.perf_counter() - start
                count = max(1, min(4 * count, int(count * PIECE_SECONDS / seconds)))
    return trouble != 0

"""From a plan and weights to a running kernel: packed weights, scratch memory, and the sequence piece by piece."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable

import numpy as np

from fastclstm.engines import lending, remembered
from fastclstm.engines.cpu import packing, threads, tiles, transforms
from fastclstm.engines.cpu.kernels.entry import table
from fastclstm.engines.cpu.kernels.schedule import FLOW, LINE, NOTHING, Plan, Slots
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.spec import Pair

NO_MASK = table(np.ones((0, 0), np.bool_))

NO_FLOWS = table(np.zeros(0, FLOW))
_BYTE = np.dtype(np.uint8)

SERIAL_FLOPS = 2_000_000
"""Below this much work a second thread costs more than it saves."""

PIECE_FLOPS = 25_000_000_000
PIECE_SECONDS = 0.15
"""Size of the first piece of a sequence that is computed in pieces, and how long the others last."""

SMALL_KERNEL = 1 << 18
"""Scalars that NumPy packs before a kernel for that has been started, let alone compiled."""

SPARE_BYTES = 64 << 20
"""Size of the memory that is left to the next call, at most."""

_spare: deque[tuple[int, np.ndarray]] = deque(maxlen=8)
"""Memory that no call uses, and where it is."""


def borrow(size: int) -> tuple[int, np.ndarray]:
    """Address of memory of at least so many bytes, and the memory; nobody else has it until it is given back.

    A call that is interrupted does not give it back, and a call within a call (in a signal handler, or in another
    Python thread) gets other memory.
    """
    try:
        address, memory = _spare.pop()
    except IndexError:
        pass
    else:
        if memory.nbytes >= size:
            return address, memory
    memory = lending.aligned_empty(size, _BYTE)
    return memory.ctypes.data, memory


def give_back(address: int, memory: np.ndarray) -> None:
    """Leave borrowed memory to the next call."""
    if memory.nbytes <= SPARE_BYTES:
        _spare.append((address, memory))


def team_size(flops: int) -> int:
    """Threads for so many floating-point operations a step."""
    return max(1, min(threads.usable_threads(), flops // SERIAL_FLOPS))


def pack(
    kernels: tuple[np.ndarray, ...], bias: np.ndarray | None, scales: np.ndarray, m: Tile | None, *,
    strides: tuple[Pair, ...] = (), transposed: bool = False, remember: bool = True,
) -> packing.Columns:  # fmt: skip
    """Pack the kernels of a sum of convolutions times `scales`, those of gates or (gates, F), rounded once.

    strides: of each convolution; for tiles its kernel is cut into lattices. transposed: the kernels are those that pull
    gradients back, (KH, KW, F, C): flipped and transposed. remember: the same kernels will come again, so that packing
    them once is worth the memory.
    """
    dtype, gates = kernels[0].dtype, len(scales)

    def make() -> packing.Columns:
        taps = [k[::-1, ::-1].swapaxes(2, 3) if transposed else k for k in kernels]
        F = taps[0].shape[3] // gates
        factors = np.empty((gates, F))
        factors[...] = scales.reshape(gates, -1)
        line = None if bias is None else bias.reshape(gates, F) * factors
        if not m and sum(k.size for k in taps) < SMALL_KERNEL:
            return packing.pack(np.concatenate([k.reshape(-1, gates, F) for k in taps]), factors, line)
        if m and strides:
            pairs = zip(taps, strides, strict=True)
            taps = [k[lattice] for k, pair in pairs for lattice in tiles.lattices(k.shape[0], k.shape[1], pair)]
        tile = m or transforms.AS_IT_IS
        columns = packing.lay_out(tile.points, transforms.rows(taps, tile), gates, F, line, dtype, paired=bool(m))
        transforms.transform(taps, factors, m, columns)
        return columns

    key = m, strides, transposed, *scales.ravel()
    return remembered.remember((*kernels, bias), key, make) if remember else make()


def run(
    plan: Plan, columns: packing.Columns, cell: np.ndarray, B: int, T: int, team: int, fresh: bool = True,
    mask: np.ndarray | None = None, step_flops: int = 0, convolve: Callable[[int, int], object] | None = None, *,
    h: Slots, x: Slots = NOTHING, zx: Slots = NOTHING, h_first: Slots = NOTHING, c: Slots = NOTHING,
    c_first: Slots = NOTHING, y: Slots = NOTHING, y_first: Slots = NOTHING, gates: Slots = NOTHING,
) -> np.ndarray:  # fmt: skip
    """Run T steps on B images with up to `team` threads, writing to the memory of h, c, y and gates.

    zx (B, steps, HO, WO, 4F) is what is added to the pre-activations of a ConvLSTM, besides the convolutions of the
    plan: `convolve(t, count)` fills it, before each piece, with those of the steps from t on, as many as it has.
    What only stores columns (conv2d) returns where (B,) anything written to h is infinite or NaN.

    Between pieces of the sequence Python gets to answer a Ctrl-C; step_flops, the floating-point operations of a step,
    sizes the first, the time it took the others.
    """
    trouble = np.zeros(B, np.int64)
    team = max(1, min(team, plan.pieces))
    share = -(-plan.scratch_bytes // 4096) * 4096 + LINE * 5  # workers at different cache sets
    progress = lending.aligned_empty(plan.units * (1 + plan.blocks) * LINE if team > 1 else 0, _BYTE)
    tables = plan.tables, columns.tables, table(cell), NO_MASK if mask is None else table(np.ascontiguousarray(mask))
    most = T if convolve is None else zx.kept
    now, t, count = team, 0, most if step_flops * most <= PIECE_FLOPS else max(1, PIECE_FLOPS // step_flops)
    address, memory = borrow(share * team)
    rest = (
        plan.units, plan.blocks, plan.parts, mask is not None, fresh,
        *x[:3], *h_first[:3], *h[:3], *c_first[:3], *c[:3], *y_first[:3], *y[:3], *gates[:3], h.kept, c.kept,
        trouble.ctypes.data, address, share, progress.ctypes.data if team > 1 else 0,
    )  # fmt: skip
    while t < T:
        start = time.perf_counter()
        count = min(count, T - t)
        if convolve is not None:
            convolve(t, count)
        if team > 1:
            progress.fill(0)
        flow = array("q", (B, t, count, *rest, *zx.after(0, -t)[:3]))
        flows = NO_FLOWS._replace(place=(flow.buffer_info()[0], 1))
        threads.run(plan.kernel, now, plan.variant, flows, *tables)
        t += count
        if t < T:
            now = min(team, threads.usable_threads())
            count = max(1, min(most, 4 * count, int(count * PIECE_SECONDS / (time.perf_counter() - start))))
    give_back(address, memory)
    return trouble != 0

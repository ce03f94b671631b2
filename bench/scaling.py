"""Predict the speed-up on many cores from how the plans cut the work, beside what was measured on two.

The claiming of `fastclstm.engines.cpu.kernels.schedule` is played through for so many workers: pieces in order, each
waiting for its neighbours of the step before, each claim and each report an atomic addition to a counter that one
worker has at a time. A piece's time is its share of what one thread was measured to take: a block of tiles counts its
whole chunks, a direct one its pixels, and either at least what reading its weights takes.
Taken as given: every core as fast as the one measured, and weights and states in a shared cache.
"""

from __future__ import annotations

import argparse
from heapq import heapify, heappop, heappush
from pathlib import Path

import numpy as np

from bench.cases import CASES, ConvLSTMCase
from bench.render import OURS, insert, load
from fastclstm.engines.cpu import launch, plans
from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.kernels.schedule import Plan
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.spec import ConvSpec

THREADS = (2, 4, 8, 16, 32, 64)
ATOMIC_SECONDS = 5e-8


def play(pieces: np.ndarray, neighbours: np.ndarray, units: int, parts: int, steps: int, workers: int) -> float:
    """Return the seconds until the last worker finds nothing more to do.

    pieces (blocks,): seconds of each block's parts; neighbours (blocks, 2): the first block, and the last plus 1, that
    a block waits for.
    """
    count = steps * len(pieces) * parts
    begun = 0  # units that somebody has taken
    claimed = [0] * units  # pieces of each
    free = [0.0] * units  # from when on a unit's counter can be had
    finished = np.zeros((units, steps, len(pieces)))
    events = [(0.0, worker, -1, -1) for worker in range(workers)]  # when, who, at which unit, the next one to help with
    heapify(events)
    while events:
        now, worker, unit, helped = heappop(events)
        if unit >= 0:
            now = free[unit] = max(now, free[unit]) + ATOMIC_SECONDS
            step, block = claimed[unit] // parts // len(pieces), claimed[unit] // parts % len(pieces)
            claimed[unit] += 1
            if claimed[unit] <= count:
                if step:
                    first, last = neighbours[block]
                    now = max(now, finished[unit, step - 1, first:last].max())
                now += pieces[block] + ATOMIC_SECONDS
                finished[unit, step, block] = max(now, finished[unit, step, block])
                heappush(events, (now, worker, unit, helped))
                continue
        if helped < 0:
            unit, begun, now = begun, begun + 1, now + ATOMIC_SECONDS
            helped = 0 if unit >= units else -1
        if helped >= 0:
            unit, helped = helped, helped + 1
        if unit < units:
            heappush(events, (now, worker, unit, helped))
    return now


def _rows(plan: Plan, tile: Tile | None) -> np.ndarray:
    """Estimate the work of each block of a unit, in rows of its matrix products."""
    work, blocks = plan.work[0], np.arange(plan.blocks)
    if tile:
        tiles = np.minimum(work["block_tiles"], work["unit_tiles"] - blocks * work["block_tiles"])
        rows = -(-tiles // work["chunk"]) * (work["chunk"] + 0.75)  # as the plan weighs them
    else:
        y, x = blocks // work["blocks_x"] * work["block_height"], blocks % work["blocks_x"] * work["block_width"]
        rows = np.minimum(work["block_height"], work["HO"] - y) * np.minimum(work["block_width"], work["WO"] - x)
    return np.maximum(rows, plans.STREAMING_ROWS)


def predict(case: ConvLSTMCase, threads: int, row_seconds: float = 1.0) -> float:
    """Return the seconds of a case on so many threads, where a row of all columns takes row_seconds."""
    specs = tuple(
        ConvSpec.infer((case.B, case.H, case.W, channels), (case.K, case.K, channels, 4 * case.F))
        for channels in (case.F, case.C)
    )
    tile = plans.choose(specs, "auto", 4)
    threads = max(1, min(threads, int(1e9 * case.work / case.T) // launch.SERIAL_FLOPS))
    plan = plans.plan(specs, tile, "update", -(-case.F // simd.lanes(4)), 4, threads)
    pieces = _rows(plan, tile) * row_seconds / plan.parts
    neighbours = plan.tables.arrays[2]
    return play(pieces, neighbours, plan.units, plan.parts, case.T, min(threads, plan.pieces))


def row(case: ConvLSTMCase, seconds: dict[int, float]) -> list[str]:
    """Return the case's name, the speed-up measured on two threads and the predicted ones; seconds by threads."""
    row_seconds = seconds[1] / predict(case, 1)
    cells = [case.name, f"{seconds[1] / seconds[2]:.2f}×"]
    for threads in THREADS:
        cells.append(f"{min(seconds[1] / predict(case, threads, row_seconds), threads):.1f}×")
    return cells


def main(arguments: list[str] | None = None) -> None:
    """Print the table, or write it between a file's markers."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON written by bench.compare, on 1 and 2 threads")
    parser.add_argument("--page", type=Path, help="the file with the markers; without it the table is printed")
    options = parser.parse_args(arguments)
    runs = load(options.results)["runs"]
    seconds: dict[str, dict[int, float]] = {}
    for run in runs:
        seconds.setdefault(run["case"], {})[run["threads"]] = run["results"][OURS]["median_seconds"]
    cases = [
        case for case in CASES.values() if isinstance(case, ConvLSTMCase) and {1, 2} <= set(seconds.get(case.name, ()))
    ]
    head = ["case", "measured, 2", *(f"predicted, {threads}" for threads in THREADS)]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *(row(case, seconds[case.name]) for case in cases)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    if options.page:
        options.page.write_text(insert(options.page.read_text(), table, "scaling"))
    else:
        print(table)


if __name__ == "__main__":
    main()

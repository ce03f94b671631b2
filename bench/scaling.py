"""Predict the speed-up on many cores from how the plans cut the work, beside what was measured on two.

The busiest worker's share of a step is counted in rows of the matrix products: a block of tiles costs its tiles rounded
up to whole chunks, and at least what reading its weights takes. Where workers share a step, each step adds a wait.
Taken as given: every core as fast as the one measured, weights and states in a shared cache, a wait of 5 µs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.cases import CASES, ConvLSTMCase
from bench.render import OURS, insert, load
from fastclstm.engines.cpu import launch
from fastclstm.engines.cpu.kernels import direct, winograd
from fastclstm.spec import ConvSpec

THREADS = (2, 4, 8, 16, 32, 64)
WAIT_SECONDS = 5e-6


def busiest_rows(case: ConvLSTMCase, threads: int) -> tuple[float, bool]:
    """Return the rows that the busiest of `threads` workers computes in a step, and whether it waits after each."""
    recurrent, frame = (
        ConvSpec.infer((case.B, case.H, case.W, channels), (case.K, case.K, channels, 4 * case.F))
        for channels in (case.F, case.C)
    )
    specs = (recurrent, frame)
    m = launch.choose("convlstm2d", specs, "auto", 4)
    plan = winograd.plan(specs, m, -(-case.F // 16), 4, threads)
    work = plan.work[0]
    rows = max(-(-int(work["block_tiles"]) // int(work["chunk"])) * int(work["chunk"]), direct.STREAMING_ROWS)
    task = rows / int(work["parts"])
    if plan.by_unit:
        return -(-plan.units // threads) * plan.tasks * task, False
    return -(-plan.tasks * plan.units // threads) * task, True


def row(case: ConvLSTMCase, seconds: dict[int, float]) -> list[str]:
    """Return the case's name, the speed-up measured on two threads and the predicted ones; seconds by threads."""
    alone, _ = busiest_rows(case, 1)
    cells = [case.name, f"{seconds[1] / seconds[2]:.2f}×"]
    for threads in THREADS:
        rows, waits = busiest_rows(case, threads)
        predicted = seconds[1] * rows / alone + (case.T * WAIT_SECONDS if waits else 0.0)
        cells.append(f"{min(seconds[1] / predicted, threads):.1f}×")
    return cells


def main(arguments: list[str] | None = None) -> None:
    """Print the table, or write it between a file's markers."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON written by bench.compare, on 1 and 2 threads")
    parser.add_argument("--readme", type=Path, help="the file with the markers; without it the table is printed")
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
    if options.readme:
        options.readme.write_text(insert(options.readme.read_text(), table, "scaling"))
    else:
        print(table)


if __name__ == "__main__":
    main()

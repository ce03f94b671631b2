"""Compare implementations in interleaved rounds: A B C A B C …, so that a noisy neighbour or a drifting clock hits all.

Each implementation lives in a process of its own, held to the same number of CPUs, and waits while the others run. The
machine's peak (FMA for convlstm2d, memory bandwidth for max_pool3d) is measured once in every round too.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench import cases, cells, peers
from fastclstm.commands.info import processor_name

OURS = "fastclstm"
_SETTLE_SECONDS = 0.1  # until the threads of whoever ran before have stopped spinning
_TURN_SECONDS = 0.2
_TURN_RUNS = 200
PEAK = "peak"


def hold_to(threads: int) -> bool:
    """Keep this process on `threads` CPUs; return whether the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        return False
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    return True


def memory(field: str) -> float | None:
    """Return VmRSS or VmHWM (its peak) of this process in MB, or None where the system does not tell."""
    try:
        return int(re.findall(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024
    except (OSError, IndexError):
        return None


def trim() -> None:
    """Hand unused memory back to the system, where it can be asked to."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def held_memory(run: Callable[[], Any], before: float | None) -> float | None:
    """Return the peak of one more run in MB above `before`: input, weights, result, scratch and compiled code."""
    if before is None:
        return None
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    peak = memory("VmHWM")
    return None if peak is None else peak - before


def turn(run: Callable[[], Any], last: float, enough: float = _TURN_SECONDS) -> list[float]:
    """Time one turn: a run to warm the caches unless a run is long, then runs until `enough` seconds have passed."""
    if last < 1:
        run()
    seconds: list[float] = []
    while not seconds or (sum(seconds) < enough and len(seconds) < _TURN_RUNS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def _work(pipe: Connection, name: str, case_name: str, threads: int, oracle: Path) -> None:
    """Be one implementation: prepare, check, then time one turn for each message until None comes."""
    held = hold_to(threads)
    case = cases.CASES[case_name]
    implementation = peers.IMPLEMENTATIONS[case.op][name]
    try:
        implementation.load()
        before = memory("VmRSS")
        prepared = implementation.prepare(case, threads)
        worst = peers.error(prepared, np.load(oracle, mmap_mode="r"))
        held_mb = held_memory(prepared.run, before)
    except cells.Unavailable as reason:
        pipe.send(str(reason))
        return
    except Exception as reason:
        pipe.send(f"{type(reason).__name__}: {reason}")
        return
    pipe.send({"max_error": worst, "memory_mb": held_mb, "held_to_cpus": held})
    last = 0.0
    while pipe.recv() is not None:
        seconds = turn(prepared.run, last)
        last = statistics.median(seconds)
        pipe.send(last)


def measure_peak(pipe: Connection, op: str, threads: int) -> None:
    """Be the measurement of the machine's peak, one value for each message until None comes."""
    hold_to(threads)
    from fastclstm.engines.cpu.peak import bandwidth_gbs, fma_peak_gflops

    measure = fma_peak_gflops if op == "convlstm2d" else bandwidth_gbs
    pipe.send({})
    while pipe.recv() is not None:
        pipe.send(measure(threads))


class Worker:
    """A process that computes when it is asked to; `ready` is what it said first, a dict, or why it cannot."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *arguments))
        self.process.start()
        theirs.close()
        try:
            self.ready = self.pipe.recv()
        except EOFError:
            self.ready = "its process died"

    def ask(self, message: Any = True, settle: float = _SETTLE_SECONDS) -> Any:
        """Let it compute once, on a machine that has been quiet for a while, and return its answer."""
        time.sleep(settle)
        self.pipe.send(message)
        return self.pipe.recv()

    def close(self) -> None:
        """Let it end."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join()


def compare(
    case: cases.Case, names: list[str], threads: int, rounds: int, oracle: Path, required: bool
) -> dict[str, Any]:
    """Run one case in interleaved rounds; return the times, the peaks, and what stayed out and why."""
    workers: dict[str, Worker] = {}
    left_out: dict[str, str] = {}
    try:
        for name in tqdm(names, f"{case.name} on {threads}: preparing", leave=False, disable=None):
            worker = Worker(_work, name, case.name, threads, oracle)
            if isinstance(worker.ready, str):
                left_out[name] = worker.ready
                worker.close()
                if required or name == OURS:
                    raise SystemExit(f"{case.name}: {name}: {worker.ready}")
            else:
                workers[name] = worker
        peak = workers[PEAK] = Worker(measure_peak, case.op, threads)
        if isinstance(peak.ready, str):
            raise SystemExit(f"{case.name}: the machine's peak cannot be measured: {peak.ready}")
        answers: dict[str, list[float]] = {name: [] for name in workers}
        for _ in tqdm(range(rounds), f"{case.name} on {threads}: rounds", leave=False, disable=None):
            for name, worker in workers.items():
                answers[name].append(worker.ask())
    finally:
        for worker in workers.values():
            worker.close()
    peaks = answers.pop(PEAK)
    return {
        "case": case.name,
        "op": case.op,
        "title": case.title,
        "work": case.work,
        "unit": case.unit,
        "threads": threads,
        "peaks": peaks,
        "left_out": left_out,
        "results": {
            name: _summary(case, seconds, answers, peaks) | workers[name].ready for name, seconds in answers.items()
        },
    }


def _summary(
    case: cases.Case, seconds: list[float], answers: dict[str, list[float]], peaks: list[float]
) -> dict[str, Any]:
    rates = [case.work / second for second in seconds]
    summary = {
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "rate": statistics.median(rates),
        "share_of_peak": statistics.median(rate / peak for rate, peak in zip(rates, peaks, strict=True)),
    }
    if OURS in answers:
        ratios = [theirs / ours for theirs, ours in zip(seconds, answers[OURS], strict=True)]
        summary["fastclstm_times_faster"] = statistics.median(ratios)
    return summary


def main(arguments: list[str] | None = None) -> None:
    """Run the comparisons that the command line asks for and write them as JSON."""
    every = list(dict.fromkeys(name for table in peers.IMPLEMENTATIONS.values() for name in table))
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=cases.CASES, default=list(cases.CASES))
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="+", choices=every, help="only these; one that cannot run is then an error")
    parser.add_argument("--without", nargs="+", choices=every, default=[], help="leave these out")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args(arguments)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for case_name in options.cases:
            case = cases.CASES[case_name]
            oracle = Path(folder) / f"{case_name}.npy"
            np.save(oracle, cases.oracle(case_name))
            table = peers.IMPLEMENTATIONS[case.op]
            names = [name for name in table if name in (options.peers or table) and name not in options.without]
            for threads in options.threads:
                runs.append(compare(case, names, threads, options.rounds, oracle, required=bool(options.peers)))
                _print(runs[-1])
            oracle.unlink()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "processor": processor_name(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "versions": peers.versions(),
        "rounds": options.rounds,
        "runs": runs,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def _print(run: dict[str, Any]) -> None:
    peak = statistics.median(run["peaks"])
    print(f"{run['case']} ({run['title']}), {run['threads']} threads, peak {peak:.0f} {run['unit']}")
    for name, result in sorted(run["results"].items(), key=lambda item: item[1]["median_seconds"]):
        print(
            f"  {name:28} {result['median_seconds'] * 1e3:10.3f} ms {result['rate']:8.1f} {run['unit']}"
            f" {result['share_of_peak']:6.0%} of peak, error {result['max_error']:.1e}"
        )
    for name, reason in run["left_out"].items():
        print(f"  {name:28} left out: {reason}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

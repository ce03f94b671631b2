"""Measure the cpu engine at rest and in a crowd, in wall and CPU seconds: cold calls, busy neighbours, other libraries.

Four parts. "cold": first calls in fresh processes, with nothing compiled on disk and again with what that left there.
"busy": calls while other processes compute. "mixed": calls that take turns with another library's in one process.
"prefork": several processes that all compute at once. But for the first, blocks of calls on one thread and on the
default number take turns, and ratios are those within a round, so that whatever else the machine does hits both.

CPU seconds are those of all threads of the process, with what they do shortly after a call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import fastclstm
from bench import peers, render
from bench.cases import CASES, ConvLSTMCase, PoolCase
from bench.compare import Worker
from fastclstm import functional
from fastclstm.commands.info import processor_name
from fastclstm.engines.disk_cache import CACHE_VARIABLE

Run = Callable[[], Any]
Seconds = dict[str, float]

_SETTLE_SECONDS = 0.05
"""Until threads that still spin after the last call of a block have stopped."""


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int = 7
    cold_rounds: int = 3
    block_seconds: float = 1.0
    processes: int = 4
    neighbours: tuple[int, ...] = (0, 1, 2, 4)
    cases: tuple[str, ...] = ("readme", "pool_readme", "mmnist", "fit")
    cold: tuple[str, ...] | None = None
    """Of `COLD`; None: all."""


QUICK = Effort(1, 1, 0.02, 2, (0, 1), ("readme", "pool_readme"), ("MaxPooling3D",))
"""For a look at whether it runs: no figure of it means anything."""

# What is measured ----------------------------------------------------------------------------------------------------


def _case(name: str) -> Run:
    case = CASES[name]
    if isinstance(case, PoolCase):
        return partial(functional.max_pool3d, **case.arrays(), pool_size=case.pool_size, strides=case.stride,
                       engine="cpu")  # fmt: skip
    return partial(functional.convlstm2d, **case.arrays(), engine="cpu")


def _fit() -> Run:
    """One step of a small network's training."""
    from fastclstm.models import EncoderForecaster

    model = EncoderForecaster(1, (16,), 3, seed=0, engine="cpu")
    frames = np.random.default_rng(0).random((4, 12, 32, 32, 1), np.float32)
    return partial(model.fit, frames[:, :8], frames[:, 8:], batch_size=4, quiet=True)


WORK: dict[str, Callable[[], Run]] = {
    "readme": partial(_case, "readme"), "pool_readme": partial(_case, "pool_readme"),
    "mmnist": partial(_case, "mmnist"), "fit": _fit,
}  # fmt: skip
"""What is timed in a crowd."""


def _nothing() -> None:
    pass


def _matrix_product() -> Run:
    matrix = np.random.default_rng(0).random((768, 768), np.float32)
    return partial(np.matmul, matrix, matrix)


def _torch_convolution() -> Run:
    import torch

    return partial(torch.nn.functional.conv2d, torch.rand(1, 64, 64, 64), torch.rand(64, 64, 3, 3), padding=1)


PARTNERS: dict[str, Callable[[], Run]] = {
    "NumPy matrix products": _matrix_product,
    "PyTorch convolutions": _torch_convolution,
}
"""What takes turns with us in "mixed", on all threads that it likes."""


def _readme_layer() -> tuple[Any, np.ndarray]:
    from fastclstm.layers import ConvLSTM2D

    case = CASES["readme"]
    assert isinstance(case, ConvLSTMCase)
    return ConvLSTM2D(case.C, case.F, case.K, seed=0, engine="cpu"), case.arrays()["x"]


def _forward() -> Run:
    layer, x = _readme_layer()
    return partial(layer, x)


def _training() -> Run:
    layer, x = _readme_layer()
    return lambda: layer.backward(np.ones_like(layer(x, training=True)))


def _not_a_number() -> Run:
    layer, x = _readme_layer()
    layer(x)
    spoilt = x.copy()
    spoilt[0, 3, 5, 5] = np.nan
    return partial(layer, spoilt)


def _command(*arguments: str) -> Run:
    command = [sys.executable, "-m", "fastclstm", *arguments]
    return partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


COLD: dict[str, Callable[[], Run]] = {
    "ConvLSTM2D(1, 32, 3)": _forward, "forward and backward": _training, "EncoderForecaster.fit": _fit,
    "a NaN, after a call without": _not_a_number, "MaxPooling3D": partial(_case, "pool_readme"),
    "python -m fastclstm demo": partial(_command, "demo"), "python -m fastclstm warmup": partial(_command, "warmup"),
}  # fmt: skip
"""What is run once in a process."""

# How -----------------------------------------------------------------------------------------------------------------


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those that it started and that have ended. Unix only."""
    import resource

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _run_once(pipe: Connection, name: str) -> None:
    """Be a process that runs something for the first time."""
    try:
        run = COLD[name]()
        start, used = time.perf_counter(), _cpu_seconds()
        run()
    except (ImportError, subprocess.CalledProcessError) as reason:
        pipe.send(str(reason))
        return
    pipe.send({"wall": time.perf_counter() - start, "cpu": _cpu_seconds() - used})


def _first(name: str) -> Seconds:
    worker = Worker(_run_once, name)
    worker.close()
    if isinstance(worker.ready, str):
        raise SystemExit(f"{name}: {worker.ready}")
    return worker.ready


def cold(effort: Effort) -> list[dict[str, Any]]:
    """Measure first calls."""
    results = []
    for name in effort.cold or COLD:
        rounds = []
        for _ in range(effort.cold_rounds):
            with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {CACHE_VARIABLE: folder}):
                rounds.append({"cold": _first(name), "warm": _first(name)})
        medians = {
            state: {kind: statistics.median(each[state][kind] for each in rounds) for kind in ("wall", "cpu")}
            for state in ("cold", "warm")
        }
        results.append({"what": name, **medians, "rounds": rounds})
        print(" | ".join(_cold_row(results[-1])), flush=True)
    return results


def block(run: Run, partner: Run, threads: int | None, seconds: float) -> Seconds:
    """Take turns with a partner for some seconds; return wall seconds of a call and of the partner, and both's CPU."""
    fastclstm.set_num_threads(threads)
    run()
    ours, theirs, calls = 0.0, 0.0, 0
    used, begun = time.process_time(), time.perf_counter()
    while not calls or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        partner()
        between = time.perf_counter()
        run()
        ours += time.perf_counter() - between
        theirs += between - start
        calls += 1
    time.sleep(_SETTLE_SECONDS)
    return {"wall": ours / calls, "cpu": (time.process_time() - used) / calls, "partner": theirs / calls}


def _serve(pipe: Connection, names: tuple[str, ...], partner: str | None) -> None:
    """Be a process that computes: run a block for each message (name, threads, seconds), until None comes."""
    try:
        beside = PARTNERS[partner]() if partner else _nothing
    except ImportError as reason:
        pipe.send(str(reason))
        return
    runs = {name: WORK[name]() for name in names}
    pipe.send({})
    with contextlib.suppress(EOFError):  # whoever asks is gone
        while (message := pipe.recv()) is not None:
            name, threads, seconds = message
            pipe.send(block(runs[name], beside, threads, seconds))


@contextlib.contextmanager
def _serving(effort: Effort, count: int = 1, partner: str | None = None) -> Iterator[list[Worker]]:
    """Start so many of these processes and end them afterwards."""
    with contextlib.ExitStack() as stack:
        workers = []
        for _ in range(count):
            workers.append(Worker(_serve, effort.cases, partner))
            stack.callback(workers[-1].close)
        yield workers


def _ask(workers: list[Worker], *message: Any) -> Seconds:
    """Let all run a block at once; return the wall seconds in which each does a call, and its CPU seconds."""
    for worker in workers:
        worker.pipe.send(message)
    answers = [worker.pipe.recv() for worker in workers]
    return {
        "wall": statistics.harmonic_mean([answer["wall"] for answer in answers]),
        **{kind: statistics.fmean(answer[kind] for answer in answers) for kind in ("cpu", "partner")},
    }


def _both(effort: Effort, workers: list[Worker], situation: str) -> list[dict[str, Any]]:
    """Measure every case on one thread and on the default number, in turns."""
    rounds: dict[str, list[dict[str, Seconds]]] = {name: [] for name in effort.cases}
    for _ in range(effort.rounds):
        for name in effort.cases:
            rounds[name].append({
                "one_thread": _ask(workers, name, 1, effort.block_seconds),
                "default": _ask(workers, name, None, effort.block_seconds),
            })  # fmt: skip
    results = []
    for name, each in rounds.items():
        results.append({"situation": situation, "case": name, **_summary(each), "rounds": each})
        print(f"{situation}: {name}: {_cell(results[-1])}", flush=True)
    return results


def _summary(rounds: list[dict[str, Seconds]]) -> dict[str, Any]:
    def median(value: Callable[[dict[str, Seconds]], float]) -> float:
        return statistics.median(map(value, rounds))

    return {
        "one_thread_wall": median(lambda each: each["one_thread"]["wall"]),
        "default_wall": median(lambda each: each["default"]["wall"]),
        "wall_ratio": median(lambda each: each["default"]["wall"] / each["one_thread"]["wall"]),
        "cpu_ratio": median(lambda each: each["default"]["cpu"] / each["one_thread"]["cpu"]),
    }


_LOOPS = ("sum(range(100_000))", "numpy.sqrt(array, out=array)")
_BUSY = """
import os, numpy
array, parent = numpy.ones(10_000), os.getppid()
print(flush=True)
while os.getppid() == parent:
    {}
"""


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[list[subprocess.Popen]]:
    """Keep so many other processes busy, with Python and with NumPy by turns; they end if this one does."""
    processes: list[subprocess.Popen] = []
    try:
        for n in range(count):
            code = _BUSY.format(_LOOPS[n % 2])
            processes.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def busy(effort: Effort) -> list[dict[str, Any]]:
    """Measure calls beside busy processes."""
    results = []
    with _serving(effort) as workers:
        for count in effort.neighbours:
            with neighbours(count):
                results += _both(effort, workers, f"{count} busy" if count else "alone")
    return results


def mixed(effort: Effort) -> list[dict[str, Any]]:
    """Measure calls that take turns with another library's."""
    results = []
    for partner in PARTNERS:
        with _serving(effort, partner=partner) as workers:
            if isinstance(workers[0].ready, str):
                print(f"{partner}: left out: {workers[0].ready}")
            else:
                results += _both(effort, workers, partner)
    return results


def prefork(effort: Effort) -> list[dict[str, Any]]:
    """Measure several processes that compute at once."""
    with _serving(effort, effort.processes) as workers:
        return _both(effort, workers, f"{effort.processes} processes")


PARTS: dict[str, Callable[[Effort], list[dict[str, Any]]]] = {
    "cold": cold, "busy": busy, "mixed": mixed, "prefork": prefork,
}  # fmt: skip

# What is told --------------------------------------------------------------------------------------------------------

_COLD_NOTE = (
    "Seconds in a process of its own, the engine's import included, with nothing compiled before and with the kernels "
    "on disk; medians of {cold_rounds} rounds."
)
_CROWD_NOTE = (
    "Milliseconds of a call on the default number of threads ({threads}); how many times as long as on one thread in "
    "the same situation; and how many times as much CPU time. “busy”: processes that compute all the time beside it; "
    "“NumPy matrix products”, “PyTorch convolutions”: one in turn with each call, in the same process, whose CPU time "
    "is counted too; “{processes} processes”: all of them making such calls. “fit” is a step of training a small "
    "EncoderForecaster. Medians of {rounds} interleaved rounds on {processor}, {cpus} CPUs."
)


def _cold_row(result: dict[str, Any]) -> list[str]:
    return [result["what"], *(f"{result[state][kind]:.2g}" for state in ("cold", "warm") for kind in ("wall", "cpu"))]


def _cell(result: dict[str, Any]) -> str:
    return f"{result['default_wall'] * 1e3:.3g} ms, {result['wall_ratio']:.2f}×, {result['cpu_ratio']:.2f}×"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows))


def markdown(report: dict[str, Any]) -> str:
    """Return the tables of the parts that were measured, and what a reader must know about them."""
    told = []
    if report.get("cold"):
        head = ["the first", "cold, wall", "cold, CPU", "from disk, wall", "from disk, CPU"]
        told += [_table(head, [*map(_cold_row, report["cold"])]), _COLD_NOTE.format(**report)]
    crowd = {(run["case"], run["situation"]): run for part in PARTS for run in report.get(part, ()) if part != "cold"}
    if crowd:
        cases, situations = (list(dict.fromkeys(key)) for key in zip(*crowd, strict=True))
        rows = [[case, *(_cell(crowd[case, s]) if (case, s) in crowd else "–" for s in situations)] for case in cases]
        told += [_table(["", *situations], rows), _CROWD_NOTE.format(**report)]
    return "\n\n".join(told)


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts that the command line asks for, print them and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.crowd", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="only these; the file's others stay")
    parser.add_argument("--quick", action="store_true", help="just see whether it runs; no figure means anything")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, or with --page to read")
    parser.add_argument("--page", type=Path, help="measure nothing: put the tables of the results into this file")
    options = parser.parse_args(arguments)
    if options.page:
        block = markdown(json.loads(options.out.read_text()))
        options.page.write_text(render.insert(options.page.read_text(), block, "crowd"))
        return
    effort = QUICK if options.quick else Effort()
    report: dict[str, Any] = {
        "processor": processor_name(), "cpus": os.cpu_count(), "threads": fastclstm.get_num_threads(),
        "system": platform.platform(), "versions": peers.versions(), "rounds": effort.rounds,
        "cold_rounds": effort.cold_rounds, "processes": effort.processes,
    }  # fmt: skip
    earlier = json.loads(options.out.read_text()) if options.parts and options.out.exists() else report
    if {name: earlier[name] for name in report} != report:
        raise SystemExit(f"{options.out} was measured on another machine, with other versions or rounds; write another")
    measured = {part: PARTS[part](effort) for part in options.parts or PARTS}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(earlier | measured, indent=1) + "\n")


if __name__ == "__main__":
    main()

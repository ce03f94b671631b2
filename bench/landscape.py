"""Draw configurations of a ConvLSTM by a seed, add a fixed list, and time each beside the fastest of the peers.

Ours and each kind of peer live in a process of their own for a whole run; they take turns, each after a pause and one
run that is not timed. What a peer computes is compared with ours first. A peer is timed once; those that are near the
fastest take part in the other rounds. Medians count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench import compare, peers, ratios, training
from bench.cells import Unavailable
from bench.configurations import Configuration
from bench.families import FAMILIES, FIXED, draw
from fastclstm.commands.info import processor_name

OURS = compare.OURS
PEERS = {
    "torch": ("torch", "torch-channels-last", "torch-split", "torch-split-channels-last"),
    "onnxruntime": ("onnxruntime",),
    "ncnn": ("ncnn", "ncnn-split"),
}
"""Kinds of peers, each a process, and their forms."""

GATE_OPERATIONS = 160
"""Operations at the FMA peak in whose time the gates of one cell can be computed: about 80 instructions a vector."""
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
"""Largest difference between a peer's result and ours, relative to its largest value or 1; training: to its largest."""

SETTLE_SECONDS = 0.03
TURN_SECONDS = 0.06
CONFIGURATION_SECONDS = 1.5
"""For all rounds after the first; as many of them are left out as this takes."""
LEAST_ROUNDS = 3
OTHERS, ATTEMPTS = 0.03, 4
"""The share of the CPUs that other processes may have in a round, or it is repeated; at most so often."""
LONG = 0.1
"""From this number of seconds on a run needs none before it that is not timed."""
NEAR = 1.4
"""How many times as long as the fastest a peer may take in the first round and still be in the others."""


# What one process does -----------------------------------------------------------------------------------------------


class Wrong(Exception):
    """A result that is not ours; the message says by how much."""


def difference(got: dict[str, np.ndarray], ours: dict[str, np.ndarray], configuration: Configuration) -> float:
    """Return the largest difference relative to the largest value of ours (forward: or 1), or raise Wrong."""
    worst = 0.0
    for name, want in ours.items():
        if got[name].shape != want.shape or got[name].dtype != want.dtype:
            raise Wrong(f"{name} is {got[name].dtype} {got[name].shape}, ours is {want.dtype} {want.shape}")
        scale = max(float(np.abs(want).max()), np.finfo(want.dtype).tiny if configuration.training else 1.0)
        apart = float(np.abs(got[name] - want).max()) / scale
        worst = apart if not apart <= worst else worst  # not a number is the worst
    if not worst <= TOLERANCE[configuration.dtype]:
        raise Wrong(f"differs from ours by {worst:.1e}, more than {TOLERANCE[configuration.dtype]:.0e}")
    return worst


def _prepare(name: str, configuration: Configuration, threads: int) -> tuple[Callable[[], Any], dict[str, np.ndarray]]:
    """Return what is to be timed and what it computes, by names."""
    if configuration.training:
        if name not in training.IMPLEMENTATIONS:
            raise Unavailable(f"{name} does not train")
        run = training.IMPLEMENTATIONS[name](configuration, threads)  # type: ignore[arg-type]
        return run, run()
    prepared = peers.IMPLEMENTATIONS["convlstm2d"][name].prepare(configuration, threads)  # type: ignore[arg-type]
    return prepared.run, {"h": prepared.channels_last(prepared.run())}


def _work(pipe: Connection, threads: int, folder: Path) -> None:
    """Be ours or one kind of peer: for each message prepare and check a form, or time one turn, until None comes."""
    compare.hold_to(threads)
    runs: dict[str, Callable[[], Any]] = {}
    last: dict[str, float] = {}
    pipe.send({})
    while (message := pipe.recv()) is not None:
        name, configuration = message
        try:
            if configuration is None:
                seconds = compare.turn(runs[name], last[name] / LONG, TURN_SECONDS)
                last[name] = statistics.median(seconds)
                pipe.send(last[name])
                continue
            runs.pop(name, None)
            run, result = _prepare(name, configuration, threads)
            apart = _compared(name, result, configuration, folder / "ours.npz")
            start = time.perf_counter()
            run()
            runs[name], last[name] = run, time.perf_counter() - start
            pipe.send({"difference": apart})
        except Exception as reason:
            pipe.send(f"{type(reason).__name__}: {reason}")


def _compared(name: str, result: dict[str, np.ndarray], configuration: Configuration, path: Path) -> float:
    if name == OURS:
        np.savez(path, **result)  # type: ignore[arg-type]
        return 0.0
    with np.load(path) as ours:
        return difference(result, dict(ours), configuration)


def _measure(pipe: Connection, threads: int) -> None:
    """Be what measures the machine: multiply-adds in a dtype, or the memory's bandwidth, until None comes."""
    compare.hold_to(threads)
    from fastclstm.engines.cpu.peak import bandwidth_gbs, fma_peak_gflops

    pipe.send({})
    while (what := pipe.recv()) is not None:
        pipe.send(bandwidth_gbs(threads) if what == "bandwidth" else fma_peak_gflops(threads, what))


# The run -------------------------------------------------------------------------------------------------------------


_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _text(path: str) -> str:
    """Return what a file of the system says, or where there is none, nothing."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _busy_seconds() -> float:
    """Return the seconds that all CPUs together have been busy, where the system tells."""
    fields = [int(field) for field in _text("/proc/stat").partition("\n")[0].split()[1:9]]
    return (sum(fields) - sum(fields[3:5])) / _TICKS  # without idle and waiting for a disk


class Crew:
    """The processes of one number of threads: one that measures the machine, ours, and one a kind of peer."""

    def __init__(self, threads: int, forms: Sequence[str], folder: Path) -> None:
        self.threads, self.folder = threads, folder
        self.kinds = {name: kind for kind, names in PEERS.items() for name in names if name in forms} | {OURS: OURS}
        self.workers = {kind: self._hire(kind) for kind in dict.fromkeys((OURS, *self.kinds.values()))}
        self.machine = compare.Worker(_measure, threads)
        self.bandwidth = self.ask_machine("bandwidth")

    def _hire(self, kind: str) -> compare.Worker:
        return compare.Worker(_work, self.threads, self.folder)

    def ask(self, name: str, configuration: Configuration | None, settle: float = SETTLE_SECONDS) -> Any:
        """Let `name` prepare a configuration, or with None be timed; return its answer, a text for a failure."""
        kind = self.kinds[name]
        try:
            return self.workers[kind].ask((name, configuration), settle)
        except (EOFError, ConnectionError):
            self.workers[kind].close()
            self.workers[kind] = self._hire(kind)
            return "its process died"

    def ask_machine(self, what: str) -> float:
        """Return a measurement of the machine."""
        return float(self.machine.ask(what, SETTLE_SECONDS))

    def round(self, names: Sequence[str], configuration: Configuration) -> dict[str, Any]:
        """Let each of `names` be timed once; return that, the peak, and the share of the CPUs that others had."""
        busy, own, begun = _busy_seconds(), self._own_seconds(), time.perf_counter()
        seconds = {name: self.ask(name, None) for name in names}
        peak = self.ask_machine(configuration.dtype)
        room = (time.perf_counter() - begun) * (os.cpu_count() or 1)
        if broken := [f"{name}: {answer}" for name, answer in seconds.items() if isinstance(answer, str)]:
            raise RuntimeError(f"{configuration.title}: {', '.join(broken)}")
        others = (_busy_seconds() - busy - (self._own_seconds() - own)) / room
        return {"seconds": seconds, "peak": peak, "others": max(others, 0.0)}

    def _own_seconds(self) -> float:
        """Return the CPU seconds of this process and the crew's, where the system tells."""
        pids = [os.getpid(), *(worker.process.pid for worker in (*self.workers.values(), self.machine))]
        return sum(sum(map(int, _text(f"/proc/{pid}/stat").rpartition(")")[2].split()[11:13])) for pid in pids) / _TICKS

    def close(self) -> None:
        """Let all end."""
        for worker in (*self.workers.values(), self.machine):
            worker.close()


def measure(crew: Crew, configuration: Configuration, rounds: int) -> dict[str, Any]:
    """Time ours and the peers in rounds; return the times, what the machine can do, and what stayed out and why."""
    run = asdict(configuration) | {
        "title": configuration.title, "threads": crew.threads, "work": configuration.work,
        "updates": configuration.updates, "left_out": {}, "seconds": {}, "difference": {},
    }  # fmt: skip
    said = crew.ask(OURS, configuration, 0.0)
    if isinstance(said, str):
        return run | {"failure": said}
    names = [OURS]
    for name in crew.kinds:
        if name != OURS:
            said = crew.ask(name, configuration, 0.0)
            if isinstance(said, str):
                run["left_out"][name] = said
            else:
                run["difference"][name] = said["difference"]
                names.append(name)
    kept = [_quiet_round(crew, names, configuration)]
    rivals = {name: seconds for name, seconds in kept[0]["seconds"].items() if name != OURS}
    near = NEAR * min(rivals.values(), default=0.0)
    names = [OURS, *(name for name, seconds in rivals.items() if seconds <= near)]
    begun = time.perf_counter()
    while len(kept) < rounds and (len(kept) < LEAST_ROUNDS or time.perf_counter() - begun < CONFIGURATION_SECONDS):
        kept.append(_quiet_round(crew, names, configuration))
    times = {name: [one["seconds"][name] for one in kept if name in one["seconds"]] for name in kept[0]["seconds"]}
    peak = statistics.median(one["peak"] for one in kept)
    disturbed = {"disturbed": max(one["others"] for one in kept)}
    return run | {"seconds": times} | disturbed | judged(configuration, times, peak, crew.bandwidth)


def _quiet_round(crew: Crew, names: Sequence[str], configuration: Configuration) -> dict[str, Any]:
    """Return a round in which other processes had next to nothing of the CPUs, or after some attempts the quietest."""
    attempts: list[dict[str, Any]] = []
    while not attempts or (attempts[-1]["others"] > OTHERS and len(attempts) < ATTEMPTS):
        attempts.append(crew.round(names, configuration))
    return min(attempts, key=lambda one: one["others"])


def judged(
    configuration: Configuration, times: dict[str, list[float]], peak: float, bandwidth: float
) -> dict[str, Any]:
    """Return medians, the fastest peer and how many times as long as ours it takes, and the shares of the bounds."""
    last = {name: statistics.median(seconds) for name, seconds in times.items()}
    ours = last[OURS]
    told = {
        "peak": peak, "bandwidth": bandwidth, "milliseconds": {name: 1e3 * seconds for name, seconds in last.items()},
        "share_of_peak": configuration.work / peak / ours,
        "share_of_gates": configuration.updates * GATE_OPERATIONS / 1e9 / peak / ours,
        "share_of_bandwidth": configuration.gigabytes / bandwidth / ours,
    }  # fmt: skip
    most = max(map(len, times.values()))
    finalists = [name for name, seconds in times.items() if name != OURS and len(seconds) == most]
    if finalists:
        fastest = min(finalists, key=last.__getitem__)
        told["fastest"] = fastest
        told["ratio"] = statistics.median(t / o for t, o in zip(times[fastest], times[OURS], strict=True))
    return told


def line(run: dict[str, Any]) -> str:
    """Return one line about a run."""
    head = f"{run['family']:13} {run['threads']}T  {run['title']:58}"
    if "failure" in run:
        return f"{head} OURS FAILED: {run['failure']}"
    ours = f"{run['milliseconds'][OURS]:9.3f} ms"
    shares = ", ".join(f"{run[f'share_of_{what}']:.0%} of {what}" for what in ("peak", "gates", "bandwidth"))
    if "ratio" not in run:
        return f"{head} {ours}, no peer can do this; {shares}"
    peer = run["fastest"]
    noise = f", others had {run['disturbed']:.0%} of the CPUs" if run["disturbed"] > OTHERS else ""
    return f"{head} {ours} {run['milliseconds'][peer]:9.3f} {peer:25} {run['ratio']:6.2f}×  {shares}{noise}"


def told(runs: Sequence[dict[str, Any]]) -> str:
    """Return the closing lines: of each group its summary and its losses, then what failed or disagreed."""
    lines = []
    for (trained, threads), members in ratios.groups(runs).items():
        found = ratios.summary(members)
        kind = "training" if trained else "inference"
        lines.append(f"\n{kind}, {threads} threads: {found['count']} configurations")
        if found["count"]:
            lines[-1] += (f", geometric mean {found['geometric_mean']:.2f}×, worst {found['worst']:.2f}×, "
                          f"{found['share_from_1.3']:.0%} at least 1.3×, {len(found['losses'])} below 1×")  # fmt: skip
            lines += [f"  {loss['ratio']:.2f}× {loss['family']}: {loss['title']} ({loss['fastest']})"
                      for loss in found["losses"]]  # fmt: skip
    for run in ratios.wrong(runs):
        lines += [f"!!! {line(run)}"] if "failure" in run else [
            f"!!! {run['title']}: {name}: {why}" for name, why in ratios.broken(run).items()
        ]  # fmt: skip
    return "\n".join(lines)


def chosen(options: argparse.Namespace) -> list[Configuration]:
    """Return the configurations that the command line asks for."""
    kinds = [trained for trained, asked in ((False, options.inference), (True, options.training)) if asked]
    kinds = kinds or [False, True]
    fixed = [one for one in FIXED if one.training in kinds and one.family in options.only]
    drawn = [] if options.fixed_only else [
        draw(options.seed, number, trained, options.only) for trained in kinds for number in range(options.count)
        if trained or options.only != ["dropout"]
    ]  # fmt: skip
    return [*([] if options.drawn_only else fixed), *drawn]


def _write(path: Path, report: dict[str, Any]) -> None:
    """Write a report so that whoever is stopped meanwhile leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(path)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for, print it and write it as JSON."""
    forms = [name for names in PEERS.values() for name in names]
    parser = argparse.ArgumentParser(prog="python -m bench.landscape", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn (default: 1)")
    parser.add_argument("--count", type=int, default=40, help="configurations to draw of each kind (default: 40)")
    parser.add_argument("--fixed-only", action="store_true", help="draw nothing")
    parser.add_argument("--drawn-only", action="store_true", help="leave out the fixed list")
    parser.add_argument("--inference", action="store_true", help="only this kind (default: both)")
    parser.add_argument("--training", action="store_true", help="only this kind (default: both)")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rounds", type=int, default=5, help="the most rounds (default: 5)")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY",
                        help=f"of {', '.join(FAMILIES)}")  # fmt: skip
    parser.add_argument("--peers", nargs="+", choices=forms, default=forms)
    parser.add_argument("--avx2", action="store_true", help="ours and PyTorch with AVX2 and nothing newer; ncnn "
                        "and ONNX Runtime use what they find")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="just see whether it runs; no figure means anything")
    parser.add_argument("--out", type=Path, help="the JSON file to write; runs that are in it stay, or are replaced")
    parser.add_argument("--missing", action="store_true", help="leave out what the file has, undisturbed")
    options = parser.parse_args(arguments)
    configurations = chosen(options)
    if options.quick:
        configurations.sort(key=lambda one: (one.training, one.work))  # the smallest of each kind
        configurations = list({one.training: one for one in reversed(configurations)}.values())
        options.threads, options.rounds = [1], 1
        options.peers = [name for name in options.peers if name in ("torch", "ncnn")]
    limits = peers.AVX2 | peers.PYTORCH_AVX2
    if options.avx2:
        os.environ.update(limits)  # of the processes to come
    report: dict[str, Any] = {
        "environment": {name: os.environ[name] for name in limits if name in os.environ},
        "processor": processor_name(), "cpus": os.cpu_count(), "system": platform.platform(),
        "versions": peers.versions(),
    }  # fmt: skip
    earlier = json.loads(options.out.read_text()) if options.out and options.out.exists() else report | {"runs": []}
    earlier.setdefault("environment", {})
    if {name: earlier[name] for name in report} != report:
        raise SystemExit(f"{options.out} was measured on another machine or otherwise; write another")
    known = (
        {ratios.key(run) for run in earlier["runs"] if run.get("disturbed", 1) <= OTHERS} if options.missing else set()
    )
    runs = []
    for threads in options.threads:
        waiting = [one for one in configurations if (one.title, one.family, threads) not in known]
        if not waiting:
            continue
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.closing(Crew(threads, options.peers, Path(folder))) as crew,
        ):
            for configuration in tqdm(waiting, f"on {threads}", leave=False, disable=None):
                runs.append(measure(crew, configuration, options.rounds))
                print(line(runs[-1]), flush=True)
                if options.out:
                    _write(options.out, ratios.joined(earlier, runs))
    print(told(runs))
    if ratios.wrong(runs):
        sys.exit("ours or a peer failed, or a result is another than ours")


if __name__ == "__main__":
    main()

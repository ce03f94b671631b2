"""Time forward and backward together against PyTorch's autograd, in interleaved rounds, and measure their peak memory.

As in training, the weights are new in every run, so nothing that was derived from them can be kept; the gradients of x,
the weights and the bias are all asked for. The work, of which the share of the multiply-add peak is told, is counted as
three forward passes by direct convolution.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

import fastclstm
from bench import cases, cells, compare, peers, render
from fastclstm import functional
from fastclstm.commands.info import processor_name

Gradients = dict[str, np.ndarray]
Run = Callable[[], Any]

RECOMPUTE = "fastclstm-recompute"
PASSES = 3
"""Forward passes whose direct convolutions are the work: forward, the gradients of the input, those of the kernels."""
WEIGHTS = {"kernel", "recurrent_kernel", "bias"}
TOLERANCE = 1e-4
"""Largest error of a gradient, relative to its largest value, that an implementation may show before it is timed."""

TRAINED = tuple(name for name, case in cases.CASES.items() if isinstance(case, cases.ConvLSTMCase))
_SMALL = cases.ConvLSTMCase("small", B=1, T=2, H=32, W=32, C=1, F=16, K=3)
"""What each process runs first, so that code that is loaded once is not taken for the memory of a run."""


def cotangent(case: cases.ConvLSTMCase) -> np.ndarray:
    """Return the gradient (B, T, H, W, F) of the hidden sequence that is pulled back."""
    return np.random.default_rng(1).standard_normal(case.spec.output_shape, np.float32).astype(case.dtype)


def flat(gradients: dict[str, Any]) -> Gradients:
    """Return the gradients by name, those of a mapping by the names of both."""
    named: Gradients = {}
    for name, value in gradients.items():
        named |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return named


def _fastclstm(case: cases.ConvLSTMCase, threads: int, engine: str, **options: Any) -> Run:
    if engine == "cpu":
        fastclstm.set_num_threads(threads)
    arrays, dy = case.arrays(), cotangent(case)

    def run() -> Gradients:
        for name in WEIGHTS & arrays.keys():
            arrays[name] *= 1 + np.finfo(arrays[name].dtype).eps
        _, pullback = functional.convlstm2d_vjp(**arrays, engine=engine, **case.options, **options)
        return flat(pullback(dy))

    return run


def _torch(case: cases.ConvLSTMCase, threads: int, channels_last: bool, split: bool = False) -> Run:
    import torch

    torch.set_num_threads(threads)
    module = cells.torch_module(case, split, channels_last)
    for parameter in module.parameters():
        parameter.requires_grad_()
    x, dy = torch.from_numpy(case.arrays()["x"]), torch.from_numpy(cotangent(case))
    if not channels_last:
        x, dy = (array.permute(0, 1, 4, 2, 3).contiguous() for array in (x, dy))
    x.requires_grad_()

    def run() -> Gradients:
        for tensor in (x, *module.parameters()):
            tensor.grad = None
        module(x).backward(dy)
        kernels = [module.input.grad, module.recurrent.grad] if split else module.input.grad.split([case.C, case.F], 1)
        named = {
            "x": x.grad if channels_last else x.grad.permute(0, 1, 3, 4, 2),
            "kernel": kernels[0].permute(2, 3, 1, 0),
            "recurrent_kernel": kernels[1].permute(2, 3, 1, 0),
            "bias": None if module.bias is None else module.bias.grad,
        }
        for name, table in module.cell.items():
            named |= {f"{name}.{key}": _channels_back(weight.grad) for key, weight in table.items()}
        return {name: tensor.numpy() for name, tensor in named.items() if tensor is not None}

    return run


def _channels_back(gradient: Any) -> Any:
    """Return the gradient of a weight (F, HO, WO) or (F, 1, 1) as (HO, WO, F) or (F,); another as it is."""
    if gradient.ndim != 3:
        return gradient
    return gradient.flatten() if gradient.shape[1:] == (1, 1) else gradient.permute(1, 2, 0)


IMPLEMENTATIONS: dict[str, Callable[[cases.ConvLSTMCase, int], Run]] = {
    "fastclstm": partial(_fastclstm, engine="cpu"),
    RECOMPUTE: partial(_fastclstm, engine="cpu", recompute=True),
    "fastclstm-direct": partial(_fastclstm, engine="cpu", algorithm="direct"),
    "numpy": partial(_fastclstm, engine="reference"),
    "torch": partial(_torch, channels_last=False),
    "torch-channels-last": partial(_torch, channels_last=True),
    "torch-split": partial(_torch, channels_last=False, split=True),
    "torch-split-channels-last": partial(_torch, channels_last=True, split=True),
}
"""Every implementation by name: from a case and a number of threads to a function that computes all gradients."""


def oracle(case: cases.ConvLSTMCase) -> Gradients:
    """Return the gradients in float64 by the reference engine."""
    arrays = {name: array.astype(np.float64) for name, array in case.arrays().items()}
    _, pullback = functional.convlstm2d_vjp(**arrays, engine="reference")
    return flat(pullback(cotangent(case).astype(np.float64)))


def errors(gradients: Gradients, expected: Gradients, most: float = TOLERANCE) -> dict[str, float]:
    """Return each gradient's largest error relative to its largest value; raise AssertionError for a large one."""
    worst = {
        name: float(np.abs(gradients[name] - value).max() / np.abs(value).max()) for name, value in expected.items()
    }
    if not max(worst.values()) <= most:
        raise AssertionError(f"largest errors {worst} are above {most:.0e}")
    return worst


def _work(pipe: Connection, name: str, case_name: str, threads: int, folder: Path) -> None:
    """Be one implementation: load, measure the memory of a first run, check, then time one turn for each message."""
    held = compare.hold_to(threads)
    case = cases.CASES[case_name]
    assert isinstance(case, cases.ConvLSTMCase)
    try:
        IMPLEMENTATIONS[name](_SMALL, threads)()
        run = IMPLEMENTATIONS[name](case, threads)
        compare.trim()
        held_mb = compare.held_memory(run, compare.memory("VmRSS"))
        worst = errors(run(), {path.stem: np.load(path) for path in folder.glob("*.npy")})
    except Exception as reason:
        pipe.send(f"{type(reason).__name__}: {reason}")
        return
    pipe.send({"errors": worst, "memory_mb": held_mb, "held_to_cpus": held})
    with contextlib.suppress(EOFError):
        while pipe.recv() is not None:
            pipe.send(statistics.median(compare.turn(run, 0.0)))  # after a run that brings its memory back


def train(case: cases.ConvLSTMCase, names: list[str], threads: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Run one case in interleaved rounds."""
    workers: dict[str, compare.Worker] = {}
    left_out: dict[str, str] = {}
    try:
        for name in names:
            worker = compare.Worker(_work, name, case.name, threads, folder)
            if isinstance(worker.ready, str):
                left_out[name] = worker.ready
                worker.close()
            else:
                workers[name] = worker
        workers[compare.PEAK] = compare.Worker(compare.measure_peak, case.op, threads)
        answers: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                answers[name].append(worker.ask())
    finally:
        for worker in workers.values():
            worker.close()
    peaks, work = answers.pop(compare.PEAK), PASSES * case.work
    return {
        "case": case.name, "op": case.op, "title": case.title, "work": work, "unit": case.unit, "threads": threads,
        "peaks": peaks, "left_out": left_out,
        "results": {
            name: workers[name].ready | {
                "seconds": seconds, "median_seconds": statistics.median(seconds),
                "share_of_peak": statistics.median(work / s / p for s, p in zip(seconds, peaks, strict=True)),
                "times_faster": {other: _ratio(answers[other], seconds) for other in answers},
            }
            for name, seconds in answers.items()
        },
    }  # fmt: skip


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def markdown(report: dict[str, Any]) -> str:
    """Return the table and what a reader must know about it."""
    head = ["case", "threads", "fastclstm", "recompute", "PyTorch", "vs. PyTorch", "recompute vs. PyTorch",
            "of FMA peak", "MB", "recompute, MB", "PyTorch, MB", "max error"]  # fmt: skip
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *map(_row, report["runs"])]
    versions = ", ".join(f"{name} {report['versions'][name]}" for name in ("python", "numpy", "numba", "torch"))
    told = (
        f"Forward and backward, float32, milliseconds and peak megabytes beyond inputs and weights; medians of "
        f"{report['rounds']} interleaved rounds on {report['processor']}, {report['cpus']} CPUs. PyTorch is the faster "
        f"of its forms, and for memory the leanest; “of FMA peak” counts three forward passes of direct convolution; "
        f"“max error” is relative to each gradient's largest value, against float64. {versions}."
    )
    return "\n".join([*("| " + " | ".join(row) + " |" for row in rows), "", told])


def _row(run: dict[str, Any]) -> list[str]:
    results = run["results"]
    ours, lean = results[compare.OURS], results.get(RECOMPUTE)
    rivals = {name: result for name, result in results.items() if name.startswith("torch")}
    fastest = min(rivals, key=lambda name: rivals[name]["median_seconds"])
    least = min(result["memory_mb"] for result in rivals.values())

    def time(result: dict[str, Any] | None) -> str:
        return "–" if result is None else f"{result['median_seconds'] * 1e3:.3g}"

    def faster(result: dict[str, Any] | None) -> str:
        return "–" if result is None else f"{result['times_faster'][fastest]:.2f}×"

    def memory(result: dict[str, Any] | None) -> str:
        return "–" if result is None else f"{result['memory_mb']:.3g} ({result['memory_mb'] / least:.0%})"

    return [
        f"{run['case']} ({run['title']})", str(run["threads"]), f"**{time(ours)}**", time(lean),
        time(rivals[fastest]), faster(ours), faster(lean), f"{ours['share_of_peak']:.0%}", memory(ours), memory(lean),
        f"{least:.3g}", f"{max(ours['errors'].values()):.1e}",
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run the comparisons that the command line asks for, print them and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, or with --page to read")
    parser.add_argument("--page", type=Path, help="run nothing: put the table of the results into this file")
    options = parser.parse_args(arguments)
    if options.page:
        block = markdown(render.load([options.out]))
        options.page.write_text(render.insert(options.page.read_text(), block, "training"))
        return
    runs = []
    for name in options.cases:
        case = cases.CASES[name]
        assert isinstance(case, cases.ConvLSTMCase)
        with tempfile.TemporaryDirectory() as folder:
            for gradient, value in oracle(case).items():
                np.save(Path(folder) / f"{gradient}.npy", value)
            for threads in options.threads:
                runs.append(train(case, options.peers, threads, options.rounds, Path(folder)))
                _print(runs[-1])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"processor": processor_name(), "cpus": os.cpu_count(), "versions": peers.versions(),
              "rounds": options.rounds, "runs": runs}  # fmt: skip
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def _print(run: dict[str, Any]) -> None:
    peak = statistics.median(run["peaks"])
    print(f"{run['case']} ({run['title']}), {run['threads']} threads, peak {peak:.0f} {run['unit']}")
    for name, result in sorted(run["results"].items(), key=lambda item: item[1]["median_seconds"]):
        memory = "" if result["memory_mb"] is None else f" {result['memory_mb']:8.0f} MB"
        print(f"  {name:28} {result['median_seconds'] * 1e3:10.2f} ms, {result['share_of_peak']:6.0%} of peak,"
              f"{memory}, error {max(result['errors'].values()):.1e}", flush=True)  # fmt: skip
    for name, reason in run["left_out"].items():
        print(f"  {name:28} left out: {reason}", flush=True)


if __name__ == "__main__":
    main()

"""Time modules of PyTorch before and after `accelerate`, beside our own layer on the same arrays.

The modules have the structure and the gates' order of ndrplz's and OpenSTL's. What `accelerate` may cost beyond our own
layer is 5 % and 60 µs a call. Module, accelerated module and our own layer live in a process of their own each, as the
threads of one spin for a while after its call, and take turns in rounds; medians count. Our own layer takes and returns
channels-first arrays, as the modules do, returns its states too, and computes the gradient of x where they do. In
Conv2d → ConvLSTM → ConvTranspose2d it stands between the same convolutions of PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fastclstm
from bench import compare, families, render
from bench.cases import CASES, ConvLSTMCase
from fastclstm.adapters.torch import accelerate
from fastclstm.commands.info import processor_name
from fastclstm.convert.torch import from_torch

SHARE, CALL = 0.05, 60e-6
"""What a call may take longer than our own layer's, as a share of that and in seconds."""
SIDES = ("torch", "accelerated", "own")
PLAIN_ROUNDS = 3
"""Rounds of the plain module, for the factor alone; whether that is near is not in question."""
ENOUGH = 0.06
"""Seconds of a turn's runs."""
DRAWN = ("usual", "few-filters", "small-frames", "large-frames")
"""Families of the landscape whose configurations a module of PyTorch has, too."""


class Cell(nn.Module):
    """A cell of ndrplz's module, or of OpenSTL's."""

    def __init__(self, C: int, F: int, K: int, split: bool):
        super().__init__()
        self.F = F
        if split:
            self.conv_x = nn.Sequential(nn.Conv2d(C, 4 * F, K, padding=K // 2, bias=False))
            self.conv_h = nn.Sequential(nn.Conv2d(F, 4 * F, K, padding=K // 2, bias=False))
        else:
            self.conv = nn.Conv2d(C + F, 4 * F, K, padding=K // 2)

    def forward(self, x: Any, state: Any) -> Any:
        """Take one step."""
        h, c = state
        if hasattr(self, "conv"):
            i, f, o, g = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
        else:
            i, f, g, o = (self.conv_x(x) + self.conv_h(h)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class ConvLSTM(nn.Module):
    """One layer over whole sequences (B, T, C, H, W)."""

    def __init__(self, C: int, F: int, K: int, split: bool):
        super().__init__()
        self.cell_list = nn.ModuleList([Cell(C, F, K, split)])

    def forward(self, x: Any) -> Any:
        """Return the hidden sequence and the last states."""
        cell: Any = self.cell_list[0]
        state = [x.new_zeros(len(x), cell.F, *x.shape[3:])] * 2
        steps = []
        for frame in x.unbind(1):
            state = cell(frame, state)
            steps.append(state[0])
        return torch.stack(steps, 1), state


class Between(nn.Module):
    """Conv2d → ConvLSTM → ConvTranspose2d."""

    def __init__(self, C: int, F: int, K: int):
        super().__init__()
        self.encoder, self.convlstm = nn.Conv2d(C, C, 3, padding=1), ConvLSTM(C, F, K, False)
        self.decoder = nn.ConvTranspose2d(F, C, 3, padding=1)

    def forward(self, x: Any) -> Any:
        """Return frames as x has them."""
        y, _ = self.convlstm(self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        return self.decoder(y.flatten(0, 1)).unflatten(0, x.shape[:2])


MODELS: dict[str, Callable[[ConvLSTMCase], nn.Module]] = {
    "ndrplz": lambda case: ConvLSTM(case.C, case.F, case.K, False),
    "openstl": lambda case: ConvLSTM(case.C, case.F, case.K, True),
    "conv-convlstm-conv": lambda case: Between(case.C, case.F, case.K),
}


def drawn(seed: int, count: int, trained: bool) -> list[ConvLSTMCase]:
    """Return sizes of the landscape with square odd kernels and nothing unusual."""
    found: list[ConvLSTMCase] = []
    number = 0
    while len(found) < count:
        one = families.draw(seed, number, trained, DRAWN)
        number += 1
        if one.H == one.W and one.kernel[0] % 2:
            found.append(ConvLSTMCase(f"drawn-{seed}-{number - 1}", one.B, one.T, one.H, one.W, one.C, one.F,
                                      one.kernel[0]))  # fmt: skip
    return found


def _output(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def call(side: str, name: str, case: ConvLSTMCase, train: bool) -> tuple[Callable[[], Any], list[np.ndarray]]:
    """Return what a side does in a call, and what it computes: the output and, in training, the parameters' gradients.

    Our own layer has its parameters in another arrangement: of it the gradients are left out.
    """
    torch.manual_seed(0)
    model: Any = MODELS[name](case)
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(case.arrays()["x"], -1, 2)))
    between = isinstance(model, Between)
    dy = torch.randn(*x.shape[:2], case.C if between else case.F, *x.shape[3:],
                     generator=torch.Generator().manual_seed(1))  # fmt: skip
    if side == "own":
        layer: Any = from_torch(model.convlstm if between else model, data_format="channels_first", return_state=True)
        layer.input_gradient = between
    elif side == "accelerated":
        with contextlib.redirect_stdout(io.StringIO()):
            model, report = accelerate(model, return_report=True)
        assert report.swapped, f"{name} {case.title}: {report}"

    def module() -> Any:
        if not train:
            with torch.no_grad():
                return _output(model(x))
        model.zero_grad()
        y = _output(model(x))
        y.backward(dy)
        return y

    def own() -> Any:
        if not between:
            y, _ = layer(x.numpy(), training=train)
            if train:
                layer.backward(dy.numpy(), None)
            return y
        with torch.set_grad_enabled(train):
            frames = model.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            hidden, _ = layer(frames.detach().numpy(), training=train)
            y = torch.from_numpy(hidden).requires_grad_(train)
            made = model.decoder(y.flatten(0, 1)).unflatten(0, x.shape[:2])
        if train:
            model.zero_grad()
            made.backward(dy)
            frames.backward(torch.from_numpy(layer.backward(y.grad.numpy(), None)))
        return made

    run = own if side == "own" else module
    made = run()
    computed = [made if side == "own" and not between else made.detach().numpy()]
    if train and side != "own":
        computed += [parameter.grad.numpy().copy() for parameter in model.parameters()]
    return run, [array.ravel()[:: max(1, array.size // 100_000)] for array in computed]


def _work(pipe: Connection, side: str, threads: int) -> None:
    """Be one side: make what is called when told a configuration, else time one turn, until None comes."""
    compare.hold_to(threads)
    fastclstm.set_num_threads(threads)
    torch.set_num_threads(threads)
    pipe.send({})
    run: Any = None
    last = 0.0
    while (message := pipe.recv()) is not None:
        if message == "turn":
            last = statistics.median(compare.turn(run, last, ENOUGH))
            pipe.send(last)
            continue
        try:
            run, last = None, 0.0  # the memory of the one before first
            run, computed = call(side, *message)
            pipe.send(computed)
        except Exception as reason:
            pipe.send(f"{type(reason).__name__}: {reason}")


class Sides:
    """The three processes."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.workers = {side: compare.Worker(_work, side, threads) for side in SIDES}

    def close(self) -> None:
        """Let them end."""
        for worker in self.workers.values():
            worker.close()

    def measure(self, name: str, case: ConvLSTMCase, train: bool, rounds: int) -> dict[str, Any]:
        """Compare what the sides compute, then time one configuration in rounds."""
        computed = {side: worker.ask((name, case, train)) for side, worker in self.workers.items()}
        for side, found in computed.items():
            if isinstance(found, str):
                raise SystemExit(f"{name} {case.title}: {side}: {found}")
            apart = [float(abs(a - b).max() / abs(b).max()) for a, b in zip(found, computed["torch"], strict=False)]
            assert max(apart) < 1e-4, f"{name} {case.title}: {side} differs by {max(apart):.1e}"
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(rounds):
            for side, worker in self.workers.items():
                if side != "torch" or number < PLAIN_ROUNDS:
                    seconds[side].append(worker.ask("turn"))
        medians = {side: statistics.median(times) for side, times in seconds.items()}
        over = statistics.median(a - b for a, b in zip(seconds["accelerated"], seconds["own"], strict=True))
        return {
            "model": name, "case": case.name, "title": case.title, "train": train, "threads": self.threads,
            "seconds": seconds, "medians": medians, "over": over, "within": over <= SHARE * medians["own"] + CALL,
            "factor": statistics.median(a / b for a, b in zip(seconds["torch"], seconds["accelerated"], strict=False)),
        }  # fmt: skip


def told(row: dict[str, Any]) -> str:
    """Return a line of what is printed."""
    own, over = row["medians"]["own"], row["over"]
    return (f"{row['model']:18} {row['title']:28} {'training' if row['train'] else 'inference':9} "
            f"{row['medians']['torch'] * 1e3:9.2f} {row['medians']['accelerated'] * 1e3:9.2f} {own * 1e3:9.2f} ms  "
            f"{row['factor']:5.2f}×  {over * 1e6:+8.0f} µs {over / own:+7.1%}"
            f"{'' if row['within'] else '  ABOVE'}")  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """Return the table, a line a model and a kind of call, and what a reader must know about it."""
    lines = ["| model | | configurations | faster than PyTorch | worst | over our own layer | within 5 % + 60 µs |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    kinds = sorted(
        {(row["model"], row["train"]) for row in report["rows"]}, key=lambda k: (list(MODELS).index(k[0]), k[1])
    )
    for model, train in kinds:
        rows = [row for row in report["rows"] if (row["model"], row["train"]) == (model, train)]
        factors = [row["factor"] for row in rows]
        over = statistics.median(row["over"] / row["medians"]["own"] for row in rows)
        lines.append(f"| {model} | {'training' if train else 'inference'} | {len(rows)} | "
                     f"{statistics.geometric_mean(factors):.2f}× | {min(factors):.2f}× | {over:+.1%} | "
                     f"{sum(row['within'] for row in rows)} of {len(rows)} |")  # fmt: skip
    slower = sorted((row for row in report["rows"] if row["factor"] < 1), key=lambda row: row["factor"])
    lost = "; ".join(map(_named, slower)) or "none"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [
        "",
        "Geometric mean and worst of how many times as fast a model is after `accelerate`, and the median of "
        "what a call takes longer than our own layer on the same arrays. Slower than plain PyTorch: "
        f"{lost}. Medians of {report['rounds']} rounds, "
        f"{report['rows'][0]['threads']} threads, {report['processor']}, {report['cpus']} CPUs; {versions}.",
        "",
        "Every row, those above 5 % and 60 µs over our own layer in bold:",
        "",
        "| configuration | model | | PyTorch, ms | accelerated, ms | our own layer, ms | faster | over |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(report["rows"], key=lambda row: (row["train"], row["title"], list(MODELS).index(row["model"]))):
        times = " | ".join(f"{row['medians'][side] * 1e3:.2f}" for side in SIDES)
        over = f"{row['over'] / row['medians']['own']:+.0%}"
        lines.append(f"| {row['title']} | {row['model']} | {'training' if row['train'] else 'inference'} | {times} | "
                     f"{row['factor']:.2f}× | {over if row['within'] else f'**{over}**'} |")  # fmt: skip
    return "\n".join(lines)


def _named(row: dict[str, Any]) -> str:
    return f"{row['model']} {row['title']} {'training' if row['train'] else 'inference'} ({row['factor']:.2f}×)"


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "case", "train", "threads"))


def joined(path: Path, rows: Sequence[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Return a file's report, if there is one, with these rows in the place of those of the same configurations."""
    new = {_key(row) for row in rows}
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "fastclstm": fastclstm.__version__}  # fmt: skip
    return {"processor": processor_name(), "cpus": os.cpu_count(), "system": platform.platform(), "versions": versions,
            "rounds": rounds, "rows": [row for row in kept if _key(row) not in new] + list(rows)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for and write it as JSON, or put a file's table into a page."""
    named = [name for name, case in CASES.items() if isinstance(case, ConvLSTMCase)]
    parser = argparse.ArgumentParser(prog="python -m bench.accelerate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="*", choices=named, default=named)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--drawn", type=int, default=8, help="how many sizes of the landscape besides")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--modes", nargs="+", choices=("inference", "training"), default=["inference", "training"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, help="the JSON file to write, rows of earlier runs in it stay; with --page to read"
    )
    parser.add_argument("--missing", action="store_true", help="leave out what the file has")
    parser.add_argument("--page", type=Path, help="run nothing: put the table of the results into this file")
    options = parser.parse_args(arguments)
    if options.page:
        block = markdown(json.loads(options.out.read_text()))
        options.page.write_text(render.insert(options.page.read_text(), block, "accelerate"))
        return
    there = set()
    if options.missing and options.out.exists():
        there = {_key(row) for row in json.loads(options.out.read_text())["rows"]}
    sides = Sides(options.threads)
    try:
        print(f"{'':57} {'PyTorch':>9} {'accel.':>9} {'own':>9}      factor    over own")
        for mode in options.modes:
            train = mode == "training"
            cases: list[Any] = [CASES[name] for name in options.cases] + drawn(options.seed, options.drawn, train)
            for case in cases:
                for name in options.models:
                    if (name, case.name, train, options.threads) in there:
                        continue
                    row = sides.measure(name, case, train, options.rounds)
                    print(told(row), flush=True)
                    if options.out:
                        options.out.parent.mkdir(parents=True, exist_ok=True)
                        report = joined(options.out, [row], options.rounds)
                        options.out.write_text(json.dumps(report, indent=1) + "\n")
    finally:
        sides.close()


if __name__ == "__main__":
    main()

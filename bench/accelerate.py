"""Time modules of PyTorch before and after `accelerate`, beside our own layer on the same arrays.

The modules have the structure and the gates' order of ndrplz's and OpenSTL's. What `accelerate` may cost beyond our own
layer is 5 % and 60 µs a call. All run in one process and take turns, each after a pause and one run that is not timed;
medians count. Our own layer takes and returns channels-first arrays, as the modules do, returns its states too, and
computes the gradient of x where they do.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fastclstm
from bench import compare, landscape
from bench.cases import CASES, ConvLSTMCase
from fastclstm.adapters.torch import accelerate
from fastclstm.commands.info import processor_name
from fastclstm.convert.torch import from_torch

SHARE, CALL = 0.05, 60e-6
"""What a call may take longer than our own layer's, as a share of that and in seconds."""
PAUSE = 0.03
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
        one = landscape.draw(seed, number, trained, DRAWN)
        number += 1
        if one.H == one.W and one.kernel[0] % 2:
            found.append(ConvLSTMCase(f"drawn-{seed}-{number - 1}", one.B, one.T, one.H, one.W, one.C, one.F,
                                      one.kernel[0]))  # fmt: skip
    return found


def _output(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def calls(name: str, case: ConvLSTMCase, train: bool) -> dict[str, Callable[[], Any]]:
    """Return what is timed: the module, the module accelerated, and our own layer in its place."""
    torch.manual_seed(0)
    plain = MODELS[name](case)
    fast: Any = accelerate(copy.deepcopy(plain))
    recurrent = plain.convlstm if isinstance(plain, Between) else plain
    layer: Any = from_torch(recurrent, data_format="channels_first", return_state=True)
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(case.arrays()["x"], -1, 2)))
    with torch.no_grad():
        expected = _output(plain(x))
        apart = (_output(fast(x)) - expected).abs().max() / expected.abs().max()
    assert apart < 1e-4, f"{name} {case.title}: accelerated it differs by {apart:.1e}"
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    layer.input_gradient = isinstance(plain, Between)

    def module(model: nn.Module) -> Callable[[], Any]:
        def run() -> Any:
            if not train:
                with torch.no_grad():
                    return model(x)
            model.zero_grad()
            return _output(model(x)).backward(dy)

        return run

    def own() -> Any:
        if not isinstance(plain, Between):
            y = layer(x.numpy(), training=train)
            return layer.backward(dy.numpy(), None) if train else y
        with torch.set_grad_enabled(train):
            frames = plain.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            hidden, _ = layer(frames.detach().numpy(), training=train)
            y = torch.from_numpy(hidden).requires_grad_(train)
            made = plain.decoder(y.flatten(0, 1)).unflatten(0, x.shape[:2])
        if train:
            plain.zero_grad()
            made.backward(dy)
            frames.backward(torch.from_numpy(layer.backward(y.grad.numpy(), None)))
        return made

    return {"torch": module(plain), "accelerated": module(fast), "own": own}


def measure(name: str, case: ConvLSTMCase, train: bool, rounds: int) -> dict[str, Any]:
    """Time one configuration in interleaved rounds."""
    runs = calls(name, case, train)
    seconds: dict[str, list[float]] = {one: [] for one in runs}
    for number in range(rounds + 1):
        for one, run in runs.items():
            if one == "torch" and number > 3:  # for the factor; that it is near is not in question
                continue
            time.sleep(PAUSE)
            turn = compare.turn(run, 0.0)
            if number:  # the first compiles
                seconds[one].append(statistics.median(turn))
    medians = {one: statistics.median(times) for one, times in seconds.items()}
    over = statistics.median(a - b for a, b in zip(seconds["accelerated"], seconds["own"], strict=True))
    return {
        "model": name, "case": case.name, "title": case.title, "train": train, "seconds": medians, "over": over,
        "within": over <= SHARE * medians["own"] + CALL, "factor": medians["torch"] / medians["accelerated"],
    }  # fmt: skip


def told(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    own, over = row["seconds"]["own"], row["over"]
    return (f"{row['model']:18} {row['title']:28} {'training' if row['train'] else 'inference':9} "
            f"{row['seconds']['torch'] * 1e3:9.2f} {row['seconds']['accelerated'] * 1e3:9.2f} {own * 1e3:9.2f} ms  "
            f"{row['factor']:5.2f}×  {over * 1e6:+8.0f} µs {over / own:+7.1%}"
            f"{'' if row['within'] else '  ABOVE'}")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for and write it as JSON."""
    named = [name for name, case in CASES.items() if isinstance(case, ConvLSTMCase)]
    parser = argparse.ArgumentParser(prog="python -m bench.accelerate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="*", choices=named, default=named)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--drawn", type=int, default=8, help="how many sizes of the landscape besides")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--modes", nargs="+", choices=("inference", "training"), default=["inference", "training"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="the JSON file to write; rows of earlier runs in it stay")
    options = parser.parse_args(arguments)
    fastclstm.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    print(f"{'':57} {'PyTorch':>9} {'accel.':>9} {'own':>9}      factor    over own")
    for mode in options.modes:
        train = mode == "training"
        cases: list[Any] = [CASES[name] for name in options.cases] + drawn(options.seed, options.drawn, train)
        for case in cases:
            for name in options.models:
                rows.append(measure(name, case, train, options.rounds) | {"threads": options.threads})
                print(told(rows[-1]), flush=True)
    if options.out is None:
        return
    report: dict[str, Any] = {
        "processor": processor_name(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "rows": [],
    }
    if options.out.exists():
        report = json.loads(options.out.read_text())
    keys = ("model", "case", "train", "threads")
    new = {tuple(row[key] for key in keys) for row in rows}
    kept = [row for row in report["rows"] if tuple(row[key] for key in keys) not in new]
    report |= {"versions": {"torch": torch.__version__, "numpy": np.__version__, "fastclstm": fastclstm.__version__},
               "rounds": options.rounds, "rows": kept + rows}  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Draw configurations of a ConvLSTM by a seed, add a fixed list, and time each beside the fastest of the peers.

Ours and each kind of peer live in a process of their own for a whole run; they take turns, each after a pause and one
run that is not timed. What a peer computes is compared with ours first. A peer is timed once; those that are near the
fastest take part in the other rounds. Medians count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from bench import compare, peers, ratios, training
from bench.cases import Arrays
from bench.cells import Unavailable
from fastclstm.commands.info import processor_name
from fastclstm.nn import activations
from fastclstm.nn import normalization as normalizations
from fastclstm.spec import ConvLSTMSpec, Pair

OURS = compare.OURS
PEERS = {
    "torch": ("torch", "torch-channels-last", "torch-split", "torch-split-channels-last"),
    "onnxruntime": ("onnxruntime",),
    "ncnn": ("ncnn", "ncnn-split"),
}
"""Kinds of peers, each a process, and their forms."""

MOST_WORK = 16.0
"""Billions of operations of the direct convolutions of a drawn call: on this project's machines 1 ms to 1 s.

Training does three times as much and is drawn up to a third.
"""
LEAST_WORK, LEAST_UPDATES, MOST_UPDATES = 0.05, 2**17, 2**24
"""The least work unless as many cells are updated; the most cells that are."""
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


@dataclass(frozen=True)
class Configuration:
    """One ConvLSTM over ``x (B, T, H, W, C)`` with F filters: its sizes, options, dtype, and whether it is trained."""

    op: ClassVar[str] = "convlstm2d"
    unit: ClassVar[str] = "GFLOP/s"

    family: str
    B: int
    T: int
    H: int
    W: int
    C: int
    F: int
    kernel: Pair = (3, 3)
    recurrent_kernel: Pair | None = None
    """None: as the kernel."""
    strides: Pair = (1, 1)
    dilation: Pair = (1, 1)
    recurrent_dilation: Pair | None = None
    """None: as the dilation."""
    padding: str = "same"
    padding_mode: str = "zeros"
    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    peephole: str | None = None
    cell_clip: float | None = None
    normalization: str | None = None
    dropout: float = 0.0
    """Share that is dropped of x and of h, for each gate."""
    bias: bool = True
    mask: bool = False
    go_backwards: bool = False
    dtype: str = "float32"
    training: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `convlstm2d` beside the arrays."""
        names = ("strides", "padding", "padding_mode", "dilation", "activation", "recurrent_activation", "cell_clip",
                 "normalization", "go_backwards")  # fmt: skip
        own = self.dilation if self.recurrent_dilation is None else self.recurrent_dilation
        return {name: getattr(self, name) for name in names} | {"recurrent_dilation": own}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of x and the kernels."""
        return {
            "x": (self.B, self.T, self.H, self.W, self.C),
            "kernel": (*self.kernel, self.C, 4 * self.F),
            "recurrent_kernel": (*(self.recurrent_kernel or self.kernel), self.F, 4 * self.F),
        }

    @property
    def spec(self) -> ConvLSTMSpec:
        """Geometry and options, checked, but for the arrays that options bring with them."""
        options = self.options
        activation, recurrent = (activations.get(options.pop(f"{kind}activation")) for kind in ("", "recurrent_"))
        how = options.pop("normalization")
        if how is not None:
            names = ("gamma", "beta", *(("mean", "variance") if how == "batch" else ()))
            options["normalization"] = normalizations.get(how)
            options["normalization_shapes"] = dict.fromkeys(names, (4 * self.F,))
        shapes = self.shapes
        return ConvLSTMSpec.infer(
            shapes["x"], shapes["kernel"], shapes["recurrent_kernel"], activation=activation,
            recurrent_activation=recurrent, output_activation=activation, **options,
        )  # fmt: skip

    def arrays(self) -> Arrays:
        """Return x, normal, and the weights, uniform in ±1/sqrt(fan_in), drawn by the configuration's name."""
        rng = np.random.default_rng(zlib.crc32(repr(self).encode()))
        spec, shapes = self.spec, self.shapes

        def uniform(shape: tuple[int, ...], most: float, middle: float = 0.0) -> np.ndarray:
            return rng.uniform(middle - most, middle + most, shape).astype(self.dtype)

        arrays: Arrays = {"x": rng.standard_normal(shapes["x"], np.float32).astype(self.dtype)}
        for name in ("kernel", "recurrent_kernel"):
            arrays[name] = uniform(shapes[name], 1 / math.sqrt(math.prod(shapes[name][:3])))
        if self.bias:
            arrays["bias"] = uniform((4 * self.F,), 1 / math.sqrt(self.F))
        if self.peephole:
            shape = {"channel": (self.F,), "elementwise": spec.state_shape[1:]}[self.peephole]
            arrays["peephole"] = {gate: uniform(shape, 0.5) for gate in "ifo"}
        if self.normalization:
            weights = {"gamma": uniform((4 * self.F,), 0.5, 1.0), "beta": uniform((4 * self.F,), 0.5)}
            if self.normalization == "batch":
                weights |= {"mean": uniform((4 * self.F,), 0.5), "variance": uniform((4 * self.F,), 0.5, 1.0)}
            arrays["normalization_weights"] = weights
        if self.dropout:
            shapes_of = {"x": (4, self.B, self.H, self.W, self.C), "h": (4, *spec.state_shape)}
            arrays["dropout_masks"] = {
                name: ((rng.random(shape) >= self.dropout) / (1 - self.dropout)).astype(self.dtype)
                for name, shape in shapes_of.items()
            }
        if self.mask:
            arrays["mask"] = rng.random((self.B, self.T)) < 0.8
        return arrays

    @property
    def updates(self) -> int:
        """Cells whose gates are computed."""
        return self.T * math.prod(self.spec.state_shape)

    @property
    def work(self) -> float:
        """Billions of operations of direct convolution; training is three times as much."""
        return self.spec.flops * (training.PASSES if self.training else 1) / 1e9

    @property
    def gigabytes(self) -> float:
        """Billions of bytes that must move: x and the weights read once, the result written once."""
        values = self.updates + sum(map(math.prod, self.shapes.values()))
        return values * np.dtype(self.dtype).itemsize / 1e9

    @property
    def title(self) -> str:
        """All that is not usual, in a few characters."""
        frame = f"{self.H}²" if self.H == self.W else f"{self.H}×{self.W}"
        told = [f"{self.B}×{self.T}×{frame}", f"{self.C}→{self.F}", f"k{_pair(self.kernel)}"]
        for name, short in (("recurrent_kernel", "recurrent k"), ("recurrent_dilation", "recurrent dilation ")):
            if getattr(self, name) is not None:
                told.append(f"{short}{_pair(getattr(self, name))}")
        for name in ("strides", "dilation"):
            if max(getattr(self, name)) > 1:
                told.append(f"{name.removesuffix('s')} {_pair(getattr(self, name))}")
        told += [getattr(self, n) for n, usual in _USUAL.items() if getattr(self, n) not in (usual, None)]
        if self.peephole:
            told.append(f"{self.peephole} peephole")
        if self.normalization:
            told.append(f"{self.normalization} norm")
        if self.cell_clip is not None:
            told.append(f"clip {self.cell_clip:g}")
        if self.dropout:
            told.append(f"dropout {self.dropout:g}")
        told += [name.replace("_", " ") for name in ("mask", "go_backwards", "training") if getattr(self, name)]
        return ", ".join([*told, *([] if self.bias else ["no bias"])])


_USUAL = {"padding": "same", "padding_mode": "zeros", "activation": "tanh", "recurrent_activation": "sigmoid",
          "dtype": "float32"}  # fmt: skip


def _pair(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}×{pair[1]}"


# What is drawn -------------------------------------------------------------------------------------------------------

Rng = np.random.Generator
RANGES = {"B": (1, 64), "T": (4, 20), "H": (4, 512), "W": (4, 512), "C": (1, 512), "F": (1, 512), "kernel": (1, 11)}
"""Smallest and largest value of each size, drawn so that their logarithms are even."""

ACTIVATIONS = ("tanh", "relu", "leaky_relu", "elu", "selu", "gelu", "silu", "softplus", "softsign")
RECURRENT_ACTIVATIONS = ("sigmoid", "hard_sigmoid", "hard_sigmoid_keras2")


def _size(rng: Rng, low: int, high: int) -> int:
    """Return an integer between `low` and `high`, often one that people like."""
    value = math.exp(rng.uniform(math.log(low), math.log(high + 1)))
    if rng.random() < 0.5:
        value = 2 ** round(math.log2(value))
    return int(min(max(value, low), high))


def _chosen(rng: Rng, *values: Any) -> Any:
    return values[rng.integers(len(values))]


def _any_sizes(rng: Rng, **fixed: Any) -> dict[str, Any]:
    """Return sizes of the usual kind: square frames and 3×3 kernels, most of the time."""
    sizes: dict[str, Any] = {name: _size(rng, *RANGES[name]) for name in ("B", "T", "H", "W", "C", "F")}
    sizes["kernel"] = (3, 3) if rng.random() < 0.7 else (5, 5)
    if rng.random() < 0.6:
        sizes["W"] = sizes["H"]
    return sizes | fixed


def _few_filters(rng: Rng) -> dict[str, Any]:
    return _any_sizes(rng, F=int(rng.integers(1, 25)), C=_size(rng, 1, 32), kernel=_chosen(rng, (3, 3), (5, 5)))


def _thin(rng: Rng) -> dict[str, Any]:
    thin: dict[int, dict[str, Any]] = {
        0: {"kernel": (1, 1)},
        1: {"recurrent_kernel": (1, 1)},
        2: {"kernel": (1, _size(rng, 2, 11))},
        3: {"kernel": (_size(rng, 2, 11), 1)},
    }
    return _any_sizes(rng) | thin[int(rng.integers(4))]


def _large(rng: Rng) -> dict[str, Any]:
    return _any_sizes(rng, kernel=_chosen(rng, *((k, k) for k in (6, 7, 7, 8, 9, 10, 11))))


def _odd(rng: Rng) -> dict[str, Any]:
    kernel = _chosen(rng, (2, 2), (4, 4), (3, 5), (5, 3), (2, 3), (4, 3), (3, 7), (6, 3), tuple(rng.integers(2, 12, 2)))
    return _any_sizes(rng, kernel=(int(kernel[0]), int(kernel[1])))


def _geometry(rng: Rng) -> dict[str, Any]:
    kernels = [(k, k) for k in (1, 2, 3, 5, 7)]
    options = _chosen(
        rng,
        {"strides": (2, 2)},
        {"strides": _chosen(rng, (3, 3), (1, 2), (2, 1))},
        {"dilation": (2, 2)},
        {"dilation": _chosen(rng, (3, 3), (1, 2)), "recurrent_dilation": (1, 1)},
        {"recurrent_dilation": (2, 2)},
        {"recurrent_kernel": _chosen(rng, *kernels)},
        {"padding": "valid"},
        {"padding_mode": "circular"},
    )
    if "strides" in options:
        options["recurrent_dilation"] = (1, 1)
    return _any_sizes(rng, kernel=_chosen(rng, (3, 3), (3, 3), (5, 5))) | options


def _small_frames(rng: Rng) -> dict[str, Any]:
    return _any_sizes(rng, H=(size := _size(rng, 4, 16)), W=size, C=_size(rng, 32, 512), F=_size(rng, 64, 512))


def _large_frames(rng: Rng) -> dict[str, Any]:
    return _any_sizes(rng, B=int(rng.integers(1, 3)), H=_size(rng, 128, 512), W=_size(rng, 128, 512))


def _options(rng: Rng) -> dict[str, Any]:
    drawn = _any_sizes(rng) | {
        "activation": _chosen(rng, "tanh", *ACTIVATIONS),
        "recurrent_activation": _chosen(rng, "sigmoid", *RECURRENT_ACTIVATIONS),
        "peephole": _chosen(rng, None, None, "channel", "elementwise"),
        "cell_clip": _chosen(rng, None, None, 1.0, 5.0),
        "bias": _chosen(rng, True, True, False),
        "mask": _chosen(rng, False, False, True),
        "go_backwards": _chosen(rng, False, False, True),
    }
    return drawn


def _normalized(rng: Rng) -> dict[str, Any]:
    return _any_sizes(rng, normalization=_chosen(rng, "layer", "group", "batch"))


def _dropped(rng: Rng) -> dict[str, Any]:
    return _any_sizes(rng, dropout=_chosen(rng, 0.1, 0.25, 0.5))


def _double(rng: Rng) -> dict[str, Any]:
    return _any_sizes(rng, dtype="float64")


FAMILIES: dict[str, Callable[[Rng], dict[str, Any]]] = {
    "usual": _any_sizes,
    "few-filters": _few_filters,
    "thin-kernels": _thin,
    "large-kernels": _large,
    "odd-kernels": _odd,
    "geometry": _geometry,
    "small-frames": _small_frames,
    "large-frames": _large_frames,
    "options": _options,
    "normalization": _normalized,
    "dropout": _dropped,
    "float64": _double,
}
"""How the sizes and options of each family are drawn; "dropout" is for training only."""


def bounded(configuration: Configuration) -> bool:
    """Whether a call takes neither too short nor too long to be timed, and its data fit the memory."""
    try:
        spec = configuration.spec
    except ValueError:  # a window that does not fit the frame
        return False
    if configuration.padding_mode == "circular" and min(spec.HO, spec.WO) < 11:
        return False
    updates, work = configuration.updates, configuration.work
    return (work >= LEAST_WORK or updates >= LEAST_UPDATES) and updates <= MOST_UPDATES and work <= MOST_WORK


def draw(seed: int, number: int, trained: bool, families: Sequence[str] = tuple(FAMILIES)) -> Configuration:
    """Return the `number`-th configuration of a seed: always the same, however many are drawn."""
    rng = np.random.default_rng([seed, number, trained])
    names = [name for name in families if trained or name != "dropout"]
    family = names[rng.integers(len(names))]
    for _ in range(10_000):
        drawn = FAMILIES[family](rng)
        if trained and drawn.get("normalization") == "batch":
            continue  # its statistics are the batch's, step by step, or constants that nobody trains with
        configuration = Configuration(family, **drawn, training=trained)
        if bounded(configuration):
            return configuration
    raise RuntimeError(f"nothing in the ranges of {family!r} is within the bounds")


def _fixed() -> Iterator[Configuration]:
    """Yield what users really run, each family of issue 15's table and more."""
    make = Configuration
    for sizes in ((2, 10, 64, 64, 1, 64), (1, 10, 64, 64, 64, 64), (4, 10, 32, 32, 32, 32), (1, 12, 128, 128, 16, 16)):
        yield make("usual", *sizes)
    yield make("usual", 2, 10, 16, 16, 16, 128, (5, 5))
    yield make("usual", 2, 10, 48, 48, 1, 40, (5, 5))
    for filters, size in ((3, 64), (4, 64), (8, 64), (12, 48), (10, 64), (20, 48)):
        yield make("few-filters", 4, 10, size, size, 1, filters)
    yield make("few-filters", 4, 10, 64, 64, 8, 8)
    yield make("few-filters", 2, 10, 64, 64, 3, 1, (5, 5))
    yield make("thin-kernels", 4, 10, 64, 64, 16, 32, (1, 1))
    yield make("thin-kernels", 4, 10, 64, 64, 16, 32, (3, 3), (1, 1))
    yield make("thin-kernels", 4, 10, 64, 64, 16, 32, (1, 3))
    yield make("thin-kernels", 4, 10, 64, 64, 16, 32, (7, 1))
    yield make("large-kernels", 2, 10, 48, 48, 12, 24, (7, 7))
    yield make("large-kernels", 1, 8, 48, 48, 1, 64, (7, 7))
    yield make("large-kernels", 2, 10, 32, 32, 16, 32, (9, 9))
    yield make("large-kernels", 1, 10, 32, 32, 8, 32, (11, 11))
    yield make("large-kernels", 2, 10, 32, 32, 8, 32, (6, 6))
    for kernel in ((2, 2), (4, 4), (3, 5), (5, 2)):
        yield make("odd-kernels", 2, 10, 48, 48, 16, 32, kernel)
    yield make("geometry", 4, 10, 64, 64, 8, 32, strides=(2, 2))
    yield make("geometry", 4, 10, 64, 64, 8, 32, (5, 5), strides=(2, 2))
    yield make("geometry", 2, 10, 48, 48, 16, 32, dilation=(2, 2))
    yield make("geometry", 2, 10, 48, 48, 16, 32, recurrent_dilation=(2, 2))
    yield make("geometry", 2, 10, 48, 48, 16, 32, (5, 5), (3, 3))
    yield make("geometry", 2, 10, 48, 48, 16, 32, (3, 3), (5, 5))
    yield make("geometry", 2, 10, 49, 49, 16, 32, padding="valid")
    yield make("geometry", 2, 10, 48, 48, 16, 32, padding_mode="circular")
    yield make("small-frames", 4, 10, 8, 8, 128, 256)
    yield make("small-frames", 16, 10, 4, 4, 64, 256)
    yield make("small-frames", 64, 5, 7, 7, 32, 64)
    yield make("large-frames", 1, 6, 256, 256, 1, 32)
    yield make("large-frames", 1, 4, 512, 512, 2, 8)
    yield make("large-frames", 1, 6, 255, 131, 4, 24)
    yield make("options", 2, 10, 48, 48, 16, 32, peephole="elementwise")
    yield make("options", 2, 10, 48, 48, 16, 32, peephole="channel", cell_clip=3.0)
    yield make("options", 2, 10, 48, 48, 16, 32, recurrent_activation="hard_sigmoid")
    yield make("options", 2, 10, 48, 48, 16, 32, activation="relu")
    yield make("options", 2, 10, 48, 48, 16, 32, activation="silu")
    yield make("options", 2, 10, 48, 48, 16, 32, activation="gelu", bias=False)
    yield make("options", 2, 10, 48, 48, 16, 32, mask=True, go_backwards=True)
    for kind in ("layer", "group", "batch"):
        yield make("normalization", 2, 10, 48, 48, 16, 32, normalization=kind)
    yield make("float64", 2, 10, 48, 48, 16, 32, dtype="float64")
    yield make("float64", 2, 10, 32, 32, 1, 16, (5, 5), dtype="float64")


def _fixed_training() -> Iterator[Configuration]:
    def make(family: str, *sizes: Any, **options: Any) -> Configuration:
        return replace(Configuration(family, *sizes, **options), training=True)

    yield make("usual", 1, 10, 64, 64, 32, 32)
    yield make("usual", 2, 10, 64, 64, 1, 32)
    yield make("usual", 4, 8, 16, 16, 16, 64, (5, 5))
    for filters in (4, 8, 12):
        yield make("few-filters", 2, 10, 64, 64, 1, filters)
    yield make("thin-kernels", 2, 10, 64, 64, 16, 32, (1, 1))
    yield make("large-kernels", 1, 8, 48, 48, 12, 24, (7, 7))
    yield make("odd-kernels", 1, 10, 48, 48, 16, 32, (4, 4))
    yield make("geometry", 2, 10, 64, 64, 8, 32, strides=(2, 2))
    yield make("geometry", 1, 10, 48, 48, 16, 32, (5, 5), (3, 3))
    yield make("small-frames", 2, 6, 8, 8, 128, 256)
    yield make("large-frames", 1, 4, 256, 256, 1, 8)
    yield make("options", 1, 10, 48, 48, 16, 32, activation="silu")
    yield make("options", 1, 10, 48, 48, 16, 32, peephole="elementwise")
    for kind in ("layer", "group"):
        yield make("normalization", 1, 10, 48, 48, 16, 32, normalization=kind)
    yield make("dropout", 1, 10, 48, 48, 16, 32, dropout=0.2)
    yield make("float64", 1, 10, 32, 32, 16, 32, dtype="float64")


FIXED = (*_fixed(), *_fixed_training())
"""What is measured whatever the seed."""

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

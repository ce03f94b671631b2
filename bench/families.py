"""The landscape's configurations: families that are drawn by a seed, within bounds, and a fixed list."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bench.configurations import Configuration

MOST_WORK = 16.0
"""Billions of operations of the direct convolutions of a drawn call: on this project's machines 1 ms to 1 s.

Training does three times as much and is drawn up to a third.
"""
LEAST_WORK, LEAST_UPDATES, MOST_UPDATES = 0.05, 2**17, 2**24
"""The least work unless as many cells are updated; the most cells that are."""

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

"""Normalization of pre-activations between kernels: statistics of what strips of pixels give, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastclstm.engines.cpu.kernels.cell_steps import PART
from fastclstm.spec import GATES, NORMALIZED_PARTS, ConvLSTMSpec

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Statistics:
    """Of a step's z, or of one of its two parts."""

    mean: np.ndarray
    """(B or 1, 4F), float64."""
    variance: np.ndarray
    count: int
    """Number of values that a mean was taken of; 0: the statistics were given."""


class Normalizing:
    """The normalization of a cell's pre-activations: its weights, and the tables that kernels read."""

    def __init__(
        self, spec: ConvLSTMSpec, weights: Arrays | None, bias: np.ndarray | None, strips: list[int], dtype: np.dtype
    ):
        """`strips`: the pixels of each; the bias of parts that are normalized separately is added after that."""
        options = spec.normalization
        self.suffixes: tuple[str, ...] = () if options is None else NORMALIZED_PARTS[options.separate]
        self.parts = np.zeros(len(self.suffixes), PART)
        if options is None:
            return
        assert weights is not None
        self._spec, self._weights, self._pixels = spec, weights, np.array(strips, np.float64)[:, np.newaxis]
        self.elementwise = options.elementwise
        self.given = f"mean{self.suffixes[0]}" in weights
        self.per_image = options.kind != "batch"
        channels = len(GATES) * spec.F
        self._groups = {"layer": 1, "group": options.groups or len(GATES), "batch": channels}[options.kind]
        table = (spec.B if self.per_image else 1, channels)
        self.sums = np.zeros((len(self.suffixes), spec.B, len(strips), 2, channels), dtype)
        self._tables = np.zeros((len(self.suffixes), 4, *table), dtype)
        self._weighing = [[weights[f"{name}{part}"] for name in ("gamma", "beta")] for part in self.suffixes]
        if bias is not None and options.separate:
            self._weighing[0][1] = self._weighing[0][1] + bias
        for n, (gamma, beta) in enumerate(self._weighing):
            part = self.parts[n]
            for name, array in zip(("mean", "scale", "offset", "along"), self._tables[n], strict=True):
                part[name] = array.ctypes.data
            part["gamma"], part["beta"] = gamma.ctypes.data, beta.ctypes.data
            part["sums"] = self.sums[n].ctypes.data
        self.gradients: Arrays = {}

    @property
    def separate(self) -> bool:
        """Whether the convolutions of x and of h are normalized each for itself."""
        return len(self.suffixes) == 2

    def statistics(self, part: int, valid: np.ndarray) -> Statistics:
        """Statistics of what `sums` tells of the strips' channels (means, squares), or those that were given."""
        suffix, spec = self.suffixes[part], self._spec
        if self.given:
            mean, variance = (self._weights[f"{name}{suffix}"][np.newaxis] for name in ("mean", "variance"))
            return Statistics(mean, variance, 0)
        pixels, (means, squares) = spec.HO * spec.WO, self.sums[part].astype(np.float64).transpose(2, 0, 1, 3)
        mean = (self._pixels * means).sum(1) / pixels  # (B, 4F)
        square = squares.sum(1) + (self._pixels * (means - mean[:, np.newaxis]) ** 2).sum(1)
        if not self.per_image:
            images = int(valid.sum())
            mean, square = mean[valid != 0], square[valid != 0]
            both = mean.sum(0) / max(images, 1)
            square = square.sum(0) + pixels * ((mean - both) ** 2).sum(0)
            count = images * pixels
            return Statistics(both[np.newaxis], square[np.newaxis] / max(count, 1), count)
        mean, square = (a.reshape(spec.B, self._groups, -1) for a in (mean, square))
        both = mean.mean(2, keepdims=True)
        square = square.sum(2, keepdims=True) + pixels * ((mean - both) ** 2).sum(2, keepdims=True)
        count = pixels * mean.shape[2]
        mean, variance = (np.broadcast_to(a, mean.shape).reshape(spec.B, -1) for a in (both, square / count))
        return Statistics(mean, variance, count)

    def use(self, part: int, statistics: Statistics) -> None:
        """Bring the statistics of a step to the tables."""
        self._tables[part, 0] = statistics.mean
        self._tables[part, 1] = 1 / np.sqrt(statistics.variance + self._spec.normalization.epsilon)

    def start_back(self, dtype: np.dtype) -> None:
        """Make room for the gradients of gamma and beta."""
        spec = self._spec
        shape = (spec.B, spec.HO, spec.WO, len(GATES) * spec.F) if self.elementwise else (len(GATES) * spec.F,)
        for n, suffix in enumerate(self.suffixes):
            for name in ("gamma", "beta"):
                array = np.zeros(shape, dtype if self.elementwise else np.float64)
                self.gradients[f"{name}{suffix}"] = array
                if self.elementwise:
                    self.parts[n][f"d{name}"] = array.ctypes.data

    def pull_back(self, part: int, count: int) -> None:
        """Take the weights' gradients and the two means of a step, of what `sums` tells of those before gamma."""
        sums, suffix = self.sums[part].sum(1, dtype=np.float64), self.suffixes[part]  # (B, 2, 4F)
        if not self.elementwise:
            self.gradients[f"beta{suffix}"] += sums[:, 0].sum(0)
            self.gradients[f"gamma{suffix}"] += sums[:, 1].sum(0)
            sums *= self._weighing[part][0]
        if count == 0:
            return
        if self.per_image:
            whole = sums.reshape(*sums.shape[:2], self._groups, -1).sum(-1, keepdims=True)
            sums = np.broadcast_to(whole, (*whole.shape[:3], sums.shape[2] // self._groups)).reshape(sums.shape)
        else:
            sums = sums.sum(0, keepdims=True)
        self._tables[part, 2:] = sums.swapaxes(0, 1) / count

    def result(self, dtype: np.dtype) -> Arrays:
        """Return the gradients of the weights by name; of given statistics zeros."""
        found = {
            name: (g.sum(0, np.float64) if self.elementwise else g).astype(dtype) for name, g in self.gradients.items()
        }
        return {name: found.get(name, np.zeros_like(weight)) for name, weight in self._weights.items()}

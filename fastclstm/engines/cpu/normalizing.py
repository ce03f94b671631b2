"""Normalization of pre-activations: its weights and statistics, in the tables that kernels read and write."""

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
        self, spec: ConvLSTMSpec, weights: Arrays | None, bias: np.ndarray | None, strips: int, dtype: np.dtype
    ):
        """`strips`: how many an image has; the bias of parts that are normalized separately is added after that."""
        options = spec.normalization
        self.suffixes: tuple[str, ...] = () if options is None else NORMALIZED_PARTS[options.separate]
        self.parts = np.zeros(len(self.suffixes), PART)
        if options is None:
            return
        assert weights is not None
        self._spec, self._weights = spec, weights
        self.elementwise = options.elementwise
        self.given = f"mean{self.suffixes[0]}" in weights
        self.per_image = options.kind != "batch"
        channels = len(GATES) * spec.F
        self.groups = {"layer": 1, "group": options.groups or len(GATES), "batch": channels}[options.kind]
        shape = (spec.B if self.per_image else 1, channels)
        self._sums = np.zeros((len(self.suffixes), spec.B, strips, 2, channels), dtype)
        self._tables = np.zeros((len(self.suffixes), 4, *shape), dtype)
        self._weighing = [[weights[f"{name}{part}"] for name in ("gamma", "beta")] for part in self.suffixes]
        if bias is not None and options.separate:
            self._weighing[0][1] = self._weighing[0][1] + bias
        for n, (gamma, beta) in enumerate(self._weighing):
            part = self.parts[n]
            for name, array in zip(("mean", "scale", "offset", "along"), self._tables[n], strict=True):
                part[name] = array.ctypes.data
            part["gamma"], part["beta"] = gamma.ctypes.data, beta.ctypes.data
            part["sums"] = self._sums[n].ctypes.data
        self.gradients: Arrays = {}
        if self.given:
            for table, part in zip(self._tables, self.suffixes, strict=True):
                table[0] = weights[f"mean{part}"]
                table[1] = 1 / np.sqrt(weights[f"variance{part}"] + options.epsilon)

    def memory(self, steps: int) -> np.ndarray:
        """Memory for the statistics of some steps (steps, parts, means and variances, B or 1, 4F), float64."""
        return np.zeros((steps, len(self.suffixes), 2, *self._tables.shape[2:]))

    def statistics(self, measured: np.ndarray, valid: np.ndarray) -> tuple[Statistics, ...]:
        """Statistics of a step, `measured` as of `memory`, or those that were given."""
        if not self.suffixes:
            return ()
        if self.given:
            weights = self._weights
            return tuple(
                Statistics(weights[f"mean{part}"][np.newaxis], weights[f"variance{part}"][np.newaxis], 0)
                for part in self.suffixes
            )
        spec, images = self._spec, 1 if self.per_image else int(valid.sum())
        count = images * spec.HO * spec.WO * (len(GATES) * spec.F // self.groups)
        return tuple(Statistics(mean, variance, count) for mean, variance in measured)

    def again(self, saved: list[tuple[Statistics, ...]]) -> np.ndarray:
        """Bring statistics of steps (from `statistics`) to tables of their own; return the parts of each step."""
        parts = np.tile(self.parts, (len(saved), 1))
        self._again = np.zeros((len(saved), len(self.suffixes), 2, *self._tables.shape[2:]), self._tables.dtype)
        for t, found in enumerate(saved):
            for n, statistics in enumerate(found):
                mean, scale = self._again[t, n]
                mean[...] = statistics.mean
                scale[...] = 1 / np.sqrt(statistics.variance + self._spec.normalization.epsilon)
                parts[t, n]["mean"], parts[t, n]["scale"] = mean.ctypes.data, scale.ctypes.data
        return parts

    def start_back(self, dtype: np.dtype) -> None:
        """Make room for the gradients of gamma and beta."""
        spec = self._spec
        shape = (spec.B, spec.HO, spec.WO, len(GATES) * spec.F)
        for n, suffix in enumerate(self.suffixes):
            both = np.zeros((2, *shape), dtype) if self.elementwise else np.zeros((2, shape[-1]))
            for name, array in zip(("beta", "gamma"), both, strict=True):
                self.gradients[f"{name}{suffix}"] = array
                if self.elementwise:
                    self.parts[n][f"d{name}"] = array.ctypes.data
            if not self.elementwise:
                self.parts[n]["gradients"] = both.ctypes.data

    def result(self, dtype: np.dtype) -> Arrays:
        """Return the gradients of the weights by name; of given statistics zeros."""
        found = {
            name: (g.sum(0, np.float64) if self.elementwise else g).astype(dtype) for name, g in self.gradients.items()
        }
        return {name: found.get(name, np.zeros_like(weight)) for name, weight in self._weights.items()}

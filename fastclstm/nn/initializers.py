"""Initializers: how the first values of a parameter are drawn, by name, as Keras 3 draws them.

An initializer is a function ``f(shape, rng, dtype) -> array``; those here are frozen sets of options that files can
hold. All draws are made in float64 and rounded once, so float32 and float64 layers with the same seed start from the
same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm.nn import Options, is_number, look_up
from fastclstm.spec import Shape, choice

Initializer = Callable[[Shape, np.random.Generator, Any], np.ndarray]

_TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of the standard normal distribution cut off at ±2."""


@dataclass(frozen=True)
class Constant(Options):
    """The same `value` everywhere."""

    value: float = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("value")

    def __call__(self, shape: Shape, rng: np.random.Generator, dtype: Any) -> np.ndarray:
        """Return the values."""
        return np.full(shape, self.value, dtype)


@dataclass(frozen=True)
class Zeros(Options):
    """Zero everywhere."""

    def __call__(self, shape: Shape, rng: np.random.Generator, dtype: Any) -> np.ndarray:
        """Return the values."""
        return np.zeros(shape, dtype)


@dataclass(frozen=True)
class Ones(Options):
    """One everywhere."""

    def __call__(self, shape: Shape, rng: np.random.Generator, dtype: Any) -> np.ndarray:
        """Return the values."""
        return np.ones(shape, dtype)


@dataclass(frozen=True)
class RandomUniform(Options):
    """Uniform between `low` and `high`."""

    low: float = -0.05
    high: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("low")
        self._check_number("high", self.low)

    def __call__(self, shape: Shape, rng: np.random.Generator, dtype: Any) -> np.ndarray:
        """Draw the values."""
        return rng.uniform(self.low, self.high, shape).astype(dtype)


@dataclass(frozen=True)
class RandomNormal(Options):
    """Normal with this mean and standard deviation."""

    mean: float = 0
    stddev: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("mean")
        self._check_number("stddev", 0)

    def __call__(self, shape: Shape, rng: np.random.Generator, dtype: Any) -> np.ndarray:
        """Draw the values."""
        return rng.normal(self.mean, self.stddev, shape).astype(dtype)


@dataclass(frozen=True)
class TruncatedNormal(RandomNormal):
    """Normal with this mean and standard deviation, drawn again where beyond twice the latter from the former."""

    def __call__(self, shape: Shape, rng: np.random.Generator, dtype: Any) -> np.ndarray:
        """Draw the values."""
        values = rng.standard_normal(shape)
        outside = np.abs(values) > 2
        while outside.any():
            values[outside] = rng.standard_normal(np.count_nonzero(outside))
            outside = np.abs(values) > 2
        return (self.mean + values * self.stddev).astype(dtype)


@dataclass(frozen=True)
class VarianceScaling(Options):
    """Values with mean zero and the variance ``scale / fan``, so that signals keep their size from layer to layer.

    Parameters
    ----------
    scale : float
        1 for tanh and linear layers, 2 for relu.
    mode : "fan_in", "fan_out" or "fan_avg"
        Which of the `fans` divides; "fan_avg" is their mean.
    distribution : "uniform", "normal" or "truncated_normal"
        All of the same variance.

    Notes
    -----
    Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010; He et
    al., "Delving deep into rectifiers", ICCV 2015.
    """

    scale: float = 1
    mode: str = "fan_in"
    distribution: str = "truncated_normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("scale", 0, inclusive=False)
        choice("VarianceScaling", "mode", self.mode, ("fan_in", "fan_out", "fan_avg"))
        choice("VarianceScaling", "distribution", self.distribution, ("uniform", "normal", "truncated_normal"))

    def __call__(self, shape: Shape, rng: np.random.Generator, dtype: Any) -> np.ndarray:
        """Draw the values."""
        fan_in, fan_out = fans(shape)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        variance = self.scale / max(1, fan)
        draw: Initializer
        if self.distribution == "uniform":
            draw = RandomUniform(-math.sqrt(3 * variance), math.sqrt(3 * variance))
        elif self.distribution == "normal":
            draw = RandomNormal(0, math.sqrt(variance))
        else:
            draw = TruncatedNormal(0, math.sqrt(variance) / _TRUNCATED_STD)
        return draw(shape, rng, dtype)


@dataclass(frozen=True)
class Orthogonal(Options):
    """A random orthogonal matrix, (all axes but the last) × (the last), times `gain`: Saxe et al., ICLR 2014."""

    gain: float = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("gain")

    def __call__(self, shape: Shape, rng: np.random.Generator, dtype: Any) -> np.ndarray:
        """Draw the values."""
        _need_two_axes("orthogonal", shape)
        rows, columns = math.prod(shape[:-1]), shape[-1]
        q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
        q *= np.where(np.diagonal(r) < 0, -1, 1)  # makes the decomposition unique, hence the distribution uniform
        return (self.gain * (q.T if rows < columns else q)).reshape(shape).astype(dtype)


@dataclass(frozen=True)
class Identity(Options):
    """The kernel that hands each channel on, times `gain`: of a kernel with more than two axes, at its central tap.

    The convolution with it, with stride 1 and padding "same", returns its input.
    """

    gain: float = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("gain")

    def __call__(self, shape: Shape, rng: np.random.Generator, dtype: Any) -> np.ndarray:
        """Return the values."""
        _need_two_axes("identity", shape)
        values = np.zeros(shape, dtype)
        values[tuple((n - 1) // 2 for n in shape[:-2])] = self.gain * np.eye(shape[-2], shape[-1])
        return values


def fans(shape: Shape) -> tuple[int, int]:
    """Return (fan_in, fan_out) of a parameter: of a kernel (KH, KW, C, F) they are KH·KW·C and KH·KW·F."""
    if len(shape) < 2:
        size = math.prod(shape)
        return size, size
    field = math.prod(shape[:-2])
    return field * shape[-2], field * shape[-1]


def _need_two_axes(name: str, shape: Shape) -> None:
    if len(shape) < 2:
        raise ValueError(f"initializer {name!r} needs at least two axes, got shape {shape}")


TABLE: dict[str, Initializer] = {
    "zeros": Zeros(),
    "ones": Ones(),
    "constant": Constant(),
    "glorot_uniform": VarianceScaling(1, "fan_avg", "uniform"),
    "glorot_normal": VarianceScaling(1, "fan_avg", "truncated_normal"),
    "he_uniform": VarianceScaling(2, "fan_in", "uniform"),
    "he_normal": VarianceScaling(2, "fan_in", "truncated_normal"),
    "lecun_uniform": VarianceScaling(1, "fan_in", "uniform"),
    "lecun_normal": VarianceScaling(1, "fan_in", "truncated_normal"),
    "orthogonal": Orthogonal(),
    "identity": Identity(),
    "random_uniform": RandomUniform(),
    "uniform": RandomUniform(),
    "random_normal": RandomNormal(),
    "normal": RandomNormal(),
    "truncated_normal": TruncatedNormal(),
}
"""The initializers by name."""


def get(spec: Any) -> Initializer:
    """Return the initializer that `spec` means: a name, a number, or a function ``f(shape, rng, dtype) -> array``.

    The objects of this module are such functions.

    Raises
    ------
    ValueError
        An unknown name.
    TypeError
        Anything else.

    Examples
    --------
    >>> get("ones")((2,), np.random.default_rng(0), "float32")
    array([1., 1.], dtype=float32)
    >>> get(0.5)
    Constant(value=0.5)
    """
    if isinstance(spec, str):
        return look_up("initializer", TABLE, spec)
    if is_number(spec):
        return Constant(spec)
    if callable(spec):
        return spec
    raise TypeError(
        f"an initializer must be a name ({', '.join(TABLE)}), a finite number or a function (shape, rng, dtype) -> "
        f"array, got {spec!r}"
    )

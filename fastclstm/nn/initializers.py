"""Initializers: functions that draw the first values of a parameter, by name, as Keras 3 draws them.

An initializer is a function ``f(shape, rng, dtype) -> array``. All draws are made in float64 and rounded once, so
float32 and float64 layers with the same seed start from the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Initializer = Callable[[tuple[int, ...], np.random.Generator, Any], np.ndarray]

RANDOM_SCALE = 0.05
"""Half the range of "random_uniform", and the standard deviation of "random_normal" and "truncated_normal"."""

_TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of the standard normal distribution cut off at ±2."""


def get(spec: Any) -> Initializer:
    """Return the initializer that `spec` means: a name or a function ``f(shape, rng, dtype) -> array``.

    Raises
    ------
    ValueError
        An unknown name.
    TypeError
        Neither a name nor callable.

    Examples
    --------
    >>> get("ones")((2,), np.random.default_rng(0), "float32")
    array([1., 1.], dtype=float32)
    """
    if isinstance(spec, str):
        if spec not in TABLE:
            raise ValueError(f"unknown initializer {spec!r}; known are {', '.join(TABLE)}")
        return TABLE[spec]
    if callable(spec):
        return spec
    raise TypeError(
        f"an initializer must be a name ({', '.join(TABLE)}) or a function (shape, rng, dtype) -> array, got {spec!r}"
    )


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (fan_in, fan_out) of a parameter: of a kernel (KH, KW, C, F) they are KH·KW·C and KH·KW·F."""
    if len(shape) < 2:
        size = math.prod(shape)
        return size, size
    field = math.prod(shape[:-2])
    return field * shape[-2], field * shape[-1]


def _zeros(shape: tuple[int, ...], rng: np.random.Generator, dtype: Any) -> np.ndarray:
    return np.zeros(shape, dtype)


def _ones(shape: tuple[int, ...], rng: np.random.Generator, dtype: Any) -> np.ndarray:
    return np.ones(shape, dtype)


def _uniform(shape: tuple[int, ...], rng: np.random.Generator, limit: float) -> np.ndarray:
    return rng.uniform(-limit, limit, shape)


def _truncated_normal(shape: tuple[int, ...], rng: np.random.Generator, scale: float) -> np.ndarray:
    """Draw from the normal distribution with standard deviation `scale`, again where beyond twice that."""
    values = rng.standard_normal(shape)
    outside = np.abs(values) > 2
    while outside.any():
        values[outside] = rng.standard_normal(np.count_nonzero(outside))
        outside = np.abs(values) > 2
    return values * scale


def _random_uniform(shape: tuple[int, ...], rng: np.random.Generator, dtype: Any) -> np.ndarray:
    return _uniform(shape, rng, RANDOM_SCALE).astype(dtype)


def _random_normal(shape: tuple[int, ...], rng: np.random.Generator, dtype: Any) -> np.ndarray:
    return rng.normal(0, RANDOM_SCALE, shape).astype(dtype)


def _random_truncated_normal(shape: tuple[int, ...], rng: np.random.Generator, dtype: Any) -> np.ndarray:
    return _truncated_normal(shape, rng, RANDOM_SCALE).astype(dtype)


def _variance_scaling(scale: float, mode: str, distribution: str) -> Initializer:
    """Return the initializer whose values have the variance scale / fan."""

    def initializer(shape: tuple[int, ...], rng: np.random.Generator, dtype: Any) -> np.ndarray:
        fan_in, fan_out = fans(shape)
        fan = fan_in if mode == "fan_in" else (fan_in + fan_out) / 2
        variance = scale / max(1, fan)
        if distribution == "uniform":
            return _uniform(shape, rng, math.sqrt(3 * variance)).astype(dtype)
        return _truncated_normal(shape, rng, math.sqrt(variance) / _TRUNCATED_STD).astype(dtype)

    return initializer


def _orthogonal(shape: tuple[int, ...], rng: np.random.Generator, dtype: Any) -> np.ndarray:
    """Draw a random orthogonal matrix, (all axes but the last) × (the last): Saxe et al., ICLR 2014."""
    if len(shape) < 2:
        raise ValueError(f"initializer 'orthogonal' needs at least two axes, got shape {shape}")
    rows, columns = math.prod(shape[:-1]), shape[-1]
    q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
    q *= np.where(np.diagonal(r) < 0, -1, 1)  # makes the decomposition unique, hence the distribution uniform
    return (q.T if rows < columns else q).reshape(shape).astype(dtype)


TABLE: dict[str, Initializer] = {
    "zeros": _zeros,
    "ones": _ones,
    "glorot_uniform": _variance_scaling(1, "fan_avg", "uniform"),
    "glorot_normal": _variance_scaling(1, "fan_avg", "truncated_normal"),
    "he_uniform": _variance_scaling(2, "fan_in", "uniform"),
    "he_normal": _variance_scaling(2, "fan_in", "truncated_normal"),
    "lecun_uniform": _variance_scaling(1, "fan_in", "uniform"),
    "lecun_normal": _variance_scaling(1, "fan_in", "truncated_normal"),
    "orthogonal": _orthogonal,
    "random_uniform": _random_uniform,
    "random_normal": _random_normal,
    "truncated_normal": _random_truncated_normal,
}
"""The initializers by name."""

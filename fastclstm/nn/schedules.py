"""Schedules: the learning rate of each step of an optimizer, counted from 0."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastclstm.nn import Options, is_number

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class ConstantSchedule(Options):
    """The same rate at every step."""

    learning_rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("learning_rate", 0)

    def __call__(self, step: int) -> float:
        """Return the rate."""
        return self.learning_rate


@dataclass(frozen=True)
class ExponentialDecay(Options):
    """``learning_rate * decay_rate ** (step / decay_steps)``, as in Keras.

    Parameters
    ----------
    learning_rate : float
        The first rate.
    decay_steps : int
        After how many steps it has been multiplied by `decay_rate`.
    decay_rate : float
    staircase : bool
        In leaps, every `decay_steps`, instead of at every step.

    Examples
    --------
    >>> ExponentialDecay(0.1, decay_steps=10, decay_rate=0.25)(5)
    0.05
    """

    learning_rate: float
    decay_steps: int
    decay_rate: float
    staircase: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("learning_rate", 0)
        self._check_integer("decay_steps", 1)
        self._check_number("decay_rate", 0, inclusive=False)

    def __call__(self, step: int) -> float:
        """Return the rate."""
        periods = step // self.decay_steps if self.staircase else step / self.decay_steps
        return self.learning_rate * self.decay_rate**periods


@dataclass(frozen=True)
class CosineDecay(Options):
    """Half a cosine from `learning_rate` down to its `alpha`-th, after a straight way up: Keras's with warmup.

    Parameters
    ----------
    learning_rate : float
        The highest rate.
    decay_steps : int
        Steps of the way down, after those of the warmup; thereafter the rate stays.
    alpha : float
        The last rate as a share of the highest, 0 to 1.
    warmup_steps : int
        Steps of the way up.
    warmup_start : float
        Where that begins.

    Notes
    -----
    Loshchilov & Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017, without the restarts.

    Examples
    --------
    >>> schedule = CosineDecay(0.1, decay_steps=100, warmup_steps=10)
    >>> [round(schedule(step), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """

    learning_rate: float
    decay_steps: int
    alpha: float = 0
    warmup_steps: int = 0
    warmup_start: float = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("learning_rate", 0)
        self._check_integer("decay_steps", 1)
        self._check_number("alpha", 0, 1)
        self._check_integer("warmup_steps", 0)
        self._check_number("warmup_start", 0)

    def __call__(self, step: int) -> float:
        """Return the rate."""
        if step < self.warmup_steps:
            return self.warmup_start + (self.learning_rate - self.warmup_start) * step / self.warmup_steps
        share = min(1, (step - self.warmup_steps) / self.decay_steps)
        return _cosine(self.learning_rate, self.alpha * self.learning_rate, share)


@dataclass(frozen=True)
class PiecewiseConstant(Options):
    """``values[0]`` up to and including step ``boundaries[0]``, then ``values[1]``, and so on; one value more.

    Examples
    --------
    >>> schedule = PiecewiseConstant([100, 200], [0.1, 0.01, 0.001])
    >>> schedule(100), schedule(101)
    (0.1, 0.01)
    """

    boundaries: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, rates = self.boundaries, self.values
        integers = isinstance(steps, tuple) and all(type(step) is int and step >= 0 for step in steps)
        if not integers or list(steps) != sorted(set(steps)):
            self._refuse("boundaries", "a sequence of growing integers >= 0")
        numbers = isinstance(rates, tuple) and all(is_number(rate) and rate >= 0 for rate in rates)
        if not numbers or len(rates) != len(steps) + 1:
            self._refuse("values", f"{len(steps) + 1} numbers >= 0, one more than boundaries")

    def __call__(self, step: int) -> float:
        """Return the rate."""
        return self.values[bisect.bisect_left(self.boundaries, step)]


@dataclass(frozen=True)
class OneCycle(Options):
    """Half a cosine up to `learning_rate`, then half a one down to almost nothing: PyTorch's OneCycleLR.

    Parameters
    ----------
    learning_rate : float
        The highest rate.
    total_steps : int
        Steps of the cycle; thereafter the rate stays.
    warmup : float
        The way up's share of the steps, between 0 and 1.
    start_factor, end_factor : float
        The first rate and the last, as shares of the highest.

    Notes
    -----
    Smith & Topin, "Super-convergence: very fast training of neural networks using large learning rates", 2019.

    Examples
    --------
    >>> schedule = OneCycle(0.1, total_steps=101, warmup=0.5)
    >>> round(schedule(0), 6), round(schedule(50), 3), round(schedule(100), 9)
    (0.004, 0.1, 4e-07)
    """

    learning_rate: float
    total_steps: int
    warmup: float = 0.3
    start_factor: float = 0.04
    end_factor: float = 4e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("learning_rate", 0)
        self._check_integer("total_steps", 2)
        for name in ("warmup", "start_factor", "end_factor"):
            self._check_number(name, 0, 1)

    def __call__(self, step: int) -> float:
        """Return the rate."""
        last = self.total_steps - 1
        step, top = min(step, last), self.warmup * self.total_steps - 1
        if step < top:
            return _cosine(self.start_factor * self.learning_rate, self.learning_rate, step / top)
        top = max(0, top)
        share = (step - top) / (last - top) if last > top else 0
        return _cosine(self.learning_rate, self.end_factor * self.learning_rate, share)


def get(spec: Any) -> Schedule:
    """Return the schedule that `spec` means: a number, or a function from the step to its rate.

    The objects of this module are such functions.

    Raises
    ------
    ValueError
        A negative number.
    TypeError
        Anything else.

    Examples
    --------
    >>> get(0.1)(7)
    0.1
    """
    if is_number(spec):
        return ConstantSchedule(spec)
    if callable(spec):
        return spec
    raise TypeError(f"a learning rate must be a finite number or a function of the step, got {spec!r}")


def _cosine(start: float, end: float, share: float) -> float:
    """Return the value after a `share`, 0 to 1, of the way along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

"""What training is made of, by name: small functions and sets of options, from plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from fastclstm.lazy import on_first_use, submodules
from fastclstm.nn.described import Described, plain
from fastclstm.nn.names import nearest

T = TypeVar("T")

if not TYPE_CHECKING:
    __getattr__, __dir__ = on_first_use(__name__, submodules(
        __name__, "activations", "constraints", "initializers", "losses", "metrics", "normalization", "optimizers",
        "regularizers", "schedules", "transforms",
    ))  # fmt: skip


class Options(Described):
    """A dataclass of options, checked when made and held by files as they are: Python numbers and tuples."""

    def __post_init__(self) -> None:
        for name, value in self.options.items():
            object.__setattr__(self, name, plain(value))

    def _check_number(
        self, name: str, minimum: float = -math.inf, maximum: float = math.inf, *, inclusive: bool = True
    ) -> None:
        """Raise ValueError unless the option is finite and within the bounds; `inclusive` is of the minimum."""
        value = getattr(self, name)
        if not (is_number(value) and minimum <= value <= maximum and (inclusive or value != minimum)):
            bounds = [f" {'>=' if inclusive else '>'} {minimum}"] * (minimum > -math.inf)
            bounds += [f" <= {maximum}"] * (maximum < math.inf)
            self._refuse(name, f"a finite number{' and'.join(bounds)}")

    def _check_integer(self, name: str, minimum: int) -> None:
        """Raise ValueError unless the option is an integer >= `minimum`."""
        value = getattr(self, name)
        if type(value) is not int or value < minimum:
            self._refuse(name, f"an integer >= {minimum}")

    def _refuse(self, name: str, expected: str) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: {name} must be {expected}, got {getattr(self, name)!r}")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite real number, Python's or NumPy's; True and False are none."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return real and math.isfinite(value)


def look_up(kind: str, table: Mapping[str, T], name: str) -> T:
    """Return what `table` has under `name`; raise ValueError where that is nothing."""
    if name not in table:
        meant = nearest(name, table)
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise ValueError(f"unknown {kind} {name!r}; known are {', '.join(table)}{hint}")
    return table[name]

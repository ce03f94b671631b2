"""How a module of PyTorch may be given x and its states: forms, and the arguments of a call in one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

X = -1
"""Where x stands in a form."""


def parameters_of(forward: Callable[..., Any], needed: bool = False) -> list[str]:
    """Return the names of the positional arguments of a method, without self; of those alone that must be given."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY
    found = inspect.signature(forward).parameters.items()
    return [name for name, parameter in found if parameter.kind in kinds
            and not (needed and parameter.default is not inspect.Parameter.empty)][1:]  # fmt: skip


class Inputs(NamedTuple):
    """What a module is called with: x, and of all its cells the states, channels-first."""

    x: Tensor
    states: tuple[Tensor, ...]

    def arguments(self, form: Any, needed: int = 0) -> list[Any]:
        """Return the arguments of a call in a form, None behind them for those that are needed."""
        given = [_filled(item, (*self.states, self.x)) for item in form]
        return given + [None] * (needed - len(given))


def forms_of(cells: int, states: int, steps: bool) -> list[Any]:
    """Return how x and states may be given: tuples of `X`, of states' numbers, or of tuples of such."""
    behind: list[Any]
    if states == 1:
        flat = tuple(range(cells))
        behind = [(0,), ((0,),)] if cells == 1 else [(flat,)]
        return [(X,), *((X, *form) for form in behind), *([(0, X)] if steps else [])]
    if cells == 1:
        orders = ((0, 1), (1, 0))
        behind = [form for h, c in orders for form in ((h, c), ((h, c),), (((h, c),),))]
        before = [form for h, c in orders for form in ((h, c, X), ((h, c), X))] if steps else []
        return [(X,), *((X, *form) for form in behind), *before]
    numbers = [tuple(range(cell * states, (cell + 1) * states)) for cell in range(cells)]
    return [(X,), (X, tuple(numbers)), (X, *(tuple(one[state] for one in numbers) for state in range(states)))]


def _filled(item: Any, tensors: tuple[Tensor, ...], within: bool = False) -> Any:
    """Return an argument in a form's structure: a list or, in another, a tuple."""
    if isinstance(item, int):
        return tensors[item]
    parts = [_filled(part, tensors, True) for part in item]
    return tuple(parts) if within else parts


def found_in(form: Any, arguments: list[Any], axes: int) -> tuple[Tensor, list[Tensor]] | None:
    """Return x and the states in arguments of a form's structure, None where they have another."""
    found: dict[int, Tensor] = {}

    def fits(item: Any, value: Any) -> bool:
        if isinstance(item, int):
            found[item] = value
            return isinstance(value, Tensor) and value.dim() == (axes if item == X else 4)
        return isinstance(value, list | tuple) and len(value) == len(item) and all(map(fits, item, value))

    if not fits(form, arguments):
        return None
    return found.pop(X), [found[number] for number in sorted(found)]

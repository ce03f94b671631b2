"""What names do not tell of a module that is at hand: it is called, and the dialect is found that computes the same.

A copy is called, in eval mode and where it can be in double precision, so that nothing of the module's own changes.
Its first cell is tried, which is called step by step, then the whole.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from fastclstm.convert.torch_calls import outputs

COMPUTED = frozenset({
    "activation", "recurrent_activation", "output_activation", "padding", "stride", "padding_mode", "dilation",
    "recurrent_dilation", "leaky_relu_slope",
})  # fmt: skip
"""Options by which a user tells what the module computes; others ask for something else of the layer."""

_FRAME, _STEPS = (5, 4), 3
_CLOSE = {True: 1e-7, False: 1e-3}
"""How far outputs may be from the module's, as a share of their largest value, in double precision and not."""

Row = TypeVar("Row")


def agreeing(
    module: Any, places: Sequence[tuple[str, int]], states: int, rows: Sequence[Row],
    make: Callable[[Row, int, str], Any],
) -> Row | None:  # fmt: skip
    """Return the first of `rows` whose layer gives what a module gives; None where no call of it gives anything alike.

    `places` are of submodules to try, and their filters; ``make(row, number of the place, dtype)`` is a layer for one.

    Raises
    ------
    ValueError
        What the module gives has the layer's shape, and no row agrees.
    """
    if not hasattr(module, "get_submodule"):
        return None
    least: float | None = None
    for number, (place, filters) in enumerate(places):
        for part, double in _copies(module, place):
            dtype = "float64" if double else "float32"
            first = make(rows[0], number, dtype)
            frame = getattr(first, "frame_size", None) or _FRAME
            x = np.random.default_rng(0).normal(size=(1, _STEPS, first.in_channels, *frame))
            ys = [y for y in _called(part, x, filters, states) if y.shape == first(x).shape and np.any(y)]
            if not ys:
                continue
            for row in rows:
                y = make(row, number, dtype)(x)
                difference = min(float(np.max(np.abs(y - other)) / np.max(np.abs(other))) for other in ys)
                if difference <= _CLOSE[double]:
                    return row
                least = difference if least is None else min(least, difference)
            break
    if least is None:
        return None
    raise ValueError(f"from_torch: the module computes something else than a layer with its weights would: on drawn x "
                     f"the outputs differ by {least:.2g} of the largest value or more, in whatever order the gates "
                     f"stand; perhaps activation=…, recurrent_activation=…, dilation=…, padding_mode=… or a dialect's "
                     f"forget_bias=… is another. Its state_dict() is read by the names alone")  # fmt: skip


def _copies(module: Any, place: str) -> Iterator[tuple[Any, bool]]:
    """Yield copies of a submodule, in double precision first, that may be called."""
    for start in ("", "module.", "_orig_mod."):
        try:
            part = module.get_submodule(f"{start}{place}".removesuffix("."))
        except AttributeError:
            continue
        for double in (True, False):
            try:
                own = copy.deepcopy(part)
                yield (own.double() if double else own), double
            except Exception:  # what a user's module raises that cannot be copied
                continue
        return


def _called(module: Any, x: np.ndarray, filters: int, states: int) -> list[np.ndarray]:
    import torch

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        made, _ = outputs(module, x, filters, states)
    return [y for y in made if np.isfinite(y).all()]

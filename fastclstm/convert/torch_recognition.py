"""Which ConvLSTM the names of a state_dict tell, and what is wrong where they tell none."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastclstm.convert.torch_dialects import DIALECTS, Dialect, Index
from fastclstm.io.bounds import shown

Cells = dict[Index, dict[str, Any]]
"""The weights of each cell, by their names in it."""


_COMPUTED = re.compile(r"\bparametrizations\.\w+\.original|weight_(?:g|orig)$")


class Recognized(NamedTuple):
    """A ConvLSTM in a state_dict: its dialect, what stands before its cells' places, and its cells."""

    row: Dialect
    place: str
    cells: Cells


def recognize(state: Mapping[str, Any], rows: list[Dialect], prefix: str) -> Recognized:
    """Return the one ConvLSTM under `prefix` that is of the dialect of one of the rows; warn of what is left over.

    Raises
    ------
    ValueError
        There is none, there are several, or some of its cells are missing.
    """
    start = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    candidates = [Recognized(row, *cells) for row in rows if row.cells != ""
                  for cells in _cells(state, row, start).items()]  # fmt: skip
    fits = [one for one in candidates if all(not any(_misfits(one.row, cell)) for cell in one.cells.values())]
    found = _distinct(fits)
    likely: list[Recognized] = []
    if not found:
        likely = _single_cells(state, rows, start)
        found = [one for one in likely if one.place == start]
        found = found or [
            one for one in likely if [row.cells for row in rows] == [""] or _unmistakable(one.row, one.cells[0, 0])
        ]
    if len(found) > 1:
        raise ValueError(
            f"{rows[0].reader}: several ConvLSTMs fit: {_places(found)}; say which with prefix=… and dialect=…"
        )
    if not found:
        under = f" under {start!r}" if start else ""
        told = f"by their shapes these may be cells: {_places(likely, 2)}; say which with prefix=…" if likely \
            else _nearest(state, rows, candidates, start)  # fmt: skip
        computed = next((name for name in map(str, state) if _COMPUTED.search(name)), None)
        if computed is not None:
            told += (f"; {computed} is of a weight that is computed (weight_norm, spectral_norm, …): let the module "
                     "keep its value, as by torch.nn.utils.parametrize.remove_parametrizations")  # fmt: skip
        raise ValueError(f"{rows[0].reader}: no ConvLSTM is recognized by its names{under}: {told}")
    row, place, cells = found[0]
    complete = {(0, d) for d in range(len(cells))} if row.directions else {(n, 0) for n in range(len(cells))}
    if cells.keys() != complete:
        numbers = ", ".join(str(max(index)) for index in [*cells][:8]) + (", …" if len(cells) > 8 else "")
        raise ValueError(f"{row.reader}: {place or 'the source'} has the weights of some cells only, numbers "
                         f"{numbers}; they count from 0")  # fmt: skip
    _warn_of_the_rest(state, found[0], start)
    return found[0]


def _cells(state: Mapping[str, Any], row: Dialect, start: str) -> dict[str, Cells]:
    """Return what looks like cells of a dialect, by the prefix before them."""
    found: dict[str, Cells] = {}
    for key, value in state.items():
        at = row.find(key, start) if isinstance(key, str) and key.startswith(start) else None
        if at is not None:
            place, index, name = at
            found.setdefault(place, {}).setdefault(index, {})[name] = value
    return found


def _distinct(found: list[Recognized]) -> list[Recognized]:
    """Leave out what another dialect reads just as the one before it."""
    kept: dict[tuple[Any, ...], Recognized] = {}
    for one in found:
        kept.setdefault((one.place, *one.row.meaning), one)
    return list(kept.values())


def _single_cells(state: Mapping[str, Any], rows: list[Dialect], start: str) -> list[Recognized]:
    """Return the modules that have the names and shapes of one cell and nothing else."""
    found: list[Recognized] = []
    names = [name for name in state if isinstance(name, str) and name.startswith(start)]
    for row in sorted(rows, key=lambda row: row.cells != ""):
        if not isinstance(row.cells, str) or (row.cells and row not in DIALECTS.values()):
            continue  # one of the user's own is where its cells are
        row = row.alone() if row.cells else row
        first = row.required[0]
        ends = (name for name in names if f".{name}".endswith(f".{first}"))
        cells: dict[str, dict[str, Any]] = {name.removesuffix(first): {} for name in ends}
        for name in names:
            for place in _places_of(name, start):
                if place in cells:
                    cells[place][name.removeprefix(place)] = state[name]
        for place, cell in cells.items():
            if not any(_misfits(row, cell)) and _plausible(row, cell):
                found.append(Recognized(row, place, {(0, 0): cell}))
    return _distinct(found)


def _places_of(name: str, start: str) -> list[str]:
    """Return what may be the place of a name: what ends before one of its parts."""
    parts = name.removeprefix(start).split(".")[:-1]
    return [start + "".join(f"{part}." for part in parts[:count]) for count in range(min(len(parts), _DEEPEST) + 1)]


_DEEPEST = 64


def _plausible(row: Dialect, cell: Mapping[str, Any]) -> bool:
    """Whether a joint convolution has 4F outputs and more than F inputs, that of h alone 4F and F."""
    convolution = row.joint if row.split is None else row.split[1]
    assert convolution is not None
    shapes = [np.shape(cell[f"{name}.{row.weight}"]) for name in row.spelled(convolution)]
    if any(len(shape) != 4 for shape in shapes):
        return False
    outputs, inputs = (0, 1) if row.layout == "OIHW" else (3, 2)
    width, given = sum(shape[outputs] for shape in shapes), shapes[0][inputs]
    return width % 4 == 0 and (0 < width // 4 < given if row.joint is not None else width // 4 == given)


def _unmistakable(row: Dialect, cell: Mapping[str, Any]) -> bool:
    """Whether the names tell that there is a ConvLSTM, and not just any convolution."""
    return row.split is not None or any(name in cell for name in row.peephole or ())


def _places(found: list[Recognized], most: int = 3) -> str:
    return shown((f"{row.name!r} at prefix={place!r}" for row, place, _ in found), most)


def _misfits(row: Dialect, cell: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return what a cell has not but needs, and what it has and the dialect does not know."""
    known = {*row.required, *row.optional, *row.ignored}
    return [name for name in row.required if name not in cell], [name for name in cell if name not in known]


def _nearest(state: Mapping[str, Any], rows: list[Dialect], candidates: list[Recognized], start: str) -> str:
    """Say what the dialect that fits best lacks, or else what the names are."""
    near = []
    for row, place, cells in candidates:
        for index, cell in cells.items():
            missing, unknown = _misfits(row, cell)
            if len(missing) < len(row.required) and (missing or unknown):
                near.append(
                    (len(missing) + len(unknown), f"{place}{row.place(*index)}".rstrip("."), row, missing, unknown)
                )
    if near:
        _, where, row, missing, unknown = min(near, key=lambda miss: miss[0])
        misses = [f"has no {_few(missing)}, which {row.name!r} has"] if missing else []
        misses += [f"also has {_few(unknown)}, which {row.name!r} has not"] if unknown else []
        return (
            f"{where[:60] or 'the cell'} {' and '.join(misses)}; describe it yourself with cells=…, joint=… or split=…"
        )
    names = [name for name in state if isinstance(name, str) and name.startswith(start)]
    if any(name.endswith("recurrent_kernel") for name in names):
        return "these are the parameters of a layer of fastclstm; hand them to its set_parameters"
    if len(rows) == 1:
        row = rows[0]
        place = shown([row.cells] if isinstance(row.cells, str) else row.cells, 2)
        where = f" in each of its cells {place:.80}" if place else ", and nothing else"
        return f"got {_few(names)}; {row.name!r} has {_few([*row.required])}{where}"
    known = shown((row.name for row in rows), 4)
    how = next(_likely(state, names), "cells=…, joint=… or split=…")
    return f"got {_few(names)}; known are {known} (DIALECTS, GRU_DIALECTS); describe others yourself with {how}"


def _likely(state: Mapping[str, Any], names: list[str]) -> Iterator[str]:
    """Yield how to describe what by its shape and name may be the convolution of x and h of a cell."""
    for name in names:
        place, _, kind = name.rpartition(".")
        shape = np.shape(state[name])
        if kind == "weight" and len(shape) == 4 and shape[0] % 4 == 0 and 0 < shape[0] // 4 < shape[1]:
            cell, _, convolution = place.rpartition(".")
            if _RECURRENT.search(place):
                yield f"cells=[{cell!r}], joint={convolution!r}, if that convolves x and h together, and gates=…"


_RECURRENT = re.compile("lstm|rnn|cell|gate", re.IGNORECASE)


def _few(names: list[str]) -> str:
    return shown((name if len(name) <= 30 else f"{name[:29]}…" for name in names), 2)


def _warn_of_the_rest(state: Mapping[str, Any], found: Recognized, start: str) -> None:
    """Warn of what stands beside the ConvLSTM, unless its own prefix was given."""
    row, place, _ = found
    if start and start == place:
        return
    known = tuple(f"{place}{name}" for name in row.beside)

    def is_left(name: str) -> bool:
        if row.cells == "":
            return not name.startswith(place)
        beside = any(name.startswith(one) if one.endswith(".") else name == one for one in known)
        return not beside and ((here := row.find(name, start)) is None or here[0] != place)

    rest = [name for name in state if isinstance(name, str) and name.startswith(start) and is_left(name)]
    if rest:
        groups = dict.fromkeys(f"{name.rpartition('.')[0]}.".removeprefix(".") or name for name in rest)
        advice = f"; prefix={place!r} says that this is meant" if place else ""
        at = f" at {place!r}" if place else ""
        warnings.warn(f"{row.reader}: only the ConvLSTM{at} was taken, and {len(rest)} other tensors were left: "
                      f"{shown(groups)}{advice}", UserWarning, stacklevel=4)  # fmt: skip

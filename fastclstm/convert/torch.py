"""ConvLSTM2D from the weights of PyTorch's ConvLSTMs, and back; PyTorch itself is not needed.

A dialect is one of the published modules: how it names its weights, in which order the gates stand, what it adds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.convert.legacy_order import LegacyOrder
from fastclstm.convert.torch_dialects import DIALECTS, Arrays, Dialect, Index, Options
from fastclstm.io import torch_files
from fastclstm.layers import ConvLSTM2D
from fastclstm.spec import choice

__all__ = ["DIALECTS", "Dialect", "LegacyOrder", "from_torch", "to_torch"]


def from_torch(
    source: Any, dialect: str | Dialect | None = None, *, prefix: str = "", key: str | None = None,
    legacy_order: bool = False, data_format: str = "channels_first", **options: Any,
) -> ConvLSTM2D | LegacyOrder:  # fmt: skip
    """Return the ConvLSTM2D that has the weights of a PyTorch module.

    Without other options it computes what the module computes in eval mode: x (B, T, C, H, W) to the last layer's
    outputs (B, T, F, H, W), or (B, T, 2F, H, W) where it is bidirectional.

    Parameters
    ----------
    source : path, mapping or module
        A file that `fastclstm.io.torch_files.read` reads, a state_dict of tensors or arrays, or anything that has a
        method state_dict.
    dialect : str or Dialect, optional
        Whose module it is; None: told by the names. "ndrplz" (ndrplz/ConvLSTM_pytorch), "kl4805"
        (KL4805/ConvLSTM-Pytorch, with convolved peepholes), "seyongk" (seyongk/Bidirectional-Conv-LSTM-pytorch, with
        batch normalization), "openstl" (the ConvLSTM of chengtan9907/OpenSTL), "kimuyen" (KimUyen/ConvLSTM-Pytorch).
    prefix : str
        The submodule to read, as in "encoder.convlstm."; needed only where the source has several ConvLSTMs.
    key : str, optional
        Where in a checkpoint file the state_dict is, as in `fastclstm.io.torch_files.read`.
    legacy_order : bool
        Of a bidirectional "seyongk": outputs and states in the order in which the published module has them, see
        `LegacyOrder`.
    data_format : "channels_first" or "channels_last"
        The former is PyTorch's.
    **options
        Further options of `ConvLSTM2D`, such as return_state, engine or dtype; None of them may contradict the
        weights. dtype is the weights' own (of half precision: float32), unless given.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        Names or shapes that fit no dialect, or several; options that the weights decide; weights that no ConvLSTM2D
        can hold.
    TypeError
        A source that is none, tensors that are not of real numbers.

    Examples
    --------
    >>> import numpy as np
    >>> weights = {"cell_list.0.conv.weight": np.zeros((16, 7, 3, 3)), "cell_list.0.conv.bias": np.zeros(16)}
    >>> layer = from_torch(weights, engine="reference")
    >>> layer(np.zeros((1, 5, 3, 8, 8))).shape
    (1, 5, 4, 8, 8)
    """
    rows = [*DIALECTS.values()] if dialect is None else [_row("from_torch", dialect)]
    state = _state_dict(source, key)
    row, place, cells = _recognize(state, rows, prefix)
    if legacy_order and not (row.name == "seyongk" and len(cells) == 2):
        raise ValueError(f"from_torch: legacy_order=True is for bidirectional weights of the dialect 'seyongk', "
                         f"got {_told(len(cells), row)}; leave it out")  # fmt: skip
    arrays = {
        index: {n: _array(f"{place}{row.place(*index)}{n}", v) for n, v in cell.items()}
        for index, cell in cells.items()
    }
    parameters, decided = _native(row, place, arrays)
    if wrong := sorted(decided.keys() & options.keys()):
        raise ValueError(f"from_torch: {', '.join(wrong)} follow from the weights; leave them out")
    if "dtype" not in options:
        decided["dtype"] = dispatch.working_dtype(*(v for cell in arrays.values() for v in cell.values())).name
    if legacy_order:
        options["merge_mode"] = None
    layer = ConvLSTM2D(**decided, data_format=data_format, **options)
    layer.set_parameters(parameters)
    return LegacyOrder(layer) if legacy_order else layer


def to_torch(layer: ConvLSTM2D, dialect: str | Dialect) -> Arrays:
    """Return the state_dict with which a module of `dialect` computes what `layer` computes.

    ``module.load_state_dict({name: torch.from_numpy(a) for name, a in to_torch(layer, dialect).items()})`` takes it;
    for "openstl" and "kimuyen" with ``strict=False``, since those modules have weights that they never use. Dropout
    and regularization are not weights, and stay behind.

    Parameters
    ----------
    layer : ConvLSTM2D
    dialect : str or Dialect
        As in `from_torch`.

    Raises
    ------
    ValueError
        The dialect has no place for one of the layer's options.

    Examples
    --------
    >>> {name: array.shape for name, array in to_torch(ConvLSTM2D(3, 4, 3), "ndrplz").items()}
    {'cell_list.0.conv.weight': (16, 7, 3, 3), 'cell_list.0.conv.bias': (16,)}
    """
    row = _row("to_torch", dialect)
    if not isinstance(layer, ConvLSTM2D):
        raise TypeError(f"to_torch: layer must be a ConvLSTM2D, got {type(layer).__name__}")
    row.expect(layer)
    cells: dict[Index, Arrays] = {}
    for name, array in layer.parameters.items():
        match = re.fullmatch(r"layers\.(\d+)\.(?:(forward|backward)\.)?(\w+)", name)
        assert match is not None, name
        cells.setdefault((int(match[1]), int(match[2] == "backward")), {})[match[3]] = array
    return {
        f"{row.place(*index)}{name}": np.array(array, order="C")
        for index, cell in cells.items()
        for name, array in row.write(cell).items()
    }


def _row(op: str, dialect: str | Dialect) -> Dialect:
    if isinstance(dialect, Dialect):
        return dialect
    choice(op, "dialect", dialect, tuple(DIALECTS))
    return DIALECTS[dialect]


# Sources and names


def _state_dict(source: Any, key: str | None) -> Mapping[str, Any]:
    if isinstance(source, str | os.PathLike):
        return torch_files.read(source, key)
    if hasattr(source, "state_dict"):
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise TypeError(f"from_torch: source must be a path, a mapping of names to tensors or arrays, or a module, "
                        f"got {type(source).__name__}")  # fmt: skip
    if key is not None:
        raise ValueError(f"from_torch: key={key!r} is for files; give source[{key!r}] instead")
    return source


def _array(name: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor, perhaps a parameter, perhaps on another device
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return dispatch.as_numpy("from_torch", name, value)


Cells = dict[Index, dict[str, Any]]
"""The weights of each cell, by their names in it."""


def _recognize(state: Mapping[str, Any], rows: list[Dialect], prefix: str) -> tuple[Dialect, str, Cells]:
    """Return the dialect, the prefix and the cells."""
    start = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    found = [
        (row, place, cells)
        for row in rows
        for place, cells in _cells(state, row, start).items()
        if all(_fits(row, cell) for cell in cells.values())
    ]
    if len(found) > 1:
        places = ", ".join(f"{row.name!r} at prefix={place!r}" for row, place, _ in found)
        raise ValueError(f"from_torch: several ConvLSTMs fit: {places}; say which with prefix=… and dialect=…")
    if not found:
        expected = "; ".join(f"{row.name!r}: {_expected(row)}" for row in rows)
        names = [name for name in state if name.startswith(start)]
        shown = ", ".join(map(str, names[:12])) + (" …" if len(names) > 12 else "")
        raise ValueError(
            f"from_torch: no ConvLSTM is recognized by its names{f' under {start!r}' if start else ''}. Expected, "
            f"after any prefix, are {expected}; got {shown or 'none'}"
        )
    ((row, place, cells),) = found
    complete = {(0, d) for d in range(len(cells))} if row.directions else {(n, 0) for n in range(len(cells))}
    if cells.keys() != complete:
        raise ValueError(f"from_torch: {place or 'the source'} has the weights of some cells only, numbers "
                         f"{', '.join(str(max(index)) for index in cells)}; they count from 0")  # fmt: skip
    return row, place, cells


def _expected(row: Dialect) -> str:
    names = [*row.required, *(f"[{name}]" for name in row.optional)]
    return f"{row.cells}.".replace("{direction}", f"{{{'|'.join(row.directions)}}}") + f"({', '.join(names)})"


def _cells(state: Mapping[str, Any], row: Dialect, start: str) -> dict[str, Cells]:
    """Return what looks like cells of a dialect, by the prefix before them."""
    found: dict[str, Cells] = {}
    for key, value in state.items():
        at = row.find(key, start) if isinstance(key, str) and key.startswith(start) else None
        if at is not None:
            place, index, name = at
            found.setdefault(place, {}).setdefault(index, {})[name] = value
    return found


def _fits(row: Dialect, cell: Mapping[str, Any]) -> bool:
    """Whether a cell has all that the dialect needs and nothing that it does not know."""
    return set(row.required) <= set(cell) <= {*row.required, *row.optional, *row.ignored}


def _native(row: Dialect, place: str, cells: Mapping[Index, Arrays]) -> tuple[Arrays, Options]:
    """Return ConvLSTM2D's parameters and the options that the weights decide."""
    bidirectional = len(cells) == 2 and bool(row.directions)
    parameters: Arrays = {}
    told: list[tuple[int, int, tuple[int, int], Options]] = []
    for (layer, direction), cell in cells.items():
        where = f"{place}{row.place(layer, direction)}"
        named, options = row.read(where, cell)
        KH, KW, C, width = named["kernel"].shape
        told.append((C, width // 4, (KH, KW), options | {"use_bias": "bias" in named}))
        if told[-1][3] != told[0][3]:
            raise ValueError(
                f"from_torch: {where} is of another kind than the cells before it ({told[-1][3]}, {told[0][3]})"
            )
        way = f"{('forward', 'backward')[direction]}." if bidirectional else ""
        parameters |= {f"layers.{layer}.{way}{name}": array for name, array in named.items()}
    layers = told[:1] if bidirectional else told
    filters, sizes = [F for _, F, _, _ in layers], [size for _, _, size, _ in layers]
    decided = {
        "in_channels": layers[0][0],
        "out_channels": filters[0] if len(set(filters)) == 1 else filters,
        "kernel_size": sizes[0] if len(set(sizes)) == 1 else sizes,
        "num_layers": len(layers),
        "bidirectional": bidirectional,
        "unit_forget_bias": False,
        **layers[0][3],
    }
    return parameters, decided


def _told(count: int, row: Dialect) -> str:
    return f"{count} {'direction' if row.directions else 'layer'}{'s' if count > 1 else ''} of {row.name!r}"

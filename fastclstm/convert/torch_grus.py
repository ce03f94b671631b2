"""ConvGRU2D from the weights of PyTorch's ConvGRUs, and back: one row a dialect, as `torch_dialects` has for ConvLSTMs.

Most modules keep ``(1 − z)∘h`` where ours keeps ``z∘h``: since 1 − σ(a) = σ(−a), their weights of z, or those of its
normalization, are ours times −1.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.io.bounds import shown
from fastclstm.layers import ConvGRU2D, torch_weights
from fastclstm.layers.base import uninitialized
from fastclstm.nn.normalization import Normalization

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class GRUDialect:
    """How a module of PyTorch names and arranges its cells' weights."""

    name: str
    gates: tuple[str, ...]
    """The convolution of x and h that makes z and r together, or those that make each, z's first."""
    candidate: tuple[str, ...]
    """The convolution of x and r∘h that makes n; or that of x and that of h, whose result r multiplies."""
    order: str = "rz"
    """Of the blocks that one convolution makes."""
    keeps: str = "1 - z"
    """What multiplies the old h."""
    cells: str = ""
    """Where the cells of several layers are, with {layer} in it; "": only a cell by itself is of the dialect."""
    activation: str = "tanh"
    norms: tuple[str, ...] = ()
    """Modules that normalize the gates and n, over groups of `group_size` channels."""
    group_size: int = 32
    hidden_first: bool = False
    """Whether h stands before x where a convolution is of both."""

    @property
    def reset_after(self) -> bool:
        """Where r multiplies."""
        return len(self.candidate) == 2

    @property
    def required(self) -> tuple[str, ...]:
        """Names that every cell has."""
        convolutions = (f"{name}.weight" for name in (*self.gates, *self.candidate))
        return (*convolutions, *(f"{norm}.{kind}" for norm in self.norms for kind in ("weight", "bias")))

    @property
    def biases(self) -> tuple[str, ...]:
        """Names that a cell has all or none of."""
        return tuple(f"{name}.bias" for name in (*self.gates, *self.candidate))

    @property
    def sign(self) -> int:
        """What z's weights are multiplied by."""
        return -1 if self.keeps == "1 - z" else 1


_JOINT = ("conv_gates",), ("conv_can",)
GRU_DIALECTS = {row.name: row for row in (
    GRUDialect("jhhuang96-gru", ("conv1.0",), ("conv2.0",), "zr", norms=("conv1.1", "conv2.1")),
    GRUDialect("aserdega-gru", ("conv_zr",), ("conv_h1", "conv_h2"), "zr", "z"),
    GRUDialect("utae-gru", *_JOINT, cells="cell_list.{layer}"),
    GRUDialect("mlcast", ("combined_gates",), ("out_gate",), "zr"),
    GRUDialect("kimmel-gru", ("update_gate", "reset_gate"), ("out_gate",), cells="ConvGRUCell_{layer:02d}"),
    GRUDialect("dgmr", ("update_gate_conv", "read_gate_conv"), ("output_conv",), keeps="z", activation="relu"),
    GRUDialect("raft", ("convz", "convr"), ("convq",), hidden_first=True),
)}  # fmt: skip
"""Those of jhhuang96's ConvLSTM-PyTorch, aserdega's convlstmgru, U-TAE and happyjin's ConvGRU-pytorch, mlcast,
jacobkimmel's pytorch_convgru, of DGMR (its spectral normalization removed, with the weights that it makes), and of
RAFT and what is made after it."""


def recognized(state: Mapping[str, Any], prefix: str, row: GRUDialect | None = None) -> dict[str, GRUDialect]:
    """Return the places before a cell's names under a prefix, and of which dialect the cells there are."""
    start = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    names = [name for name in state if isinstance(name, str) and name.startswith(start)]
    found: dict[str, GRUDialect] = {}
    for one in GRU_DIALECTS.values() if row is None else [row]:
        first = one.required[0]
        for name in names:
            place = name.removesuffix(first)
            if (
                place != name
                and (place in ("", start) or place.endswith("."))
                and all(f"{place}{other}" in state for other in one.required)
            ):
                found.setdefault(place, one)
    return found


def located(
    state: Mapping[str, Any], prefix: str, row: GRUDialect | None, cells: Any
) -> tuple[GRUDialect, list[str]]:  # fmt: skip
    """Return the dialect of the cells in a state_dict and their places: those given, or all that are numbered."""
    found = recognized(state, prefix, row)
    if cells is not None:
        places = [f"{prefix}{cell}" if not cell or cell.endswith(".") else f"{prefix}{cell}." for cell in cells]
        if missing := [place for place in places if place not in found]:
            raise ValueError(f"from_torch: no cell of a ConvGRU is at {shown(missing)}; there are {shown(found)}")
    else:
        places = sorted(found, key=lambda place: [int(n) for n in re.findall(r"\d+", place)])
        alike = {re.sub(r"\d+", "#", place) for place in places}
        numbered = len(alike) == 1 and all(row.cells for row in found.values())
        if len(places) != 1 and not numbered:
            where = f"several fit: {shown(places)}; say which with prefix=…, or cells=[…] which are stacked"
            raise ValueError(f"from_torch: {where}" if places else "from_torch: no ConvGRU is recognized by its names")
    return found[places[0]], places


def variants(row: GRUDialect) -> list[GRUDialect]:
    """Return the dialects that have a row's names: what they do not tell of a cell may be otherwise."""
    orders = ("rz", "zr") if len(row.gates) == 1 else (row.order,)
    others = [replace(row, order=order, keeps=keeps) for keeps in ("1 - z", "z") for order in orders]
    return [row, *(other for other in others if other != row)]


def read(
    state: Mapping[str, Any], prefix: str, row: GRUDialect, places: list[str], options: dict[str, Any], *,
    warns: bool = False,
) -> ConvGRU2D:  # fmt: skip
    """Return the ConvGRU2D of the cells at these places in a state_dict, with a warning of the rest."""
    arrays: list[Arrays] = []
    for place in places:
        names = [name for name in (*row.required, *row.biases) if f"{place}{name}" in state]
        arrays.append({n: torch_weights.array("from_torch", f"{place}{n}", state[f"{place}{n}"]) for n in names})
    rest = [name for name in state if not any(name == f"{p}{n}" for p, cell in zip(places, arrays, strict=True)
                                              for n in cell)]  # fmt: skip
    if rest and not prefix and warns:
        warnings.warn(f"from_torch: the source has more than the ConvGRU: {shown(rest)}", stacklevel=3)
    read_cells = [_read(row, place, cell) for place, cell in zip(places, arrays, strict=True)]
    decided = _decided(row, [parameters for parameters, _ in read_cells])
    if wrong := sorted(decided.keys() & options.keys()):
        raise ValueError(f"from_torch: {', '.join(wrong)} follow from the weights; leave them out")
    if "dtype" not in options:
        decided["dtype"] = dispatch.working_dtype(*(a for cell in arrays for a in cell.values())).name
    with uninitialized():
        layer = ConvGRU2D(**{"activation": row.activation} | options | decided)
    layer.set_parameters({f"layers.{n}.{name}": array for n, (parameters, _) in enumerate(read_cells)
                          for name, array in parameters.items()})  # fmt: skip
    return layer


def _read(row: GRUDialect, where: str, cell: Arrays) -> tuple[Arrays, int]:
    """Return a cell's parameters as ours are, and F."""
    shapes = ", ".join(f"{where}{name} {array.shape}" for name, array in cell.items())
    weights = {name: cell[f"{name}.weight"] for name in (*row.gates, *row.candidate)}
    F, (KH, KW) = len(weights[row.candidate[0]]), weights[row.gates[0]].shape[2:]
    C = weights[row.gates[0]].shape[1] - F
    expected = [(2 * F // len(row.gates), C + F, KH, KW)] * len(row.gates)
    expected += [(F, C, KH, KW), (F, F, KH, KW)] if row.reset_after else [(F, C + F, KH, KW)]
    if C < 1 or [array.shape for array in weights.values()] != expected:
        raise ValueError(f"from_torch: these shapes are none of a ConvGRU: {shapes}")
    if KH % 2 == 0 or KW % 2 == 0:
        raise ValueError(f"from_torch: a {KH}×{KW} kernel padded by half of it does not keep the frame, so PyTorch "
                         f"cannot run this module either; kernels must be odd: {shapes}")  # fmt: skip
    hwio = {name: array.transpose(2, 3, 1, 0) for name, array in weights.items()}
    if row.hidden_first:
        hwio = {name: np.roll(array, C, 2) if array.shape[2] == C + F else array for name, array in hwio.items()}
    gates = _blocks(row, [hwio[name] for name in row.gates])
    n = hwio[row.candidate[0]]
    of_h = hwio[row.candidate[1]] if row.reset_after else n[:, :, C:]
    parameters = {
        "kernel": np.concatenate([*(gate[:, :, :C] for gate in gates), n[:, :, :C]], -1),
        "recurrent_kernel": np.concatenate([*(gate[:, :, C:] for gate in gates), of_h], -1),
    }
    if biased := [name for name in row.biases if name in cell]:
        if len(biased) != len(row.biases):
            raise ValueError(f"from_torch: {where or 'the cell'} has some biases only: {', '.join(biased)}")
        bias = np.concatenate([*_blocks(row, [cell[f"{name}.bias"] for name in row.gates]),
                               cell[f"{row.candidate[0]}.bias"]])  # fmt: skip
        if row.reset_after:
            bias = np.stack([bias, np.concatenate([np.zeros(2 * F, bias.dtype), cell[f"{row.candidate[1]}.bias"]])])
        parameters["bias"] = bias
    signed: tuple[str, ...] = ("kernel", "recurrent_kernel", "bias")
    if row.norms:
        if F % row.group_size:
            raise ValueError(f"from_torch: groups of {row.group_size} channels need a multiple of as many filters, got "
                             f"{F}: {shapes}")  # fmt: skip
        for ours, kind in (("gamma", "weight"), ("beta", "bias")):
            parts = _blocks(row, [cell[f"{row.norms[0]}.{kind}"]])
            parameters[ours] = np.concatenate([*parts, cell[f"{row.norms[1]}.{kind}"]])
        signed = ("gamma", "beta")
    return {name: _signed(row, array, F) if name in signed else array for name, array in parameters.items()}, F


def _blocks(row: GRUDialect, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Return the blocks of z and of r on the last axis; the transpose of that is itself."""
    blocks = arrays if len(arrays) == 2 else np.split(arrays[0], 2, -1)
    return list(blocks) if len(arrays) == 2 or row.order == "zr" else list(blocks[::-1])


def _signed(row: GRUDialect, array: np.ndarray, F: int) -> np.ndarray:
    """Return weights of 3F columns with those of z times the dialect's sign."""
    result = np.array(array)
    result[..., :F] *= row.sign
    return result


def _decided(row: GRUDialect, cells: list[Arrays]) -> dict[str, Any]:
    """Return the options that the weights decide."""
    kernels = [cell["kernel"] for cell in cells]
    filters, sizes = [kernel.shape[3] // 3 for kernel in kernels], [kernel.shape[:2] for kernel in kernels]
    groups = {3 * F // row.group_size for F in filters} if row.norms else set()
    if len(groups) > 1 or any(("bias" in cell) != ("bias" in cells[0]) for cell in cells):
        raise ValueError("from_torch: the cells are of several kinds, which no one layer stacks; read them one by one")
    return {
        "in_channels": kernels[0].shape[2],
        "out_channels": filters[0] if len(set(filters)) == 1 else filters,
        "kernel_size": sizes[0] if len(set(sizes)) == 1 else sizes,
        "num_layers": len(cells),
        "reset_after": row.reset_after,
        "use_bias": "bias" in cells[0],
        "normalization": Normalization("group", groups=groups.pop()) if groups else None,
    }


def write(layer: ConvGRU2D, row: GRUDialect) -> Arrays:
    """Return the state_dict with which a module of the dialect computes what `layer` computes."""
    cells = [{name: np.array(array) for name, array in cell.parameters.items()} for cell in layer.cells]
    decided = _decided(row, cells)
    allowed: dict[str, tuple[Any, ...]] = {
        "reset_after": (row.reset_after,), "activation": (row.activation,), "recurrent_activation": ("sigmoid",),
        "stride": (1, (1, 1)), "dilation": (1, (1, 1)), "recurrent_dilation": (1, (1, 1)), "padding": ("same",),
        "padding_mode": ("zeros",), "recurrent_kernel_size": (None, layer.kernel_size), "go_backwards": (False,),
        "bidirectional": (False,), "normalization": (decided["normalization"],),
        "num_layers": (1,) if not row.cells else (layer.num_layers,),
        "leaky_relu_slope": (None, 1) if layer.num_layers > 1 else (layer.leaky_relu_slope,),
    }  # fmt: skip
    for name, values in allowed.items():
        if getattr(layer, name) not in values:
            raise ValueError(f"to_torch: the dialect {row.name!r} has no {name}={getattr(layer, name)!r}; it has "
                             f"{' or '.join(map(repr, values))}")  # fmt: skip
    named: Arrays = {}
    for index, cell in enumerate(cells):
        KH, KW, _, width = cell["kernel"].shape
        if KH % 2 == 0 or KW % 2 == 0:
            raise ValueError(f"to_torch: the dialect {row.name!r} has odd kernels, got {KH}×{KW}")
        place = _numbered(row, index) if layer.num_layers > 1 else ""
        named |= {f"{place}{name}": np.array(a, order="C") for name, a in _written(row, cell, width // 3).items()}
    return named


def _written(row: GRUDialect, cell: Arrays, F: int) -> Arrays:
    """Return a cell's weights by their names."""
    signed = ("gamma", "beta") if row.norms else ("kernel", "recurrent_kernel", "bias")
    cell = {name: _signed(row, array, F) if name in signed else array for name, array in cell.items()}
    halves = [cell["kernel"], cell["recurrent_kernel"]]
    joint = np.concatenate(halves[::-1] if row.hidden_first else halves, 2)
    named: Arrays = {}
    bias = cell.get("bias")
    rows = None if bias is None else bias if bias.ndim == 2 else np.stack([bias, np.zeros_like(bias)])

    def put(names: tuple[str, ...], kernels: list[np.ndarray], biases: list[np.ndarray]) -> None:
        for name, kernel in zip(names, kernels, strict=True):
            named[f"{name}.weight"] = kernel.transpose(3, 2, 0, 1)
        for name, one in zip(names, biases, strict=False):
            named[f"{name}.bias"] = one

    def joined(array: np.ndarray) -> list[np.ndarray]:
        blocks = np.split(array[..., : 2 * F], 2, -1)
        return blocks if len(row.gates) == 2 else [np.concatenate(_blocks(row, [np.concatenate(blocks, -1)]), -1)]

    put(row.gates, joined(joint), [] if rows is None else joined(rows.sum(0)))
    if row.reset_after:
        kernels = [cell["kernel"][..., 2 * F :], cell["recurrent_kernel"][..., 2 * F :]]
        put(row.candidate, kernels, [] if rows is None else [one[2 * F :] for one in rows])
    else:
        put(row.candidate, [joint[..., 2 * F :]], [] if rows is None else [rows.sum(0)[2 * F :]])
    for ours, kind in (("gamma", "weight"), ("beta", "bias")) if row.norms else ():
        for norm, part in zip(row.norms, (joined(cell[ours])[0], cell[ours][2 * F :]), strict=True):
            named[f"{norm}.{kind}"] = part
    return named


def _numbered(row: GRUDialect, layer: int) -> str:
    return f"{row.cells.format(layer=layer)}."

"""ConvLSTM2D from the weights of PyTorch's ConvLSTMs, and back; PyTorch itself is not needed.

A dialect is one of the published modules: how it names its weights, in which order the gates stand, what it adds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastclstm import dispatch
from fastclstm.io import torch_files
from fastclstm.layers import ConvLSTM2D, Layer
from fastclstm.nn.normalization import Normalization
from fastclstm.nn.normalization import get as get_normalization
from fastclstm.spec import ConvSpec, Shape, choice

Arrays = dict[str, np.ndarray]
Options = dict[str, Any]


def from_torch(
    source: Any, dialect: str | None = None, *, prefix: str = "", key: str | None = None, legacy_order: bool = False,
    data_format: str = "channels_first", **options: Any,
) -> ConvLSTM2D | LegacyOrder:  # fmt: skip
    """Return the ConvLSTM2D that has the weights of a PyTorch module.

    Without other options it computes what the module computes in eval mode: x (B, T, C, H, W) to the last layer's
    outputs (B, T, F, H, W), or (B, T, 2F, H, W) where it is bidirectional.

    Parameters
    ----------
    source : path, mapping or module
        A file that `fastclstm.io.torch_files.read` reads, a state_dict of tensors or arrays, or anything that has a
        method state_dict.
    dialect : str, optional
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
    if dialect is not None:
        choice("from_torch", "dialect", dialect, tuple(DIALECTS))
    state = _state_dict(source, key)
    name, place, cells = _recognize(state, dialect, prefix)
    if legacy_order and not (name == "seyongk" and len(cells) == 2):
        raise ValueError(f"from_torch: legacy_order=True is for bidirectional weights of the dialect 'seyongk', "
                         f"got {_told(len(cells), name)}; leave it out")  # fmt: skip
    own = DIALECTS[name]
    arrays = {
        index: {n: _array(f"{place}{own.place(*index)}{n}", v) for n, v in cell.items()}
        for index, cell in cells.items()
    }
    parameters, decided = _native(name, place, arrays)
    if wrong := sorted(decided.keys() & options.keys()):
        raise ValueError(f"from_torch: {', '.join(wrong)} follow from the weights; leave them out")
    if "dtype" not in options:
        decided["dtype"] = dispatch.working_dtype(*(v for cell in arrays.values() for v in cell.values())).name
    if legacy_order:
        options["merge_mode"] = None
    layer = ConvLSTM2D(**decided, data_format=data_format, **options)
    layer.set_parameters(parameters)
    return LegacyOrder(layer) if legacy_order else layer


def to_torch(layer: ConvLSTM2D, dialect: str) -> Arrays:
    """Return the state_dict with which a module of `dialect` computes what `layer` computes.

    ``module.load_state_dict({name: torch.from_numpy(a) for name, a in to_torch(layer, dialect).items()})`` takes it;
    for "openstl" and "kimuyen" with ``strict=False``, since those modules have weights that they never use. Dropout
    and regularization are not weights, and stay behind.

    Parameters
    ----------
    layer : ConvLSTM2D
    dialect : str
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
    choice("to_torch", "dialect", dialect, tuple(DIALECTS))
    if not isinstance(layer, ConvLSTM2D):
        raise TypeError(f"to_torch: layer must be a ConvLSTM2D, got {type(layer).__name__}")
    _check_plain(layer, dialect)
    cells: dict[tuple[int, int], Arrays] = {}
    for name, array in layer.parameters.items():
        match = re.fullmatch(r"layers\.(\d+)\.(?:(forward|backward)\.)?(\w+)", name)
        assert match is not None, name
        cells.setdefault((int(match[1]), int(match[2] == "backward")), {})[match[3]] = array
    own = DIALECTS[dialect]
    return {
        f"{own.place(*index)}{name}": np.array(array, order="C")
        for index, cell in cells.items()
        for name, array in own.foreign(cell).items()
    }


@dataclass(eq=False, repr=False)
class LegacyOrder(Layer):
    """A bidirectional ConvLSTM2D whose results have the order of the module published as "seyongk".

    ``layer(x)`` takes x (B, T, C, H, W) and returns (B, T, 2F, H, W), of which step t holds the forward outputs of step
    t and the backward outputs of step T - 1 - t: those are not brought back to the order of the input. Where the inner
    layer has return_state=True it returns (that, (h, c)), each (B, F, H, 2W) with both directions side by side.

    Parameters
    ----------
    layer : ConvLSTM2D
        With bidirectional=True, merge_mode=None, return_sequences=True, num_layers=1 and time_major=False.

    Raises
    ------
    ValueError, TypeError
        Another layer.
    """

    layer: ConvLSTM2D

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layer, ConvLSTM2D):
            raise TypeError(f"LegacyOrder: layer must be a ConvLSTM2D, got {type(self.layer).__name__}")
        for name, needed in (
            ("bidirectional", True), ("merge_mode", None), ("return_sequences", True), ("num_layers", 1),
            ("time_major", False),
        ):  # fmt: skip
            choice("LegacyOrder", f"layer.{name}", getattr(self.layer, name), (needed,))
        self._sublayers = {"layer": self.layer}

    def forward(self, x: Any, training: bool = False) -> Any:
        """Return the output, and with the inner layer's return_state the states; see the class."""
        restore = dispatch.restorer(x)
        result = self.layer(dispatch.as_numpy("LegacyOrder", "x", x), training=training)
        (forward, backward), states = result if self.layer.return_state else (result, None)
        self._pullback = self._pull if training else None
        output = restore(np.concatenate([forward, _reversed(backward)], self._channels))
        if states is None:
            return output
        width = -1 if self.layer.data_format == "channels_first" else -2
        return output, tuple(restore(np.concatenate(pair, width)) for pair in zip(*states, strict=True))

    def backward(self, dy: Any) -> Any:
        """Return dx of the last call, which was a training call, given dy of its output's shape.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        """
        return self._recorded()(dy)

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of the output for an x of `input_shape`."""
        shape = list(self.layer.output_shape(input_shape)[0])
        shape[self._channels] *= 2
        return tuple(shape)

    @property
    def _channels(self) -> int:
        return -3 if self.layer.data_format == "channels_first" else -1

    def _pull(self, dy: Any) -> Any:
        restore = dispatch.restorer(dy)
        forward, backward = np.split(dispatch.as_numpy("LegacyOrder", "dy", dy), 2, self._channels)
        dx = self.layer.backward((forward, _reversed(backward)))
        self._collect_gradients()
        return restore(dx)


def _reversed(sequence: np.ndarray) -> np.ndarray:
    """Reverse the time of a sequence ([B,] T, …, …, …)."""
    return np.flip(sequence, -4)


# The dialects: each turns one cell's weights into ConvLSTM2D's parameters and options, and back


class _Dialect(NamedTuple):
    template: str
    """Where a cell's weights are, with {layer} or {direction} in it."""
    directions: tuple[str, ...]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    unused: tuple[str, ...]
    native: Callable[[Arrays], tuple[Arrays, Options]]
    foreign: Callable[[Arrays], Arrays]

    @property
    def pattern(self) -> str:
        place = re.escape(self.template).replace(r"\{layer\}", r"(?P<layer>\d+)")
        place = place.replace(r"\{direction\}", f"(?P<direction>{'|'.join(self.directions)})")
        return rf"(?P<prefix>(?:.*\.)?){place}\.(?P<name>.+)"

    @property
    def keys(self) -> str:
        names = [*self.required, *(f"[{name}]" for name in self.optional)]
        return f"{self.template}.".replace("{direction}", f"{{{'|'.join(self.directions)}}}") + f"({', '.join(names)})"

    def place(self, layer: int, direction: int) -> str:
        return self.template.format(layer=layer, direction=(*self.directions, "", "")[direction]) + "."


def _hwio(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(2, 3, 1, 0)


def _oihw(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(3, 2, 0, 1)


def _swap(array: np.ndarray) -> np.ndarray:
    """Turn gates i, f, o, g on the last axis into i, f, g, o, or back."""
    i, f, o, g = np.split(array, 4, -1)
    return np.concatenate([i, f, g, o], -1)


def _from_joint(cell: Arrays) -> tuple[Arrays, Options]:
    """Split one convolution of x and h, gates i, f, o, g."""
    weight = cell["conv.weight"]
    C = weight.shape[1] - weight.shape[0] // 4
    kernel = _swap(_hwio(weight))
    parameters = {"kernel": kernel[:, :, :C], "recurrent_kernel": kernel[:, :, C:]}
    if "conv.bias" in cell:
        parameters["bias"] = _swap(cell["conv.bias"])
    return parameters, {}


def _to_joint(cell: Arrays) -> Arrays:
    kernel = np.concatenate([cell["kernel"], cell["recurrent_kernel"]], 2)
    named = {"conv.weight": _oihw(_swap(kernel))}
    return named | ({"conv.bias": _swap(cell["bias"])} if "bias" in cell else {})


def _from_kl4805(cell: Arrays) -> tuple[Arrays, Options]:
    parameters, options = _from_joint(cell)
    parameters["peephole_i"], parameters["peephole_f"] = np.split(_hwio(cell["conv_c.weight"]), 2, -1)
    parameters["peephole_o"] = _hwio(cell["conv_cnext.weight"])
    if "bias" in parameters:
        parameters["peephole_bias_i"], parameters["peephole_bias_f"] = np.split(cell["conv_c.bias"], 2)
        parameters["peephole_bias_o"] = cell["conv_cnext.bias"]
    return parameters, options | {"peephole": "conv"}


def _to_kl4805(cell: Arrays) -> Arrays:
    named = _to_joint(cell)
    named["conv_c.weight"] = _oihw(np.concatenate([cell["peephole_i"], cell["peephole_f"]], -1))
    named["conv_cnext.weight"] = _oihw(cell["peephole_o"])
    if "bias" in cell:
        named["conv_c.bias"] = np.concatenate([cell["peephole_bias_i"], cell["peephole_bias_f"]])
        named["conv_cnext.bias"] = cell["peephole_bias_o"]
    return named


def _from_two(cell: Arrays, x: str, h: str) -> Arrays:
    """Read the convolutions named `x` and `h`, gates i, f, g, o, whose biases add up."""
    parameters = {"kernel": _hwio(cell[f"{x}.weight"]), "recurrent_kernel": _hwio(cell[f"{h}.weight"])}
    if f"{x}.bias" in cell:
        parameters["bias"] = cell[f"{x}.bias"] + cell[f"{h}.bias"]
    return parameters


def _to_two(cell: Arrays, x: str, h: str) -> Arrays:
    named = {f"{x}.weight": _oihw(cell["kernel"]), f"{h}.weight": _oihw(cell["recurrent_kernel"])}
    if "bias" in cell:
        named |= {f"{x}.bias": cell["bias"], f"{h}.bias": np.zeros_like(cell["bias"])}
    return named


_BATCH_NORM = {"gamma": "bn2d.weight", "beta": "bn2d.bias", "moving_mean": "bn2d.running_mean",
               "moving_variance": "bn2d.running_var"}  # fmt: skip
_LAYER_NORM = {"gamma_x": "conv_x.1.weight", "beta_x": "conv_x.1.bias", "gamma_h": "conv_h.1.weight",
               "beta_h": "conv_h.1.bias"}  # fmt: skip


def _from_seyongk(cell: Arrays) -> tuple[Arrays, Options]:
    parameters = _from_two(cell, "conv_x", "conv_h")
    return parameters | {own: cell[name] for own, name in _BATCH_NORM.items()}, {"normalization": "batch"}


def _to_seyongk(cell: Arrays) -> Arrays:
    normalization = {name: cell[own] for own, name in _BATCH_NORM.items()}
    return _to_two(cell, "conv_x", "conv_h") | normalization | {"bn2d.num_batches_tracked": np.zeros((), np.int64)}


def _from_openstl(cell: Arrays) -> tuple[Arrays, Options]:
    parameters = _from_two(cell, "conv_x.0", "conv_h.0")
    if "conv_x.1.weight" not in cell:
        return parameters, {}
    parameters |= {own: np.moveaxis(cell[name], 0, -1) for own, name in _LAYER_NORM.items()}
    HO, WO, _ = parameters["gamma_x"].shape
    normalization = Normalization("layer", separate=True, elementwise=True)
    return parameters, {"normalization": normalization, "frame_size": (HO, WO)}


def _to_openstl(cell: Arrays) -> Arrays:
    named = _to_two({n: a for n, a in cell.items() if n != "bias"}, "conv_x.0", "conv_h.0")
    return named | {name: np.moveaxis(cell[own], -1, 0) for own, name in _LAYER_NORM.items() if own in cell}


def _from_kimuyen(cell: Arrays) -> tuple[Arrays, Options]:
    changed = [n for n, a in cell.items() if n.startswith("layer_norm") and np.any(a != float(n.endswith("weight")))]
    if changed or "layer_norm_ci.weight" in cell:
        raise ValueError(
            "from_torch: these weights were trained with layer_norm=True or peephole=True, which in KimUyen's module "
            "normalizes the cell state, or leaves the peepholes' weights out of the state_dict: no ConvLSTM2D can "
            f"compute that ({', '.join(changed) or 'layer_norm_ci.weight'})"
        )
    return _from_two(cell, "input_conv", "rnn_conv"), {}


def _to_kimuyen(cell: Arrays) -> Arrays:
    return _to_two(cell, "input_conv", "rnn_conv")


def _pair(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))


_KIMUYEN_NORMS = _pair(*(f"layer_norm_{name}" for name in ("x", "h", "cnext", "ci", "cf", "co")))

DIALECTS = {
    "ndrplz": _Dialect(
        "cell_list.{layer}", (), ("conv.weight",), ("conv.bias",), (), _from_joint, _to_joint
    ),
    "kl4805": _Dialect(
        "cell_list.{layer}", (), ("conv.weight", "conv_c.weight", "conv_cnext.weight"),
        ("conv.bias", "conv_c.bias", "conv_cnext.bias"), (), _from_kl4805, _to_kl4805,
    ),
    "seyongk": _Dialect(
        "conv_lstm_cells.{direction}.gates.0", ("0", "1"), ("conv_x.weight", "conv_h.weight", *_BATCH_NORM.values()),
        ("conv_x.bias", "conv_h.bias"), ("bn2d.num_batches_tracked",), _from_seyongk, _to_seyongk,
    ),
    "openstl": _Dialect(
        "cell_list.{layer}", (), ("conv_x.0.weight", "conv_h.0.weight"), tuple(_LAYER_NORM.values()),
        ("conv_o.0.weight", "conv_o.1.weight", "conv_o.1.bias", "conv_last.weight"), _from_openstl, _to_openstl,
    ),
    "kimuyen": _Dialect(
        "cell_{direction}", ("fw", "bw"), ("input_conv.weight", "rnn_conv.weight"),
        ("input_conv.bias", "rnn_conv.bias", *_KIMUYEN_NORMS), (), _from_kimuyen, _to_kimuyen,
    ),
}  # fmt: skip
"""The published modules whose weights are read and written."""


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


def _recognize(
    state: Mapping[str, Any], dialect: str | None, prefix: str
) -> tuple[str, str, dict[tuple[int, int], dict[str, Any]]]:
    """Return the dialect, the prefix, and the weights of each (layer, direction) by their names in the cell."""
    start = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    found: dict[tuple[str, str], dict[tuple[int, int], dict[str, Any]]] = {}
    for name, own in DIALECTS.items():
        if dialect in (None, name):
            for place, cells in _cells(state, own, start).items():
                if all(_fits(own, cell) for cell in cells.values()):
                    found[name, place] = cells
    if len(found) == 1:
        ((name, place), cells) = next(iter(found.items()))
        count = len(cells)
        complete = {(0, d) for d in range(count)} if DIALECTS[name].directions else {(n, 0) for n in range(count)}
        if cells.keys() != complete:
            raise ValueError(f"from_torch: {place or 'the source'} has the weights of some cells only, numbers "
                             f"{', '.join(str(max(index)) for index in cells)}; they count from 0")  # fmt: skip
        return name, place, cells
    if found:
        places = ", ".join(f"{name!r} at prefix={place!r}" for name, place in found)
        raise ValueError(f"from_torch: several ConvLSTMs fit: {places}; say which with prefix=… and dialect=…")
    expected = "; ".join(f"{n!r}: {own.keys}" for n, own in DIALECTS.items() if dialect in (None, n))
    names = [name for name in state if name.startswith(start)]
    shown = ", ".join(map(str, names[:12])) + (" …" if len(names) > 12 else "")
    raise ValueError(
        f"from_torch: no ConvLSTM is recognized by its names{f' under {start!r}' if start else ''}. Expected, after "
        f"any prefix, are {expected}; got {shown or 'none'}"
    )


def _cells(state: Mapping[str, Any], dialect: _Dialect, start: str) -> dict[str, dict[tuple[int, int], dict[str, Any]]]:
    """Return what looks like cells of a dialect: prefix -> (layer, direction) -> name in the cell -> weight."""
    pattern = re.compile(dialect.pattern)
    found: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    for key, value in state.items():
        match = pattern.fullmatch(key) if isinstance(key, str) and key.startswith(start) else None
        if match is not None:
            groups = match.groupdict()
            direction = dialect.directions.index(groups["direction"]) if dialect.directions else 0
            index = int(groups.get("layer", 0)), direction
            found.setdefault(groups["prefix"], {}).setdefault(index, {})[groups["name"]] = value
    return found


def _fits(dialect: _Dialect, cell: Mapping[str, Any]) -> bool:
    """Whether a cell has all that the dialect needs and nothing that it does not know."""
    known = {*dialect.required, *dialect.optional, *dialect.unused}
    return set(dialect.required) <= set(cell) <= known


def _native(dialect: str, place: str, cells: Mapping[tuple[int, int], Arrays]) -> tuple[Arrays, Options]:
    """Return ConvLSTM2D's parameters and the options that the weights decide."""
    own = DIALECTS[dialect]
    bidirectional = len(cells) == 2 and bool(own.directions)
    parameters: Arrays = {}
    told: list[tuple[int, int, tuple[int, int], Options]] = []
    for (layer, direction), cell in cells.items():
        where = f"{place}{own.place(layer, direction)}"
        named, options = _read_cell(own, where, cell)
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


def _read_cell(dialect: _Dialect, where: str, cell: Arrays) -> tuple[Arrays, Options]:
    """Return a cell's parameters and options; raise ValueError where its arrays do not fit one another."""
    shapes = ", ".join(f"{where}{name} {array.shape}" for name, array in cell.items() if name not in dialect.unused)
    try:
        named, options = dialect.native(cell)
        KH, KW, C, width = named["kernel"].shape
        fits = C > 0 and width % 4 == 0 and named["recurrent_kernel"].shape == (KH, KW, width // 4, width)
    except (IndexError, KeyError) as error:
        raise ValueError(f"from_torch: a weight is missing or has too few axes ({error}): {shapes}") from error
    except ValueError as error:
        if str(error).startswith("from_torch"):
            raise
        raise ValueError(f"from_torch: these shapes do not fit one another ({error}): {shapes}") from error
    if not fits:
        raise ValueError(f"from_torch: these shapes are none of a ConvLSTM: {shapes}")
    if KH % 2 == 0 or KW % 2 == 0:
        raise ValueError(f"from_torch: a {KH}×{KW} kernel padded by half of it does not keep the frame, so PyTorch "
                         f"cannot run this module either; kernels must be odd: {shapes}")  # fmt: skip
    return named, options


def _told(count: int, dialect: str) -> str:
    return (
        f"{count} {'direction' if DIALECTS[dialect].directions else 'layer'}{'s' if count > 1 else ''} of {dialect!r}"
    )


# What a dialect can hold

_NORMALIZATIONS = {
    "seyongk": (Normalization("batch"),),
    "openstl": (None, Normalization("layer", separate=True, elementwise=True)),
}


def _check_plain(layer: ConvLSTM2D, dialect: str) -> None:
    """Raise ValueError where a layer has options that the dialect's module does not."""
    directions = bool(DIALECTS[dialect].directions)
    allowed: dict[str, tuple[Any, ...]] = {
        "stride": (1, (1, 1)),
        "dilation": (1, (1, 1)),
        "recurrent_dilation": (1, (1, 1)),
        "padding_mode": ("zeros",),
        "cell_clip": (None,),
        "activation": ("tanh",),
        "recurrent_activation": ("sigmoid",),
        "output_activation": (None, "tanh"),
        "go_backwards": (False,),
        "peephole": ("conv",) if dialect == "kl4805" else (None,),
        "bidirectional": (False, True) if directions else (False,),
    }
    if dialect == "openstl":
        allowed["use_bias"] = (False,)
    if directions:
        allowed["num_layers"] = (1,)
    if layer.bidirectional:
        allowed["merge_mode"] = ("concat", None)
    if layer.num_layers > 1:
        allowed["leaky_relu_slope"] = (None, 1)
    for name, values in allowed.items():
        if getattr(layer, name) not in values:
            raise ValueError(f"to_torch: the dialect {dialect!r} has no {name}={getattr(layer, name)!r}; "
                             f"it has {' or '.join(map(repr, values))}")  # fmt: skip
    normalization = None if layer.normalization is None else get_normalization(layer.normalization)
    if normalization not in _NORMALIZATIONS.get(dialect, (None,)):
        raise ValueError(f"to_torch: the dialect {dialect!r} has no normalization={layer.normalization!r}; "
                         f"it has {' or '.join(map(repr, _NORMALIZATIONS.get(dialect, (None,))))}")  # fmt: skip
    for name, array in layer.parameters.items():
        if array.ndim != 4:
            continue
        place = name.rpartition(".")[0]
        KH, KW, *_ = size = layer.parameters[f"{place}.kernel"].shape[:2]
        if array.shape[:2] != size or KH % 2 == 0 or KW % 2 == 0:
            raise ValueError(f"to_torch: the dialect {dialect!r} has one odd kernel size for all of a cell's "
                             f"convolutions, got {name} of {array.shape[:2]}, kernel of {size}")  # fmt: skip
        given, same = (
            ConvSpec.infer((1, KH, KW, 1), (KH, KW, 1, 1), strides=1, padding=padding, padding_mode="zeros", dilation=1)
            for padding in (layer.padding, "same")
        )
        if given.padding != same.padding:
            raise ValueError(f"to_torch: the dialect {dialect!r} keeps the frame (padding='same'), "
                             f"got {layer.padding!r}")  # fmt: skip

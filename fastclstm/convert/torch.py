"""ConvLSTM2D and ConvGRU2D from the weights of PyTorch's, and back; PyTorch itself is not needed.

A dialect is one of the published modules: how it names its weights, in which order the gates stand, what it adds.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.convert import torch_grus
from fastclstm.convert.legacy_order import LegacyOrder
from fastclstm.convert.torch_calls import called, filters
from fastclstm.convert.torch_cells import Arrays, Options, expect_layer, read_cell, write_cell
from fastclstm.convert.torch_dialects import DIALECTS, Dialect, Index
from fastclstm.convert.torch_grus import GRU_DIALECTS, GRUDialect, recognized
from fastclstm.convert.torch_probing import COMPUTED, agreeing
from fastclstm.convert.torch_recognition import Recognized, recognize
from fastclstm.layers import ConvGRU2D, ConvLSTM2D, torch_weights
from fastclstm.layers.base import uninitialized
from fastclstm.spec import choice

__all__ = ["DIALECTS", "GRU_DIALECTS", "Dialect", "GRUDialect", "LegacyOrder", "from_torch", "to_torch"]


def from_torch(
    source: Any, dialect: str | Dialect | GRUDialect | None = None, *, prefix: str = "", key: str | None = None,
    gates: str | None = None, check: Any = None, legacy_order: bool = False,
    data_format: str = "channels_first", **options: Any,
) -> Any:  # fmt: skip
    """Return the ConvLSTM2D, or ConvGRU2D, that has the weights of a PyTorch module.

    Without other options it computes what the module computes in eval mode: x (B, T, C, H, W) to the last layer's
    outputs (B, T, F, H, W), or (B, T, 2F, H, W) where it is bidirectional.

    Names tell neither the order of the gates nor activations nor padding: there are modules with the names of "ndrplz"
    whose gates stand otherwise. A module that is at hand is therefore called, a copy of it on drawn input, and where
    the order is another that is taken. Of a file or a state_dict give `check` where the module is not one of those
    named here, as it was published.

    A ConvLSTM is found anywhere in the source, and so are all its cells where they are numbered. Where every layer is a
    module of its own, or where a convolution is called like any other, `prefix` says which is meant, and ``cells``
    which are to be stacked: ``from_torch(sd, "holmdk", cells=["encoder_1_convlstm", "encoder_2_convlstm"])``.

    Parameters
    ----------
    source : path, mapping or module
        A file that `fastclstm.io.torch_files.read` reads, a state_dict of tensors or arrays or a checkpoint that holds
        one, or anything that has a method state_dict.
    dialect : str, Dialect or GRUDialect, optional
        Whose module it is; None: told by the names. See the table below.
    prefix : str
        The submodule to read, as in "encoder.convlstm."; needed only where the source has several ConvLSTMs.
    key : str, optional
        Where in a checkpoint the state_dict is, as in `fastclstm.io.torch_files.read`.
    gates : str, optional
        The order of the gates in the module's weights, as in "ifgo" or "fiog"; None: the dialect's.
    check : (x, y) or x, optional
        An input of the module and its output, in eval mode; the layer's output must agree to a thousandth of the
        largest value, to eight roundings where y is of half precision. Where the source is a module, its input x
        (B, T, C, H, W) alone: it is called on it, or step by step where it is a cell, in eval mode.
    legacy_order : bool
        Of a bidirectional "seyongk": outputs and states in the order in which the published module has them, see
        `LegacyOrder`.
    data_format : "channels_first" or "channels_last"
        The former is PyTorch's.
    **options
        Further options of `ConvLSTM2D`, such as return_state, engine or dtype; none of them may contradict the weights.
        activation, recurrent_activation, output_activation, padding, stride and padding_mode are the module's, where
        they are not those of the layer: tanh, sigmoid, "same" (but for "czifan", whose g has no activation). dtype is
        the weights' own (of half precision: float32), unless given. Or the fields of a `Dialect` of your own: cells and
        joint or split, and what else it needs; with a `dialect` those in which yours differs from it.

    Warns
    -----
    UserWarning
        The source has tensors beside the ConvLSTM, and no `prefix` names it; a module that cannot be called to compare,
        or whose cells alone agree.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        Names or shapes that fit no dialect, or several; options that the weights decide; weights that no ConvLSTM2D
        can hold; an output that differs from that of `check`; a module that computes something else.
    TypeError
        A source that is none, tensors that are not of real numbers.

    Notes
    -----
    ======================  ==========================================  =======  ===============================
    dialect                 weights of a cell                           gates    what else
    ======================  ==========================================  =======  ===============================
    "ndrplz"                cell_list.{n}.conv                          i f o g
    "kl4805"                cell_list.{n}.conv, conv_c, conv_cnext      i f o g  convolved peepholes
    "aserdega"              cell_list.{n}.conv, Wci, Wcf, Wco           i f o g  peepholes
    "openstl"               cell_list.{n}.conv_x.0, conv_h.0            i f g o  LayerNorm of each
    "seyongk"               conv_lstm_cells.{0,1}.gates.0.conv_x, …     i f g o  BatchNorm; bidirectional
    "kimuyen"               cell_fw.input_conv, rnn_conv; cell_bw       i f g o  bidirectional
    "automan000", "stae"    cell{n}.Wxi, Whi, Wxf, …                    by name  peepholes, where they were stored
    "sladewinter"           convLSTMcell.conv, W_ci, W_cf, W_co         i f g o  peepholes; x (B, C, T, H, W)
    "sladewinter-hadamard"  the same, W_ci.weight, …                    i f g o  an earlier form of it
    "tsugumi"               ConvLSTMCell.conv, W_ci, W_cf, W_co         i f g o  peepholes, where they were stored
    "hzzone"                _conv, Wci, Wcf, Wco                        i f g o  peepholes, where they were stored
    "jhhuang96"             conv.0, conv.1                              i f g o  GroupNorm, 32 channels a group
    "czifan"                conv.0, conv.1                              i f g o  BatchNorm; g has no activation
    "holmdk", "satflow"     conv                                        i f o g
    "snntorch"              conv                                        i f o g  of SConv2dLSTM, y is mem
    "seagochen"             conv_x, conv_h                              differs  give gates=… or check=…
    ======================  ==========================================  =======  ===============================

    Those of ConvGRUs, of which `cells` may say which are stacked (others: ``dialect=GRUDialect(…)``):

    ===============  ======================================================  =====  ================================
    dialect          weights of a cell                                       gates  what else
    ===============  ======================================================  =====  ================================
    "jhhuang96-gru"  conv1.0, conv1.1, conv2.0, conv2.1                      z r    GroupNorm, 32 channels a group
    "aserdega-gru"   conv_zr, conv_h1, conv_h2                               z r    reset_after
    "utae-gru"       cell_list.{n}.conv_gates, conv_can                      r z    happyjin's too
    "mlcast"         combined_gates, out_gate                                z r
    "kimmel-gru"     ConvGRUCell_{nn}.update_gate, reset_gate, out_gate      each   those of a DGMR too
    "dgmr"           update_gate_conv, read_gate_conv, output_conv           each   relu; no spectral normalization
    "raft"           convz, convr, convq                                     each   h before x
    ===============  ======================================================  =====  ================================

    Peepholes that a module moved to a GPU when it was made (``nn.Parameter(…).to(device)``) are no parameters of it:
    no optimizer trained them and no state_dict has them. They were zeros, and there are none here; only "tsugumi" with
    drawn ones lost them.

    Examples
    --------
    >>> import numpy as np
    >>> weights = {"cell_list.0.conv.weight": np.zeros((16, 7, 3, 3)), "cell_list.0.conv.bias": np.zeros(16)}
    >>> layer = from_torch(weights, engine="reference")
    >>> layer(np.zeros((1, 5, 3, 8, 8))).shape
    (1, 5, 4, 8, 8)
    >>> weights = {f"enc.{name}": array for name, array in zip(("W.weight", "W.bias"), weights.values())}
    >>> from_torch(weights, cells=["enc"], joint="W", gates="ifgo").out_channels
    4
    """
    gru, given = _gru_row(dialect), options | {"data_format": data_format}
    rows, options = ([], options) if isinstance(dialect, GRUDialect) or gru else _rows(dialect, gates, options)
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    try:
        state = torch_weights.state_dict("from_torch", source, key)
        if not any(str(name).startswith(prefix) for name in state):
            prefix = prefix.removeprefix("module.")
        if gru is not None:
            return _gru(source, state, prefix, gru, given, check)
        try:
            found = recognize(state, rows, prefix)
        except ValueError:
            if dialect is not None or not recognized(state, prefix):
                raise
            return _gru(source, state, prefix, None, given, check)

        def make(row: Dialect) -> ConvLSTM2D | LegacyOrder:
            return layer_of(found._replace(row=row), options | {"data_format": data_format}, legacy_order)

        if check is not None:
            return make(_checked(check, source, found, make))
        row = _probed(source, found, options, given=dialect is not None or gates is not None)
        if row is not None and not prefix:
            _warn_of_more(source, state, found._replace(row=row), options)
        found = found if row is None else found._replace(row=row)
        _expect_order("from_torch", found.row)
        return make(found.row)
    except ValueError as error:
        if path is None or path in str(error):
            raise
        raise ValueError(f"{error} (in {path})") from error


def _gru_row(dialect: Any) -> GRUDialect | None:
    """Return the dialect of a ConvGRU that is meant, if one is."""
    row = GRU_DIALECTS.get(dialect) if isinstance(dialect, str) else dialect
    return row if isinstance(row, GRUDialect) else None


def _gru(
    source: Any, state: Mapping[str, Any], prefix: str, row: GRUDialect | None, options: Options, check: Any
) -> ConvGRU2D:  # fmt: skip
    """Return the ConvGRU2D of a state_dict, checked by an input and its output if these are given."""
    cells, given = options.pop("cells", None), row
    row, places = torch_grus.located(state, prefix, row, [cells] if isinstance(cells, str) else cells)
    if check is None:
        told = {name: value for name, value in options.items() if name in COMPUTED}
        probe = {"data_format": "channels_first", "engine": "reference"}

        def make(row: GRUDialect, number: int, dtype: str) -> ConvGRU2D:
            return torch_grus.read(state, prefix, row, places[:1], told | probe | {"dtype": dtype})

        F = len(state[f"{places[0]}{row.candidate[0]}.weight"])
        made = agreeing(source, [(places[0], F)], 1, torch_grus.variants(row), make)
        if made is not None and given is not None and made != given:
            other = f"order={made.order!r} and keeps={made.keeps!r}"
            raise ValueError(f"from_torch: the module is not of the dialect {given.name!r}: it has {other}; leave the "
                             f"dialect out")  # fmt: skip
        row = made or row
    layer = torch_grus.read(state, prefix, row, places, options, warns=cells is None)
    if check is not None:
        if not (isinstance(check, tuple | list) and len(check) == 2):
            raise ValueError("from_torch: of a ConvGRU check must be (x, y), an input and its output")
        x, y = (torch_weights.array("from_torch", f"check's {n}", v) for n, v in zip("xy", check, strict=True))
        difference = _difference(layer, x, [y])
        if difference > 1e-3:
            raise ValueError(
                f"from_torch: the layer's output differs from check's y by up to {difference:.2g} of its "
                f"largest value; the module is not that of the dialect, or was made with other options"
            )
    return layer


def to_torch(layer: ConvLSTM2D | ConvGRU2D, dialect: str | Dialect | GRUDialect, gates: str | None = None) -> Arrays:
    """Return the state_dict with which a module of `dialect` computes what `layer` computes.

    ``module.load_state_dict({name: torch.from_numpy(a) for name, a in to_torch(layer, dialect).items()})`` takes it;
    for "openstl", "kimuyen", "stae" and "snntorch" with ``strict=False``, since those modules have weights that they
    never use, the same ones twice, or numbers that are no weights. Dropout and regularization are not weights, and stay
    behind. Of a module that has its cells elsewhere give ``dataclasses.replace(DIALECTS["holmdk"], cells=["enc"])``.

    Parameters
    ----------
    layer : ConvLSTM2D or ConvGRU2D
    dialect : str, Dialect or GRUDialect
    gates : str, optional
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
    if (gru := _gru_row(dialect)) is not None:
        if not isinstance(layer, ConvGRU2D):
            raise TypeError(f"to_torch: the dialect {gru.name!r} is of a ConvGRU2D, got {type(layer).__name__}")
        return torch_grus.write(layer, gru)
    assert not isinstance(dialect, GRUDialect)
    row = _row("to_torch", dialect, gates)
    _expect_order("to_torch", row)
    if not isinstance(layer, ConvLSTM2D):
        raise TypeError(f"to_torch: layer must be a ConvLSTM2D, got {type(layer).__name__}")
    return state_dict_of(row, layer)


def state_dict_of(row: Dialect, layer: ConvLSTM2D) -> Arrays:
    """Return the weights of a dialect's module that computes what `layer` computes."""
    expect_layer(row, layer)
    cells: dict[Index, Arrays] = {}
    for name, array in layer.parameters.items():
        match = re.fullmatch(r"layers\.(\d+)\.(?:(forward|backward)\.)?(\w+)", name)
        assert match is not None, name
        cells.setdefault((int(match[1]), int(match[2] == "backward")), {})[match[3]] = array
    return {
        f"{row.place(*index)}{name}": np.array(array, order="C")
        for index, cell in cells.items()
        for name, array in write_cell(row, cell).items()
    }


def _row(op: str, dialect: str | Dialect, gates: str | None = None) -> Dialect:
    if not isinstance(dialect, Dialect):
        choice(op, "dialect", dialect, (*DIALECTS, *GRU_DIALECTS))
        dialect = DIALECTS[dialect]
    return dialect if gates is None else replace(dialect, gates=gates)


def _expect_order(op: str, row: Dialect) -> None:
    if not row.gates:
        raise ValueError(
            f"{op}: modules with the names of {row.name!r} ({', '.join(row.required)}) have their gates in different "
            f"orders, such as 'ifgo' and 'ifog'; say which with gates=…{', or give check=…' * (op == 'from_torch')}"
        )


_ROW = {field.name for field in fields(Dialect)} - {"name"}
_SHARED = {"peephole", "normalization", "output_activation"}
"""Fields of a row that options of `ConvLSTM2D` are called like."""


def _rows(dialect: str | Dialect | None, gates: str | None, options: Options) -> tuple[list[Dialect], Options]:
    """Return the dialects that may be meant, and the options that are the layer's."""
    if not options.keys() & (_ROW - _SHARED):
        names = [*DIALECTS.values()] if dialect is None else [dialect]
        return [_row("from_torch", name, gates) for name in names], options
    own = {name: value for name, value in options.items() if name in _ROW}
    if dialect is None and "cells" not in own:
        raise ValueError(f"from_torch: {', '.join(own)} make a dialect of your own: give cells=… with them, or the "
                         f"dialect that yours differs from")  # fmt: skip
    row = Dialect(**own) if dialect is None else replace(_row("from_torch", dialect), **own)
    return [_row("from_torch", row, gates)], {n: v for n, v in options.items() if n not in own}


# The layer


def layer_of(found: Recognized, options: Options, legacy_order: bool = False) -> ConvLSTM2D | LegacyOrder:
    """Return the layer with the weights that were found."""
    row, place, cells = found
    if legacy_order and not (row.name == "seyongk" and len(cells) == 2):
        kind = ("direction" if row.directions else "layer") + ("s" if len(cells) > 1 else "")
        raise ValueError(f"from_torch: legacy_order=True is for bidirectional weights of the dialect 'seyongk', "
                         f"got {len(cells)} {kind} of {row.name!r}; leave it out")  # fmt: skip
    arrays = {
        index: {n: torch_weights.array(row.reader, f"{place}{row.place(*index)}{n}", v) for n, v in cell.items()}
        for index, cell in cells.items()
    }
    parameters, decided = _native(row, place, arrays)
    if wrong := sorted(decided.keys() & options.keys()):
        raise ValueError(f"{row.reader}: {', '.join(wrong)} follow from the weights; leave them out")
    told: Options = {"activation": row.activations[0], "output_activation": row.output_activation}
    if "activation" in options:  # the module was made with another
        told.pop("output_activation")
    if "dtype" not in options:
        decided["dtype"] = dispatch.working_dtype(*(v for cell in arrays.values() for v in cell.values())).name
    if legacy_order:
        decided["merge_mode"] = None
    with uninitialized():
        layer = ConvLSTM2D(**told | options | decided)
    layer.set_parameters(parameters)
    return LegacyOrder(layer) if legacy_order else layer


def _native(row: Dialect, place: str, cells: Mapping[Index, Arrays]) -> tuple[Arrays, Options]:
    """Return ConvLSTM2D's parameters and the options that the weights decide."""
    bidirectional = len(cells) == 2 and bool(row.directions)
    parameters: Arrays = {}
    told: list[tuple[int, int, tuple[int, int], Options]] = []
    for (layer, direction), cell in cells.items():
        where = f"{place}{row.place(layer, direction)}"
        named, options = read_cell(row, where, cell)
        KH, KW, C, width = named["kernel"].shape
        told.append((C, width // 4, (KH, KW), options | {"use_bias": "bias" in named}))
        if told[-1][3] != told[0][3]:
            raise ValueError(
                f"{row.reader}: {where} is of another kind than the cells before it ({told[-1][3]}, {told[0][3]})"
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


def _probed(source: Any, found: Recognized, options: Options, *, given: bool) -> Dialect | None:
    """Return the row that computes what a module computes; None where it cannot be called, or is none."""
    row, told = found.row, {name: value for name, value in options.items() if name in COMPUTED}
    parts = [(found.place + row.place(0, 0), found._replace(cells={(0, 0): found.cells[0, 0]}))]
    if isinstance(row.cells, str) and row.cells and not row.directions:
        parts.append((found.place, found))
    orders = [*([row] if row.gates else []), *row.reordered()]
    activations = row.activations[:1] if "activation" in told else row.activations
    rows = [replace(one, activations=(activation,)) for activation in activations for one in orders]

    def make(row: Dialect, number: int, dtype: str) -> Any:
        return layer_of(parts[number][1]._replace(row=row), told | _PROBE | {"dtype": dtype})

    made = agreeing(source, [(place, filters(part)) for place, part in parts], 2, rows, make)
    if made is None and not (given or row.directions) and row.gates and hasattr(source, "get_submodule"):
        alone = f"the order of the gates is told by its names alone, {row.gates!r}; check=(x, y) compares"
        warnings.warn(f"from_torch: no call of the module gives what could be compared, so that {alone}", UserWarning,
                      stacklevel=3)  # fmt: skip
    if made is not None and given and row.gates and made.gates != row.gates:
        raise ValueError(f"from_torch: the module computes what gates={made.gates!r} would, not {row.gates!r}; give "
                         f"that, or leave the dialect out")  # fmt: skip
    return made


_PROBE = {"data_format": "channels_first", "engine": "reference"}


def _warn_of_more(source: Any, state: Mapping[str, Any], found: Recognized, options: Options) -> None:
    """Warn of a module whose weights are all in its cells, and that returns something else than they do."""
    row, place, cells = found
    own = {f"{place}{row.place(*index)}{name}" for index, cell in cells.items() for name in cell}
    if (
        row.directions
        or not row.cells
        or "go_backwards" in options
        or any(name.startswith(place) for name in state if name not in own)
    ):
        return
    told = {name: value for name, value in options.items() if name in COMPUTED}

    def make(row: Dialect, _: int, dtype: str) -> Any:
        return layer_of(found._replace(row=row), told | _PROBE | {"dtype": dtype})

    try:
        agreeing(source, [(place, filters(found))], 2, [row], make)
    except ValueError:
        module = type(source.get_submodule(place.removesuffix("."))).__name__
        warnings.warn(
            f"from_torch: the cells agree, but {module} itself returns something else: what it does before, between or "
            f"behind them (activations, steps in another order, sums with x) is not in the layer; leaky_relu_slope=… "
            f"or go_backwards=… says it, or compute it around the layer; its state_dict() is read without a word",
            UserWarning, stacklevel=3)  # fmt: skip


_AGREEMENT = {"float16": 2**-7, "bfloat16": 2**-4}
"""How far an output may be from the one that is given, by its dtype, as a share of its largest value; else 1e-3."""

_NO_ORDER_AGREES = (
    "no order of the gates agrees; perhaps activation=…, recurrent_activation=… or padding=… is another, "
    "or y is not the last layer's output in eval mode"
)


def _checked(check: Any, source: Any, found: Recognized, make: Callable[[Dialect], Any]) -> Dialect:
    """Return the row whose layer gives the output that `check` tells; raise ValueError where none does.

    That is `found.row` or, where its names do not tell the order of the gates, a row in another order.
    """
    x, ys, agreement = _expected(check, source, found)
    row = found.row
    differences: dict[str, float] = {}
    for other in (row,) if row.gates else row.reordered():
        differences[other.gates] = _difference(make(other), x, ys)
        if differences[other.gates] <= agreement:
            return other
    agree = [other.gates for other in row.reordered() if row.gates and _difference(make(other), x, ys) <= agreement]
    advice = f"gates={agree[0]!r} agrees" if agree else _NO_ORDER_AGREES
    gates, difference = min(differences.items(), key=lambda item: item[1])
    raise ValueError(f"from_torch: the layer's output differs from check's y by up to {difference:.2g} of its largest "
                     f"value with gates={gates!r}; {advice}")  # fmt: skip


def _expected(check: Any, source: Any, found: Recognized) -> tuple[np.ndarray, list[np.ndarray], float]:
    """Return an input, outputs of which one is to agree, and how well."""
    if isinstance(check, tuple | list) and len(check) == 2:
        x, y = (torch_weights.array("from_torch", f"check's {n}", v) for n, v in zip("xy", check, strict=True))
        ys, agreement = [y], _AGREEMENT.get(str(getattr(check[1], "dtype", "")).removeprefix("torch."), 1e-3)
    elif hasattr(check, "shape") and hasattr(source, "state_dict") and callable(source):
        x = torch_weights.array("from_torch", "check", check)
        ys, agreement = called(source, found, x), 1e-3
    else:
        kind = f"{type(check).__name__}{f' of {len(check)}' if isinstance(check, tuple | list) else ''}"
        raise TypeError(f"from_torch: check must be (x, y), an input of the module and its output, or, where the "
                        f"source is a module, x alone; got {kind}")  # fmt: skip
    if not (np.isfinite(x).all() and all(np.isfinite(y).all() and np.any(y) for y in ys)):
        raise ValueError("from_torch: check's x and y must be finite, and y not all 0; without values nothing is told")
    return x, [y.astype(np.float64) for y in ys], agreement


def _difference(layer: ConvLSTM2D | ConvGRU2D | LegacyOrder, x: np.ndarray, ys: list[np.ndarray]) -> float:
    """Return how far the output is from the nearest of those that are given, as a share of its largest value."""
    inner = layer.layer if isinstance(layer, LegacyOrder) else layer
    output = layer(x)
    output = output[0] if inner.return_state else output
    fit = [y for y in ys if y.shape == np.shape(output)]
    if not fit:
        shapes = " or ".join(dict.fromkeys(str(y.shape) for y in ys))
        raise ValueError(
            f"from_torch: check's y has shape {shapes}, but the layer's output for its x {np.shape(output)}"
        )
    return min(float(np.max(np.abs(output - y)) / np.max(np.abs(y))) for y in fit)

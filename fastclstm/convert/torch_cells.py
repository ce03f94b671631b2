"""One cell's weights in a dialect of PyTorch as ConvLSTM2D's parameters and options, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastclstm.convert.torch_dialects import GATES, Dialect, convolves
from fastclstm.layers import ConvLSTM2D
from fastclstm.spec import ConvSpec

Arrays = dict[str, np.ndarray]
Options = dict[str, Any]


def read_cell(row: Dialect, where: str, cell: Arrays) -> tuple[Arrays, Options]:
    """Return a cell's parameters as `ConvLSTM2D` names them, and the options that go with them.

    Raises ValueError where its arrays, whose names stand after `where`, do not fit one another.
    """
    _check_trained(row, cell)
    shapes = ", ".join(f"{where}{name} {array.shape}" for name, array in cell.items() if name not in row.ignored)
    weights = [f"{convolution}.{row.weight}" for part in (row.joint, *(row.split or ())) if part is not None
               for convolution in row.spelled(part)]  # fmt: skip
    for rank, name in ((np.ndim(cell[name]) - 2, name) for name in weights if name in cell):
        if rank in (1, 3):
            raise ValueError(
                f"{row.reader}: {where}{name} {cell[name].shape} is the weight of a convolution over {rank} axes, and "
                f"what is read here are those of frames, with 4 axes; give them to a ConvLSTM{rank}D by set_parameters"
            )
    try:
        named, options = _read(row, cell)
        KH, KW, C, width = named["kernel"].shape
        fits = C > 0 and width % 4 == 0 and named["recurrent_kernel"].shape == (KH, KW, width // 4, width)
    except (IndexError, KeyError) as error:
        raise ValueError(f"{row.reader}: a weight is missing or has too few axes ({error}): {shapes}") from error
    except ValueError as error:
        raise ValueError(f"{row.reader}: these shapes do not fit one another ({error}): {shapes}") from error
    if not fits:
        raise ValueError(f"{row.reader}: these shapes are none of a ConvLSTM: {shapes}")
    if row.layout == "OIHW" and (KH % 2 == 0 or KW % 2 == 0):
        raise ValueError(f"{row.reader}: a {KH}×{KW} kernel padded by half of it does not keep the frame, so PyTorch "
                         f"cannot run this module either; kernels must be odd: {shapes}")  # fmt: skip
    return named, options


def _read(row: Dialect, cell: Arrays) -> tuple[Arrays, Options]:
    biased = any(name in cell for name in row.bias_names())
    if row.joint is not None:
        kernel = _gathered(row, cell, row.joint, row.weight)
        C = kernel.shape[2] - kernel.shape[3] // 4
        parameters = {"kernel": kernel[:, :, :C], "recurrent_kernel": kernel[:, :, C:]}
        biases = [_gathered(row, cell, row.joint, "bias")] if biased else []
    else:
        assert row.split is not None
        x, h = row.split
        parameters = {"kernel": _gathered(row, cell, x, row.weight),
                      "recurrent_kernel": _gathered(row, cell, h, row.weight)}  # fmt: skip
        biases = [_gathered(row, cell, {"x": x, "h": h}[part], "bias") for part in row.biases if biased]
    if biases:
        parameters["bias"] = sum(biases[1:], biases[0])
    if row.forget_bias:
        parameters["bias"] = parameters.get("bias", 0) + _forget_bias(row, parameters["kernel"])
    options: Options = {}
    for further, more in (_read_peephole(row, cell, biased), _read_norms(row, cell)):
        parameters |= further
        options |= more
    return parameters, options


def write_cell(row: Dialect, cell: Arrays) -> Arrays:
    """Return the weights of a cell of the dialect's module, given ours by name."""
    named: Arrays = {}
    if row.forget_bias:
        cell = cell | {"bias": cell.get("bias", 0) - _forget_bias(row, cell["kernel"])}
    if row.joint is not None:
        convolutions = {row.joint: np.concatenate([cell["kernel"], cell["recurrent_kernel"]], 2)}
        biases = [row.joint]
    else:
        assert row.split is not None
        convolutions = dict(zip(row.split, (cell["kernel"], cell["recurrent_kernel"]), strict=True))
        biases = [row.split["xh".index(part)] for part in row.biases]
    for conv, kernel in convolutions.items():
        named |= _scattered(row, conv, row.weight, kernel)
    for number, conv in enumerate(biases if "bias" in cell else ()):
        named |= _scattered(row, conv, "bias", np.zeros_like(cell["bias"]) if number else cell["bias"])
    named |= _written_peephole(row, cell)
    for ours, theirs in row.norm_parameters():
        if ours in cell:
            named[theirs] = np.moveaxis(_foreign(row, cell[ours]), -1, 0)
    return named | {name: np.zeros((), np.int64) for name in row.counters()}


def _forget_bias(row: Dialect, kernel: np.ndarray) -> np.ndarray:
    """Return (4F,) what the module adds when it runs."""
    added = np.zeros((4, kernel.shape[-1] // 4), kernel.dtype)
    added[GATES.index("f")] = row.forget_bias
    return added.reshape(-1)


def _native(row: Dialect, array: np.ndarray) -> np.ndarray:
    """Bring the gates on the last axis into our order."""
    blocks = dict(zip(row.gates.replace("c", "g"), np.split(array, 4, -1), strict=True))
    return np.concatenate([blocks[gate] for gate in GATES], -1)


def _foreign(row: Dialect, array: np.ndarray) -> np.ndarray:
    blocks = dict(zip(GATES, np.split(array, 4, -1), strict=True))
    return np.concatenate([blocks[gate] for gate in row.gates.replace("c", "g")], -1)


def _gathered(row: Dialect, cell: Arrays, convolution: str, kind: str) -> np.ndarray:
    """Return a convolution's kernel (KH, KW, inputs, 4F) or bias (4F,) in our order of gates."""
    arrays = [cell[f"{name}.{kind}"] for name in row.spelled(convolution)]
    native = [a if kind == "bias" or row.layout == "HWIO" else _hwio(a) for a in arrays]
    return _native(row, np.concatenate(native, -1))


def _scattered(row: Dialect, convolution: str, kind: str, array: np.ndarray) -> Arrays:
    names = row.spelled(convolution)
    parts = np.split(_foreign(row, array), len(names), -1)
    foreign = (a if kind == "bias" or row.layout == "HWIO" else _oihw(a) for a in parts)
    return {f"{n}.{kind}": a for n, a in zip(names, foreign, strict=True)}


def _read_peephole(row: Dialect, cell: Arrays, biased: bool) -> tuple[Arrays, Options]:
    parameters: Arrays = {}
    options: Options = {}
    absent = row.peephole_optional and not set(row.peephole or ()) & set(cell)
    for gate, name, part, parts in () if absent else row.peepholes():
        array = cell[name]
        if convolves(name, array.shape):
            parameters[f"peephole_{gate}"] = np.split(_hwio(array), parts, -1)[part]
            if biased:
                bias = cell[name.removesuffix("weight") + "bias"]
                parameters[f"peephole_bias_{gate}"] = np.split(bias, parts)[part]
            options = {"peephole": "conv"}
            continue
        array = np.split(np.moveaxis(array.reshape(array.shape[-3:]), 0, -1), parts, -1)[part]
        HO, WO, _ = array.shape
        elementwise = (HO, WO) != (1, 1)
        parameters[f"peephole_{gate}"] = array if elementwise else array[0, 0]
        options = {"peephole": "elementwise", "frame_size": (HO, WO)} if elementwise else {"peephole": "channel"}
    return parameters, options


def _written_peephole(row: Dialect, cell: Arrays) -> Arrays:
    blocks: dict[str, list[np.ndarray]] = {}
    for gate, name, _, _ in row.peepholes() if "peephole_i" in cell else ():
        array = cell[f"peephole_{gate}"]
        if not _convolved(row):
            array = array.reshape((1,) * (row.peephole_axes - array.ndim) + array.shape)
        blocks.setdefault(name, []).append(array)
        if _convolved(row) and "bias" in cell:
            blocks.setdefault(name.removesuffix("weight") + "bias", []).append(cell[f"peephole_bias_{gate}"])
    joined = {name: np.concatenate(arrays, -1) for name, arrays in blocks.items()}
    return {n: a if a.ndim == 1 else _oihw(a) if _convolved(row) else np.moveaxis(a, -1, -3)
            for n, a in joined.items()}  # fmt: skip


def _convolved(row: Dialect) -> bool:
    """Whether the dialect's peepholes are convolutions."""
    return row.peephole is not None and convolves(row.peephole[0], (0,) * row.peephole_axes)


def _read_norms(row: Dialect, cell: Arrays) -> tuple[Arrays, Options]:
    if row.normalization is None or (row.norms_optional and not set(row.norm_names()) & set(cell)):
        return {}, {}
    named = {ours: _native(row, np.moveaxis(cell[theirs], 0, -1)) for ours, theirs in row.norm_parameters()}
    options: Options = {"normalization": row.normalization_of(next(iter(named.values())).shape[-1])}
    if row.normalization.elementwise:
        HO, WO, _ = next(iter(named.values())).shape
        options["frame_size"] = (HO, WO)
    return named, options


def _check_trained(row: Dialect, cell: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError where a cell's weights are those of a module that computes what no ConvLSTM2D can."""
    trained = [name for name, value in row.untrained if name in cell and np.any(cell[name] != value)]
    if wrong := dict.fromkeys(trained + [name for name in row.refused if name in cell]):
        raise ValueError(f"{row.reader}: {row.refusal}: no ConvLSTM2D can compute that ({', '.join(wrong)})")


def expect_layer(row: Dialect, layer: ConvLSTM2D) -> None:
    """Raise ValueError where a layer has options that the dialect's module does not."""
    for name, values in _allowed(row, layer).items():
        if getattr(layer, name) not in values:
            raise ValueError(f"{row.writer}: the dialect {row.name!r} has no {name}={getattr(layer, name)!r}; "
                             f"it has {' or '.join(map(repr, values))}")  # fmt: skip
    for name, array in layer.parameters.items():
        if array.ndim == 4:
            kernel = layer.parameters[f"{name.rpartition('.')[0]}.kernel"]
            _expect_convolution(row, layer, name, array.shape[:2], kernel.shape[:2])


def _allowed(row: Dialect, layer: ConvLSTM2D) -> dict[str, tuple[Any, ...]]:
    """Return which values of a layer's options the dialect can hold."""
    normalizations = tuple(dict.fromkeys(row.normalization_of(cell.kernel.shape[-1]) for cell in layer.cells))
    allowed: dict[str, tuple[Any, ...]] = {
        "stride": (1, (1, 1)),
        "dilation": (1, (1, 1)),
        "recurrent_dilation": (1, (1, 1)),
        "padding_mode": ("zeros",),
        "cell_clip": (None,),
        "activation": row.activations,
        "recurrent_activation": ("sigmoid",),
        "output_activation": (None, layer.activation) if row.output_activation is None else (row.output_activation,),
        "go_backwards": (False,),
        "peephole": (None,),
        "bidirectional": (False, True) if row.directions else (False,),
        "normalization": (None, *normalizations) if row.norms_optional else normalizations,
    }
    if row.peephole is not None:
        allowed["peephole"] = ("conv",) if _convolved(row) else ("elementwise", "channel")
        allowed["peephole"] += (None,) if row.peephole_optional else ()
    if not row.bias_names() and not row.forget_bias:
        allowed["use_bias"] = (False,)
    if row.directions:
        allowed["num_layers"] = (1,)
    if layer.bidirectional:
        allowed["merge_mode"] = ("concat", None)
    if layer.num_layers > 1:
        allowed["leaky_relu_slope"] = (None, 1)
    return allowed


def _expect_convolution(
    row: Dialect, layer: ConvLSTM2D, name: str, given: tuple[int, ...], size: tuple[int, ...]
) -> None:
    """Raise ValueError unless a convolution has the kernel's size and keeps the frame."""
    KH, KW = size
    if given != size or (row.layout == "OIHW" and (KH % 2 == 0 or KW % 2 == 0)):
        raise ValueError(f"{row.writer}: the dialect {row.name!r} has one odd kernel size for all of a cell's "
                         f"convolutions, got {name} of {given}, kernel of {size}")  # fmt: skip
    own, same = (
        ConvSpec.infer((1, KH, KW, 1), (KH, KW, 1, 1), strides=1, padding=padding, padding_mode="zeros", dilation=1)
        for padding in (layer.padding, "same")
    )
    if own.padding != same.padding:
        raise ValueError(f"{row.writer}: the dialect {row.name!r} keeps the frame (padding='same'), "
                         f"got {layer.padding!r}")  # fmt: skip


def _hwio(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(2, 3, 1, 0)


def _oihw(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(3, 2, 0, 1)

"""Layers and models as ONNX graphs of standard operators, for ONNX Runtime, OpenVINO and what else reads them.

What was decided:

- Opset 21, of 2024: the first whose GroupNormalization has a scale for each channel, as ours; Gelu and Mish are there.
- A ConvLSTM2D, like its kin, is one Scan over time, whatever its options, however many layers are stacked; so the
  graph takes any number of samples, steps and pixels, and the file holds each weight once. (What frameworks trace is
  unrolled over time, or wrong: tensorflow-onnx's issue 1760, open since 2021.) `bidirectional` is one Scan with two
  halves.
  Measured in ONNX Runtime a Scan is as fast as the steps unrolled, within 5 %, and no slower with weights that stand
  outside of its body.
- What is exported infers. Dropout and noise are not there, batch normalization has its moving statistics.
- Operators of ONNX have channels first, most of ours last. Transposes that meet cancel each other out, and what works
  pixel by pixel needs none.
- ceil_mode, "wrap" and adaptive pooling are made of operators on which all runtimes agree.
- A layer that is not in the table (`onnx_layers.TABLE`) is an error that names it and its place, before a file is
  touched. A subclass is another layer, as it may compute something else.
- float64 is float64 in the graph, but ONNX Runtime (1.31) neither convolves nor pools in it: ``dtype="float32"``.
  Slopes and epsilons are float32 by ONNX's own definition, so float64 agrees to about 1e-7.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import Any

from fastclstm import __version__
from fastclstm.convert.onnx_builder import IR_VERSION, OPSET, Value
from fastclstm.convert.onnx_export import Export
from fastclstm.convert.onnx_forecasting import forecasting
from fastclstm.convert.onnx_layers import TABLE
from fastclstm.convert.onnx_recurrent import one_step
from fastclstm.io.files import replacing
from fastclstm.layers import (
    Dense,
    Embedding,
    Layer,
    MaxPooling3D,
    TimeDistributed,
)
from fastclstm.layers.base import DTYPES
from fastclstm.layers.container import told_of
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.layers.recurrent import Recurrent
from fastclstm.layers.recurrent_cell import RecurrentCell
from fastclstm.layers.symbolic import Known, checked_shape, is_shape, leaves, mapped_shapes, tried
from fastclstm.models import Model, Sequential
from fastclstm.models.forecasting import Forecasting
from fastclstm.models.graph import Slot, free_name
from fastclstm.models.network import Network, masked
from fastclstm.spec import choice, flag

__all__ = ["OPSET", "to_onnx"]

_LARGEST = 2**31 - 2**20
"""Bytes of weights that a file of ONNX holds, with room for the graph."""


def to_onnx(
    model: Layer, path: str | os.PathLike[str], *, input_shape: Any = None, states: bool = False, mask: bool = False,
    dtype: str | None = None,
) -> None:  # fmt: skip
    """Write a layer or a model to an ONNX file of standard operators (opset 21), whole or not at all.

    It computes what ``model(x)`` computes, for arrays of the same layout, of any sizes where `input_shape` has None.
    Inputs and outputs of a `Model` have its names, those of others are "x" and "output"; several are numbered,
    "output_1". Needs ``pip install 'fastclstm[onnx]'``.

    Parameters
    ----------
    model : Layer
        Any layer or model of this package; within it no layers of your own. Of a cell, as `ConvLSTM2DCell`, the inputs
        are "x", "h" and "c", the outputs "h.next" and "c.next". Of an `EncoderForecaster` or `MultiscaleForecaster` the
        inputs are "frames" and "steps" (int64, of shape (1,)), the output is what ``forecast(frames, steps)`` returns.
    path : path
    input_shape : tuple of int or None, or list or dict of these, optional
        Shape of x with the batch, as `model.output_shape` takes it; None is an axis of any size. Left out, it is that
        of the model's inputs or what its first layer tells. Give the sizes that layers within ask for: Dense after
        Flatten, weights for each pixel.
    states : bool
        The states of all recurrent layers that are not given any in the graph become inputs, such as "0.h" and "0.c",
        and outputs, "0.h.next" and "0.c.next", in the layer's data_format: so a stream runs piece by piece. Before the
        names stands the place of the layer in its model, "lstm.0.h". Else they start from zeros.
    mask : bool
        Make a mask (B, T), as calls take it, an input of the name "mask".
    dtype : "float32" or "float64", optional
        Of the whole graph. None: each layer computes in its own.

    Raises
    ------
    NotImplementedError
        A layer that has no counterpart in ONNX here; the message says which, and where.
    ValueError
        Sizes that a layer needs and that are not known, a stateful layer without `states`, an activation that is a
        function of yours, more weights than a file of ONNX holds.
    TypeError
        Anything but a layer.
    ImportError
        ONNX is not installed.
    OSError
        The file cannot be written.

    Notes
    -----
    A stream, frame by frame, in ONNX Runtime::

        to_onnx(ConvLSTM2D(1, 8, 3), "model.onnx", states=True)
        session = onnxruntime.InferenceSession("model.onnx")
        h = c = np.zeros((B, H, W, 8), np.float32)
        for frame in frames:  # each (B, 1, H, W, 1)
            y, h, c = session.run(None, {"x": frame, "0.h": h, "0.c": c})
    """
    if not isinstance(model, Layer):
        raise TypeError(f"to_onnx: model must be a layer or a model of layers, got {type(model).__name__}")
    flag("to_onnx", "states", states)
    flag("to_onnx", "mask", mask)
    choice("to_onnx", "dtype", dtype, (None, *DTYPES))
    ends = {*model._inputs, *model._outputs} if isinstance(model, Model) else ()
    try:
        e = Export(TABLE, dtype, states, ends)
    except ImportError:
        raise ImportError("to_onnx needs the package onnx: pip install 'fastclstm[onnx]'") from None
    outputs = _converted(e, model, input_shape, mask)
    onnx, g = e.g.onnx, e.g
    taken = {value.name for value in g.inputs}
    for name, value in outputs + [(f"{name}.next", value) for name, value in e.next_states.items()]:
        free = free_name(name, taken)
        taken.add(free)
        g.output(free, value)
    if g.size > _LARGEST:
        raise ValueError(f"to_onnx: the weights take {g.size / 2**30:.1f} GiB, but a file of ONNX holds less than 2")
    made = onnx.helper.make_model(
        g.graph(type(model).__name__), opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
        producer_name="fastclstm", producer_version=__version__,
    )  # fmt: skip
    content = made.SerializeToString()
    onnx.checker.check_model(content)
    with replacing(path) as new:
        new.write_bytes(content)


def _converted(e: Export, model: Layer, input_shape: Any, mask: bool) -> list[tuple[str, Value]]:
    """Return the outputs by name."""
    if isinstance(model, Model):
        shapes: dict[Any, Any] = {slot: model._graph.shapes[slot] for slot in model._inputs.values()}
        if input_shape is not None:
            shapes = model._by_slot("input_shape", _shapes(input_shape))
            model._check_shapes("input_shape", shapes)
        x: Any = {name: _input(e, name, shapes[slot], *_reader(model, slot)) for name, slot in model._inputs.items()}
        names = list(model._outputs)
    else:
        shape = _default_shape(model) if input_shape is None else _shapes(input_shape)
        several, numbers = not is_shape(shape), count()
        reader = _reader(model, None)
        name = "frames" if isinstance(model, Forecasting) else "x"
        x = mapped_shapes(lambda s: _input(e, f"x_{next(numbers)}" if several else name, s, *reader), shape)
        names = []
    options = {"mask": _mask(e, model, next(leaves(x)))} if mask else {}
    if isinstance(model, RecurrentCell):
        return _cell(e, model, x)
    if isinstance(model, Forecasting):
        with told_of(type(model).__name__):
            return [("output", forecasting(e, model, x, e.g.input("steps", "int64", [1])))]
    values = list(leaves(e.call("", model, x, options)))
    return list(zip(names or ["output"] * len(values), values, strict=True))


def _shapes(given: Any) -> Any:
    """Return a shape, or a list or dict of these, each a tuple."""
    if isinstance(given, Mapping):
        return {name: _shapes(shape) for name, shape in given.items()}
    if not isinstance(given, list | tuple):
        raise TypeError(f"to_onnx: input_shape must be a tuple of sizes, None for any, or a list or dict of these, "
                        f"got {given!r}")  # fmt: skip
    several = any(isinstance(item, list | tuple) for item in given)
    return list(map(_shapes, given)) if several else checked_shape("to_onnx: input_shape", given)


def _cell(e: Export, cell: RecurrentCell, x: Value) -> list[tuple[str, Value]]:
    shape, names = tried(cell.output_shape, x.shape), cell._state_names
    states = [_input(e, name, shape, cell, "initial_state") for name in names]
    made = one_step(e, cell, x, states)
    return [(f"{name}.next", replace(value, shape=shape)) for name, value in zip(names, made, strict=True)]


def _mask(e: Export, model: Layer, x: Value) -> Value:
    """Return an input for the mask of sequences x."""
    lstm = next(masked(model), None)
    if lstm is None and not isinstance(model, Recurrent):
        raise ValueError(f"to_onnx: mask is for recurrent layers, and for ConvLSTM2D within models, but "
                         f"{type(model).__name__} has none; leave it out")  # fmt: skip
    return _input(e, "mask", x.shape[:2], lstm or model, "mask")


def _reader(layer: Layer, slot: Slot | None) -> tuple[Layer, str]:
    """Return the layer that reads x, or what a network has in a slot, and as which argument."""
    if isinstance(layer, TimeDistributed):
        inner, argument = _reader(layer.layer, None)
        return (inner if isinstance(inner, Embedding) else layer), argument
    if not isinstance(layer, Network):
        return layer, "x"
    wanted = layer._graph.inputs[0] if slot is None else slot
    for step in layer._graph.steps:
        if wanted in leaves(step.x):
            inside = step.layer
            within = inside._by_slot("x", step.x) if isinstance(inside, Model) else {None: step.x}
            return _reader(inside, next((own for own, given in within.items() if given == wanted), None))
        for name, value in step.options.items():
            if wanted in leaves(value):
                return step.layer, name
    raise AssertionError(f"nothing reads {slot}")


def _input(e: Export, name: str, shape: Known, layer: Layer, argument: str) -> Value:
    """Return an input that `layer` reads as `argument`; axes of unknown size get names."""
    kind = {"mask": "bool", "lengths": "int64"}.get(argument, e.dtype or layer.options.get("dtype") or "float32")
    if isinstance(layer, Embedding) and argument == "x":
        kind = "int64"
    named = zip(shape, _axes(layer, len(shape), argument), strict=True)
    axes = [axis if size is None else size for size, axis in named]
    if e.g.inputs:  # whose axes may have other sizes, but for the batch's
        axes = [axis if axis == "batch" or isinstance(axis, int) else f"{name}_{axis}" for axis in axes]
    return e.g.input(name, str(kind), axes)


def _axes(layer: Layer, rank: int, argument: str) -> list[str]:
    """Name the axes of what a layer reads."""
    leading = ["batch", "time"]
    if getattr(layer, "time_major", False) and argument in ("x", "mask"):
        leading = ["time", "batch"]
    if argument in ("mask", "lengths"):
        return leading[:rank] if rank > 1 else ["batch"]
    space = (["depth"] if isinstance(layer, ConvRecurrent | RecurrentCell) else ["time"]) + ["height", "width"]
    space = space[-_frame_rank(layer) :]
    frame = ["channels", *space] if layer.options.get("data_format") == "channels_first" else [*space, "channels"]
    if len(frame) < rank <= len(frame) + 2:
        return [*leading[: rank - len(frame)], *frame]
    known = {1: ["batch"], 2: ["batch", "features"], 3: [*leading, "features"]}
    return known.get(rank) or ["batch", *(f"axis_{axis}" for axis in range(1, rank))]


def _default_shape(model: Layer) -> Known:
    """Return the shape of x as far as a layer tells it; raise ValueError where it does not tell how many axes."""
    layer = model
    while isinstance(layer, Sequential):
        layer = layer[0]
    options = layer.options
    if isinstance(layer, Recurrent):
        return (None, None, layer.in_features)
    if isinstance(layer, Dense):
        return (None, layer.in_features)
    C = getattr(layer, "in_channels", None)
    if C is None:
        raise ValueError(f"to_onnx: {type(layer).__name__} takes arrays of several shapes; give input_shape, with the "
                         f"batch, such as (None, None, 64, 64, 1), None for any size")  # fmt: skip
    leading = 2 if isinstance(layer, ConvRecurrent | Forecasting) else 1
    frame = options.get("frame_size") or (None,) * _frame_rank(layer)
    inner = (C, *frame) if options["data_format"] == "channels_first" else (*frame, C)
    return (*(None,) * leading, *inner)


def _frame_rank(layer: Layer) -> int:
    """Return how many axes a frame, or a volume, of a layer has without channels."""
    return 3 if isinstance(layer, MaxPooling3D) else getattr(layer, "_rank", 2)

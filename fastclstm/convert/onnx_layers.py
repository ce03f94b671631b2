"""What each layer is in ONNX: one table, and a small function a kind of layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastclstm import layers
from fastclstm.convert.onnx_builder import LAST, Builder, Size, Value
from fastclstm.convert.onnx_export import Converter, Export
from fastclstm.convert.onnx_operators import (
    activate,
    ceil,
    convolve,
    lengths,
    normalize_groups,
    padding_attributes,
    paddings,
    to_channels_first,
    to_channels_last,
)
from fastclstm.convert.onnx_recurrent import convolutional, recurrent
from fastclstm.layers.symbolic import leaves
from fastclstm.models import Model, Sequential
from fastclstm.models.graph import Slot, filled, paired
from fastclstm.models.network import Network, masked, reverses, time_axis
from fastclstm.spec import Shape, integers, transposed

Frames = Callable[[Builder, Any, Value], Value]
"""Takes a layer and its frames (N, C, …), returns the output so."""


def on_frames(convert: Frames) -> Converter:
    """Return the converter of a layer of frames or volumes, of which `convert` knows frames (N, C, …)."""

    def converter(e: Export, layer: Any, x: Value) -> Value:
        rank = 3 if isinstance(layer, layers.Conv3D | layers.MaxPooling3D) else layer._rank
        last = layer.options["data_format"] == "channels_last"
        frames = e.g.fold(x) if x.rank > rank + 2 else x
        made = convert(e.g, layer, to_channels_first(e.g, frames) if last else frames)
        made = to_channels_last(e.g, made) if last else made
        return e.g.unfold(made, x) if x.rank > rank + 2 else made

    return converter


def on_arrays(convert: Frames) -> Converter:
    """Return the converter of a layer that takes any array, as `convert` does."""
    return lambda e, layer, x: convert(e.g, layer, x)


# Convolutions


def _convolution(g: Builder, layer: Any, x: Value) -> Value:
    count = layer._rank
    strides, dilation = _numbers(layer.stride, count), _numbers(layer.dilation, count)
    y = convolve(g, x, layer.kernel, layer.bias, strides=strides, dilation=dilation, padding=layer.padding,
                 padding_mode=layer.padding_mode, groups=layer.groups)  # fmt: skip
    return _activated(g, layer, y)


def _depthwise(g: Builder, layer: Any, x: Value) -> Value:
    kernel = layer.depthwise_kernel
    KH, KW, C, M = kernel.shape
    separable = isinstance(layer, layers.SeparableConv2D)
    strides, dilation = _numbers(layer.stride, 2), _numbers(layer.dilation, 2)
    y = convolve(g, x, kernel.reshape(KH, KW, 1, C * M), None if separable else layer.bias, groups=C, strides=strides,
                 dilation=dilation, padding=layer.padding)  # fmt: skip
    if separable:
        y = convolve(g, y, layer.pointwise_kernel, layer.bias)
    return _activated(g, layer, y)


def _transposed_convolution(g: Builder, layer: Any, x: Value) -> Value:
    kernel, count = layer.kernel, layer._rank
    strides, dilation = _numbers(layer.stride, count), _numbers(layer.dilation, count)
    sizes = [max(kernel.shape[:count])] * count  # any: what is cropped does not depend on them
    spec = transposed("to_onnx", (1, *sizes, layer.in_channels), kernel.shape, strides=layer.stride,
                      padding=layer.padding, output_padding=layer.output_padding, dilation=layer.dilation)  # fmt: skip
    frame = spec if count == 2 else spec.frame
    made = [frame.H, frame.W] if count == 2 else [spec.T, frame.H, frame.W]
    before = [pair[0] for pair in frame.padding] if count == 2 else [spec.before, *(p[0] for p in frame.padding)]
    cropped = [
        (n - 1) * s + (k - 1) * d + 1 - out - start
        for n, s, k, d, out, start in zip(sizes, strides, kernel.shape, dilation, made, before, strict=False)
    ]  # after the frame; below 0: added
    weights = kernel.transpose(count + 1, count, *range(count))
    y = g.node("ConvTranspose", x, weights, *([] if layer.bias is None else [layer.bias]), strides=strides,
               dilations=dilation, pads=[*before, *(max(n, 0) for n in cropped)], kernel_shape=kernel.shape[:count],
               output_padding=[max(-n, 0) for n in cropped])  # fmt: skip
    return _activated(g, layer, y)


def _activated(g: Builder, layer: Any, y: Value) -> Value:
    """Return the activation of y (N, C, …); softmax is over the channels."""
    return to_channels_first(g, activate(g, layer.activation, to_channels_last(g, y)))


def _dense(g: Builder, layer: Any, x: Value) -> Value:
    z = g.node("MatMul", x, layer.kernel)
    return activate(g, layer.activation, z if layer.bias is None else g.elementwise("Add", z, layer.bias))


def _embedding(e: Export, layer: Any, x: Value) -> Value:
    numbers = e.g.plain(e.g.cast(x, "int64"))
    dtype = e.dtype or layer.dtype
    (name,) = e.g.several("Gather", [e.g.constant(layer.embeddings.astype(dtype)), numbers], 1)
    return e.g.named(name, dtype, (*x.shape, layer.output_dim))


# Pooling


def _pooling(kind: str) -> Frames:
    """Return what converts MaxPool or AveragePool."""

    def convert(g: Builder, layer: Any, x: Value) -> Value:
        return _pool(g, kind, layer, x)[0]

    return convert


def _max_pooling3d(e: Export, layer: Any, x: Value) -> Any:
    if not layer.return_indices:
        return on_frames(_pooling("MaxPool"))(e, layer, x)
    if layer.ceil_mode:
        raise NotImplementedError("to_onnx: MaxPooling3D with ceil_mode=True and return_indices=True has no "
                                  "counterpart in ONNX; leave one of them out")  # fmt: skip
    g, last = e.g, layer.data_format == "channels_last"
    frames = g.own(to_channels_first(g, x) if last else x)
    if _skips(layer, frames):
        raise NotImplementedError("to_onnx: MaxPooling3D with return_indices=True, padding='same' and a stride above "
                                  "its window needs to know the frames' sizes; give input_shape")  # fmt: skip
    y, numbers = _pool(g, "MaxPool", layer, frames, 2)
    size: Size = 1
    for axis in (2, 3, 4):
        size = g.count("Mul", size, g.length(frames, axis))
    indices = g.node("Mod", numbers, g.vector(size))  # ONNX counts samples and channels too
    return tuple(to_channels_last(g, part) if last else part for part in (y, indices))


def _pool(g: Builder, kind: str, layer: Any, x: Value, outputs: int = 1) -> list[Value]:
    """Return what a pooling operator makes of x (N, C, …).

    Of ceil_mode runtimes have had different ideas, so the last window is made whole by padding, and means are divided
    by how much of a window counts. So it is where runtimes would pad by less than nothing.
    """
    count = x.rank - 2
    window = _numbers(layer.pool_size, count)
    strides = window if layer.stride is None else _numbers(layer.stride, count)
    options: dict[str, Any] = {"kernel_shape": window, "strides": strides}
    if kind == "AveragePool":
        options["count_include_pad"] = int(layer.count_include_pad)
    if not (layer.ceil_mode or _skips(layer, x)):
        options |= padding_attributes(g, x, layer.padding, window, strides)
        names = g.several(kind, [g.plain(x)], outputs, **options)
        return [g.named(name, dtype, (None,) * x.rank) for name, dtype in zip(names, (x.dtype, "int64"), strict=False)]
    size = lengths(g, x)
    pairs, whole = paddings(g, size, layer.padding, window, strides), {}
    for axis, ((before, after), k, s) in enumerate(zip(pairs, window, strides, strict=True)):
        reached = g.count("Add", size(axis), before)
        room = g.count("Sub", g.count("Add", reached, after), k)
        fit = g.count("Add", ceil(g, room, s), 1)
        starts = g.count("Min", fit, ceil(g, reached, s))  # the last window starts in the frame
        end = g.count("Add", g.count("Mul", g.count("Sub", starts, 1), s), k)
        whole[axis + 2] = before, g.count("Max", g.count("Sub", end, reached), 0)
    if kind == "MaxPool":
        return [g.node(kind, g.own(g.pad(x, whole, -np.inf)), **options)]
    ones = g.elementwise("Add", g.elementwise("Mul", g.slice(x, {0: (0, 1, 1), 1: (0, 1, 1)}), 0.0), 1.0)
    counted = dict(enumerate(pairs, 2)) if layer.count_include_pad else {}
    shares = g.pad(ones, counted, 1.0)
    rest = {axis: _less(g, pair, counted.get(axis, (0, 0))) for axis, pair in whole.items()}
    means = [g.node(kind, g.own(g.pad(*part)), **options) for part in ((x, whole), (shares, rest))]
    return [g.elementwise("Div", *means)]


def _skips(layer: Any, x: Value) -> bool:
    """Whether "same" may leave pixels between windows unread: ONNX Runtime's auto_pad is then below 0."""
    window = _numbers(layer.pool_size, x.rank - 2)
    strides = window if layer.stride is None else _numbers(layer.stride, x.rank - 2)
    skips = any(k < s for k, s in zip(window, strides, strict=True))
    return layer.padding == "same" and skips and None in x.shape[2:]


def _less(g: Builder, pair: tuple[Size, Size], other: tuple[Size, Size]) -> tuple[Size, Size]:
    return g.count("Sub", pair[0], other[0]), g.count("Sub", pair[1], other[1])


def _global_pooling(kind: str) -> Frames:
    """Return what converts ReduceMean or ReduceMax."""

    def convert(g: Builder, layer: Any, x: Value) -> Value:
        return g.reduce(kind, x, layer._axes((2,) * x.rank), keepdims=layer.keep_dims)

    return convert


def _adaptive_pooling(g: Builder, layer: Any, x: Value) -> Value:
    """Multiply by matrices of shares: of pixels in output rows, and of output columns."""
    (rows, columns), size = layer.output_size, lengths(g, x)
    if rows is not None:
        x = g.node("MatMul", _shares(g, size(0), rows, x.dtype), x, rank=4)
    if columns is not None:
        shares = g.transpose(_shares(g, size(1), columns, x.dtype), (1, 0))
        x = g.node("MatMul", x, shares)
    return x


def _shares(g: Builder, size: Size, count: int, dtype: str) -> Value:
    """Return the matrix (count, size) that takes means, of row i from floor(i·n / count) to ceil((i + 1)·n / count)."""
    number, n = np.arange(count).reshape(-1, 1), g.vector(size)
    start = g.node("Div", g.node("Mul", n, number, rank=2), np.array(count))
    stop = g.node("Div", g.node("Add", g.node("Mul", n, number + 1, rank=2), np.array(count - 1)), np.array(count))
    pixel = g.unsqueeze(g.range(0, size), [0])
    late = g.node("Less", pixel, stop, dtype="bool")
    inside = g.node("And", late, g.node("GreaterOrEqual", pixel, start, dtype="bool"))
    return g.node("Div", g.cast(inside, dtype), g.cast(g.node("Sub", stop, start), dtype))


# Borders, sizes, shapes


def _zero_padding(g: Builder, layer: Any, x: Value) -> Value:
    return g.pad(x, {axis: (before, after) for axis, (before, after) in enumerate(layer._pairs, 2)})


def _cropping(g: Builder, layer: Any, x: Value) -> Value:
    return g.slice(x, {axis: (before, -after or LAST, 1) for axis, (before, after) in enumerate(layer._pairs, 2)})


def _up_sampling(g: Builder, layer: Any, x: Value) -> Value:
    if layer.interpolation == "nearest":
        options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    else:
        corners = "align_corners" if layer.align_corners else "half_pixel"
        options = {"mode": "linear", "coordinate_transformation_mode": corners}
    factors = g.constant(np.array([1, 1, *layer.size], np.float32))
    (name,) = g.several("Resize", [g.plain(x), "", factors], 1, **options)
    return g.named(name, x.dtype, (None,) * x.rank)


def _space_to_depth(g: Builder, layer: Any, x: Value) -> Value:
    """Take blocks apart, to (N, r, s, C, H/r, W/s) or (N, C, r, s, H/r, W/s); ONNX's own operator has no modes."""
    (r, s), size = layer.block_size, lengths(g, x)
    H, W, C = g.count("Div", size(0), r), g.count("Div", size(1), s), g.length(x, 1)
    blocks = g.reshape(x, [-1, C, H, r, W, s])
    order = (0, 3, 5, 1, 2, 4) if layer.mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return g.reshape(g.transpose(blocks, order), [-1, g.count("Mul", C, r * s), H, W])


def _depth_to_space(g: Builder, layer: Any, x: Value) -> Value:
    """Put blocks together: rectangular ones too, which ONNX's own operator does not know."""
    (r, s), size = layer.block_size, lengths(g, x)
    H, W, C = size(0), size(1), g.count("Div", g.length(x, 1), r * s)
    parts = [r, s, C] if layer.mode == "DCR" else [C, r, s]
    order = (0, 3, 4, 1, 5, 2) if layer.mode == "DCR" else (0, 1, 4, 2, 5, 3)
    blocks = g.transpose(g.reshape(x, [-1, *parts, H, W]), order)
    return g.reshape(blocks, [-1, C, g.count("Mul", H, r), g.count("Mul", W, s)])


def _flatten(g: Builder, layer: Any, x: Value) -> Value:
    return g.reshape(x, [g.length(x, 0), -1 if None in x.shape[1:] else math.prod(n or 0 for n in x.shape[1:])])


def _reshaping(g: Builder, layer: Any, x: Value) -> Value:
    return g.reshape(x, [g.length(x, 0), *layer.target_shape])


def _permuting(g: Builder, layer: Any, x: Value) -> Value:
    return g.transpose(x, (0, *layer.dims))


def _repeating(g: Builder, layer: Any, x: Value) -> Value:
    wide = g.unsqueeze(x, [1])
    (name,) = g.several("Expand", [wide.name, g.constant([1, layer.n, *[1] * (x.rank - 1)])], 1)
    return g.named(name, x.dtype, (None,) * (x.rank + 1))


# Element by element


def _same(g: Builder, layer: Any, x: Value) -> Value:
    """Convert what only does something while training."""
    return x


def _activation(g: Builder, layer: Any, x: Value) -> Value:
    return activate(g, getattr(layer, "activation", "softmax"), x)


def _leaky_relu(g: Builder, layer: Any, x: Value) -> Value:
    slope = layer.negative_slope
    return g.elementwise("LeakyRelu", x, alpha=slope) if slope else g.elementwise("Relu", x)


def _relu(g: Builder, layer: Any, x: Value) -> Value:
    most, slope, threshold = layer.max_value, layer.negative_slope, layer.threshold
    if not slope and not threshold:
        return g.elementwise("Relu", x) if most is None else g.elementwise("Clip", x, 0.0, most)
    below = g.elementwise("Mul", g.elementwise("Sub", x, threshold), slope)
    y = g.elementwise("Where", g.elementwise("Less", x, threshold, dtype="bool"), below, x, dtype=x.dtype)
    return y if most is None else g.elementwise("Min", y, most)


def _prelu(g: Builder, layer: Any, x: Value) -> Value:
    return g.elementwise("PRelu", x, layer.alpha)


def _rescaling(g: Builder, layer: Any, x: Value) -> Value:
    return g.elementwise("Add", g.elementwise("Mul", x, np.asarray(layer.scale)), np.asarray(layer.offset))


def _learnt_input(g: Builder, layer: Any, x: Value) -> Value:
    return g.elementwise("Add", x, layer.value.reshape(-1, 1, 1))


def _masking(g: Builder, layer: Any, x: Value) -> Value:
    other = g.elementwise("Not", g.elementwise("Equal", x, layer.mask_value, dtype="bool"))
    return g.elementwise("Mul", x, g.reduce("ReduceMax", g.cast(other, x.dtype), [x.rank - 1]))


# Normalization


def _batch_normalization(g: Builder, layer: Any, x: Value) -> Value:
    """Scale and shift each channel, wherever it is."""
    scale = 1 / np.sqrt(layer.moving_variance.astype(np.float64) + layer.epsilon)
    scale = scale if layer.gamma is None else scale * layer.gamma
    shift = (0 if layer.beta is None else layer.beta) - layer.moving_mean * scale
    wide = (layer.num_features, *(1,) * (x.rank - 1 - layer._channel_axis % x.rank))
    return g.elementwise("Add", g.elementwise("Mul", x, scale.reshape(wide)), shift.reshape(wide))


def _layer_normalization(g: Builder, layer: Any, x: Value) -> Value:
    gamma, beta = _affine(layer, layer.shape)
    return g.node("LayerNormalization", x, gamma, beta, axis=-len(layer.shape), epsilon=layer.epsilon)


def _group_normalization(g: Builder, layer: Any, x: Value) -> Value:
    axis, (gamma, beta) = layer._channel_axis % x.rank, _affine(layer, (layer.num_features,))
    y = normalize_groups(g, g.move(x, axis, 1), layer._count, layer.epsilon, gamma, beta)
    return g.move(y, 1, axis)


def _affine(layer: Any, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return gamma and beta, those that a layer has not too."""
    return (np.ones(shape) if layer.gamma is None else layer.gamma,
            np.zeros(shape) if layer.beta is None else layer.beta)  # fmt: skip


# Several arrays


def _merging(kind: str) -> Converter:
    """Return the converter of what makes one array of several of one shape, or of shapes that broadcast."""

    def converter(e: Export, layer: Any, x: Sequence[Value]) -> Value:
        g, rank = e.g, max(value.rank for value in x)
        wide = [value if value.rank == rank else g.unsqueeze(value, range(1, 1 + rank - value.rank)) for value in x]
        total = wide[0]
        for value in wide[1:]:
            total = g.elementwise(kind, total, value)
        return g.elementwise("Mul", total, 1 / len(wide)) if isinstance(layer, layers.Average) else total

    return converter


def _concatenating(e: Export, layer: Any, x: Sequence[Value]) -> Value:
    return e.g.concatenate(x, layer.axis % x[0].rank)


# Layers of layers


def _time_distributed(e: Export, layer: Any, x: Value) -> Value:
    return e.g.unfold(e.call("layer", layer.layer, e.g.fold(x)), x)


def _network(e: Export, layer: Network, x: Any, mask: Value | None = None, lengths: Value | None = None) -> Any:
    """Convert a Sequential or a Model: what `Network` runs, step by step."""
    graph = layer._graph
    values: dict[Slot, Any] = layer._by_slot("x", x) if isinstance(layer, Model) else {graph.inputs[0]: x}
    if lengths is not None:
        mask = _mask(e.g, layer, lengths, next(leaves(values)))
    masks = {} if mask is None else dict.fromkeys(values, mask)
    for step in graph.steps:
        options = {name: filled(value, values) for name, value in step.options.items()}
        valid = next((masks[slot] for slot in leaves(step.x) if slot in masks), None)
        if valid is not None:
            if "mask" not in options and any(masked(step.layer)):
                options["mask"] = valid
            if reverses(step.layer):
                valid = e.g.slice(valid, {time_axis(next(masked(step.layer)), True): (-1, -LAST, -1)})
        made = e.call(step.name, step.layer, filled(step.x, values), options)

        def keep(slot: Slot, value: Any, valid: Value | None = valid) -> None:
            values[slot] = value
            if valid is not None:
                masks[slot] = valid

        paired(step.y, made, keep)
    return filled(graph.outputs, values)


convert_network = _network
cut, join = on_frames(_space_to_depth), on_frames(_depth_to_space)


def _mask(g: Builder, layer: Network, lengths: Value, x: Value) -> Value:
    """Return the mask of lengths (B,) for sequences x."""
    axis = time_axis(next(masked(layer)), True)
    steps, counts = g.range(0, g.length(x, axis)), g.cast(lengths, "int64")
    return g.node("Less", g.unsqueeze(steps, [1 - axis]), g.unsqueeze(counts, [axis]), dtype="bool")


def _numbers(value: Any, count: int) -> Shape:
    return integers("to_onnx", "an option", value, count, 1)


TABLE: Mapping[type, Converter] = {
    layers.Activation: on_arrays(_activation),
    layers.AdaptiveAveragePooling2D: on_frames(_adaptive_pooling),
    layers.Add: _merging("Add"),
    layers.Average: _merging("Add"),
    layers.AveragePooling2D: on_frames(_pooling("AveragePool")),
    layers.AveragePooling3D: on_frames(_pooling("AveragePool")),
    layers.BatchNormalization: on_arrays(_batch_normalization),
    layers.Concatenate: _concatenating,
    layers.Conv2D: on_frames(_convolution),
    layers.Conv2DTranspose: on_frames(_transposed_convolution),
    layers.Conv3D: on_frames(_convolution),
    layers.Conv3DTranspose: on_frames(_transposed_convolution),
    layers.ConvGRU2D: convolutional,
    layers.ConvLSTM1D: convolutional,
    layers.ConvLSTM2D: convolutional,
    layers.ConvLSTM3D: convolutional,
    layers.ConvRNN2D: convolutional,
    layers.Cropping2D: on_frames(_cropping),
    layers.Cropping3D: on_frames(_cropping),
    layers.Dense: on_arrays(_dense),
    layers.DepthToSpace: on_frames(_depth_to_space),
    layers.DepthwiseConv2D: on_frames(_depthwise),
    layers.Dropout: on_arrays(_same),
    layers.Embedding: _embedding,
    layers.Flatten: on_arrays(_flatten),
    layers.GRU: recurrent,
    layers.GaussianNoise: on_arrays(_same),
    layers.GlobalAveragePooling: on_arrays(_global_pooling("ReduceMean")),
    layers.GlobalAveragePooling2D: on_arrays(_global_pooling("ReduceMean")),
    layers.GlobalAveragePooling3D: on_arrays(_global_pooling("ReduceMean")),
    layers.GlobalMaxPooling: on_arrays(_global_pooling("ReduceMax")),
    layers.GlobalMaxPooling2D: on_arrays(_global_pooling("ReduceMax")),
    layers.GlobalMaxPooling3D: on_arrays(_global_pooling("ReduceMax")),
    layers.GroupNormalization: on_arrays(_group_normalization),
    layers.InstanceNormalization: on_arrays(_group_normalization),
    layers.LSTM: recurrent,
    layers.LayerNormalization: on_arrays(_layer_normalization),
    layers.LeakyReLU: on_arrays(_leaky_relu),
    layers.LearntInput: on_frames(_learnt_input),
    layers.Masking: on_arrays(_masking),
    layers.MaxPooling2D: on_frames(_pooling("MaxPool")),
    layers.MaxPooling3D: _max_pooling3d,
    layers.Maximum: _merging("Max"),
    layers.Minimum: _merging("Min"),
    layers.Multiply: _merging("Mul"),
    layers.PReLU: on_arrays(_prelu),
    layers.Permute: on_arrays(_permuting),
    layers.PixelShuffle: on_frames(_depth_to_space),
    layers.PixelUnshuffle: on_frames(_space_to_depth),
    layers.ReLU: on_arrays(_relu),
    layers.RepeatVector: on_arrays(_repeating),
    layers.Rescaling: on_arrays(_rescaling),
    layers.Reshape: on_arrays(_reshaping),
    layers.SeparableConv2D: on_frames(_depthwise),
    layers.Softmax: on_arrays(_activation),
    layers.SpaceToDepth: on_frames(_space_to_depth),
    layers.SpatialDropout2D: on_arrays(_same),
    layers.SpatialDropout3D: on_arrays(_same),
    layers.Subtract: _merging("Sub"),
    layers.TimeDistributed: _time_distributed,
    layers.TimeDistributionCalculator: on_arrays(_same),
    layers.UpSampling: on_frames(_up_sampling),
    layers.UpSampling3D: on_frames(_up_sampling),
    layers.ZeroPadding2D: on_frames(_zero_padding),
    layers.ZeroPadding3D: on_frames(_zero_padding),
    Model: _network,
    Sequential: _network,
}

"""to_onnx: every layer, the options of the ConvLSTM and whole models, in ONNX Runtime against our own numbers.

What is exported has axes of unknown size, and is run with two sets of sizes.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from layer_checks import normal

import fastclstm
from fastclstm import layers, to_onnx
from fastclstm.convert.onnx_layers import TABLE
from fastclstm.layers import (
    GRU,
    LSTM,
    Activation,
    AdaptiveAveragePooling2D,
    Add,
    Average,
    AveragePooling2D,
    AveragePooling3D,
    BatchNormalization,
    Concatenate,
    Conv2D,
    Conv2DTranspose,
    Conv3D,
    Conv3DTranspose,
    ConvGRU2D,
    ConvGRU2DCell,
    ConvLSTM1D,
    ConvLSTM2D,
    ConvLSTM2DCell,
    ConvLSTM3D,
    ConvLSTM3DCell,
    ConvRNN2D,
    ConvRNN2DCell,
    Cropping2D,
    Cropping3D,
    Dense,
    DepthToSpace,
    DepthwiseConv2D,
    Dropout,
    Embedding,
    Flatten,
    GaussianNoise,
    GlobalAveragePooling,
    GlobalAveragePooling2D,
    GlobalAveragePooling3D,
    GlobalMaxPooling,
    GlobalMaxPooling2D,
    GlobalMaxPooling3D,
    GroupNormalization,
    Input,
    InstanceNormalization,
    LayerNormalization,
    LeakyReLU,
    LearntInput,
    Masking,
    Maximum,
    MaxPooling2D,
    MaxPooling3D,
    Minimum,
    Multiply,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    PReLU,
    ReLU,
    RepeatVector,
    Rescaling,
    Reshape,
    SeparableConv2D,
    Softmax,
    SpaceToDepth,
    SpatialDropout2D,
    SpatialDropout3D,
    Subtract,
    TimeDistributed,
    TimeDistributionCalculator,
    UpSampling,
    UpSampling2D,
    UpSampling3D,
    ZeroPadding2D,
    ZeroPadding3D,
)
from fastclstm.layers.symbolic import leaves, mapped_shapes
from fastclstm.models import EncoderForecaster, Model, MultiscaleForecaster, Sequential
from fastclstm.nn.activations import TABLE as ACTIVATIONS
from fastclstm.nn.normalization import Normalization

REFUSED = {"Input", "Layer"}
"""What is no layer to be exported: the function that makes a symbol, and the class of all layers."""

N = None
REF = {"engine": "reference"}
CONV = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | REF
FIRST = {"data_format": "channels_first"}
FRAMES, SEQUENCES = (N, N, N, 4), (N, N, N, N, 4)
CHANNELS_FIRST = (N, N, 4, N, N)


def made(kind, *options, **shared):
    """Layers of one kind with several options."""
    return [kind(**shared | each) for each in options]


def rows(*cases):
    """(layer, shape of what is exported, two sets of sizes for its unknown axes)."""
    return [pytest.param(*case, id=f"{type(case[0]).__name__}-{number}") for number, case in enumerate(cases)]


LAYERS = rows(
    *((Activation(name), FRAMES, 7) for name in (*ACTIVATIONS, "softmax")),
    (AdaptiveAveragePooling2D((3, None)), FRAMES, 7),
    (AdaptiveAveragePooling2D((2, 5), **FIRST), CHANNELS_FIRST, 7),
    (Add(), [FRAMES, FRAMES, FRAMES], 7),
    (Add(), [FRAMES, (N, 4)], 7),
    (Average(), [FRAMES, FRAMES, FRAMES], 7),
    *((layer, FRAMES, 8) for layer in made(
        AveragePooling2D, {}, {"padding": "same"}, {"padding": "same", "count_include_pad": True},
        {"padding": 1, "count_include_pad": True}, {"padding": ((0, 1), (1, 0)), "ceil_mode": True},
        {"padding": 1, "ceil_mode": True, "count_include_pad": True}, {"stride": 4, "ceil_mode": True},
        {"pool_size": 2, "padding": "same", "stride": 4},
        **{"pool_size": 3, "stride": 2},
    )),
    (AveragePooling2D(2, **FIRST), CHANNELS_FIRST, 7),
    (AveragePooling3D((2, 3, 2), (2, 2, 1), padding="same"), SEQUENCES, 7),
    (AveragePooling3D((2, 3, 2), 2, ceil_mode=True, **FIRST), (N, 4, N, N, N), 7),
    (BatchNormalization(4), SEQUENCES, 5),
    (BatchNormalization(4, center=False, **FIRST), CHANNELS_FIRST, 5),
    (BatchNormalization(4, axis=1, scale=False), (N, 4, N, N, N), 5),
    (Concatenate(), [FRAMES, (N, N, N, 3)], 5),
    (Concatenate(axis=1), [SEQUENCES, SEQUENCES], 5),
    *((layer, FRAMES, 7) for layer in made(
        Conv2D, {"activation": "relu"}, {"kernel_size": (2, 4), "stride": 2, "activation": "softmax"},
        {"padding": ((9, 9), (1, 2)), "padding_mode": "circular"}, {"dilation": (1, 2), "use_bias": False},
        {"stride": 2, "padding_mode": "circular"}, **CONV,
    )),
    (Conv2D(padding="valid", stride=(2, 1), groups=2, **CONV), SEQUENCES, 7),
    (Conv2D(padding=((1, 0), (2, 1)), dilation=(2, 1), activation="silu", **CONV, **FIRST), (N, 4, N, N), 7),
    (Conv2D(stride=2, padding_mode="circular", activation="softmax", **CONV, **FIRST), CHANNELS_FIRST, 7),
    (Conv2D(stride=3, padding=2, **CONV), (N, 7, 8, 4), 7),
    (Conv2D(stride=(3, 2), **CONV), (N, 7, 8, 4), 7),
    (Conv3D(4, 6, (2, 3, 3), "same", groups=2, activation="softmax", **REF), SEQUENCES, 5),
    (Conv3D(4, 2, (3, 2, 3), "same", (2, 1, 2), padding_mode="circular", **FIRST, **REF), (N, 4, N, N, N), 5),
    (Conv3D(4, 2, 2, ((1, 0), (0, 1), (1, 1)), dilation=(2, 1, 1), **REF), SEQUENCES, 5),
    *((layer, FRAMES, 5) for layer in made(
        Conv2DTranspose, {"stride": 2, "activation": "tanh"}, {"kernel_size": 2, "padding": "valid", "stride": 3},
        {"padding": 1, "stride": 2, "output_padding": 1}, {"padding": ((0, 1), (2, 0)), "stride": (1, 3)},
        {"stride": 2, "output_padding": (1, 0)}, {"padding": "valid", "dilation": 2}, **CONV,
    )),
    (Conv2DTranspose(stride=2, activation="softmax", **CONV | {"kernel_size": 4}, **FIRST), CHANNELS_FIRST, 5),
    (Conv3DTranspose(4, 3, (2, 3, 3), "same", (2, 1, 2), **REF), SEQUENCES, 4),
    (Conv3DTranspose(4, 3, 3, 1, 2, output_padding=1, **FIRST, **REF), (N, 4, N, N, N), 4),
    (Cropping2D(((1, 0), (2, 1))), SEQUENCES, 6),
    (Cropping2D(1, **FIRST), CHANNELS_FIRST, 6),
    (Cropping3D(((1, 0), (0, 2), (1, 1))), SEQUENCES, 6),
    (Dense(4, 5, "softmax"), (N, 4), 5),
    (Dense(4, 5, "mish", use_bias=False), SEQUENCES, 5),
    (DepthToSpace(2), FRAMES, 5),
    (DepthToSpace((1, 2), mode="CRD", **FIRST), CHANNELS_FIRST, 5),
    (DepthwiseConv2D(4, 3, stride=2, depth_multiplier=2), SEQUENCES, 7),
    (DepthwiseConv2D(4, (3, 2), 1, dilation=2, activation="relu6", use_bias=False, **FIRST), CHANNELS_FIRST, 7),
    (Dropout(0.5), FRAMES, 5),
    (Flatten(), (N, 3, 2, 4), 5),
    (Flatten(), FRAMES, 5),
    (GaussianNoise(0.5), FRAMES, 5),
    *((kind(**options), shape, 5) for kind in (GlobalAveragePooling, GlobalMaxPooling) for options, shape in [
        ({}, SEQUENCES), ({"keep_dims": True, **FIRST}, CHANNELS_FIRST), ({"channel_axis": 1}, (N, 4, N, N, N))]),
    *((kind(**o), shape, 5) for kind in (GlobalAveragePooling2D, GlobalMaxPooling2D)
      for o, shape in [({}, FRAMES), ({"keep_dims": True}, SEQUENCES), (FIRST, CHANNELS_FIRST)]),
    *((kind(**o), shape, 5) for kind in (GlobalAveragePooling3D, GlobalMaxPooling3D)
      for o, shape in [({}, SEQUENCES), (FIRST, (N, 4, N, N, N))]),
    (GroupNormalization(4, 2), SEQUENCES, 5),
    (GroupNormalization(4, 1, center=False, **FIRST), CHANNELS_FIRST, 5),
    (InstanceNormalization(4, scale=False), FRAMES, 5),
    (LayerNormalization(4), SEQUENCES, 5),
    (LayerNormalization((3, 4), center=False), (N, N, 3, 4), 5),
    (LearntInput(4), SEQUENCES, 5),
    (LearntInput(4, **FIRST), CHANNELS_FIRST, 5),
    (LeakyReLU(0.2), FRAMES, 5),
    (LeakyReLU(0.0), FRAMES, 5),
    (Masking(0.0), (N, N, 4), 5),
    (Maximum(), [FRAMES, FRAMES], 5),
    *((layer, FRAMES, 8) for layer in made(
        MaxPooling2D, {}, {"padding": "same", "stride": 2}, {"padding": 1, "stride": 1},
        {"padding": ((0, 1), (1, 0)), "stride": 2, "ceil_mode": True}, {"stride": 4, "ceil_mode": True},
        {"pool_size": (3, 1), "padding": "same", "stride": 2}, **{"pool_size": 3}, **REF,
    )),
    (MaxPooling2D(2, **FIRST, **REF), CHANNELS_FIRST, 8),
    (MaxPooling3D((2, 2, 2), 1, padding="same", **REF), SEQUENCES, 5),
    (MaxPooling3D((3, 2, 2), ceil_mode=True, **FIRST, **REF), (N, 4, N, N, N), 5),
    (MaxPooling3D(2, return_indices=True, **REF), SEQUENCES, 5),
    (MaxPooling3D((1, 3, 2), 1, padding="same", return_indices=True, **FIRST, **REF), (N, 4, N, N, N), 5),
    (Minimum(), [FRAMES, FRAMES, (N, 1, 1, 4)], 5),
    (Multiply(), [FRAMES, FRAMES, FRAMES], 5),
    (PReLU(4), SEQUENCES, 5),
    (PReLU((4, 1, 1)), CHANNELS_FIRST, 5),
    (PReLU(), FRAMES, 5),
    (Permute((3, 1, 2)), FRAMES, 5),
    (PixelShuffle(2), FRAMES, 5),
    (PixelUnshuffle((3, 2)), FRAMES, 8),
    (ReLU(), FRAMES, 5),
    (ReLU(0.8), FRAMES, 5),
    (ReLU(1.0, 0.1, 0.3), FRAMES, 5),
    (RepeatVector(3), FRAMES, 5),
    (LearntInput(4), FRAMES, 5),
    (Rescaling((1.0, 2.0, 0.5, 3.0), 0.25), FRAMES, 5),
    (Rescaling(0.5, (1.0, 2.0, 0.5, 3.0)), (N, 4), 5),
    (Reshape((-1, 2)), FRAMES, 5),
    (Reshape((2, 6)), (N, 3, 4), 5),
    (SeparableConv2D(4, 5, 3, stride=2, depth_multiplier=2, activation="elu", **REF), FRAMES, 7),
    (Softmax(), SEQUENCES, 5),
    (SpaceToDepth((2, 3)), SEQUENCES, 8),
    (SpaceToDepth((3, 2), mode="CRD", **FIRST), CHANNELS_FIRST, 8),
    (SpatialDropout2D(0.5), FRAMES, 5),
    (SpatialDropout3D(0.5), SEQUENCES, 5),
    (Subtract(), [FRAMES, (N, N, N, 1)], 5),
    (TimeDistributed(Conv2D(4, 2, 3, stride=2, **REF)), SEQUENCES, 5),
    (TimeDistributed(Dense(4, 3)), (N, N, 4), 5),
    (TimeDistributed(Sequential([Conv2D(4, 2, 3, **REF), GlobalMaxPooling(), Dense(2, 3)])), SEQUENCES, 5),
    (TimeDistributed(ConvLSTM2D(4, 3, 3, return_sequences=False, **REF)), (N, N, N, N, N, 4), 4),
    (TimeDistributionCalculator(0.5, 5), (N, 5, N), 4),
    (UpSampling(2), FRAMES, 5),
    (UpSampling((3, 1)), SEQUENCES, 5),
    (UpSampling((2, 3), "bilinear"), FRAMES, 5),
    (UpSampling((2, 3), "bilinear", align_corners=True), FRAMES, 5),
    (UpSampling2D((1, 2), **FIRST), CHANNELS_FIRST, 5),
    (UpSampling3D((2, 1, 3)), SEQUENCES, 4),
    (UpSampling3D(2, "trilinear", **FIRST), (N, 4, N, N, N), 4),
    (ZeroPadding2D(((1, 0), (2, 1))), SEQUENCES, 5),
    (ZeroPadding3D((1, 0, 2), **FIRST), (N, 4, N, N, N), 5),
    (LSTM(4, 3, **REF), (N, N, 4), 5),
    (LSTM(4, 3, "softsign", use_bias=False, return_sequences=False, return_state=True, go_backwards=True, **REF),
     (N, N, 4), 5),
    (GRU(4, 3, return_state=True), (N, N, 4), 5),
    (GRU(4, 3, "relu", reset_after=False, return_sequences=False, go_backwards=True), (N, N, 4), 5),
    (GRU(4, 3, use_bias=False, go_backwards=True), (N, N, 4), 5),
    (Sequential([Embedding(9, 4), LSTM(4, 3, **REF)]), (N, N), 5),
    (ConvLSTM2D(4, 3, 3, **REF), SEQUENCES, 5),
)  # fmt: skip


def drawn(layer, seed=0, scale=0.3):
    """A layer with parameters that are all different, variances above 0."""
    rng = np.random.default_rng(seed)
    new = {}
    for name, old in layer.parameters.items():
        array = rng.normal(scale=scale, size=old.shape)
        new[name] = np.abs(array) + 0.5 if "variance" in name else array
    layer.set_parameters(new)
    return layer


def sized(shape, batch, base):
    """A shape with sizes for the unknown axes: the batch, then others."""
    return tuple(n if n is not None else base + axis % 2 if axis else batch for axis, n in enumerate(shape))


def values(shape, layer, batch, base):
    """Inputs of a layer, one or a list."""
    seeds = iter(range(9))
    reads = "".join(type(part).__name__ for part in fastclstm.layers.container.parts(layer))

    def draw(known):
        x = normal(*sized(known, batch, base), seed=next(seeds))
        return np.clip(np.abs(4 * x), 0, 8).astype(np.int64) if "Embedding" in reads else np.float32(x)

    return mapped_shapes(draw, shape)


class Exported:
    """A model written to a file, checked, and run by ONNX Runtime."""

    def __init__(self, model, folder, **options):
        onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        self.path = folder / "model.onnx"
        to_onnx(model, self.path, **options)
        self.proto = onnx.load(self.path)
        onnx.checker.check_model(self.proto, full_check=True)
        self.kinds = [node.op_type for node in self.proto.graph.node]
        quiet = runtime.SessionOptions()
        quiet.log_severity_level, quiet.intra_op_num_threads = 3, 1
        self.session = runtime.InferenceSession(self.path, quiet)
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]

    def __call__(self, *arrays, **named):
        feeds = dict(zip(self.inputs, arrays, strict=False)) | named
        return self.session.run(None, feeds)


def same(made, expected, tolerance=1e-5):
    expected = list(leaves(expected))
    assert len(made) == len(expected)
    for a, b in zip(made, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_every_layer_is_exported_or_refused():
    cells = {f"{name}Cell" for name in ("ConvLSTM2D", "ConvLSTM3D", "ConvGRU2D", "ConvRNN2D")}
    exported = {type(case.values[0]).__name__ for case in LAYERS} | cells | {"UpSampling2D", "Embedding"}
    elsewhere = {"ConvGRU2D", "ConvRNN2D", "ConvLSTM1D", "ConvLSTM3D"}  # test_other_cells_and_frames
    assert (exported | elsewhere) - {"Sequential"} == set(layers.__all__) - REFUSED
    in_table = {kind.__name__ for kind in TABLE} | cells | {"UpSampling2D"}
    assert in_table == (set(layers.__all__) - REFUSED) | {"Sequential", "Model"}


@pytest.mark.parametrize(("layer", "shape", "base"), LAYERS)
def test_a_layer_is_in_onnx_what_it_is_here(layer, shape, base, tmp_path):
    pytest.importorskip("onnxruntime")
    run = Exported(drawn(layer), tmp_path, input_shape=shape)
    for batch, larger in ((2, 0), (3, 6)):  # blocks of 2 and 3 pixels fill both
        x = values(shape, layer, batch, base + larger)
        same(run(*x) if isinstance(x, list) else run(x), layer(x))


CELLS = [
    {"num_layers": 3, "out_channels": [3, 2, 3], "leaky_relu_slope": 0.1, "return_sequences": False},
    {"num_layers": 2, "stride": 2, "kernel_size": [3, (2, 4)], "recurrent_activation": "hard_sigmoid"},
    {"bidirectional": True, "num_layers": 2, "leaky_relu_slope": 0.3, "go_backwards": True},
    {"bidirectional": True, "merge_mode": "sum", "return_sequences": False, "num_layers": 2, "return_state": True},
    {"bidirectional": True, "merge_mode": "mul", **FIRST, "go_backwards": True, "return_sequences": False},
    {"bidirectional": True, "merge_mode": "ave", "time_major": True, "return_state": True},
    {"bidirectional": True, "merge_mode": None, **FIRST},
    {"go_backwards": True, "num_layers": 2, "use_bias": False, "time_major": True, **FIRST},
    {"padding": "valid", "recurrent_kernel_size": (5, 2), "dilation": 2, "recurrent_dilation": (2, 1)},
    {"padding": ((2, 0), (1, 1)), "stride": (2, 1), "padding_mode": "circular", "return_state": True},
    {"padding_mode": "circular", "stride": 2, "peephole": "conv", "peephole_size": 2, "recurrent_kernel_size": 9},
    {"padding": 1, "peephole": "channel", "activation": "relu6", "output_activation": "elu", "return_state": True},
    {"peephole": "elementwise", "frame_size": (5, 6), "stride": (1, 2), "kernel_size": 2},
    {"peephole": "conv", "use_bias": False, "num_layers": 2},
    {"normalization": "layer", "peephole": "channel", "cell_clip": 0.5, "num_layers": 2},
    {"normalization": Normalization("group", groups=2, separate=True)},
    {"normalization": Normalization("batch", separate=True), "bidirectional": True},
    {"normalization": "batch"},
    {"normalization": Normalization("layer", elementwise=True, separate=True), "frame_size": (5, 6), "use_bias": False},
    {"normalization": Normalization("layer", elementwise=True), "frame_size": (5, 6)},
]  # fmt: skip
IDS = ["-".join(key for key in case if key != "return_state") for case in CELLS]


def lstm(**options):
    return drawn(ConvLSTM2D(**{"in_channels": 4, "out_channels": 3, "kernel_size": 3, **REF} | options))


def sequences(layer, batch, steps, height, width, seed=0):
    """Frames in a layer's layout, and a mask of theirs, one sample of which begins late and one is empty."""
    height, width = layer.frame_size or (height, width)
    x, valid = np.float32(normal(batch, steps, height, width, 4, seed=seed)), normal(batch, steps, seed=seed + 1) > -0.4
    valid[0, :2], valid[1:2], valid[-1, -1] = False, False, False
    x = np.moveaxis(x, -1, 2) if layer.data_format == "channels_first" else x
    return (np.ascontiguousarray(x.swapaxes(0, 1)), valid.T.copy()) if layer.time_major else (x, valid)


@pytest.mark.parametrize("options", CELLS, ids=IDS)
def test_a_convlstm_is_one_scan_whatever_its_options(options, tmp_path):
    pytest.importorskip("onnxruntime")
    layer = lstm(**options)
    run = Exported(layer, tmp_path)
    assert run.kinds.count("Scan") == (layer.num_layers if layer.bidirectional else 1)
    for sizes in ((2, 4, 7, 6), (1, 1, 5, 8), (3, 6, 8, 5)):
        x, _ = sequences(layer, *sizes)
        same(run(x), layer(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ConvGRU2D(4, 3, 3, num_layers=2, go_backwards=True, return_state=True, leaky_relu_slope=0.1, **REF),
         SEQUENCES),
        (ConvGRU2D(4, 4, 3, reset_after=False, normalization=Normalization("group", groups=6), stride=2,
                   bidirectional=True, **FIRST, **REF), CHANNELS_FIRST),
        (ConvGRU2D(4, 3, 3, reset_after=False, use_bias=False, recurrent_kernel_size=5, **REF), SEQUENCES),
        (ConvRNN2D(4, 3, 3, normalization="group", padding_mode="circular", return_sequences=False, **REF), SEQUENCES),
        (ConvLSTM1D(4, 3, 3, num_layers=2, peephole="channel", stride=2, return_state=True, **REF), (N, N, N, 4)),
        (ConvLSTM1D(4, 3, 2, 1, bidirectional=True, return_sequences=False, **FIRST, **REF), (N, N, 4, N)),
        (ConvLSTM3D(4, 3, (2, 3, 3), normalization="group", stride=(1, 2, 1), return_state=True, **REF),
         (N, N, N, N, N, 4)),
        (ConvLSTM3D(4, 2, 3, bidirectional=True, merge_mode="sum", **FIRST, **REF), (N, N, 4, N, N, N)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_other_cells_and_frames(layer, shape, tmp_path):
    pytest.importorskip("onnxruntime")
    run = Exported(drawn(layer), tmp_path, states=True)
    assert run.kinds.count("Scan") == 1
    returned, layer.return_state = layer.return_state, True
    for batch, base in ((2, 4), (3, 6)):
        x = values(shape, layer, batch, base)
        _, zeros = layer(x)
        states = [tuple(np.float32(normal(*array.shape, seed=n)) for n, array in enumerate(cell)) for cell in zeros]
        y, after = layer(x, initial_state=states)
        same(run(x, *leaves(states)), [y, after, after] if returned else [y, after])


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("options", [CELLS[n] for n in (0, 2, 3, 4, 5, 7, 9)], ids=str)
def test_masks_of_a_convlstm(options, zero, tmp_path):
    pytest.importorskip("onnxruntime")
    layer = lstm(zero_output_for_mask=zero, **options)
    run = Exported(layer, tmp_path, mask=True)
    assert run.inputs == ["x", "mask"]
    for sizes in ((3, 5, 7, 6), (2, 3, 5, 8)):
        x, valid = sequences(layer, *sizes)
        same(run(x, valid), layer(x, mask=valid))
        x[np.broadcast_to(~valid[(..., *[None] * 3)], x.shape)] = np.nan  # which nobody sees
        same(run(x, valid), layer(x, mask=valid))


@pytest.mark.parametrize(
    "layer", [LSTM(4, 3, go_backwards=True, return_state=True, **REF), GRU(4, 3)], ids=["LSTM", "GRU"]
)
def test_masks_and_states_of_recurrent_layers(layer, tmp_path):
    pytest.importorskip("onnxruntime")
    run = Exported(drawn(layer), tmp_path, mask=True, states=True)
    x, valid = np.float32(normal(3, 6, 4)), normal(3, 6, seed=5) > 0
    valid[0, :3] = False
    states = tuple(np.float32(normal(3, 3, seed=n)) for n in range(len(run.inputs) - 2))
    expected = layer(x, mask=valid, initial_state=[states])
    layer.return_state = True
    _, after = layer(x, mask=valid, initial_state=[states])
    same(run(x, valid, *states), [expected, after])


@pytest.mark.parametrize("options", [CELLS[n] for n in (0, 1, 8, 11, 14)], ids=str)
def test_a_stream_is_its_pieces(options, tmp_path):
    pytest.importorskip("onnxruntime")
    layer = lstm(**options | {"return_state": False, "stateful": True})
    run = Exported(layer, tmp_path, states=True)
    x, _ = sequences(layer, 2, 7, 8, 7)
    layer.return_state, layer.stateful = True, False
    _, states = layer(x[:, :1])
    names = [f"{cell}.{name}" for cell in range(len(layer.cells)) for name in "hc"]
    assert (run.inputs, run.outputs) == (["x", *names], ["output", *(f"{name}.next" for name in names)])
    feeds = {name: np.zeros_like(state) for name, state in zip(names, leaves(states), strict=True)}
    for part in np.split(x, [1, 4], 1):
        _, *after = made = run(x=part, **feeds)
        feeds = dict(zip(names, after, strict=True))
    output, states = layer(x)
    output = output[:, 4:] if layer.return_sequences else output
    same(made, [output, states])
    one = Exported(layer, tmp_path, states=True, input_shape=(N, 1, N, N, 4))
    assert "Scan" not in one.kinds  # of one frame no loop is made
    y, states = layer(x[:, :1])
    same(one(x[:, :1], *(np.zeros_like(state) for state in leaves(states))), [y, states, states])


@pytest.mark.parametrize(
    ("cell", "frame"),
    [
        (ConvLSTM3DCell(4, 3, 3, **REF), (3, 4, 5)), (ConvRNN2DCell(4, 3, 3, **REF), (4, 5)),
        (ConvGRU2DCell(4, 3, 3, reset_after=False, **REF), (4, 5)), (ConvGRU2DCell(4, 3, 3, **REF), (4, 5)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_step_of_other_cells(cell, frame, tmp_path):
    pytest.importorskip("onnxruntime")
    run = Exported(drawn(cell), tmp_path)
    arrays = [np.float32(normal(2, *frame, C, seed=C)) for C in (4, *[3] * len(cell._state_names))]
    same(run(*arrays), cell(*arrays))


def test_a_cell_is_one_step(tmp_path):
    pytest.importorskip("onnxruntime")
    cell = drawn(ConvLSTM2DCell(4, 3, 3, stride=2, peephole="channel", **FIRST, **REF))
    run = Exported(cell, tmp_path)
    x, h, c = (np.float32(normal(2, *shape)) for shape in ((4, 7, 6), (3, 4, 3), (3, 4, 3)))
    assert (run.inputs, run.outputs) == (["x", "h", "c"], ["h.next", "c.next"])
    same(run(x, h, c), cell(x, h, c))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_cell_of_any_activation(name, tmp_path):
    pytest.importorskip("onnxruntime")
    gates = "sigmoid" if name == "exponential" else name  # else numbers grow beyond all bounds
    cell = drawn(ConvLSTM2DCell(4, 3, 3, activation=name, recurrent_activation=gates, **REF))
    x, h, c = (np.float32(0.3 * normal(2, 5, 4, C, seed=C)) for C in (4, 3, 3))
    same(Exported(cell, tmp_path)(x, h, c), cell(x, h, c))


# Models


def encoder_decoder():
    """States handed on, a mask that is an input, lengths, two inputs, outputs by name."""
    frames, later = Input((N, N, N, 1), name="frames"), Input((N, N, N, 2), name="later")
    valid, counts = Input((N,), name="valid"), Input(batch_shape=(N,), name="counts")
    encoder = ConvLSTM2D(1, 3, 3, return_state=True, return_sequences=False, num_layers=2, seed=0, **REF)
    last, states = encoder(frames, mask=valid)
    decoder = ConvLSTM2D(2, 3, 3, num_layers=2, seed=1, zero_output_for_mask=True, **REF)
    y = decoder(later, initial_state=states, lengths=counts)
    head = Conv2D(3, 1, 1, seed=2, **REF)
    return Model([frames, later, valid, counts], {"next": head(y), "now": head(last), "again": states[0][0]})


def nested():
    """A shared layer, a skip, a model within one, called twice, and an output that is an input."""
    x = Input((N, N, 3), name="x")
    inner = Model(x, Add()([Conv2D(3, 3, 3, activation="tanh", seed=0, **REF)(x), x]), name="inner")
    a, b = Input((N, N, N, 3), name="a"), Input((N, N, N, 3), name="b")
    block = TimeDistributed(inner, name="block")
    shared = ConvLSTM2D(3, 3, 3, seed=1, **REF)
    y = Concatenate()([shared(block(block(a))), shared(block(b))])
    chain = Sequential([Conv2D(6, 4, 3, stride=2, seed=2, **REF), LeakyReLU(0.1), ConvLSTM2D(4, 2, 3, seed=3, **REF)])
    return Model([a, b], [chain(y), a])


def classifier():
    """From frames to classes, with sizes that a Dense asks for."""
    return Sequential([
        ConvLSTM2D(1, 3, 3, return_sequences=False, seed=0, **REF), BatchNormalization(3), MaxPooling2D(2, **REF),
        Flatten(), Dense(24, 3, "softmax", seed=1),
    ])  # fmt: skip


def test_a_graph_with_states_masks_and_names(tmp_path):
    pytest.importorskip("onnxruntime")
    model = encoder_decoder()
    run = Exported(drawn(model), tmp_path)
    assert run.inputs == ["frames", "later", "valid", "counts"]
    assert run.outputs == ["next", "now", "again"]
    for B, T, S, H, W in ((2, 4, 3, 5, 6), (3, 2, 5, 4, 7)):
        given = {
            "frames": np.float32(normal(B, T, H, W, 1)), "later": np.float32(normal(B, S, H, W, 2)),
            "valid": normal(B, T, seed=4) > 0, "counts": np.arange(B) % (S + 1),
        }  # fmt: skip
        same(run(**given), model(given))


def test_nested_and_shared_layers(tmp_path):
    pytest.importorskip("onnxruntime")
    model = nested()
    run = Exported(drawn(model), tmp_path)
    assert run.inputs == ["a", "b"]
    assert len(set(run.outputs) | {"a", "b"}) == 4
    for sizes in ((2, 3, 5, 6), (1, 2, 7, 4)):
        a, b = (np.float32(normal(*sizes, 3, seed=n)) for n in range(2))
        same(run(a, b), model([a, b]))
    streams = Exported(model, tmp_path, states=True)
    assert len(streams.inputs) == len(streams.outputs) == 2 + 2 * 3  # the shared layer runs twice


def test_a_mask_goes_to_every_convlstm_of_a_model(tmp_path):
    pytest.importorskip("onnxruntime")
    layers_ = [ConvLSTM2D(1, 2, 3, seed=0, go_backwards=True, **REF), Conv2D(2, 2, 3, seed=1, **REF)]
    model = Sequential([*layers_, ConvLSTM2D(2, 2, 3, seed=2, **REF)])
    run = Exported(model, tmp_path, mask=True)
    x, valid = np.float32(normal(3, 5, 4, 6, 1)), normal(3, 5, seed=3) > 0
    same(run(x, valid), model(x, mask=valid))


def test_known_sizes(tmp_path):
    pytest.importorskip("onnxruntime")
    model = classifier()
    run = Exported(drawn(model), tmp_path, input_shape=[N, N, 8, 4, 1])
    for B, T in ((2, 3), (1, 5)):
        x = np.float32(normal(B, T, 8, 4, 1))
        same(run(x), model(x))


def test_transposes_cancel(tmp_path):
    """One before the first convolution, one behind the last; none between them and what is element by element."""
    pytest.importorskip("onnxruntime")
    body = [Conv2D(4, 4, 3, seed=0, **REF), LeakyReLU(0.1), BatchNormalization(4), MaxPooling2D(2, **REF), PReLU(4)]
    run = Exported(drawn(Sequential([*body, UpSampling(2), Conv2D(4, 2, 3, seed=0, **REF)])), tmp_path)
    assert run.kinds.count("Transpose") == 2
    first = [Conv2D(4, 4, 3, seed=0, **FIRST, **REF), Activation("tanh"), ConvLSTM2D(4, 2, 3, seed=1, **FIRST, **REF)]
    assert Exported(Sequential(first), tmp_path, input_shape=(N, N, 4, N, N)).kinds.count("Transpose") == 2  # of time


FORECASTERS = [
    EncoderForecaster(1, (3, 2), 3, seed=0, **REF),
    EncoderForecaster(2, 3, 3, patch_size=2, inputs="nothing", cell="ConvGRU2D", seed=0, **FIRST, **REF),
    EncoderForecaster(1, (3, 2), 3, inputs="learnt", strides=(2, 2), seed=0, **REF),
    EncoderForecaster(1, 2, 3, inputs="zeros", peephole="elementwise", frame_size=(8, 4), seed=0, **REF),
    MultiscaleForecaster([Conv2D(1, 2, 3, seed=0, **REF), ConvLSTM2D(2, 3, 3, seed=1, **REF)], None,
                         [Conv2D(3, 1, 1, seed=2, **REF)], inputs="frames", reads="last"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FORECASTERS)))
def test_forecasters(number, tmp_path):
    pytest.importorskip("onnxruntime")
    model = drawn(FORECASTERS[number])
    run = Exported(model, tmp_path)
    assert (run.inputs, run.outputs) == (["frames", "steps"], ["output"])
    first = model.data_format == "channels_first"
    sizes = ((2, 4, 3, 8, 4), (1, 2, 5, 8, 4)) if number == 3 else ((2, 4, 3, 8, 4), (1, 2, 5, 12, 8))
    for B, T, steps, H, W in sizes:
        x = np.float32(normal(B, T, H, W, model.in_channels))
        x = np.ascontiguousarray(np.moveaxis(x, -1, 2)) if first else x
        same(run(x, np.array([steps])), model.forecast(x, steps))


def test_a_forecaster_reads_a_stream(tmp_path):
    pytest.importorskip("onnxruntime")
    model = EncoderForecaster(1, (3, 2), 3, seed=0, **REF)
    run = Exported(drawn(model), tmp_path, states=True)
    assert run.inputs == ["frames", "steps", *(f"encoder.conv_lstm2d.{n}.{name}" for n in range(2) for name in "hc")]
    x, steps = np.float32(normal(2, 5, 6, 4, 1)), np.array([3])
    zeros = [np.zeros((2, 6, 4, F), np.float32) for F in (3, 3, 2, 2)]
    _, *states = run(x[:, :2], steps, *zeros)
    made, *states = run(x[:, 2:], steps, *states)
    same([made, *states], [model.forecast(x, 3), model.encode(x)])


# dtypes and runtimes


def test_float64_by_the_reference_of_onnx(tmp_path):
    onnx, onnx_reference = pytest.importorskip("onnx"), pytest.importorskip("onnx.reference")
    layer = lstm(dtype="float64", num_layers=2, normalization="group", activation="selu")
    model = Sequential([layer, Conv2D(3, 2, 3, stride=2, seed=0, dtype="float64", **REF)])
    to_onnx(model, tmp_path / "model.onnx")
    x = normal(1, 2, 4, 3, 4)
    made = onnx_reference.ReferenceEvaluator(onnx.load(tmp_path / "model.onnx")).run(None, {"x": x})
    same(made, model(x), 1e-7)
    run = Exported(model, tmp_path, dtype="float32")
    same(run(np.float32(x)), np.float32(model(x)))


def test_a_forecaster_in_openvino(tmp_path):
    openvino = pytest.importorskip("openvino")
    model = drawn(EncoderForecaster(1, (3, 2), 3, seed=0, **REF))
    to_onnx(model, tmp_path / "model.onnx")
    run = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = np.float32(normal(2, 4, 6, 5, 1))
    same([run({"frames": x, "steps": np.array([3])})[0]], [model.forecast(x, 3)])


@pytest.mark.parametrize("options", [CELLS[n] for n in (1, 2, 3, 9, 14)], ids=str)
def test_openvino(options, tmp_path):
    openvino = pytest.importorskip("openvino")
    layer = lstm(**options)
    to_onnx(layer, tmp_path / "model.onnx", mask=True)
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", hints)
    for sizes in ((2, 4, 7, 6), (3, 3, 8, 5)):
        x, valid = sequences(layer, *sizes)
        made = model({"x": x, "mask": valid})
        same([made[n] for n in range(len(made))], layer(x, mask=valid))


# Refusals


class Own(LeakyReLU):
    """A subclass, which might compute something else."""


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [
        (Sequential([Conv2D(1, 1, 3), TimeDistributed(Own())]), {}, NotImplementedError,
         "layer 1.layer, Own has no counterpart"),
        (Sequential([Flatten(), Dense(3, 2)]), {}, ValueError, "Flatten takes .* shapes; give input_shape"),
        (classifier(), {}, ValueError, "since in_features is 24"),
        (Dense(3, 2, (np.sin, np.cos)), {}, ValueError, "'sin' is a function of yours.*take one with a name"),
        (ConvLSTM2D(1, 1, 3, stateful=True), {}, ValueError, "give states=True"),
        (GRU(1, 1, stateful=True), {}, ValueError, "stateful"),
        (MaxPooling3D(2, ceil_mode=True, return_indices=True), {"input_shape": SEQUENCES}, NotImplementedError,
         "leave one"),
        (MaxPooling3D(1, 2, padding="same", return_indices=True), {"input_shape": SEQUENCES}, NotImplementedError,
         "give input_shape"),
        (Dense(3, 2), {"mask": True}, ValueError, "Dense has none"),
        (Dense(3, 2), {"states": 1}, ValueError, "states"),
        (Dense(3, 2), {"dtype": "float16"}, ValueError, "dtype"),
        (Dense(3, 2), {"input_shape": ("batch", 3)}, TypeError, "input_shape must be a tuple of sizes"),
        (Dense(3, 2), {"input_shape": 5}, TypeError, "input_shape must be a tuple of sizes"),
        (Dense(3, 2), {"input_shape": (N, 4)}, ValueError, "in_features is 3"),
        (Conv2D(1, 1, 3)(Input((8, 8, 1))), {}, TypeError, "must be a layer or a model of layers, got Symbol"),
        (encoder_decoder(), {"input_shape": [(1, 2, 3, 4, 5)]}, ValueError, "input_shape"),
        (EncoderForecaster(1, 2, 3, inputs="noise"), {}, NotImplementedError, "'noise' are drawn anew"),
        (EncoderForecaster(1, 2, 3), {"mask": True}, ValueError, "mask is for recurrent layers"),
        (FORECASTERS[-1], {"states": True}, ValueError, "reads the last frame twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_told_before_a_file_is_touched(model, options, error, match, tmp_path):
    pytest.importorskip("onnx")
    (tmp_path / "model.onnx").write_text("before")
    with pytest.raises(error, match=match):
        to_onnx(model, tmp_path / "model.onnx", **options)
    assert (tmp_path / "model.onnx").read_text() == "before"
    assert list(tmp_path.iterdir()) == [tmp_path / "model.onnx"]


def test_an_error_says_where_it_came_up(tmp_path):
    pytest.importorskip("onnx")
    model = Sequential([Conv2D(1, 1, 3), Activation((np.sin, np.cos))])
    with pytest.raises(ValueError, match="sin") as caught:
        to_onnx(model, tmp_path / "model.onnx")
    assert "in layer 1, Activation" in caught.value.__notes__


def test_a_call_that_trains_is_refused(tmp_path):
    pytest.importorskip("onnx")
    x = Input((4, 4, 1))
    with pytest.raises(ValueError, match="training=True"):
        to_onnx(Model(x, Dropout(0.5)(x, training=True)), tmp_path / "model.onnx")


def test_more_weights_than_a_file_holds_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setattr(importlib.import_module("fastclstm.convert.onnx"), "_LARGEST", 300)
    to_onnx(Dense(8, 8), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"the weights take .* GiB, but a file of ONNX holds less than 2"):
        to_onnx(ConvLSTM2D(1, 2, 3), tmp_path / "model.onnx")


def test_onnx_is_imported_only_when_asked_for():
    code = "import sys\nfrom fastclstm import to_onnx\nassert not {'onnx', 'onnxruntime', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(fastclstm.__file__).parents[1], check=True)


def test_without_onnx_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'fastclstm\[onnx\]'"):
        to_onnx(Dense(3, 2), tmp_path / "model.onnx")


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    pytest.importorskip("onnxruntime")
    example = Path(fastclstm.__file__).parents[1] / "examples" / "export_onnx.py"
    environment = os.environ | {"PYTHONPATH": str(example.parents[1])}
    command = [sys.executable, str(example)]
    told = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert [line[:8] for line in told.splitlines()[-3:]] == ["one of 3", "frame by", "4 sequen"]

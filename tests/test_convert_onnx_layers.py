"""to_onnx: every layer by itself, in ONNX Runtime against our own numbers.

What is exported has axes of unknown size, and is run with two sets of sizes.
"""

import pytest
from exported_onnx import CHANNELS_FIRST, FIRST, FRAMES, REF, SEQUENCES, Exported, N, agree, drawn, values

from fastclstm import layers
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
    ConvLSTM2D,
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
from fastclstm.models import Sequential
from fastclstm.nn.activations import TABLE as ACTIVATIONS

REFUSED = {"Input", "Layer"}
"""What is no layer to be exported: the function that makes a symbol, and the class of all layers."""

CONV = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | REF


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
        agree(run(*x) if isinstance(x, list) else run(x), layer(x))

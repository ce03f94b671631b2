import numpy as np
import pytest
from layer_checks import (
    check_against_torch,
    check_gradients,
    check_laws,
    check_penalties,
    check_saving,
    close,
    equal,
    keras_values,
    normal,
)

from fastclstm import functional
from fastclstm.layers import Conv2DTranspose, Conv3DTranspose

FIXED = {"dtype": "float64", "seed": 0, "bias_initializer": "random_normal"}


@pytest.fixture(params=["reference", "cpu"])
def engine(request):
    return request.param


CASES = [
    (Conv2DTranspose, {}, (2, 5, 6, 2)),
    (Conv2DTranspose, {"stride": 2, "activation": "tanh"}, (2, 2, 3, 4, 2)),
    (Conv2DTranspose, {"stride": (2, 1), "padding": "valid", "activation": "softmax"}, (2, 5, 3, 2)),
    (Conv2DTranspose, {"stride": 2, "padding": 1, "output_padding": 1, "use_bias": False}, (2, 2, 5, 3, 2)),
    (Conv2DTranspose, {"dilation": 2, "padding": ((1, 2), (0, 2)), "kernel_size": (2, 3)}, (2, 5, 6, 2)),
    (Conv2DTranspose, {"data_format": "channels_first", "stride": 2}, (2, 3, 2, 4, 3)),
    (Conv3DTranspose, {}, (2, 3, 4, 3, 2)),
    (Conv3DTranspose, {"stride": (2, 1, 2), "activation": "sigmoid", "kernel_size": (1, 3, 2)}, (2, 2, 3, 2, 2)),
    (Conv3DTranspose, {"data_format": "channels_first", "padding": "valid", "activation": "softmax"}, (2, 2, 2, 3, 2)),
    (Conv3DTranspose, {"stride": 2, "padding": 1, "output_padding": (0, 1, 0), "use_bias": False}, (2, 2, 3, 2, 2)),
]


@pytest.mark.parametrize(("kind", "options", "shape"), CASES, ids=str)
def test_gradients_and_laws(kind, options, shape, engine):
    layer = kind(**{"in_channels": 2, "out_channels": 3, "kernel_size": 3} | options, **FIXED, engine=engine)
    check_gradients(layer, normal(*shape))
    check_laws(layer, normal(*shape))


def test_numbers_are_those_of_functional(engine):
    x, options = normal(2, 3, 4, 5, 2), {"output_padding": 1, "padding": 1, "engine": engine}
    flat = Conv2DTranspose(2, 4, 3, stride=2, **options, **FIXED)
    expected = functional.conv2d_transpose(x.reshape(6, 4, 5, 2), flat.kernel, flat.bias, strides=2, **options)
    equal(flat(x), expected.reshape(2, 3, *expected.shape[1:]))
    deep = Conv3DTranspose(2, 4, 3, stride=2, activation="relu", **options, **FIXED)
    equal(deep(x), np.maximum(functional.conv3d_transpose(x, deep.kernel, deep.bias, strides=2, **options), 0))


def test_channels_first_is_the_same_moved(engine):
    options = FIXED | {"activation": "tanh", "engine": engine, "stride": 2}
    x = normal(2, 3, 3, 4, 2)
    for kind, axis in ((Conv2DTranspose, 2), (Conv3DTranspose, 1)):
        last, first = kind(2, 4, 3, **options), kind(2, 4, 3, data_format="channels_first", **options)
        y = last(x, training=True)
        close(first(np.moveaxis(x, -1, axis), training=True), np.moveaxis(y, -1, axis))
        close(first.backward(np.moveaxis(y, -1, axis)), np.moveaxis(last.backward(y), -1, axis))
        close(first.get_gradients()["kernel"], last.get_gradients()["kernel"])


@pytest.mark.torch
@pytest.mark.parametrize(("size", "padding", "stride", "extra", "dilation"), [
    (4, 1, 2, 0, 1), (3, 1, 2, 1, 1), (2, 0, 2, 0, 1), (3, 0, 1, 0, 2), (3, 2, 3, 2, 1),
])  # fmt: skip
def test_values_and_gradients_of_torch(engine, size, padding, stride, extra, dilation):
    torch = pytest.importorskip("torch")
    options = {"padding": padding, "stride": stride, "output_padding": extra, "dilation": dilation}
    for kind, name, shape, axes in (
        (Conv2DTranspose, "conv_transpose2d", (2, 3, 5, 4), (3, 2, 0, 1)),
        (Conv3DTranspose, "conv_transpose3d", (2, 3, 3, 4, 3), (4, 3, 0, 1, 2)),
    ):
        layer = kind(3, 4, size, data_format="channels_first", engine=engine, **options, **FIXED)
        function = lambda x, w, b, name=name: getattr(torch.nn.functional, name)(x, w, b, **options)  # noqa: E731
        weights = ("kernel", lambda kernel, axes=axes: np.ascontiguousarray(kernel.transpose(axes)))
        check_against_torch(layer, normal(*shape), function, weights, ("bias", np.array))


@pytest.mark.keras
@pytest.mark.parametrize(("size", "stride", "padding", "dilation"), [
    (2, 2, "same", 1), (4, 2, "same", 1), (4, 2, "valid", 1), (3, 1, "same", 1), (3, 1, "same", 2), (5, 3, "valid", 1),
])  # fmt: skip
def test_values_of_keras(engine, size, stride, padding, dilation):
    for kind, shape in ((Conv2DTranspose, (2, 5, 4, 3)), (Conv3DTranspose, (2, 3, 4, 3, 3))):
        layer = kind(3, 4, size, padding, stride, dilation=dilation, activation="tanh", engine=engine, **FIXED)
        x = normal(*shape)
        theirs = keras_values(
            lambda L, kind=kind: getattr(L, kind.__name__)(4, size, stride, padding, dilation_rate=dilation,
                                                           activation="tanh", dtype="float64"),
            x, (layer.kernel, layer.bias),
        )  # fmt: skip
        close(layer(x), theirs)


def test_float32(engine):
    layer = Conv2DTranspose(2, 3, 3, stride=2, seed=0, engine=engine)
    y = layer(normal(2, 5, 5, 2), training=True)
    assert y.dtype == layer.backward(y).dtype == layer.get_gradients()["kernel"].dtype == np.float32
    close(y, Conv2DTranspose(2, 3, 3, stride=2, seed=0, engine=engine, dtype="float64")(normal(2, 5, 5, 2)), 1e-5)


def test_saving(tmp_path):
    layer = Conv2DTranspose(2, 3, (3, 1), stride=2, padding=1, output_padding=(1, 0), seed=0, engine="reference")
    with pytest.raises(ValueError, match="padding 1 leaves nothing of the width: 1 make 1"):
        layer.output_shape((1, 4, 1, 2))
    check_saving(layer, normal(2, 5, 6, 2), tmp_path / "2d")
    layer = Conv3DTranspose(2, 3, 3, ((1, 1), (2, 0), (0, 0)), activation="tanh", seed=0, engine="reference")
    check_saving(layer, normal(2, 3, 5, 6, 2), tmp_path / "3d")


def test_penalties():
    layer = Conv2DTranspose(2, 1, 2, kernel_regularizer="l2", bias_regularizer="l1", kernel_constraint="non_neg",
                            engine="reference", **FIXED)  # fmt: skip
    check_penalties(layer, normal(1, 2, 2, 2), "kernel")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels must be"),
        ({"kernel_size": (1, 2, 3, 4)}, ValueError, "kernel_size must be an integer >= 1 or"),
        ({"stride": 2, "dilation": 2}, ValueError, "cannot both exceed 1"),
        ({"padding": "full"}, ValueError, "padding must be one of"),
        ({"output_padding": 1, "padding": 0}, ValueError, "output_padding 1 of the .* must be smaller than the stride"),
        ({"activation": "max"}, ValueError, "unknown activation 'max'"),
        ({"data_format": "NHWC"}, ValueError, "data_format must be one of"),
        ({"engine": "gpu"}, ValueError, "unknown engine 'gpu'"),
    ],
)
@pytest.mark.parametrize("kind", [Conv2DTranspose, Conv3DTranspose])
def test_wrong_options(kind, options, error, message):
    with pytest.raises(error, match=f"({kind.__name__}: .*{message}|{message})"):
        kind(**{"in_channels": 2, "out_channels": 3, "kernel_size": 3} | options)


def test_wrong_shapes():
    with pytest.raises(
        ValueError, match=r"Conv2DTranspose: x must be \(batch, height, width, channels\) or \(batch, ti"
    ):
        Conv2DTranspose(2, 3, 3)(np.zeros((5, 6, 2)))
    with pytest.raises(ValueError, match="Conv2DTranspose: x has 3 channels but kernel"):
        Conv2DTranspose(2, 3, 3)(np.zeros((1, 5, 6, 3)))
    with pytest.raises(
        ValueError, match=r"Conv3DTranspose: x must be \(batch, channels, time, height, width\), got 4D"
    ):
        Conv3DTranspose(2, 3, 3, data_format="channels_first")(np.zeros((5, 6, 2, 2)))

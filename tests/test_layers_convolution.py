import numpy as np
import pytest
from layer_checks import check_gradients, check_laws, check_saving, close, equal, normal

from fastclstm import functional
from fastclstm.layers import Conv2D, Conv3D

FIXED = {"dtype": "float64", "seed": 0, "bias_initializer": "random_normal"}


@pytest.fixture(params=["reference", "cpu"])
def engine(request):
    return request.param


CASES = [
    (Conv2D, {}, (2, 5, 6, 2)),
    (Conv2D, {"activation": "tanh"}, (2, 2, 5, 6, 2)),
    (Conv2D, {"stride": (2, 1), "padding": "valid", "activation": "softmax"}, (2, 5, 6, 2)),
    (Conv2D, {"dilation": 2, "padding": ((1, 2), (0, 2)), "use_bias": False}, (2, 2, 5, 6, 2)),
    (Conv2D, {"padding_mode": "circular", "kernel_size": (2, 3)}, (2, 5, 6, 2)),
    (Conv2D, {"data_format": "channels_first", "activation": "softmax"}, (2, 2, 5, 6)),
    (Conv2D, {"data_format": "channels_first", "padding": "valid"}, (2, 3, 2, 5, 6)),
    (Conv3D, {}, (2, 4, 5, 6, 2)),
    (Conv3D, {"stride": (2, 1, 2), "activation": "sigmoid", "kernel_size": (1, 3, 2)}, (2, 4, 5, 6, 2)),
    (Conv3D, {"data_format": "channels_first", "padding": "valid", "activation": "softmax"}, (2, 2, 4, 5, 6)),
    (Conv3D, {"padding": (2, 0, 1), "dilation": (2, 1, 1), "use_bias": False}, (2, 4, 5, 6, 2)),
]


@pytest.mark.parametrize(("kind", "options", "shape"), CASES, ids=str)
def test_gradients_and_laws(kind, options, shape, engine):
    layer = kind(**{"in_channels": 2, "out_channels": 3, "kernel_size": 3} | options, **FIXED, engine=engine)
    check_gradients(layer, normal(*shape))
    check_laws(layer, normal(*shape))


def test_numbers_are_those_of_functional(engine):
    x, options = normal(2, 3, 6, 7, 2), {"padding": "valid", "algorithm": "direct", "engine": engine}
    flat = Conv2D(2, 4, 3, stride=2, **options, **FIXED)
    expected = functional.conv2d(x.reshape(6, 6, 7, 2), flat.kernel, flat.bias, strides=2, **options)
    equal(flat(x), expected.reshape(2, 3, *expected.shape[1:]))
    equal(flat(x[:, 1]), flat(x)[:, 1])
    deep = Conv3D(2, 4, (2, 3, 3), activation="relu", **options, **FIXED)
    equal(deep(x), np.maximum(functional.conv3d(x, deep.kernel, deep.bias, **options), 0))


def test_channels_first_is_the_same_moved(engine):
    options = FIXED | {"activation": "tanh", "engine": engine}
    x = normal(2, 3, 5, 6, 2)
    pairs = [(Conv2D, 3, 2), (Conv3D, 3, 1)]
    for kind, size, axis in pairs:
        last, first = kind(2, 4, size, **options), kind(2, 4, size, data_format="channels_first", **options)
        y = last(x, training=True)
        close(first(np.moveaxis(x, -1, axis), training=True), np.moveaxis(y, -1, axis))
        close(first.backward(np.moveaxis(y, -1, axis)), np.moveaxis(last.backward(y), -1, axis))
        for name, gradient in last.get_gradients().items():
            close(first.get_gradients()[name], gradient)


@pytest.mark.torch
@pytest.mark.parametrize(("padding", "stride", "dilation"), [(1, 1, 1), (0, 2, 1), (2, 1, 2)])
def test_values_and_gradients_of_torch(engine, padding, stride, dilation):
    torch = pytest.importorskip("torch")
    options = {"padding": padding, "stride": stride, "dilation": dilation}
    for kind, function, shape, axes in (
        (Conv2D, torch.nn.functional.conv2d, (2, 3, 8, 7), (3, 2, 0, 1)),
        (Conv3D, torch.nn.functional.conv3d, (2, 3, 5, 8, 7), (4, 3, 0, 1, 2)),
    ):
        layer = kind(3, 4, 3, data_format="channels_first", engine=engine, **options, **FIXED)
        x = normal(*shape)
        leaves = [torch.tensor(a.copy(), requires_grad=True) for a in (x, layer.kernel, layer.bias)]
        theirs = function(leaves[0], leaves[1].permute(*axes), leaves[2], **options)
        y = layer(x, training=True)
        close(y, theirs.detach().numpy())
        dy = normal(*y.shape, seed=2)
        theirs.backward(torch.tensor(dy))
        close(layer.backward(dy), leaves[0].grad.numpy(), 1e-11)
        close(layer.get_gradients()["kernel"], leaves[1].grad.numpy(), 1e-11)
        close(layer.get_gradients()["bias"], leaves[2].grad.numpy(), 1e-11)


def test_float32(engine):
    layer = Conv2D(2, 3, 3, seed=0, engine=engine)
    y = layer(normal(2, 5, 5, 2), training=True)
    assert y.dtype == layer.backward(y).dtype == layer.get_gradients()["kernel"].dtype == np.float32
    wide = Conv2D(2, 3, 3, seed=0, engine=engine, dtype="float64")
    close(y, wide(normal(2, 5, 5, 2)), 1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels must be"),
        ({"out_channels": "a"}, TypeError, "out_channels must be"),
        ({"kernel_size": (1, 2, 3, 4)}, ValueError, "kernel_size must be an integer >= 1 or"),
        ({"stride": 2, "dilation": 2}, ValueError, "cannot both exceed 1"),
        ({"padding": "full"}, ValueError, "padding must be one of"),
        ({"padding_mode": "reflect"}, ValueError, "padding_mode must be one of"),
        ({"activation": "max"}, ValueError, "unknown activation 'max'"),
        ({"data_format": "NHWC"}, ValueError, "data_format must be one of"),
        ({"dtype": "float16"}, ValueError, "dtype must be one of"),
        ({"engine": "gpu"}, ValueError, "unknown engine 'gpu'"),
    ],
)
@pytest.mark.parametrize("kind", [Conv2D, Conv3D])
def test_wrong_options(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(**{"in_channels": 2, "out_channels": 3, "kernel_size": 3} | options)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"Conv2D: x must be \(batch, height, width, channels\) or \(batch, time"):
        Conv2D(2, 3, 3)(np.zeros((5, 6, 2)))
    with pytest.raises(ValueError, match="Conv2D: x has 3 channels but kernel"):
        Conv2D(2, 3, 3)(np.zeros((1, 5, 6, 3)))
    with pytest.raises(ValueError, match=r"Conv3D: x must be \(batch, channels, time, height, width\), got 4D"):
        Conv3D(2, 3, 3, data_format="channels_first")(np.zeros((5, 6, 2, 2)))
    with pytest.raises(ValueError, match="Conv3D: a window of 3 does not fit the time of 2"):
        Conv3D(2, 3, 3, "valid")(np.zeros((1, 2, 6, 6, 2)))


def test_saving(tmp_path):
    check_saving(Conv2D(2, 3, (3, 1), stride=2, seed=0, engine="reference"), normal(2, 5, 6, 2), tmp_path / "2d")
    layer = Conv3D(2, 3, 3, ((1, 1), (2, 0), (0, 0)), activation="tanh", seed=0, engine="reference")
    check_saving(layer, normal(2, 3, 5, 6, 2), tmp_path / "3d")


@pytest.mark.parametrize("kind", [Conv2D, Conv3D])
def test_names_and_flags_are_checked_when_made(kind):
    with pytest.raises(
        ValueError, match=f"{kind.__name__}: algorithm must be one of 'auto', 'direct', 'winograd', got 'f"
    ):
        kind(1, 1, 3, algorithm="fft")
    with pytest.raises(ValueError, match=f"{kind.__name__}: use_bias must be True or False, got 'no'"):
        kind(1, 1, 3, use_bias="no")


def test_channels_first_volumes_are_not_sequences_of_frames():
    with pytest.raises(
        ValueError, match=r"Conv3D: x must be \(batch, 2, time, height, width\), .* np.swapaxes\(x, 1, 2\)"
    ):
        Conv3D(2, 1, 3, data_format="channels_first")(np.zeros((1, 5, 2, 6, 6)))


def test_the_softmax_returned_may_be_written_to():
    layer = Conv2D(2, 3, 1, activation="softmax", dtype="float64", seed=0, engine="reference")
    x, dy = normal(1, 3, 3, 2), normal(1, 3, 3, 3, seed=2)
    layer(x, training=True)
    expected = layer.backward(dy)
    layer(x, training=True)[..., 0] -= 1
    equal(layer.backward(dy), expected)

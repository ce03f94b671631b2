import numpy as np
import pytest
from layer_checks import (
    check_against_torch,
    check_complex_step,
    check_gradients,
    check_laws,
    check_penalties,
    check_saving,
    close,
    keras_values,
    normal,
)

from fastclstm import functional
from fastclstm.layers import Conv2D, Conv3D, DepthwiseConv2D, SeparableConv2D

FIXED = {"dtype": "float64", "seed": 0, "bias_initializer": "random_normal"}
CASES = [
    {},
    {"depth_multiplier": 2, "activation": "tanh", "kernel_size": (2, 3)},
    {"stride": (2, 1), "padding": "valid", "activation": "softmax"},
    {"dilation": 2, "padding": ((1, 2), (0, 2)), "use_bias": False, "depth_multiplier": 3},
    {"data_format": "channels_first", "stride": 2},
]


def shape_of(options):
    return (2, 3, 3, 5, 6) if options.get("data_format") == "channels_first" else (2, 5, 6, 3)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_gradients_and_laws(options, tmp_path):
    x = normal(*shape_of(options))
    layer = DepthwiseConv2D(**{"in_channels": 3, "kernel_size": 3} | options, **FIXED)
    check_gradients(layer, x)
    check_complex_step(layer, x)
    check_laws(layer, x)
    check_saving(layer, x, tmp_path / "layer")
    layer = SeparableConv2D(**{"in_channels": 3, "out_channels": 4, "kernel_size": 3} | options, **FIXED,
                            engine="reference")  # fmt: skip
    check_gradients(layer, x)
    check_laws(layer, x)
    check_saving(layer, x, tmp_path / "layer")


@pytest.mark.torch
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), (1, 2, 2)])
def test_values_and_gradients_of_torch(stride, padding, dilation):
    torch = pytest.importorskip("torch")
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    layer = DepthwiseConv2D(3, 3, depth_multiplier=2, data_format="channels_first", **options, **FIXED)
    turned = lambda kernel: kernel.transpose(2, 3, 0, 1).reshape(6, 1, 3, 3)  # noqa: E731
    function = lambda x, w, b: torch.nn.functional.conv2d(x, w, b, groups=3, **options)  # noqa: E731
    check_against_torch(layer, normal(2, 3, 8, 7), function, ("depthwise_kernel", turned), ("bias", np.array))


@pytest.mark.torch
@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("groups", [2, 6])
def test_groups_of_torch(engine, groups):
    torch = pytest.importorskip("torch")
    for kind, shape, axes in ((Conv2D, (2, 6, 5, 7), (3, 2, 0, 1)), (Conv3D, (2, 6, 3, 5, 4), (4, 3, 0, 1, 2))):
        layer = kind(6, 12, 3, groups=groups, stride=2, padding=1, data_format="channels_first", engine=engine, **FIXED)
        assert layer.kernel.shape == (*(3,) * (len(shape) - 2), 6 // groups, 12)
        module = torch.nn.functional.conv2d if kind is Conv2D else torch.nn.functional.conv3d
        function = lambda x, w, b, f=module: f(x, w, b, stride=2, padding=1, groups=groups)  # noqa: E731
        weights = ("kernel", lambda kernel, axes=axes: np.ascontiguousarray(kernel.transpose(axes)))
        check_against_torch(layer, normal(*shape), function, weights, ("bias", np.array))


def test_groups_are_convolutions_of_their_own():
    layer, x = Conv2D(4, 6, 3, groups=2, engine="reference", **FIXED), normal(2, 5, 6, 4)
    halves = [functional.conv2d(x[..., 2 * g : 2 * g + 2], layer.kernel[..., 3 * g : 3 * g + 3],
                                layer.bias[3 * g : 3 * g + 3], engine="reference") for g in range(2)]  # fmt: skip
    close(layer(x), np.concatenate(halves, axis=-1))
    check_gradients(layer, x)
    check_laws(layer, x)


@pytest.mark.keras
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, "same", 1), (2, "valid", 1), (2, "same", 1),
                                                             (1, "valid", 2)])  # fmt: skip
def test_values_of_keras(stride, padding, dilation):
    x, options = normal(2, 7, 6, 3), {"stride": stride, "padding": padding, "dilation": dilation}
    theirs = {"strides": stride, "padding": padding, "dilation_rate": dilation, "depth_multiplier": 2,
              "dtype": "float64"}  # fmt: skip
    layer = DepthwiseConv2D(3, 3, depth_multiplier=2, activation="tanh", **options, **FIXED)
    weights = list(layer.parameters.values())
    close(layer(x), keras_values(lambda L: L.DepthwiseConv2D(3, activation="tanh", **theirs), x, weights))
    layer = SeparableConv2D(3, 4, 3, depth_multiplier=2, engine="reference", **options, **FIXED)
    weights = list(layer.parameters.values())
    close(layer(x), keras_values(lambda L: L.SeparableConv2D(4, 3, **theirs), x, weights))
    layer = Conv2D(3, 6, 3, groups=3, **options, engine="reference", **FIXED)
    weights = list(layer.parameters.values())
    theirs.pop("depth_multiplier")
    close(layer(x), keras_values(lambda L: L.Conv2D(6, 3, groups=3, **theirs), x, weights))


def test_penalties():
    layer = SeparableConv2D(1, 1, 2, depthwise_regularizer="l2", pointwise_regularizer="l2",
                            bias_regularizer="l1", depthwise_constraint="non_neg", engine="reference",
                            **FIXED)  # fmt: skip
    check_penalties(layer, normal(1, 2, 2, 1), "depthwise_kernel")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DepthwiseConv2D(0, 3), "DepthwiseConv2D: in_channels must be"),
        (lambda: DepthwiseConv2D(1, 3, depth_multiplier=0), "DepthwiseConv2D: depth_multiplier must be"),
        (lambda: DepthwiseConv2D(1, 3, padding="full"), "DepthwiseConv2D: padding must be one of"),
        (lambda: DepthwiseConv2D(1, 3, stride=2, dilation=2), "cannot both exceed 1"),
        (lambda: SeparableConv2D(1, 0, 3), "SeparableConv2D: out_channels must be"),
        (lambda: SeparableConv2D(1, 1, 3, engine="gpu"), "unknown engine"),
        (lambda: Conv2D(3, 4, 3, groups=2), r"Conv2D: in_channels \(3\) must be a multiple of groups \(2\)"),
        (lambda: Conv3D(2, 3, 3, groups=2), r"Conv3D: out_channels \(3\) must be a multiple of groups \(2\)"),
        (lambda: Conv2D(3, 4, 3, groups=0), "Conv2D: groups must be an integer >= 1"),
        (lambda: DepthwiseConv2D(2, 3)(np.zeros((1, 4, 4, 3))), "DepthwiseConv2D: x has 3 channels but kernel"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()

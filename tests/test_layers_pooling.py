import numpy as np
import pytest
from layer_checks import (
    IN_FLOAT32,
    check_against_torch,
    check_complex_step,
    check_gradients,
    check_laws,
    check_saving,
    close,
    equal,
    keras_values,
    normal,
)

from fastclstm import functional
from fastclstm.layers import AveragePooling2D, AveragePooling3D, GlobalAveragePooling, GlobalMaxPooling, MaxPooling2D

OPTIONS = [
    {},
    {"pool_size": 3, "stride": 2, "padding": "same"},
    {"pool_size": (2, 3), "stride": (1, 2), "padding": ((1, 0), (1, 2))},
    {"pool_size": 2, "padding": (1, 0), "ceil_mode": True},
    {"pool_size": 3, "stride": 2, "ceil_mode": True},
    {"pool_size": (1, 4), "padding": 0},
]


@pytest.fixture(params=["reference", "cpu"])
def engine(request):
    return request.param


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [MaxPooling2D, AveragePooling2D])
def test_gradients_and_laws(kind, options):
    for shape, data_format in (
        ((2, 5, 8, 3), "channels_last"),
        ((2, 3, 5, 8, 2), "channels_last"),
        ((2, 3, 2, 6, 5), "channels_first"),
    ):
        layer = kind(**options, data_format=data_format)
        check_gradients(layer, normal(*shape))
        check_laws(layer, normal(*shape))


@pytest.mark.parametrize("layer", [GlobalAveragePooling(), GlobalMaxPooling(), GlobalAveragePooling(keep_dims=True),
                                   GlobalMaxPooling(keep_dims=True)], ids=repr)  # fmt: skip
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 4, 5, 3), (2, 3, 4, 2, 3)], ids=str)
def test_gradients_and_laws_of_global_pooling(layer, shape):
    check_gradients(layer, normal(*shape))
    check_laws(layer, normal(*shape))


def test_global_pooling_takes_all_between_batch_and_channels():
    x = normal(2, 3, 4, 5, 6)
    close(GlobalAveragePooling()(x), x.mean((1, 2, 3)))
    equal(GlobalMaxPooling()(x), x.max((1, 2, 3)))
    equal(GlobalMaxPooling(keep_dims=True)(x), x.max((1, 2, 3), keepdims=True))
    close(GlobalAveragePooling("channels_first")(x), x.mean((1, 3, 4)))
    equal(GlobalMaxPooling("channels_first")(x[:, 0]), x[:, 0].max((2, 3)))
    assert GlobalAveragePooling("channels_first", keep_dims=True)(x).shape == (2, 1, 4, 1, 1)
    for kind in (GlobalAveragePooling, GlobalMaxPooling):
        check_gradients(kind("channels_first"), x)


def test_the_first_of_equal_maxima_takes_the_gradient_and_nan_wins():
    x = np.zeros((1, 2, 2, 1))
    for layer in (MaxPooling2D(engine="reference"), GlobalMaxPooling()):
        y = layer(x, training=True)
        equal(layer.backward(np.ones(y.shape)).ravel(), [1, 0, 0, 0])
    x[0, 1, 1, 0] = np.nan
    assert np.isnan(GlobalMaxPooling()(x)).all()
    assert np.isnan(MaxPooling2D(engine="reference")(x)).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_max_pooling_is_that_of_volumes_of_one_step(options, engine):
    x = normal(2, 3, 6, 8, 2)
    y = MaxPooling2D(**options, engine=engine)(x)
    pool = np.broadcast_to(options.get("pool_size", 2), 2).tolist()
    stride = np.broadcast_to(options.get("stride", pool), 2).tolist()
    padding = {"same": "same", 0: 0, (1, 0): (0, 1, 0), "valid": "valid"}.get(options.get("padding", "valid"))
    if padding is None:
        padding = (0, (1, 0), (1, 2))
    expected = functional.max_pool3d(x, (1, *pool), (1, *stride), padding=padding,
                                     ceil_mode=options.get("ceil_mode", False), engine=engine)  # fmt: skip
    equal(y, expected)


def test_average_counts_no_padding():
    x = np.ones((1, 3, 3, 1))
    for options in OPTIONS[:5]:
        y = AveragePooling2D(**options)(np.ones((1, 5, 8, 2)))
        close(y, np.ones(y.shape))
    y = AveragePooling2D(2, 1, padding="same")(np.arange(9.0).reshape(x.shape))
    equal(y[0, :, :, 0], [[2, 3, 3.5], [5, 6, 6.5], [6.5, 7.5, 8]])


@pytest.mark.torch
def test_values_and_gradients_of_torch(engine):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    x = normal(2, 3, 9, 8)
    for options in ({}, {"stride": 2}, {"stride": 2, "padding": 1}, {"stride": 2, "ceil_mode": True}):
        for layer, function in (
            (MaxPooling2D(3, **options, data_format="channels_first", engine=engine), F.max_pool2d),
            (
                AveragePooling2D(3, **options, data_format="channels_first"),
                lambda leaf, size, **o: F.avg_pool2d(leaf, size, **o, count_include_pad=False),
            ),
        ):
            leaf = torch.tensor(x, requires_grad=True)
            theirs = function(leaf, 3, **options)
            y = layer(x, training=True)
            close(y, theirs.detach().numpy())
            dy = normal(*y.shape, seed=2)
            theirs.backward(torch.tensor(dy))
            close(layer.backward(dy), leaf.grad.numpy())


def test_wrong_options_and_shapes():
    for kind in (MaxPooling2D, AveragePooling2D):
        with pytest.raises(ValueError, match=f"{kind.__name__}: pool_size must be an integer >= 1 or 2 of them"):
            kind((2, 2, 2))
        with pytest.raises(ValueError, match=f"{kind.__name__}: stride must be"):
            kind(2, 0)
        with pytest.raises(ValueError, match=f"{kind.__name__}: padding must be"):
            kind(2, padding=(1, 1, 1))
        with pytest.raises(ValueError, match=rf"{kind.__name__}: padding .* must be smaller than the window"):
            kind(2, padding=2)
        with pytest.raises(ValueError, match=f"{kind.__name__}: data_format must be one of"):
            kind(data_format="NCHW")
        with pytest.raises(ValueError, match=rf"{kind.__name__}: x must be .* got 3D"):
            kind()(np.zeros((4, 4, 2)))
        with pytest.raises(ValueError, match=f"{kind.__name__}: a window of 2 does not fit the height of 1"):
            kind()(np.zeros((2, 1, 4, 2)))
    with pytest.raises(ValueError, match=r"GlobalMaxPooling: x must be .* got 2D"):
        GlobalMaxPooling()(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"GlobalMaxPooling: x must be \(batch, channels, height, width\)"):
        GlobalMaxPooling("channels_first")(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"GlobalAveragePooling: x of shape .* has no pixels"):
        GlobalAveragePooling()(np.zeros((2, 0, 3)))


def test_saving(tmp_path):
    x = normal(2, 6, 6, 3)
    check_saving(MaxPooling2D(3, 2, padding=(1, 0), engine="reference"), x, tmp_path / "max")
    check_saving(AveragePooling2D(3, 2, padding=((1, 0), (0, 1))), x, tmp_path / "average")
    check_saving(GlobalAveragePooling("channels_first", keep_dims=True), x, tmp_path / "global")


def test_the_mean_of_large_values_does_not_overflow():
    x = np.full((1, 2, 2, 1), 3e38, np.float32)
    y = AveragePooling2D()(x)
    assert y.dtype == np.float32
    equal(y, x[:, :1, :1])


def test_global_pooling_of_channels_first_volumes():
    x = normal(2, 3, 4, 5, 6)
    for data_format in ("channels_last", "channels_first"):
        close(GlobalAveragePooling(data_format, channel_axis=1)(x), x.mean((2, 3, 4)))
        equal(GlobalMaxPooling(data_format, channel_axis=-4, keep_dims=True)(x), x.max((2, 3, 4), keepdims=True))
    for kind in (GlobalAveragePooling, GlobalMaxPooling):
        check_gradients(kind(channel_axis=2), x)
        check_laws(kind(channel_axis=2), x)
    for axis in (0, 5, -5):
        with pytest.raises(
            ValueError, match=rf"GlobalMaxPooling: x must be .* channel_axis={axis} another one; got 5D"
        ):
            GlobalMaxPooling(channel_axis=axis)(x)
    with pytest.raises(TypeError, match="GlobalMaxPooling: channel_axis must be an integer or None, got 'C'"):
        GlobalMaxPooling(channel_axis="C")
    with pytest.raises(ValueError, match=r"channel_axis=1, \(batch, channels, time, height, width\); got 3D"):
        GlobalMaxPooling("channels_first")(x[0, 0])


def test_flags_are_true_or_false():
    for make, name in (
        (lambda: MaxPooling2D(ceil_mode="no"), "MaxPooling2D: ceil_mode"),
        (lambda: AveragePooling2D(ceil_mode=1), "AveragePooling2D: ceil_mode"),
        (lambda: GlobalMaxPooling(keep_dims="no"), "GlobalMaxPooling: keep_dims"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be True or False"):
            make()


VOLUMES = [
    {},
    {"pool_size": 3, "stride": 2, "padding": "same"},
    {"pool_size": (1, 2, 3), "stride": (2, 1, 2), "padding": ((0, 0), (1, 0), (1, 2))},
    {"pool_size": 2, "padding": (1, 0, 1), "ceil_mode": True, "count_include_pad": True},
    {"pool_size": (2, 2, 1), "data_format": "channels_first"},
]


@pytest.mark.parametrize("options", VOLUMES, ids=str)
def test_average_pooling_of_volumes(options, tmp_path):
    layer, x = AveragePooling3D(**options), normal(2, 3, 4, 5, 3)
    check_gradients(layer, x)
    check_complex_step(layer, x)
    check_laws(layer, x)
    check_saving(layer, x, tmp_path / "layer")


def test_frames_are_volumes_of_one_step():
    for options in OPTIONS:
        x, frames = normal(2, 5, 8, 3), AveragePooling2D(**options)
        three = frames._options()
        volumes = AveragePooling3D(three["pool_size"], three["strides"], padding=three["padding"],
                                   ceil_mode=three["ceil_mode"])  # fmt: skip
        equal(frames(x), volumes(x[:, np.newaxis])[:, 0])


@pytest.mark.torch
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(("size", "stride", "padding", "ceil"), [(2, 2, 0, False), (3, 2, 1, False), (3, 2, 1, True),
                                                                 (2, 3, 1, True), (4, 3, 2, True)])  # fmt: skip
def test_average_pooling_of_torch(size, stride, padding, ceil, include):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    for kind, function, shape in ((AveragePooling2D, F.avg_pool2d, (2, 3, 7, 6)),
                                  (AveragePooling3D, F.avg_pool3d, (2, 3, 5, 7, 6))):  # fmt: skip
        layer = kind(size, stride, padding=padding, ceil_mode=ceil, count_include_pad=include,
                     data_format="channels_first")  # fmt: skip
        check_against_torch(layer, normal(*shape), lambda x, f=function: f(x, size, stride, padding, ceil, include))


@pytest.mark.keras
@pytest.mark.parametrize(("size", "stride", "padding"), [((3, 1, 5), 1, "same"), ((2, 2, 3), 2, "valid")])
def test_average_pooling_of_volumes_of_keras(size, stride, padding):
    """With the same padding on both sides: else Keras on PyTorch repeats the border, which other backends do not."""
    x = normal(2, 5, 4, 6, 3)
    theirs = keras_values(lambda L: L.AveragePooling3D(size, stride, padding, dtype="float64"), x)
    close(AveragePooling3D(size, stride, padding=padding)(x), theirs, IN_FLOAT32)

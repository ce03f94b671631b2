import os

import numpy as np
import pytest
from layer_checks import (
    check_against_torch,
    check_complex_step,
    check_gradients,
    check_laws,
    check_saving,
    close,
    equal,
    normal,
)

from fastclstm.layers import UpSampling, UpSampling2D, UpSampling3D, ZeroPadding2D

LAYERS = [
    UpSampling(),
    UpSampling((3, 1)),
    UpSampling(2, "bilinear"),
    UpSampling((3, 4), "bilinear"),
    UpSampling((1, 5), "bilinear"),
    UpSampling((3, 2), "bilinear", align_corners=True),
    ZeroPadding2D(),
    ZeroPadding2D((0, 2)),
    ZeroPadding2D(((1, 2), (0, 3))),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_gradients_and_laws(layer, tmp_path):
    for shape in ((2, 4, 3, 2), (2, 3, 1, 4, 2), (1, 3, 1, 3)):
        check_gradients(layer, normal(*shape))
        check_laws(layer, normal(*shape))
    check_saving(layer, normal(1, 2, 2, 1), tmp_path / "layer.safetensors")


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_backward_is_the_exact_transpose(layer):
    """<A x, y> = <x, Aᵀ y> for random x and y."""
    x = normal(2, 5, 4, 3)
    y = layer(x, training=True)
    dy = normal(*y.shape, seed=2)
    close(np.sum(y * dy), np.sum(x * layer.backward(dy)))


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_channels_first_is_the_same_moved(layer):
    first = type(layer)(**layer.options | {"data_format": "channels_first"})
    x = normal(2, 3, 4, 5, 2)
    y = layer(x, training=True)
    equal(first(np.moveaxis(x, -1, 2), training=True), np.moveaxis(y, -1, 2))
    close(first.backward(np.moveaxis(y, -1, 2)), np.moveaxis(layer.backward(y), -1, 2))


def test_numbers():
    x = np.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    equal(UpSampling((1, 2))(x)[0, :, :, 0], [[1, 1, 2, 2], [3, 3, 4, 4]])
    equal(UpSampling((2, 1), "bilinear")(x)[0, :, 0, 0], [1, 1.5, 2.5, 3])
    equal(ZeroPadding2D(((1, 0), (0, 1)))(x)[0, :, :, 0], [[0, 0, 0], [1, 2, 0], [3, 4, 0]])
    assert UpSampling(3, "bilinear")(x.astype(np.float32)).dtype == np.float32


@pytest.mark.torch
@pytest.mark.parametrize("size", [2, 3, (4, 5), (1, 2)])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_interpolation_of_torch(size, mode):
    torch = pytest.importorskip("torch")
    x = normal(2, 3, 5, 4)
    leaf = torch.tensor(x, requires_grad=True)
    options = {} if mode == "nearest" else {"align_corners": False}
    scale = tuple(map(float, size)) if isinstance(size, tuple) else float(size)
    theirs = torch.nn.functional.interpolate(leaf, scale_factor=scale, mode=mode, **options)
    layer = UpSampling(size, mode, data_format="channels_first")
    y = layer(x, training=True)
    close(y, theirs.detach().numpy())
    dy = normal(*y.shape, seed=2)
    theirs.backward(torch.tensor(dy))
    close(layer.backward(dy), leaf.grad.numpy())


@pytest.mark.keras
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_upsampling_of_keras(interpolation):
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    x = normal(2, 4, 5, 3).astype(np.float32)
    theirs = keras.layers.UpSampling2D((2, 3), interpolation=interpolation)(x)
    close(UpSampling((2, 3), interpolation)(x), np.asarray(theirs), 1e-5)


def test_wrong_options_and_shapes():
    with pytest.raises(ValueError, match="UpSampling: size must be an integer >= 1 or 2 of them"):
        UpSampling((2, 2, 2))
    with pytest.raises(ValueError, match="UpSampling: interpolation must be one of 'nearest', 'bilinear'"):
        UpSampling(2, "cubic")
    with pytest.raises(ValueError, match="ZeroPadding2D: padding must be"):
        ZeroPadding2D((1, 2, 3))
    with pytest.raises(ValueError, match="ZeroPadding2D: padding of the height must be"):
        ZeroPadding2D(-1)
    with pytest.raises(ValueError, match=r"UpSampling: x must be .* got 3D"):
        UpSampling()(np.zeros((4, 4, 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_pixel_reaches_what_is_made_of_it_alone(bad):
    layer, x = UpSampling((3, 5), "bilinear"), normal(1, 4, 4, 1)
    x[0, 1, 2, 0] = bad
    reached = ~np.isfinite(layer(x, training=True)[0, :, :, 0])
    weights = UpSampling((3, 5), "bilinear")(np.eye(16).reshape(16, 4, 4, 1))[6, :, :, 0]
    equal(reached, weights != 0)
    dy = np.zeros((1, 12, 20, 1))
    dy[0, 4, 2, 0] = bad  # the centres of pixels 1 and 0
    equal(np.argwhere(~np.isfinite(layer.backward(dy))), [[0, 1, 0, 0]])


VOLUMES = [
    UpSampling3D(),
    UpSampling3D((3, 1, 2), "trilinear"),
    UpSampling3D((2, 3, 1), "trilinear", align_corners=True),
    UpSampling3D((2, 1, 3), data_format="channels_first"),
]


@pytest.mark.parametrize("layer", VOLUMES, ids=repr)
def test_volumes(layer, tmp_path):
    for shape in ((2, 2, 3, 4, 2), (1, 1, 3, 1, 2)):
        check_gradients(layer, normal(*shape))
        check_complex_step(layer, normal(*shape))
        check_laws(layer, normal(*shape))
    check_saving(layer, normal(1, 2, 2, 2, 1), tmp_path / "layer.safetensors")


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_complex_steps(layer):
    check_complex_step(layer, normal(2, 3, 4, 2))


@pytest.mark.torch
@pytest.mark.parametrize("size", [2, 3, (4, 5), (1, 2)])
def test_corners_of_torch(size):
    torch = pytest.importorskip("torch")
    scale = tuple(map(float, size)) if isinstance(size, tuple) else float(size)
    options = {"scale_factor": scale, "mode": "bilinear", "align_corners": True}
    layer = UpSampling(size, "bilinear", align_corners=True, data_format="channels_first")
    check_against_torch(layer, normal(2, 3, 5, 4), lambda x: torch.nn.functional.interpolate(x, **options))
    check_against_torch(layer, normal(2, 3, 1, 1), lambda x: torch.nn.functional.interpolate(x, **options))


@pytest.mark.torch
@pytest.mark.parametrize("align_corners", [None, False, True])
def test_volumes_of_torch(align_corners):
    torch = pytest.importorskip("torch")
    mode = "nearest" if align_corners is None else "trilinear"
    options = {"scale_factor": (2.0, 3.0, 1.0), "mode": mode, "align_corners": align_corners}
    layer = UpSampling3D((2, 3, 1), mode, align_corners=bool(align_corners), data_format="channels_first")
    check_against_torch(layer, normal(2, 3, 3, 2, 4), lambda x: torch.nn.functional.interpolate(x, **options))


def test_a_bad_pixel_between_corners_reaches_what_is_made_of_it_alone():
    layer, x = UpSampling((1, 3), "bilinear", align_corners=True), normal(1, 1, 3, 1)
    x[0, 0, 1, 0] = np.nan
    weights = layer(np.eye(3).reshape(3, 1, 3, 1))[1, 0, :, 0]
    equal(np.isnan(layer(x)[0, 0, :, 0]), weights != 0)


def test_the_name_of_keras_is_another_for_the_same():
    assert UpSampling2D is UpSampling
    with pytest.raises(
        ValueError, match="UpSampling: align_corners=True needs interpolation='bilinear', got 'nearest'"
    ):
        UpSampling(2, align_corners=True)
    with pytest.raises(ValueError, match="UpSampling3D: interpolation must be one of 'nearest', 'trilinear'"):
        UpSampling3D(2, "bilinear")

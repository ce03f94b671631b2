import numpy as np
import pytest
from layer_checks import IN_FLOAT32, check_layer, close, equal, keras_values, normal

from fastclstm.layers import (
    AdaptiveAveragePooling2D,
    GlobalAveragePooling,
    GlobalAveragePooling2D,
    GlobalAveragePooling3D,
    GlobalMaxPooling,
    GlobalMaxPooling2D,
    GlobalMaxPooling3D,
)

PAIRS = [(GlobalAveragePooling2D, (2, 4, 3, 2)), (GlobalAveragePooling2D, (2, 2, 4, 3, 2)),
         (GlobalMaxPooling2D, (2, 4, 3, 2)), (GlobalMaxPooling2D, (2, 2, 4, 3, 2)),
         (GlobalAveragePooling3D, (2, 2, 4, 3, 2)), (GlobalMaxPooling3D, (2, 2, 4, 3, 2))]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"keep_dims": True}, {"data_format": "channels_first"}], ids=str)
@pytest.mark.parametrize(("kind", "shape"), PAIRS)
def test_gradients_and_laws(kind, shape, options, tmp_path):
    check_layer(kind(**options), normal(*shape), tmp_path / "layer")


def test_frame_by_frame_and_over_everything():
    x = normal(2, 3, 4, 5, 2)
    close(GlobalAveragePooling2D()(x), x.mean((2, 3)))
    equal(GlobalMaxPooling2D(keep_dims=True)(x), x.max((2, 3), keepdims=True))
    equal(GlobalAveragePooling3D()(x), GlobalAveragePooling()(x))
    equal(GlobalMaxPooling3D()(x), GlobalMaxPooling()(x))
    equal(GlobalMaxPooling2D(data_format="channels_first")(x), x.max((3, 4)))
    equal(GlobalMaxPooling3D(data_format="channels_first")(x), x.max((2, 3, 4)))


@pytest.mark.keras
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("kind", "shape"), PAIRS[::2][:2] + PAIRS[4:])
def test_values_of_keras(kind, shape, data_format):
    for keep in (False, True):
        x = normal(*shape)
        theirs = keras_values(
            lambda L, keep=keep: getattr(L, kind.__name__)(data_format=data_format, keepdims=keep, dtype="float64"), x
        )
        close(kind(data_format=data_format, keep_dims=keep)(x), theirs, IN_FLOAT32)


def test_errors():
    with pytest.raises(
        ValueError, match=r"GlobalMaxPooling2D: x must be \(batch, height, width, channels\) or \(batch, t"
    ):
        GlobalMaxPooling2D()(np.zeros((2, 3, 4)))
    with pytest.raises(
        ValueError, match=r"GlobalAveragePooling3D: x must be \(batch, channels, time, height, width\), got 4"
    ):
        GlobalAveragePooling3D("channels_first")(np.zeros((2, 3, 4, 5)))
    with pytest.raises(ValueError, match="has no pixels"):
        GlobalAveragePooling2D()(np.zeros((2, 0, 4, 5)))


ADAPTIVE = [
    (AdaptiveAveragePooling2D(1), (2, 4, 3, 2)),
    (AdaptiveAveragePooling2D((3, 2)), (2, 2, 7, 5, 2)),
    (AdaptiveAveragePooling2D((None, 5)), (2, 3, 4, 2)),
    (AdaptiveAveragePooling2D((4, None), data_format="channels_first"), (2, 2, 6, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), ADAPTIVE, ids=str)
def test_adaptive_gradients_and_laws(layer, shape, tmp_path):
    check_layer(layer, normal(*shape), tmp_path / "layer")


@pytest.mark.torch
@pytest.mark.parametrize("size", [1, 3, (2, 5), (None, 4), (7, 9), (13, 2)])
def test_adaptive_pooling_of_torch(size):
    torch = pytest.importorskip("torch")
    from layer_checks import check_against_torch

    layer = AdaptiveAveragePooling2D(size, data_format="channels_first")
    check_against_torch(layer, normal(2, 3, 7, 9), lambda x: torch.nn.functional.adaptive_avg_pool2d(x, size))


def test_adaptive_errors():
    for size in (0, (1, 2, 3), (0, None)):
        with pytest.raises(ValueError, match="AdaptiveAveragePooling2D: output_size must be an integer >= 1"):
            AdaptiveAveragePooling2D(size)
    with pytest.raises(ValueError, match="frames of 0 × 3 have no pixels"):
        AdaptiveAveragePooling2D(1)(np.zeros((1, 0, 3, 1)))

import numpy as np
import pytest
from layer_checks import check_gradients, check_laws, check_saving, close, equal, normal

from fastclstm.layers import Dropout, SpatialDropout2D, SpatialDropout3D


@pytest.mark.parametrize("options", [{"rate": 0.4}, {"rate": 0.4, "noise_shape": (None, 1, 3)}, {"rate": 0}], ids=str)
def test_gradients_and_laws(options):
    check_gradients(Dropout(**options, seed=0), normal(2, 4, 3), count=12)
    check_laws(Dropout(**options, seed=0), normal(2, 4, 3))


def test_without_training_nothing_is_dropped():
    x = normal(4, 5)
    equal(Dropout(0.9, seed=0)(x), x)


def test_kept_values_are_scaled_so_that_the_mean_stays():
    y = Dropout(0.2, seed=0)(np.ones((100, 1000), np.float32), training=True)
    assert y.dtype == np.float32
    equal(np.unique(y), np.array([0, 1.25], np.float32))
    assert abs(y.mean() - 1) < 0.005
    assert abs((y == 0).mean() - 0.2) < 0.004


def test_noise_shape_drops_whole_blocks():
    y = Dropout(0.5, noise_shape=(None, 1, 1, None), seed=0)(np.ones((8, 4, 4, 8)), training=True)
    equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
    assert set(np.unique(y)) == {0, 2}
    fixed = Dropout(0.5, noise_shape=(1, 6), seed=0)(np.ones((4, 6)), training=True)
    equal(fixed, np.broadcast_to(fixed[:1], (4, 6)))


def test_draws_come_from_the_seed_and_differ_from_call_to_call():
    x = np.ones((4, 64))
    first, other = Dropout(0.5, seed=1), Dropout(0.5, seed=1)
    a, b = first(x, training=True), first(x, training=True)
    equal(other(x, training=True), a)
    assert (a != b).any()
    shared = np.random.default_rng(1)
    equal(Dropout(0.5, seed=shared)(x, training=True), a)


def test_rate_one_drops_all():
    layer = Dropout(1)
    assert not layer(np.ones(5), training=True).any()
    equal(layer.backward(np.ones(5)), np.zeros(5))


def test_wrong_options_and_shapes():
    for rate in (-0.1, 1.5, "a", None, np.nan):
        with pytest.raises(ValueError, match=r"Dropout: rate must be a number in \[0, 1\]"):
            Dropout(rate)
    with pytest.raises(TypeError, match="Dropout: noise_shape must be a tuple"):
        Dropout(0.5, noise_shape=3)
    with pytest.raises(ValueError, match="noise_shape's sizes"):
        Dropout(0.5, noise_shape=(0, 1))
    for shape in ((2, 3, 4), (5, 3), (2,)):
        with pytest.raises(ValueError, match=r"noise_shape \(None, 4\) does not broadcast"):
            Dropout(0.5, noise_shape=(None, 4))(np.ones(shape))


def test_saving(tmp_path):
    back = check_saving(Dropout(0.3, noise_shape=(None, 1), seed=4), normal(2, 3), tmp_path / "dropout.safetensors")
    close(back(np.ones((5, 3)), training=True), Dropout(0.3, noise_shape=(None, 1), seed=4)(np.ones((5, 3)), True))


@pytest.mark.parametrize("rate", [0.5, 1])
def test_nan_is_dropped_too(rate):
    layer, bad = Dropout(rate, seed=0), np.full(64, np.nan)
    dropped = Dropout(rate, seed=0)(np.ones(64), training=True) == 0
    assert dropped.any()
    equal(np.isnan(layer(bad, training=True)), ~dropped)
    equal(np.isnan(layer.backward(bad)), ~dropped)


@pytest.mark.parametrize("rate", ["0.5", True])
def test_rates_that_are_no_numbers(rate):
    with pytest.raises(ValueError, match=r"Dropout: rate must be a number in \[0, 1\]"):
        Dropout(rate)


SPATIAL = [
    (SpatialDropout2D, {}, (3, 4, 5, 6), (1, 2)),
    (SpatialDropout2D, {}, (2, 3, 4, 5, 6), (2, 3)),
    (SpatialDropout2D, {"data_format": "channels_first"}, (2, 3, 6, 4, 5), (3, 4)),
    (SpatialDropout3D, {}, (3, 2, 4, 5, 6), (1, 2, 3)),
    (SpatialDropout3D, {"data_format": "channels_first"}, (3, 6, 2, 4, 5), (2, 3, 4)),
]


@pytest.mark.parametrize(("kind", "options", "shape", "pixels"), SPATIAL, ids=str)
def test_whole_channels_are_dropped(kind, options, shape, pixels, tmp_path):
    x = 1 + normal(*shape) ** 2
    check_gradients(kind(0.4, **options, seed=0), x, count=12)
    check_laws(kind(0.4, **options, seed=0), x)
    check_saving(kind(0.4, **options, seed=0), x, tmp_path / "layer")
    layer = kind(0.5, **options, seed=0)
    equal(layer(x), x)
    kept = layer(x, training=True) != 0
    equal(kept, np.broadcast_to(kept.any(pixels, keepdims=True), shape))  # of a channel all or nothing
    equal(layer(x, training=True), np.where(layer.backward(np.ones(shape)) != 0, 2 * x, 0))
    drawn = kept.all(pixels)
    assert 0.2 < drawn.mean() < 0.8
    assert drawn.shape == tuple(n for axis, n in enumerate(shape) if axis not in pixels)
    assert all((drawn != drawn[index]).any() for index in range(len(drawn)))  # for each sample anew


def test_errors_of_spatial_dropout():
    with pytest.raises(ValueError, match=r"SpatialDropout2D: rate must be a number in \[0, 1\]"):
        SpatialDropout2D(2)
    with pytest.raises(
        ValueError, match=r"SpatialDropout3D: x must be \(batch, time, height, width, channels\), got 4D"
    ):
        SpatialDropout3D(0.5)(np.zeros((1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"SpatialDropout2D: x must be .* got 3D"):
        SpatialDropout2D(0.5)(np.zeros((1, 2, 3)), training=True)

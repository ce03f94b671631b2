import numpy as np
import pytest
from layer_checks import equal, normal

from fastclstm.layers import TimeDistributionCalculator


def test_time_distribution_is_a_vector_of_zeros_and_ones():
    vector = TimeDistributionCalculator(0.3, 10_000, seed=0).calculate_time_distribution()
    assert vector.shape == (10_000,)
    assert set(vector.tolist()) == {0, 1}
    assert vector.mean() == pytest.approx(0.7, abs=0.02)
    assert (TimeDistributionCalculator(0, 50).calculate_time_distribution() == 1).all()
    assert (TimeDistributionCalculator(1, 50).calculate_time_distribution() == 0).all()


def test_time_distribution_is_drawn_anew_from_its_seed():
    first, second = (TimeDistributionCalculator(0.5, 40, seed=np.random.default_rng(3)) for _ in range(2))
    drawn = first.calculate_time_distribution()
    equal(drawn, second.calculate_time_distribution())
    assert (drawn != first.calculate_time_distribution()).any()


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_apply_dropout_multiplies_whole_steps(dtype):
    x = (normal(2, 30, 4, 5, 3) * 100).astype(dtype)
    kept = TimeDistributionCalculator(0.5, 30, seed=5).calculate_time_distribution().astype(bool)
    original = x.copy()
    y = TimeDistributionCalculator(0.5, 30, seed=5).apply_dropout(x)
    assert y.dtype == ("float32" if dtype == "int64" else dtype)
    assert 0 < kept.sum() < 30
    equal(y[:, kept], x[:, kept])
    assert (y[:, ~kept] == 0).all()
    equal(x, original)


def test_dropout_as_a_layer():
    layer = TimeDistributionCalculator(0.5, 20, seed=5)
    x = normal(2, 20, 3)
    assert layer(x) is x
    y = layer(x, training=True)
    dy = normal(2, 20, 3, seed=2)
    equal(layer.backward(dy), np.where(y == 0, 0, dy))


def test_steps_of_nan_are_dropped_too_and_gradients_are_checked():
    layer = TimeDistributionCalculator(1.0, 2)
    equal(layer(np.full((1, 2, 3), np.nan, np.float32), training=True), np.zeros((1, 2, 3), np.float32))
    dx = layer.backward(np.full((1, 2, 3), np.nan))
    assert dx.dtype == np.float32
    equal(dx, np.zeros((1, 2, 3)))
    with pytest.raises(
        ValueError, match=r"TimeDistributionCalculator: dy has shape \(2, 2, 3\) but must be \(1, 2, 3\)"
    ):
        layer.backward(np.zeros((2, 2, 3)))
    assert layer([[1, 2]]).dtype == np.float32


@pytest.mark.parametrize("shape", [(2, 4, 3), (3,), (3, 2)])
@pytest.mark.parametrize("training", [False, True])
def test_wrong_number_of_steps(shape, training):
    with pytest.raises(ValueError, match=r"x must be .*since num_timesteps is 3"):
        TimeDistributionCalculator(0.5, 3)(np.zeros(shape), training=training)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-0.1, 3), ValueError, r"dropout_rate must be a number in \[0, 1\], .* got -0.1"),
        ((1.1, 3), ValueError, r"dropout_rate must be a number in \[0, 1\], .* got 1.1"),
        ((float("nan"), 3), ValueError, r"dropout_rate must be a number in \[0, 1\], .* got nan"),
        (("much", 3), ValueError, r"dropout_rate must be a number in \[0, 1\], .* got 'much'"),
        (("0.5", 3), ValueError, r"dropout_rate must be a number in \[0, 1\], .* got '0.5'"),
        ((True, 3), ValueError, r"dropout_rate must be a number in \[0, 1\], .* got True"),
        ((0.5, 0), ValueError, "num_timesteps must be an integer >= 1"),
        ((0.5, 2.5), TypeError, "num_timesteps must be an integer >= 1"),
    ],
)
def test_wrong_dropout_options(arguments, error, message):
    with pytest.raises(error, match=message):
        TimeDistributionCalculator(*arguments)

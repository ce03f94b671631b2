import math

import numpy as np
import pytest

from fastclstm.nn import initializers

KERNEL = (3, 5, 16, 32)
FAN_IN, FAN_OUT = 15 * 16, 15 * 32
FAN_AVG = (FAN_IN + FAN_OUT) / 2


def draw(name, shape=KERNEL, dtype="float64", seed=0):
    return initializers.get(name)(shape, np.random.default_rng(seed), dtype)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), (1, 1)), ((7,), (7, 7)), ((3, 4), (3, 4)), ((5, 3, 4), (15, 20)), (KERNEL, (FAN_IN, FAN_OUT))],
)
def test_fans(shape, expected):
    assert initializers.fans(shape) == expected


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("glorot_uniform", math.sqrt(3 / FAN_AVG)),
        ("he_uniform", math.sqrt(6 / FAN_IN)),
        ("lecun_uniform", math.sqrt(3 / FAN_IN)),
        ("random_uniform", 0.05),
    ],
)
def test_uniform_fills_its_interval(name, limit):
    values = draw(name)
    assert 0.999 * limit < values.max() <= limit
    assert -0.999 * limit > values.min() >= -limit
    assert values.std() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert abs(values.mean()) < 0.02 * limit


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("glorot_normal", math.sqrt(1 / FAN_AVG)),
        ("he_normal", math.sqrt(2 / FAN_IN)),
        ("lecun_normal", math.sqrt(1 / FAN_IN)),
    ],
)
def test_scaled_normal_has_the_variance_after_its_tails_are_cut(name, std):
    values = draw(name)
    cut = 2 * std / 0.87962566103423978
    assert values.std() == pytest.approx(std, rel=0.02)
    assert 0.98 * cut < np.abs(values).max() <= cut


def test_plain_normals():
    whole, cut = draw("random_normal"), draw("truncated_normal")
    assert whole.std() == pytest.approx(0.05, rel=0.02)
    assert np.abs(whole).max() > 0.15
    assert cut.std() == pytest.approx(0.05 * 0.8796, rel=0.02)
    assert 0.098 < np.abs(cut).max() <= 0.1


@pytest.mark.parametrize("shape", [(3, 3, 8, 32), (1, 1, 8, 32), (6, 6), (4, 9)])
def test_orthogonal(shape):
    matrix = draw("orthogonal", shape).reshape(-1, shape[-1])
    rows, columns = matrix.shape
    gram = matrix.T @ matrix if rows >= columns else matrix @ matrix.T
    np.testing.assert_allclose(gram, np.eye(min(rows, columns)), atol=1e-14)


def test_orthogonal_has_no_preferred_direction():
    rng = np.random.default_rng(0)
    signs = [initializers.get("orthogonal")((3, 3), rng, "float64")[0, 0] > 0 for _ in range(200)]
    assert 70 < sum(signs) < 130  # without the signs of R, Householder's Q leans to one side


def test_orthogonal_needs_a_matrix():
    with pytest.raises(ValueError, match=r"at least two axes, got shape \(4,\)"):
        draw("orthogonal", (4,))


def test_constants():
    assert (draw("zeros") == 0).all()
    assert (draw("ones") == 1).all()


@pytest.mark.parametrize("name", initializers.TABLE)
def test_dtype_shape_and_seed(name):
    single, double = draw(name, dtype="float32"), draw(name)
    assert single.dtype == np.float32
    assert single.shape == KERNEL
    np.testing.assert_array_equal(single, double.astype("float32"))
    np.testing.assert_array_equal(double, draw(name))
    if name not in ("zeros", "ones"):
        assert (double != draw(name, seed=1)).any()


def test_get():
    def own(shape, rng, dtype):
        return np.full(shape, 2, dtype)

    assert initializers.get(own) is own
    with pytest.raises(ValueError, match="unknown initializer 'glorot'; known are zeros, ones, glorot_uniform"):
        initializers.get("glorot")
    with pytest.raises(TypeError, match=r"or a function \(shape, rng, dtype\) -> array, got 3"):
        initializers.get(3)

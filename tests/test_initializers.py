import math

import numpy as np
import pytest

from fastclstm.functional import conv2d
from fastclstm.nn import initializers
from fastclstm.nn.described import describe, restore
from fastclstm.nn.initializers import (
    Constant,
    Identity,
    Orthogonal,
    RandomNormal,
    RandomUniform,
    TruncatedNormal,
    VarianceScaling,
)  # fmt: skip

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
    assert (draw("constant") == 0).all()
    assert (draw(0.25) == 0.25).all()
    assert (draw(np.float32(3)) == 3).all()


def test_identity_hands_frames_on():
    np.testing.assert_array_equal(draw("identity", (2, 3)), np.eye(2, 3))
    x = np.random.default_rng(0).standard_normal((2, 5, 6, 3))
    for window in ((3, 3), (2, 5), (1, 1)):
        np.testing.assert_array_equal(conv2d(x, draw(Identity(2), (*window, 3, 3)), engine="reference"), 2 * x)
    with pytest.raises(ValueError, match=r"'identity' needs at least two axes, got shape \(4,\)"):
        draw("identity", (4,))


def test_options_change_what_is_drawn():
    assert 1 <= draw(RandomUniform(1, 3)).min() < 1.01
    assert 2.99 < draw(RandomUniform(1, 3)).max() <= 3
    for cls in (RandomNormal, TruncatedNormal):
        np.testing.assert_allclose(draw(cls(5, 0.1)), 5 + 2 * draw(cls(0, 0.05)), rtol=1e-12)
    np.testing.assert_array_equal(draw(Orthogonal(-3)), -3 * draw("orthogonal"))


@pytest.mark.parametrize("distribution", ["uniform", "normal", "truncated_normal"])
@pytest.mark.parametrize(("mode", "fan"), [("fan_in", FAN_IN), ("fan_out", FAN_OUT), ("fan_avg", FAN_AVG)])
def test_variance_scaling(mode, fan, distribution):
    values = draw(VarianceScaling(3, mode, distribution))
    assert values.var() == pytest.approx(3 / fan, rel=0.04)
    assert (np.abs(values).max() > 3 * math.sqrt(3 / fan)) == (distribution == "normal")


DRAWN_BEFORE = {
    "glorot_uniform": -0.12499866625761338,
    "glorot_normal": -0.18141353711060454,
    "he_uniform": -0.1976402449286469,
    "lecun_normal": -0.2028265005089962,
    "orthogonal": -0.25313431093027833,
    "random_uniform": -0.031249666564403346,
    "random_normal": -0.06909843600032327,
    "truncated_normal": -0.06909843600032327,
}


@pytest.mark.parametrize("name", DRAWN_BEFORE)
def test_seeds_draw_what_they_drew_in_earlier_versions(name):
    assert draw(name, (3, 5, 4, 6), seed=7)[1, 2, 3, 4] == pytest.approx(DRAWN_BEFORE[name], rel=1e-14)


@pytest.mark.parametrize(("alias", "name"), [("uniform", "random_uniform"), ("normal", "random_normal")])
def test_aliases(alias, name):
    np.testing.assert_array_equal(draw(alias), draw(name))


@pytest.mark.parametrize("name", initializers.TABLE)
def test_dtype_shape_and_seed(name):
    single, double = draw(name, dtype="float32"), draw(name)
    assert single.dtype == np.float32
    assert single.shape == KERNEL
    np.testing.assert_array_equal(single, double.astype("float32"))
    np.testing.assert_array_equal(double, draw(name))
    if name not in ("zeros", "ones", "constant", "identity"):
        assert (double != draw(name, seed=1)).any()


def test_get():
    def own(shape, rng, dtype):
        return np.full(shape, 2, dtype)

    assert initializers.get(own) is own
    assert initializers.get(3) == Constant(3)
    with pytest.raises(ValueError, match="unknown initializer 'glorot'; known are zeros, ones, constant, glorot_u"):
        initializers.get("glorot")
    for wrong in (None, True, math.nan):
        with pytest.raises(TypeError, match=rf"or a function \(shape, rng, dtype\) -> array, got {wrong}"):
            initializers.get(wrong)


@pytest.mark.parametrize("given", [*initializers.TABLE.values(), VarianceScaling(np.float32(2), "fan_out", "normal")])
def test_files_hold_it(given):
    assert restore(describe(given)) == given


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant("1"), "Constant: value must be a finite number, got '1'"),
        (lambda: RandomUniform(1, 0), "RandomUniform: high must be a finite number >= 1, got 0"),
        (lambda: TruncatedNormal(0, -1), "TruncatedNormal: stddev must be a finite number >= 0, got -1"),
        (lambda: VarianceScaling(0), "VarianceScaling: scale must be a finite number > 0, got 0"),
        (lambda: VarianceScaling(1, "fan"), "VarianceScaling: mode must be one of 'fan_in', 'fan_out', 'fan_avg'"),
        (lambda: VarianceScaling(1, "fan_in", "gamma"), "VarianceScaling: distribution must be one of 'uniform'"),
        (lambda: Orthogonal(math.inf), "Orthogonal: gain must be a finite number, got inf"),
    ],
)
def test_options_that_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()

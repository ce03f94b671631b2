import pickle
import re

import numpy as np
import pytest

from fastclstm.nn import constraints
from fastclstm.nn.constraints import MaxNorm, MinMaxNorm, NonNeg, UnitNorm
from fastclstm.nn.described import describe, restore

OBJECTS = [
    MaxNorm(), MaxNorm(1.5, (0, 1, 2)), NonNeg(), UnitNorm(), UnitNorm(-1), UnitNorm((0, 1)), MinMaxNorm(),
    MinMaxNorm(1.2, 1.8, 0.5, (0, 2)),
]  # fmt: skip


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def norms(x, axis):
    return np.sqrt((x**2).sum(axis))


def test_norms_are_where_they_should_be():
    x = normal(3, 3, 2, 4) * np.array([0.01, 0.1, 1, 10])
    axis = (0, 1, 2)
    before = norms(x, axis)
    np.testing.assert_allclose(norms(UnitNorm(axis)(x), axis), 1, rtol=1e-5)
    np.testing.assert_allclose(norms(MaxNorm(2, axis)(x), axis), np.minimum(before, 2), rtol=1e-5)
    np.testing.assert_allclose(norms(MinMaxNorm(1, 2, 1, axis)(x), axis), np.clip(before, 1, 2), rtol=1e-5)
    halfway = (np.clip(before, 1, 2) + before) / 2
    np.testing.assert_allclose(norms(MinMaxNorm(1, 2, 0.5, axis)(x), axis), halfway, rtol=1e-5)
    assert before.min() < 1 < 2 < before.max()


def test_non_neg():
    np.testing.assert_array_equal(NonNeg()(np.array([-1.0, 0.0, 2.0])), [0, 0, 2])


@pytest.mark.parametrize("constraint", OBJECTS, ids=str)
def test_input_shape_and_dtype_stay(constraint):
    x = normal(3, 3, 2, 4).astype("float32")
    x.flags.writeable = False
    y = constraint(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (constraint(np.zeros((3, 3, 2, 4))) == 0).all()
    assert restore(describe(constraint)) == constraint


@pytest.mark.keras
@pytest.mark.parametrize("constraint", OBJECTS, ids=str)
def test_against_keras(keras, constraint):
    theirs = getattr(keras.constraints, type(constraint).__name__)(**constraint.options)
    x = normal(3, 3, 2, 4)
    x[..., 0] = 0
    x[..., 1] *= 10
    expected = keras.ops.convert_to_numpy(theirs(keras.ops.convert_to_tensor(x, dtype="float64")))
    np.testing.assert_allclose(constraint(x), expected, rtol=1e-6)  # some of its steps are in float32


def test_get():
    assert constraints.get("max_norm") == MaxNorm(2, 0)
    assert constraints.get("unit_norm") == UnitNorm(0)
    assert constraints.get("min_max") == constraints.get("min_max_norm") == MinMaxNorm(0, 1, 1, 0)
    for given in OBJECTS:
        assert constraints.get(given) is given
    with pytest.raises(ValueError, match="unknown constraint 'max'; known are max_norm, non_neg, unit_norm"):
        constraints.get("max")
    with pytest.raises(TypeError, match="or a function array -> array, got 2"):
        constraints.get(2)


def test_own_function():
    halved = constraints.get(lambda x: x.astype("float64") / 2)(np.ones(3, "float32"))
    assert halved.dtype == np.float32
    np.testing.assert_array_equal(halved, [0.5] * 3)
    with pytest.raises(ValueError, match=re.escape("constraint: result has shape () but must be (3,)")):
        constraints.get(np.sum)(np.ones(3))


@pytest.mark.parametrize("axis", [3, (0, 5)])
def test_axes_that_are_not_there(axis):
    message = f"UnitNorm: axis {axis} does not fit an array of 2 axes (2, 3); give UnitNorm(axis=…)"
    with pytest.raises(ValueError, match=re.escape(message)):
        UnitNorm(axis)(np.ones((2, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaxNorm(-1), "MaxNorm: max_value must be a finite number >= 0, got -1"),
        (lambda: MinMaxNorm(2, 1), "MinMaxNorm: max_value must be a finite number >= 2, got 1"),
        (lambda: MinMaxNorm(rate=2), "MinMaxNorm: rate must be a finite number >= 0 and <= 1, got 2"),
        (lambda: UnitNorm("a"), "UnitNorm: axis must be an integer or a tuple of distinct integers, got 'a'"),
        (lambda: UnitNorm((0, 0)), "UnitNorm: axis must be an integer or a tuple of distinct integers"),
    ],
)
def test_options_that_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_an_own_function_can_be_pickled():
    constraint = pickle.loads(pickle.dumps(constraints.get(np.abs)))
    np.testing.assert_array_equal(constraint(np.array([-1.0, 2.0])), [1, 2])

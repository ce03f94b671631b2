import math
import re

import numpy as np
import pytest

from fastclstm.nn import regularizers
from fastclstm.nn.described import describe, restore
from fastclstm.nn.regularizers import L1, L1L2, L2, OrthogonalRegularizer

OBJECTS = [L1(0.3), L2(0.4), L1L2(0.2, 0.5), OrthogonalRegularizer(0.7), OrthogonalRegularizer(0.7, "columns")]


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def central_differences(function, x, step=1e-6):
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        plus, minus = x.copy(), x.copy()
        plus[index] += step
        minus[index] -= step
        gradient[index] = (function(plus) - function(minus)) / (2 * step)
    return gradient


@pytest.mark.parametrize("regularizer", OBJECTS, ids=str)
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 2, 4), (1, 3), (3, 1)])
def test_gradient(regularizer, shape):
    x = normal(*shape)
    expected = central_differences(regularizer, x)
    np.testing.assert_allclose(regularizer.gradient(x), expected, rtol=1e-7, atol=1e-8)
    single = regularizer.gradient(x.astype("float32"))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-6)


def test_values_by_hand():
    x = np.array([[1.0, -2.0], [0.0, 3.0]])
    assert L1(0.5)(x) == 3
    assert L2(0.5)(x) == 7
    assert L1L2(0.5, 0.25)(x) == 6.5
    assert OrthogonalRegularizer(1)(x) == pytest.approx(2 / math.sqrt(5))
    assert OrthogonalRegularizer(1, "columns")(x) == pytest.approx(2 / math.sqrt(13))
    assert OrthogonalRegularizer(1, "columns")(np.eye(3)) == 0


def test_sums_are_taken_in_double():
    x = np.full(10**6, 0.1, "float32")
    assert L1(1)(x) == pytest.approx(1e6 * float(x[0]), rel=1e-12)
    assert L2(1)(x) == pytest.approx(1e6 * float(x[0]) ** 2, rel=1e-12)


def test_orthogonal_takes_a_kernel_as_a_matrix():
    x = normal(3, 3, 2, 4)
    for mode in ("rows", "columns"):
        regularizer = OrthogonalRegularizer(1, mode)
        assert regularizer(x) == regularizer(x.reshape(18, 4))
    with pytest.raises(ValueError, match=r"at least two axes is needed, got shape \(3,\)"):
        OrthogonalRegularizer()(normal(3))


def test_where_there_is_no_gradient_it_is_zero():
    np.testing.assert_array_equal(L1().gradient(np.zeros(3)), np.zeros(3))
    for array in (np.zeros((3, 2)), np.eye(3)):
        np.testing.assert_array_equal(OrthogonalRegularizer().gradient(array), np.zeros_like(array))
    assert OrthogonalRegularizer()(np.zeros((3, 2))) == 0


@pytest.mark.keras
@pytest.mark.parametrize("regularizer", OBJECTS, ids=str)
def test_against_keras(keras, regularizer):
    theirs = getattr(keras.regularizers, type(regularizer).__name__)(**regularizer.options)
    x = normal(6, 5)
    x[1] = 0
    assert regularizer(x) == pytest.approx(
        float(theirs(keras.ops.convert_to_tensor(x, dtype="float64"))), rel=1e-6
    )  # some of its steps are in float32


def test_get():
    for given in OBJECTS:
        assert regularizers.get(given) is given
        assert restore(describe(given)) == given
    assert regularizers.get("l1") == L1(0.01)
    assert regularizers.get("l2") == L2(0.01)
    assert regularizers.get("l1_l2") == L1L2(0.01, 0.01)
    assert regularizers.get("orthogonal") == OrthogonalRegularizer(0.01, "rows")
    with pytest.raises(ValueError, match="unknown regularizer 'l3'; known are l1, l2, l1_l2, orthogonal"):
        regularizers.get("l3")
    with pytest.raises(TypeError, match="or a pair of functions"):
        regularizers.get(0.01)
    with pytest.raises(TypeError, match=r"has no gradient to train with: give \(penalty, gradient\)"):
        regularizers.get(np.sum)


def test_own_functions():
    own = regularizers.get((lambda x: (x**4).sum(), lambda x: 4 * x.astype("float64") ** 3))
    x = np.array([1.0, 2.0], "float32")
    assert own(x) == 17
    assert own.gradient(x).dtype == np.float32
    np.testing.assert_array_equal(own.gradient(x), [4, 32])
    wrong = regularizers.get((np.sum, np.sum))
    with pytest.raises(ValueError, match=re.escape("regularizer: gradient has shape () but must be (2,)")):
        wrong.gradient(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1(-1), "L1: l1 must be a finite number >= 0, got -1"),
        (lambda: L2("a"), "L2: l2 must be a finite number >= 0, got 'a'"),
        (lambda: L1L2(0, math.nan), "L1L2: l2 must be a finite number >= 0, got nan"),
        (lambda: OrthogonalRegularizer(mode="all"), "OrthogonalRegularizer: mode must be one of 'rows', 'columns'"),
        (lambda: OrthogonalRegularizer(-1), "OrthogonalRegularizer: factor must be a finite number >= 0, got -1"),
    ],
)
def test_options_that_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()

import math

import numpy as np
import pytest

from fastclstm.nn import activations

NAMES = ["tanh", "sigmoid", "hard_sigmoid", "hard_sigmoid_keras2", "relu", "leaky_relu", "elu", "selu", "gelu", "silu",
         "softplus", "softsign", "exponential", "linear", "relu6", "mish"]  # fmt: skip

DEFINITIONS = {  # of one float, in the standard library's functions
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "hard_sigmoid": lambda x: min(max(x + 3, 0), 6) / 6,
    "hard_sigmoid_keras2": lambda x: min(max(0.2 * x + 0.5, 0), 1),
    "relu": lambda x: max(x, 0),
    "leaky_relu": lambda x: x if x > 0 else 0.2 * x,
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "selu": lambda x: 1.05070098735548 * (x if x > 0 else 1.67326324235437 * (math.exp(x) - 1)),
    "gelu": lambda x: x * math.erfc(-x / math.sqrt(2)) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "softplus": lambda x: math.log(1 + math.exp(x)),
    "softsign": lambda x: x / (1 + abs(x)),
    "exponential": math.exp,
    "linear": lambda x: x,
    "relu6": lambda x: min(max(x, 0), 6),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
}
LIMITS = {  # f(-Inf), f(Inf), f'(-Inf), f'(Inf)
    "tanh": (-1, 1, 0, 0),
    "sigmoid": (0, 1, 0, 0),
    "hard_sigmoid": (0, 1, 0, 0),
    "hard_sigmoid_keras2": (0, 1, 0, 0),
    "relu": (0, np.inf, 0, 1),
    "leaky_relu": (-np.inf, np.inf, 0.2, 1),
    "elu": (-1, np.inf, 0, 1),
    "selu": (-1.7580993408473766, np.inf, 0, 1.0507009873554805),
    "gelu": (0, np.inf, 0, 1),
    "silu": (0, np.inf, 0, 1),
    "softplus": (0, np.inf, 0, 1),
    "softsign": (-1, 1, 0, 0),
    "exponential": (0, np.inf, 0, np.inf),
    "linear": (-np.inf, np.inf, 1, 1),
    "relu6": (0, 6, 0, 0),
    "mish": (0, np.inf, 0, 1),
}
GRID = np.linspace(-9, 9, 720)  # meets none of the kinks at 0, ±2.5, ±3 and 6


def test_table_has_the_promised_names():
    assert list(activations.TABLE) == NAMES
    assert all(name == activation.name for name, activation in activations.TABLE.items())


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_definition(name):
    expected = [DEFINITIONS[name](x) for x in GRID.tolist()]
    np.testing.assert_allclose(activations.get(name).forward(GRID), expected, rtol=2e-14, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_derivative_is_that_of_forward(name):
    activation = activations.get(name)
    by_complex_step = activation.forward(GRID + 1e-40j).imag / 1e-40
    np.testing.assert_allclose(activation.derivative(GRID), by_complex_step, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_dtype_is_kept_and_input_is_not_modified(name, dtype):
    x = GRID.astype(dtype)
    for function in (activations.get(name).forward, activations.get(name).derivative):
        y = function(x)
        assert y.dtype == dtype
        assert y.shape == x.shape
        assert not np.shares_memory(x, y)
        np.testing.assert_array_equal(x, GRID.astype(dtype))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_limits_at_infinity_and_nan(name, dtype):
    activation = activations.get(name)
    low, high, low_slope, high_slope = np.array(LIMITS[name], dtype)
    np.testing.assert_array_equal(activation.forward(np.array([-np.inf, np.inf, np.nan], dtype)), [low, high, np.nan])
    np.testing.assert_array_equal(activation.derivative(np.array([-np.inf, np.inf], dtype)), [low_slope, high_slope])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "exponential"])
def test_huge_inputs_give_no_warning_and_no_nan(name):
    for dtype, huge in ((np.float32, 1e37), (np.float64, 1e300)):
        x = np.array([-huge, huge], dtype)
        assert not np.isnan(activations.get(name).forward(x)).any()
        assert np.isfinite(activations.get(name).derivative(x)).all()


def test_gelu_keeps_relative_accuracy_in_its_tail():
    x = np.linspace(-12, -4, 81)
    expected = [DEFINITIONS["gelu"](value) for value in x.tolist()]
    np.testing.assert_allclose(activations.get("gelu").forward(x), expected, rtol=1e-13)


def test_an_activation_stands_for_itself():
    relu = activations.TABLE["relu"]
    assert activations.get(relu) is relu


def test_pair_of_functions():
    sine = activations.get((np.sin, np.cos))
    x = np.linspace(0, 1, 5, dtype=np.float32)
    assert sine.name == "sin"
    np.testing.assert_array_equal(sine.forward(x), np.sin(x))
    np.testing.assert_array_equal(sine.derivative(x), np.cos(x))


def test_results_of_a_callers_function_take_the_dtype_of_the_input():
    twice = activations.get((lambda x: x.astype(np.float64) * 2, lambda x: [2.0] * len(x)))
    x = np.ones(3, np.float32)
    assert twice.forward(x).dtype == np.float32
    np.testing.assert_array_equal(twice.derivative(x), np.full(3, 2, np.float32))


def test_callers_function_must_be_elementwise():
    total = activations.get((np.sum, np.ones_like))
    with pytest.raises(ValueError, match=r"activation sum must be elementwise, but turned shape \(3,\) into \(\)"):
        total.forward(np.ones(3))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown activation 'swoosh'; known are tanh, sigmoid, .*, linear"):
        activations.get("swoosh")


@pytest.mark.parametrize("value", [None, 3, np.tanh, (np.tanh, 1), (np.tanh,)])
def test_anything_else_is_a_type_error(value):
    with pytest.raises(TypeError, match=r"must be a name \(tanh, .*\) or a pair of functions"):
        activations.get(value)

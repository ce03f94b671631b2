"""Activations: small functions and their derivatives, by name.

Every function is elementwise, keeps the dtype (float32 stays float32), has the right limit at ±Inf and hands NaN on.
Wherever it is analytic it also takes complex arrays, so that complex-step differentiation can check its derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm.nn import look_up

Function = Callable[[np.ndarray], np.ndarray]

LEAKY_RELU_SLOPE = 0.2
SELU_SCALE = 1.0507009873554805
SELU_ALPHA = 1.6732632423543772


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative, both taken at the same input."""

    name: str
    forward: Function
    derivative: Function


def get(spec: Any) -> Activation:
    """Return the activation that `spec` means: a name, an `Activation`, or a pair (forward, derivative) of callables.

    The results of a caller's own functions are brought to the dtype of their input.

    Raises
    ------
    ValueError
        An unknown name; when called, a function whose result has another shape than its input.
    TypeError
        Anything else.

    Examples
    --------
    >>> get("relu").forward(np.array([-1.0, 2.0]))
    array([0., 2.])
    >>> get((np.sin, np.cos)).name
    'sin'
    """
    if isinstance(spec, Activation):
        return spec
    if isinstance(spec, str):
        return look_up("activation", TABLE, spec)
    if isinstance(spec, tuple | list) and len(spec) == 2 and all(map(callable, spec)):
        forward, derivative = spec
        name = getattr(forward, "__name__", type(forward).__name__)
        return Activation(name, _elementwise(name, forward), _elementwise(f"derivative of {name}", derivative))
    raise TypeError(f"an activation must be a name ({', '.join(TABLE)}) or a pair of functions (forward, derivative), "
                    f"got {spec!r}")  # fmt: skip


def is_named(spec: Any) -> bool:
    """Return whether `spec` means one of `TABLE`."""
    activation = get(spec)
    return TABLE.get(activation.name) is activation


_BOUNDED = {"sigmoid", "tanh", "hard_sigmoid", "hard_sigmoid_keras2", "softsign"}


def is_bounded(activation: Activation) -> bool:
    """Return whether an activation is one of `TABLE` whose values lie in [-1, 1]."""
    return activation.name in _BOUNDED and TABLE.get(activation.name) is activation


def _elementwise(name: str, function: Callable[..., Any]) -> Function:
    def checked(x: np.ndarray) -> np.ndarray:
        y = np.asarray(function(x), x.dtype)
        if y.shape != x.shape:
            raise ValueError(f"activation {name} must be elementwise, but turned shape {x.shape} into {y.shape}")
        return y

    return checked


def _magnitude(x: np.ndarray) -> np.ndarray:
    """Return |x|, continued analytically off the real axis."""
    return np.where(x < 0, -x, x)


def _tanh_derivative(x: np.ndarray) -> np.ndarray:
    return 1 - np.tanh(x) ** 2


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # an exponential of Inf gives the right limit, 0
        return 1 / (1 + np.exp(-x))


def _sigmoid_derivative(x: np.ndarray) -> np.ndarray:
    y = _sigmoid(x)
    return y * (1 - y)


def _hard_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.clip(x + 3, 0, 6) / 6


def _hard_sigmoid_derivative(x: np.ndarray) -> np.ndarray:
    return ((x > -3) & (x < 3)).astype(x.dtype) / 6


def _hard_sigmoid_keras2(x: np.ndarray) -> np.ndarray:
    return np.clip(0.2 * x + 0.5, 0, 1)


def _hard_sigmoid_keras2_derivative(x: np.ndarray) -> np.ndarray:
    return ((x > -2.5) & (x < 2.5)).astype(x.dtype) * 0.2


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def _relu_derivative(x: np.ndarray) -> np.ndarray:
    return (x > 0).astype(x.dtype)


def _leaky_relu(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, LEAKY_RELU_SLOPE * x, x)


def _leaky_relu_derivative(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, np.ones_like(x), LEAKY_RELU_SLOPE)


def _elu(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, np.expm1(np.minimum(x, 0)), x)


def _elu_derivative(x: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(x, 0))


def _selu(x: np.ndarray) -> np.ndarray:
    return SELU_SCALE * np.where(x < 0, SELU_ALPHA * np.expm1(np.minimum(x, 0)), x)


def _selu_derivative(x: np.ndarray) -> np.ndarray:
    return SELU_SCALE * np.where(x < 0, SELU_ALPHA * np.exp(np.minimum(x, 0)), np.ones_like(x))


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    """Return Φ(x) to rounding, with relative accuracy in the lower tail.

    The midpoint rule with step h for the integral that is erfc, and the residue at its pole: Hunter & Regan, "A note
    on the evaluation of the complementary error function", Math. Comp. 26 (1972), 539-541. With h = 1/2 the rule
    errs by exp(-π²/h²) = 7e-18.
    """
    h = 0.5
    a = _magnitude(np.clip(x, -40, 40)) * math.sqrt(0.5)
    tail = sum(math.exp(-t * t) / (t * t + a * a) for t in (h * (k + 0.5) for k in range(12)))
    tail = tail * (h / math.pi) * a * np.exp(-a * a)
    pole = np.exp(-2 * math.pi / h * a)
    tail = tail + np.where(a < math.pi / h, pole / (1 + pole), 0)
    return np.where(x < 0, tail, 1 - tail)


def _gelu(x: np.ndarray) -> np.ndarray:
    """Return x Φ(x), the exact form of Hendrycks & Gimpel 2016."""
    return np.maximum(x, -40) * _normal_cdf(x)


def _gelu_derivative(x: np.ndarray) -> np.ndarray:
    near = np.clip(x, -40, 40)
    return _normal_cdf(x) + near * np.exp(-near * near / 2) / math.sqrt(2 * math.pi)


def _silu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, -1000) * _sigmoid(x)


def _silu_derivative(x: np.ndarray) -> np.ndarray:
    y = _sigmoid(x)
    return y + np.clip(x, -1000, 1000) * y * (1 - y)


def _mish_gate(x: np.ndarray) -> np.ndarray:
    """Return tanh(softplus(x)) by exp(−|x|), which does not overflow."""
    e = np.exp(-_magnitude(x))
    return np.where(x < 0, e * (e + 2) / (e * (e + 2) + 2), (1 + 2 * e) / (1 + 2 * e * (1 + e)))


def _mish(x: np.ndarray) -> np.ndarray:
    """Return x tanh(softplus(x)): Misra, "Mish", BMVC 2020."""
    return np.maximum(x, -1000) * _mish_gate(x)


def _mish_derivative(x: np.ndarray) -> np.ndarray:
    gate = _mish_gate(x)
    return gate + np.clip(x, -1000, 1000) * (1 - gate**2) * _sigmoid(x)


def _relu6(x: np.ndarray) -> np.ndarray:
    return np.clip(x, 0, 6)


def _relu6_derivative(x: np.ndarray) -> np.ndarray:
    return ((x > 0) & (x < 6)).astype(x.dtype)


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) + np.log1p(np.exp(-_magnitude(x)))


def _softsign(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, -1e30, 1e30)
    return x / (1 + _magnitude(x))


def _softsign_derivative(x: np.ndarray) -> np.ndarray:
    return (1 / (1 + _magnitude(x))) ** 2


TABLE: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("tanh", np.tanh, _tanh_derivative),
        Activation("sigmoid", _sigmoid, _sigmoid_derivative),
        Activation("hard_sigmoid", _hard_sigmoid, _hard_sigmoid_derivative),
        Activation("hard_sigmoid_keras2", _hard_sigmoid_keras2, _hard_sigmoid_keras2_derivative),
        Activation("relu", _relu, _relu_derivative),
        Activation("leaky_relu", _leaky_relu, _leaky_relu_derivative),
        Activation("elu", _elu, _elu_derivative),
        Activation("selu", _selu, _selu_derivative),
        Activation("gelu", _gelu, _gelu_derivative),
        Activation("silu", _silu, _silu_derivative),
        Activation("softplus", _softplus, _sigmoid),
        Activation("softsign", _softsign, _softsign_derivative),
        Activation("exponential", np.exp, np.exp),
        Activation("linear", np.positive, np.ones_like),
        Activation("relu6", _relu6, _relu6_derivative),
        Activation("mish", _mish, _mish_derivative),
    )
}
"""The named activations. `leaky_relu` has slope 0.2 (as Keras 3), `hard_sigmoid` is relu6(x + 3) / 6."""

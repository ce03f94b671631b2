"""Elementary functions on vectors, and the activations that kernels know by number.

exp, tanh and sigmoid err by at most 4 ULP over the whole line; NaN stays NaN, infinities give the limits.
"""

from __future__ import annotations

from math import cos, erfc, factorial, fsum, log, pi, sqrt, tan
from math import exp as exponential
from typing import Any

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numpy.polynomial import chebyshev

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd
from fastclstm.nn.activations import LEAKY_RELU_SLOPE, SELU_ALPHA, SELU_SCALE

LOG2E = 1 / log(2)
MAGIC_SINGLE = 1.5 * 2.0**23 + 127
MAGIC_DOUBLE = 1.5 * 2.0**52 + 1023
"""Adding it rounds to an integer n and leaves n + exponent bias in the low bits of the sum."""


def _exp2_coefficients(degree: int) -> tuple[float, ...]:
    """Coefficients of 2**r on [-1/2, 1/2], interpolated at Chebyshev nodes."""
    halved: Any = lambda t: np.exp2(t / 2)  # noqa: E731 (NumPy's stubs take scalar functions only)
    scaled = chebyshev.cheb2poly(chebyshev.chebinterpolate(halved, degree))
    return (1.0, *(scaled * 2.0 ** np.arange(len(scaled)))[1:])  # 2**0 is exactly 1


def _taylor_exp2(degree: int) -> tuple[float, ...]:
    """Coefficients of 2**r: Taylor's, which are rounded best, at the price of one more than Chebyshev's."""
    return tuple(log(2) ** power / factorial(power) for power in range(degree + 1))


def _expm1_coefficients(degree: int) -> tuple[float, ...]:
    """Coefficients of (exp(r) - 1 - r) / r²: Taylor's, for |r| <= log(2) / 2."""
    return tuple(1 / factorial(power) for power in range(2, degree + 1))


_EXP2 = {ir.FloatType(): _exp2_coefficients(5), ir.DoubleType(): _taylor_exp2(13)}
_EXPM1 = {ir.FloatType(): _expm1_coefficients(8), ir.DoubleType(): _expm1_coefficients(14)}


def _horner(builder, x, coefficients):
    result = simd.constant(x.type, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = simd.emit_fma(builder, result, x, simd.constant(x.type, coefficient))
    return result


@intrinsic
def _exp2_polynomial(typingctx, r):
    """2**r for |r| <= 1/2."""

    def codegen(context, builder, sig, args):
        return _horner(builder, args[0], _EXP2[args[0].type.element])

    return r(r), codegen


@intrinsic
def _expm1_polynomial(typingctx, r):
    """(exp(r) - 1 - r) / r² for |r| <= log(2) / 2."""

    def codegen(context, builder, sig, args):
        return _horner(builder, args[0], _EXPM1[args[0].type.element])

    return r(r), codegen


@inline
def _magic(x):
    return MAGIC_DOUBLE if simd.is_double(x) else MAGIC_SINGLE


LIMIT_SINGLE, LIMIT_DOUBLE = 40.0, 330.0
WIDE_SINGLE, WIDE_DOUBLE = 125.0, 1000.0


@inline
def exp2_gate(x):
    """2**x with x limited to 40 (float64: 330), so that products of three such terms stay finite.

    Below -40 (-330) the result may be that of the limit.
    """
    return _exp2_below(x, LIMIT_DOUBLE if simd.is_double(x) else LIMIT_SINGLE)


@inline
def exp2_wide(x):
    """2**x with x limited to 125 (float64: 1000), so that one over such a term and 1 is a normal number.

    Below -125 (-1000) the result may be that of the limit.
    """
    return _exp2_below(x, WIDE_DOUBLE if simd.is_double(x) else WIDE_SINGLE)


@inline
def _exp2_below(x, limit):
    x = simd.minimum(limit, x)
    if simd.can_scale(x):
        r = simd.fraction(x)
        return simd.scale(_exp2_polynomial(r), x - r)
    x = simd.maximum(-limit, x)
    magic = _magic(x)
    rounded = x + magic
    return _exp2_polynomial(x - (rounded - magic)) * simd.power_of_two(rounded)


@inline
def _reduce(x):
    """Return (n, r) with x = n·log(2) + r, n an integer and |r| <= log(2) / 2."""
    magic = _magic(x)
    n = (x * LOG2E + magic) - magic
    if simd.is_double(x):
        high, low = 0.6931471803691238, 1.9082149292705877e-10
    else:
        high, low = 0.693145751953125, 1.428606765330187e-06
    r = simd.fma(n, simd.broadcast(x, -high), x)
    return n, simd.fma(n, simd.broadcast(x, -low), r)


@inline
def exp(x):
    """Exponential function; overflows to infinity and underflows gradually."""
    low, high = (-746.0, 710.0) if simd.is_double(x) else (-105.0, 89.0)
    n, r = _reduce(simd.maximum(low, simd.minimum(high, x)))
    value = simd.fma(r * r, _expm1_polynomial(r), r) + 1.0
    magic = _magic(x)
    half = (n * 0.5 + magic) - magic  # 2**n in two factors, each a normal number
    return value * simd.power_of_two(half + magic) * simd.power_of_two((n - half) + magic)


@inline
def _expm1_small(x):
    """exp(x) - 1 for x in [-80, 0]."""
    n, r = _reduce(x)
    scale = simd.power_of_two(n + _magic(x))
    return simd.fma(scale, simd.fma(r * r, _expm1_polynomial(r), r), scale - 1.0)


@inline
def expm1_negative(x):
    """exp(x) - 1 for x <= 0, accurate near 0."""
    return _expm1_small(simd.maximum(-80.0, x))


@inline
def tanh(x):
    """Hyperbolic tangent, accurate near 0 too."""
    e = expm1_negative(-2.0 * simd.absolute(x))
    return simd.copy_sign(-e / (e + 2.0), x)


@inline
def sigmoid(x):
    """1 / (1 + exp(-x)), accurate down to the smallest numbers."""
    e = exp(-simd.absolute(x))
    one = simd.broadcast(x, 1.0)
    return simd.select_less(x, simd.broadcast(x, 0.0), e, one) / (one + e)


ACTIVATION_CODES = {
    "tanh": 0, "sigmoid": 1, "linear": 2, "relu": 3, "hard_sigmoid": 4, "hard_sigmoid_keras2": 5, "leaky_relu": 6,
    "elu": 7, "selu": 8, "silu": 9, "softsign": 10, "exponential": 11, "gelu": 12, "softplus": 13,
}  # fmt: skip
"""Number of each activation that kernels compute; the others are computed by NumPy."""


@inline
def _exponential_unit(x, alpha):
    zero = simd.broadcast(x, 0.0)
    return simd.select_less(zero, x, x, alpha * expm1_negative(simd.minimum(0.0, x)))


@inline
def activate(code, x):
    """Apply the activation with number `code`."""
    if code == 0:
        return tanh(x)
    if code == 1:
        return sigmoid(x)
    if code == 3:
        return simd.maximum(0.0, x)
    if code == 4:
        return simd.maximum(0.0, simd.minimum(6.0, x + 3.0)) / 6.0
    if code == 5:
        return simd.maximum(0.0, simd.minimum(1.0, x * 0.2 + 0.5))
    if code == 6:
        return simd.maximum(0.0, x) + LEAKY_RELU_SLOPE * simd.minimum(0.0, x)
    if code == 7:
        return _exponential_unit(x, 1.0)
    if code == 8:
        return SELU_SCALE * _exponential_unit(x, SELU_ALPHA)
    if code == 9:
        return simd.maximum(-1e30, x) * sigmoid(x)  # -inf * 0 would be NaN
    if code == 10:
        x = simd.maximum(-1e30, simd.minimum(1e30, x))
        return x / (1.0 + simd.absolute(x))
    if code == 11:
        return exp(x)
    if code == 12:
        return gelu(x)
    if code == 13:
        return softplus(x)
    return x


DERIVATIVE_CODES = frozenset(
    code for name, code in ACTIVATION_CODES.items() if name not in ("silu", "gelu", "softplus")
)
"""Numbers of the activations whose derivative follows from their value."""


@inline
def derivative(code, y):
    """Derivative of the activation with number `code`, one of `DERIVATIVE_CODES`, where its value is y."""
    zero, one = simd.broadcast(y, 0.0), simd.broadcast(y, 1.0)
    if code == 0:
        return one - y * y
    if code == 1:
        return y * (one - y)
    if code == 3:
        return simd.select_less(zero, y, one, zero)
    if code == 4:
        return _inside(y, 1.0 / 6.0)
    if code == 5:
        return _inside(y, 0.2)
    if code == 6:
        return simd.select_less(zero, y, one, simd.broadcast(y, LEAKY_RELU_SLOPE))
    if code == 7:
        return simd.select_less(y, zero, y + 1.0, one)
    if code == 8:
        return simd.select_less(y, zero, y + SELU_SCALE * SELU_ALPHA, simd.broadcast(y, SELU_SCALE))
    if code == 10:
        rest = 1.0 - simd.absolute(y)
        return rest * rest
    if code == 11:
        return y
    return one


@inline
def _inside(y, slope):
    """`slope` where 0 < y < 1, else 0."""
    zero, one = simd.broadcast(y, 0.0), simd.broadcast(y, 1.0)
    return simd.select_less(zero, y, simd.select_less(y, one, simd.broadcast(y, slope), zero), zero)


# ------------------------------------------------------------------------- activations whose slope needs their input


def _scaled_erfc(a: float) -> float:
    """exp(a²) erfc(a) for a >= 0: where that would lose digits by its continued fraction."""
    if a < 1:
        return exponential(a * a) * erfc(a)
    rest = a
    for n in range(200, 0, -1):
        rest = a + n / 2 / rest
    return 1 / (sqrt(pi) * rest)


TAIL = 2.5
"""Where the polynomial of the tail has its middle."""


def _tail_coefficients(degree: int) -> tuple[float, ...]:
    """Coefficients in s = (a - TAIL) / (a + TAIL), a >= 0, of (1 + 2a) exp(a²) erfc(a), at Chebyshev nodes.

    Sums are rounded once: of so high a degree the coefficients would lose digits otherwise.
    """
    n = degree + 1
    odd = range(1, 2 * n, 2)  # nodes are cos(odd · unit)
    unit = pi / (2 * n)
    places = [TAIL / tan(m * unit / 2) ** 2 for m in odd]
    values = [(1 + 2 * a) * _scaled_erfc(a) for a in places]
    weights = [
        fsum(v * cos(k * m % (4 * n) * unit) for v, m in zip(values, odd, strict=True)) * (1 + (k > 0)) / n
        for k in range(n)
    ]
    powers = [np.pad(chebyshev.cheb2poly([0] * k + [1]), (0, degree - k)) for k in range(n)]
    return tuple(fsum(w * row[i] for w, row in zip(weights, powers, strict=True)) for i in range(n))


def _rough_tail_coefficients(degree: int) -> tuple[float, ...]:
    """Coefficients in s of exp(a²) erfc(a), which is at most 1, so that they err alike everywhere."""
    value: Any = lambda s: [_scaled_erfc(TAIL * (1 + t) / (1 - t)) for t in s]  # noqa: E731
    return tuple(map(float, chebyshev.cheb2poly(chebyshev.chebinterpolate(value, degree))))


def _logarithm_coefficients(degree: int) -> tuple[float, ...]:
    """Coefficients in u = s² <= 1/9 of atanh(s) / s: Taylor's."""
    return tuple(1 / (2 * power + 1) for power in range(degree + 1))


_TAIL = {ir.FloatType(): _tail_coefficients(11), ir.DoubleType(): _tail_coefficients(24)}
_ROUGH_TAIL = {ir.FloatType(): _rough_tail_coefficients(9)}
_LOGARITHM = {ir.FloatType(): _logarithm_coefficients(7), ir.DoubleType(): _logarithm_coefficients(15)}


@intrinsic
def _tail_polynomial(typingctx, s):
    """(1 + 2a) exp(a²) erfc(a) of s = (a - TAIL) / (a + TAIL)."""

    def codegen(context, builder, sig, args):
        return _horner(builder, args[0], _TAIL[args[0].type.element])

    return s(s), codegen


@intrinsic
def _rough_tail_polynomial(typingctx, s):
    """exp(a²) erfc(a) of s = (a - TAIL) / (a + TAIL), float32."""

    def codegen(context, builder, sig, args):
        return _horner(builder, args[0], _ROUGH_TAIL[ir.FloatType()])

    return s(s), codegen


@intrinsic
def _logarithm_polynomial(typingctx, u):
    """atanh(s) / s of u = s² <= 1/9."""

    def codegen(context, builder, sig, args):
        return _horner(builder, args[0], _LOGARITHM[args[0].type.element])

    return u(u), codegen


@inline
def _normal(x):
    """Return Φ(x), with relative accuracy in the lower tail, and exp(-x²/2)."""
    x = simd.maximum(-40.0, simd.minimum(40.0, x))
    square = x * x
    rest = simd.fma(x, x, -square)  # what rounding took of the square
    bell = exp(-0.5 * square) * (1.0 - 0.5 * rest)
    a = simd.absolute(x) * 0.7071067811865476
    tail = 0.5 * bell * _tail_polynomial((a - TAIL) / (a + TAIL)) / (1.0 + 2.0 * a)
    return simd.select_less(x, simd.broadcast(x, 0.0), tail, 1.0 - tail), bell


@inline
def gelu(x):
    """Return x Φ(x); NaN stays."""
    below, _ = _normal(x)
    return simd.maximum(-40.0, x) * below


@inline
def softplus(x):
    """log(1 + exp(x)), accurate down to the smallest numbers."""
    e = exp(-simd.absolute(x))
    s = e / (e + 2.0)
    return simd.maximum(0.0, x) + 2.0 * s * _logarithm_polynomial(s * s)


@inline
def slope(code, x, y):
    """Derivative of the activation with number `code` at x, where its value is y."""
    if code == 9:
        s = sigmoid(x)
        return simd.fma(simd.maximum(-1000.0, simd.minimum(1000.0, x)) * s, 1.0 - s, s)
    if code == 12:
        below, bell = _normal(x)
        return simd.fma(simd.maximum(-40.0, simd.minimum(40.0, x)) * bell, simd.broadcast(x, 0.3989422804014327), below)
    if code == 13:
        return sigmoid(x)
    return derivative(code, y)


# ------------------------------------------------------------------------------------------------------ of the gates


@inline
def activate_gate(code, x):
    """Apply the activation with number `code` to what a gate takes in: in float32 as the standard gates are computed.

    Then errors are those of numbers of order 1 (3e-7, times |x| where that is more), near 0 too.
    """
    if simd.is_double(x):
        return activate(code, x)
    if code == 0:
        e = exp2_wide(x * (-2.0 * LOG2E))
        return simd.quotient(1.0 - e, 1.0 + e)
    if code == 1:
        return simd.quotient(simd.broadcast(x, 1.0), 1.0 + exp2_wide(x * -LOG2E))
    if code == 4:
        return simd.maximum(0.0, simd.minimum(6.0, x + 3.0)) * (1.0 / 6.0)
    if code == 7:
        return _rough_exponential_unit(x, 1.0)
    if code == 8:
        return SELU_SCALE * _rough_exponential_unit(x, SELU_ALPHA)
    if code == 9:
        x = simd.maximum(-128.0, x)
        return simd.quotient(x, 1.0 + exp2_wide(x * -LOG2E))
    if code == 10:
        x = simd.maximum(-1e30, simd.minimum(1e30, x))
        return simd.quotient(x, 1.0 + simd.absolute(x))
    if code == 12:
        return _rough_gelu(x)
    if code == 13:
        e = exp2_wide(simd.absolute(x) * -LOG2E)
        s = simd.quotient(e, e + 2.0)
        return simd.maximum(0.0, x) + 2.0 * s * _logarithm_polynomial(s * s)
    return activate(code, x)


@inline
def _rough_exponential_unit(x, alpha):
    zero = simd.broadcast(x, 0.0)
    return simd.select_less(zero, x, x, alpha * (exp2_wide(simd.minimum(0.0, x) * LOG2E) - 1.0))


@inline
def _rough_gelu(x):
    x = simd.maximum(-40.0, x)
    near = simd.minimum(40.0, x)
    a = simd.absolute(near) * 0.7071067811865476
    tail = 0.5 * exp2_wide(near * near * (-0.5 * LOG2E)) * _rough_tail_polynomial(simd.quotient(a - TAIL, a + TAIL))
    return x * simd.select_less(x, simd.broadcast(x, 0.0), tail, 1.0 - tail)

"""Elementary functions on vectors: their errors over the whole line, and the activations by number."""

import numba
import numpy as np
import pytest

from fastclstm.engines.cpu.kernels import simd, vmath
from fastclstm.nn import activations

pytestmark = pytest.mark.vectors
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])
WIDER = {np.float32: np.float64, np.float64: np.longdouble}
LIMITS = [0.0, -0.0, np.inf, -np.inf, np.nan]


def of_vectors(function):
    """Return the function of an array that a function of vectors is (`code` is for activate)."""

    @numba.njit
    def over(a, out, code):
        source, target = simd.pointer(a), simd.pointer(out)
        for k in range(0, a.size, simd.vector_lanes(source)):
            x = simd.load(simd.shift(source, k))
            simd.store(simd.shift(target, k), function(code, x))

    def apply(a, code=0):
        padded = np.concatenate([a, np.zeros(-a.size % simd.lanes(a.itemsize), a.dtype)])
        out = np.full_like(padded, 77)
        over(padded, out, code)
        return out[: a.size]

    return apply


EXP, TANH, SIGMOID, EXPM1, GATE, RATIO, ACTIVATE, ACTIVATE_GATE, SLOPE = map(of_vectors, (
    numba.njit(lambda code, x: vmath.exp(x)), numba.njit(lambda code, x: vmath.tanh(x)),
    numba.njit(lambda code, x: vmath.sigmoid(x)), numba.njit(lambda code, x: vmath.expm1_negative(x)),
    numba.njit(lambda code, x: vmath.exp2_gate(x)),
    numba.njit(lambda code, x: simd.quotient(simd.broadcast(x, code), x)), vmath.activate,
    vmath.activate_gate, numba.njit(lambda code, x: vmath.slope(code, x, vmath.activate(code, x))),
))  # fmt: skip


def line(dtype):
    """Numbers of every size: bit patterns spread evenly, a dense middle, the edges of overflow, NaN of odd payloads."""
    bits = np.uint32 if dtype == np.float32 else np.uint64
    span = 2 ** (8 * np.dtype(dtype).itemsize)
    everywhere = np.arange(0, span, span // 150_001, dtype=bits).view(dtype)
    edge = 104 if dtype == np.float32 else 746
    middle = np.concatenate([np.linspace(-edge, edge, 40_001), np.linspace(-1, 1, 20_001), LIMITS])
    payloads = np.array([span // 2 - 1, span - 1, span // 2 - 7], bits).view(dtype)
    return np.concatenate([everywhere, middle.astype(dtype), payloads])


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def error_in_ulp(result, expected, dtype):
    """Largest error in units of the last place of the exact value, smallest numbers included."""
    finite = np.isfinite(expected) & (np.abs(expected) <= np.finfo(dtype).max)
    np.testing.assert_array_equal(result[~finite], expected[~finite].astype(dtype))
    unit = np.spacing(np.abs(expected[finite]).astype(dtype)).astype(expected.dtype)
    return float((np.abs(result[finite].astype(expected.dtype) - expected[finite]) / unit).max())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("kernel", "function"), [(EXP, np.exp), (TANH, np.tanh), (SIGMOID, sigmoid)], ids=["exp", "tanh", "sigmoid"]
)
@every_dtype
def test_error_over_the_whole_line(kernel, function, dtype):
    wider = WIDER[dtype]
    if np.finfo(wider).eps == np.finfo(dtype).eps:
        pytest.skip("this machine has no type wider than float64 to compare with")
    x = line(dtype)
    result = kernel(x)
    assert result.dtype == dtype
    assert error_in_ulp(result, function(x.astype(wider)), dtype) <= 4


@every_dtype
def test_limits(dtype):
    x = np.array(LIMITS, dtype)
    np.testing.assert_array_equal(EXP(x), [1, 1, np.inf, 0, np.nan])
    np.testing.assert_array_equal(TANH(x), [0, 0, 1, -1, np.nan])
    np.testing.assert_array_equal(np.signbit(TANH(x)[:2]), [False, True])
    np.testing.assert_array_equal(SIGMOID(x), [0.5, 0.5, 1, 0, np.nan])
    tiny = np.finfo(dtype).smallest_subnormal
    np.testing.assert_array_equal(TANH(np.array([tiny, -tiny], dtype)), [tiny, -tiny])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@every_dtype
def test_exponential_underflows_gradually(dtype):
    """Results below the normal numbers are there, and the last of them before 0."""
    finfo = np.finfo(dtype)
    lowest = np.log(finfo.smallest_subnormal.astype(WIDER[dtype]))
    x = np.linspace(lowest - 2, np.log(finfo.smallest_normal.astype(WIDER[dtype])), 2001).astype(dtype)
    result, expected = EXP(x), np.exp(x.astype(WIDER[dtype]))
    assert np.count_nonzero((result > 0) & (result < finfo.smallest_normal)) > 1500
    assert np.abs(result - expected).max() <= 1.001 * finfo.smallest_subnormal
    assert (result[x < lowest - 1] == 0).all()


@every_dtype
def test_functions_rise(dtype):
    """No step down of more than the error where polynomials change places."""
    x = np.linspace(-30, 30, 60_001).astype(dtype)
    for kernel in (EXP, TANH, SIGMOID):
        y = kernel(x)
        assert (np.diff(y) >= -4 * np.spacing(np.abs(y[1:]))).all()


@every_dtype
def test_expm1_near_zero(dtype):
    x = -np.geomspace(1e-30, 80, 5001).astype(dtype)
    expected = np.expm1(x.astype(WIDER[dtype]))
    assert error_in_ulp(EXPM1(x), expected, dtype) <= 4


@every_dtype
def test_gate_exponential(dtype):
    """2**x to a few roundings; limited far from 0, where it must not overflow; NaN stays."""
    limit = 40 if dtype == np.float32 else 330
    x = np.linspace(-limit, limit, 30_001).astype(dtype)
    relative = GATE(x) / np.exp2(x.astype(WIDER[dtype])) - 1
    assert np.abs(relative).max() <= 2 * np.finfo(dtype).eps
    far = GATE(np.array([1.5 * limit, 1e30, np.inf, np.nan, 0], dtype))
    np.testing.assert_array_equal(far, np.array([2.0**limit, 2.0**limit, 2.0**limit, np.nan, 1], dtype))
    assert np.isfinite(far[0] ** 3)  # the gates multiply three
    low = GATE(np.array([-1.5 * limit, -100 * limit, -1e30, -np.inf], dtype))
    assert ((low >= 0) & (low <= 2.0**-limit)).all()


@every_dtype
def test_ratio(dtype):
    """Two roundings, of all denominators that the gates have; infinities and NaN as of a division."""
    limit = 120 if dtype == np.float32 else 990
    b = np.concatenate([np.linspace(1, 4, 10_001), np.geomspace(1, 2.0**limit, 10_001)]).astype(dtype)
    for a in (1.0, 1.7, -1.9):
        expected = np.array(a, dtype).astype(WIDER[dtype]) / b
        result = RATIO(b, float(dtype(a))).astype(WIDER[dtype])
        assert (np.abs(result - expected) <= 1.5 * np.finfo(dtype).eps * np.abs(expected)).all()
    for a in (0.0, np.inf, -np.inf, np.nan):
        np.testing.assert_array_equal(RATIO(b, a), np.full_like(b, a))
    assert np.isnan(RATIO(np.array([np.nan], dtype), 1.0)).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", vmath.ACTIVATION_CODES)
@every_dtype
def test_activations_are_those_of_the_table(name, dtype):
    wide = np.geomspace(1e-30, 1e4, 500)
    x = np.concatenate([np.linspace(-9, 9, 4001), wide, -wide, LIMITS]).astype(dtype)
    expected = activations.get(name).forward(x.astype(np.float64))
    result = ACTIVATE(x, vmath.ACTIVATION_CODES[name])
    assert result.dtype == dtype
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(result, expected.astype(dtype), rtol=8 * eps, atol=eps)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", vmath.ACTIVATION_CODES)
@every_dtype
def test_activations_of_gates_err_as_numbers_of_order_1(name, dtype):
    wide = np.geomspace(1e-30, 1e4, 500)
    x = np.concatenate([np.linspace(-9, 9, 4001), wide, -wide, LIMITS]).astype(dtype)
    expected = activations.get(name).forward(x.astype(np.float64))
    result = ACTIVATE_GATE(x, vmath.ACTIVATION_CODES[name])
    assert result.dtype == dtype
    np.testing.assert_array_equal(np.isnan(result), np.isnan(x))
    if name == "exponential":
        expected[expected > np.finfo(dtype).max] = np.inf
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(result, expected, rtol=8 * eps, atol=4 * eps)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", vmath.ACTIVATION_CODES)
@every_dtype
def test_slopes_are_those_of_the_table(name, dtype):
    x = np.concatenate([np.linspace(-9, 9, 4002), [30, -30, 200, -200]]).astype(dtype)
    expected = activations.get(name).derivative(x.astype(np.float64))
    result = SLOPE(x, vmath.ACTIVATION_CODES[name])
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(result, expected.astype(dtype), rtol=16 * eps, atol=4 * eps)


def test_numbers_of_activations_differ():
    codes = vmath.ACTIVATION_CODES.values()
    assert len(set(codes)) == len(codes)

"""The vector type: each operation on lanes is NumPy's on elements."""

import ctypes
import json
import mmap
import operator
import os
import platform
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from fastclstm.engines.cpu.kernels import simd

pytestmark = pytest.mark.vectors
DTYPES = [np.float32, np.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
SPECIAL = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 3e-39]


def lanes(dtype):
    return simd.lanes(np.dtype(dtype).itemsize)


def values(dtype, seed=0):
    """One vector of ordinary numbers."""
    return np.random.default_rng(seed).standard_normal(lanes(dtype)).astype(dtype)


def special_pairs(dtype):
    """Every pair of special values, in two arrays of whole vectors."""
    pairs = np.array([(a, b) for a in SPECIAL for b in SPECIAL], dtype)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def on_vectors(function):
    """Kernel that applies a function of vectors to arrays of whole vectors."""
    function = numba.njit(function)

    @numba.njit
    def unary(a, out):
        pa, target = simd.pointer(a), simd.pointer(out)
        for k in range(0, a.size, simd.vector_lanes(pa)):
            simd.store(simd.shift(target, k), function(simd.load(simd.shift(pa, k))))

    @numba.njit
    def binary(a, b, out):
        pa, pb, target = simd.pointer(a), simd.pointer(b), simd.pointer(out)
        for k in range(0, a.size, simd.vector_lanes(pa)):
            simd.store(simd.shift(target, k), function(simd.load(simd.shift(pa, k)), simd.load(simd.shift(pb, k))))

    def apply(*arrays):
        out = np.full_like(arrays[0], 77)
        (unary if len(arrays) == 1 else binary)(*arrays, out)
        return out

    return apply


@every_dtype
def test_lanes_fill_a_register(dtype):
    @numba.njit
    def count(a):
        return simd.vector_lanes(simd.pointer(a))

    assert count(np.zeros(1, dtype)) == lanes(dtype) == simd.VECTOR_BYTES // np.dtype(dtype).itemsize
    assert simd.VECTOR_BYTES in (16, 32, 64)


def test_double_is_told_from_single():
    @numba.njit
    def answers(a):
        p = simd.pointer(a)
        return simd.is_double(p), simd.is_double(simd.load(p))

    assert answers(values(np.float64)) == (True, True)
    assert answers(values(np.float32)) == (False, False)


ADD, SUBTRACT, MULTIPLY, DIVIDE, NEGATE = map(
    on_vectors, (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b, lambda a: -a)
)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:(divide by zero|overflow):RuntimeWarning")
@pytest.mark.parametrize(
    ("kernel", "function"),
    [(ADD, operator.add), (SUBTRACT, operator.sub), (MULTIPLY, operator.mul), (DIVIDE, operator.truediv)],
    ids=["+", "-", "*", "/"],
)
@every_dtype
def test_operators(kernel, function, dtype):
    for a, b in ((values(dtype), values(dtype, 1)), special_pairs(dtype)):
        np.testing.assert_array_equal(kernel(a, b), function(a, b))


@every_dtype
def test_negation_keeps_zeros_signs(dtype):
    a = np.array(SPECIAL * 2, dtype)
    np.testing.assert_array_equal(np.signbit(NEGATE(a)), ~np.signbit(a))
    np.testing.assert_array_equal(NEGATE(a), -a)


@every_dtype
def test_numbers_mix_with_vectors(dtype):
    mixed = on_vectors(lambda a: (1.5 - a * 2) / (3.0 + a) - 0.25)
    a = values(dtype)
    half = np.dtype(dtype).type
    expected = (half(1.5) - a * half(2)) / (half(3) + a) - half(0.25)
    assert mixed(a).dtype == dtype
    np.testing.assert_array_equal(mixed(a), expected)


@every_dtype
def test_fma_and_broadcast(dtype):
    fused = on_vectors(lambda a, b: simd.fma(a, b, simd.broadcast(a, -1.0)))
    eps = np.finfo(dtype).eps
    a, b = np.full(lanes(dtype), 1 + eps, dtype), np.full(lanes(dtype), 1 - eps, dtype)
    exact = -np.square(eps, dtype=dtype) if simd.HAS_FMA else 0  # without the instruction the product is rounded
    np.testing.assert_array_equal(fused(a, b), np.full_like(a, exact))


MINIMUM = on_vectors(lambda a, b: simd.minimum(a, b))
MAXIMUM = on_vectors(lambda a, b: simd.maximum(a, b))


@pytest.mark.parametrize(("kernel", "function"), [(MINIMUM, np.fmin), (MAXIMUM, np.fmax)], ids=["min", "max"])
@every_dtype
def test_bounds_keep_a_nan_of_the_value(kernel, function, dtype):
    bound, value = special_pairs(dtype)
    known = ~np.isnan(bound)
    expected = np.where(np.isnan(value), np.nan, function(bound, value))
    np.testing.assert_array_equal(kernel(bound, value)[known], expected[known])


@every_dtype
def test_bounds_may_be_numbers(dtype):
    limited = on_vectors(lambda a: simd.maximum(-1.0, simd.minimum(0.5, a)))
    a = np.resize(np.array([-np.inf, -1, 0.25, 0.5, 2, np.inf, np.nan, -0.0], dtype), 2 * simd.VECTOR_BYTES)
    np.testing.assert_array_equal(limited(a), np.clip(a, -1, 0.5))


@every_dtype
def test_select_less_takes_the_second_where_nan(dtype):
    select = on_vectors(lambda a, b: simd.select_less(a, b, simd.broadcast(a, 1.0), simd.broadcast(a, 2.0)))
    a, b = special_pairs(dtype)
    np.testing.assert_array_equal(select(a, b), np.where(a < b, 1, 2))


@every_dtype
def test_absolute_copy_sign(dtype):
    a, b = special_pairs(dtype)
    absolute = on_vectors(lambda a: simd.absolute(a))(a)
    np.testing.assert_array_equal(absolute, np.abs(a))
    assert not np.signbit(absolute).any()
    signed = on_vectors(lambda a, b: simd.copy_sign(a, b))(a, b)
    np.testing.assert_array_equal(signed, np.copysign(a, b))
    np.testing.assert_array_equal(np.signbit(signed), np.signbit(b))


@every_dtype
def test_horizontal_sum_is_pairwise(dtype):
    @numba.njit
    def total(a):
        return simd.horizontal_sum(simd.load(simd.pointer(a)))

    a = values(dtype)
    expected = a
    while expected.size > 1:
        expected = expected[: expected.size // 2] + expected[expected.size // 2 :]
    assert total(a) == expected[0]


@every_dtype
def test_tails_touch_nothing_beyond(dtype):
    @numba.njit
    def some(a, first, count, out):
        vector = simd.load_some(simd.shift(simd.pointer(a), first), count)
        simd.store(simd.pointer(out), vector)
        simd.store_some(simd.shift(simd.pointer(out), simd.vector_lanes(simd.pointer(out))), vector, count)

    n = lanes(dtype)
    for count in range(n + 1):
        a = np.full(n + 3, np.nan, dtype)
        a[3 : 3 + count] = np.arange(1, count + 1)  # an address that is no multiple of a vector's
        out = np.full(2 * n, 77, dtype)
        some(a, 3, count, out)
        np.testing.assert_array_equal(out[:n], [*range(1, count + 1), *[0] * (n - count)])
        np.testing.assert_array_equal(out[n:], [*range(1, count + 1), *[77] * (n - count)])


@pytest.mark.skipif(sys.platform == "win32", reason="pages are protected by POSIX's mprotect")
@every_dtype
def test_tails_may_end_at_the_end_of_memory(dtype):
    """A tail's other lanes lie on a page that nobody may touch."""
    libc, page = ctypes.CDLL(None), mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    raw = np.frombuffer(memory, np.uint8)
    address = raw.ctypes.data
    assert libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 0) == 0

    @numba.njit
    def double(a, count):
        p = simd.pointer(a)
        simd.store_some(p, simd.load_some(p, count) * 2.0, count)

    try:
        for count in range(1, lanes(dtype) + 1):
            tail = raw[:page].view(dtype)[-count:]
            tail[...] = np.arange(count)
            double(tail, count)
            np.testing.assert_array_equal(tail, 2 * np.arange(count))
    finally:
        libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 3)  # read and write


ROOT = Path(__file__).parents[1]
COMPILE = """
import json, re
import numba, numpy as np
from fastclstm.engines.cpu.kernels import simd

@numba.njit
def multiply_add(a):
    p = simd.pointer(a)
    simd.store(p, simd.fma(simd.load(p), simd.load(simd.shift(p, 64)), simd.load(simd.shift(p, 128))))

multiply_add(np.ones(256, np.float32))
(code,) = multiply_add.inspect_asm().values()
print(json.dumps([simd.VECTOR_BYTES, simd.REGISTERS, *(name in code for name in ("zmm", "ymm", "vfmadd"))]))
"""


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="names features of x86")
@pytest.mark.parametrize(
    ("name", "features", "expected"),
    [("x86-64", "", [16, 16, False, False, False]), ("haswell", "+avx2,+fma", [32, 16, False, True, True])],
    ids=["SSE2", "AVX2"],
)
def test_forced_features_are_all_that_is_used(name, features, expected):
    """The settings with which .ci/run runs the conformance suite restrict the machine code."""
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert json.loads(done.stdout) == expected

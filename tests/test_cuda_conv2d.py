"""conv2d of the cuda engine, its kernels run on the processor, against the oracle in float64."""

import importlib

import numpy as np
import pytest
from cuda_cases import ROUNDING, cast, convolutions, get, put, tiling, within
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclstm.engines import reference
from fastclstm.engines.cuda.product import KINDS, offset
from fastclstm.spec import ConvSpec

cuda = importlib.import_module("fastclstm.engines.cuda.conv2d")

filters = st.sampled_from([1, 3, 4, 7, 16, 20, 33])


def results(module, spec, arrays, dy, **options):
    x, kernel, bias = arrays
    return module.conv2d(spec, x, kernel, bias, **options), *module.conv2d_backward(spec, x, kernel, dy)


@st.composite
def problems(draw):
    (B, H, W, C), kernel, options = draw(convolutions())
    F = draw(filters)
    spec = ConvSpec.infer((B, H, W, C), (*kernel, C, F), **options)
    normal = np.random.default_rng(draw(st.integers(0, 99))).standard_normal
    bias = normal(F) if draw(st.booleans()) else None
    arrays = normal((B, H, W, C)), normal((*kernel, C, F)), bias
    return spec, cast(arrays, np.float32), cast(normal((B, spec.HO, spec.WO, F)), np.float32)


def run(device, algorithm, spec, arrays, dy):
    x, kernel, bias = arrays
    y = cuda.conv2d(spec, put(device, x), kernel, bias, algorithm=algorithm)
    gradients = cuda.conv2d_backward(spec, put(device, x), put(device, kernel), put(device, dy), algorithm=algorithm)
    return get(device, (y, *gradients))


def oracle(dtype, spec, arrays, dy):
    (x, kernel, bias), dy = cast(arrays, dtype), cast(dy, dtype)
    return get(None, (reference.conv2d(spec, x, kernel, bias), *reference.conv2d_backward(spec, x, kernel, dy)))


@pytest.mark.parametrize(
    ("algorithm", "dtype", "number", "examples"),
    [("simt", np.float32, 0, 12), ("simt", np.float32, 1, 30), ("simt", np.float32, 2, 20), ("simt", np.float64, 0, 20),
     ("simt", np.float64, 1, 12), ("float32", np.float32, 0, 6), ("float32", np.float32, 1, 20),
     ("float32", np.float32, 2, 12), ("float32", np.float32, 3, 15)],
)  # fmt: skip
def test_conv2d(algorithm, dtype, number, examples, monkeypatch, new_device):
    device = new_device()

    @settings(max_examples=examples)
    @given(problems())
    def check(problem):
        spec, arrays, dy = problem
        with tiling(monkeypatch, number):
            found = run(device, algorithm, spec, *cast((arrays, dy), dtype))
        within(found, oracle(np.float64, *problem), oracle(np.float32, *problem), dtype)

    check()


@pytest.mark.parametrize("algorithm", ROUNDING)
def test_reduced_precision(algorithm, monkeypatch, new_device):
    device, rounding = new_device(), ROUNDING[algorithm]

    @settings(max_examples=10)
    @given(problems())
    def check(problem):
        spec, arrays, _ = problem
        x, kernel, bias = cast(arrays, np.float64)
        with tiling(monkeypatch, 1):
            y = device.get(cuda.conv2d(spec, put(device, arrays[0]), *arrays[1:], algorithm=algorithm))
        expected = reference.conv2d(spec, x, kernel, bias)
        largest = reference.conv2d(spec, abs(x), abs(kernel), None)
        assert (abs(y - expected) <= 2.01 * rounding * largest + 1e-6).all()  # of both operands

    check()


@pytest.mark.parametrize(("algorithm", "number"), [("tf32", 0), ("bfloat16", 0), ("bfloat16", 1), ("bfloat16", 2),
                                                   ("float16", 1)])  # fmt: skip
def test_gradients_of_reduced_precision(algorithm, number, monkeypatch, new_device):
    """No product errs more than the rounding of both its operands."""
    device, rounding = new_device(), ROUNDING["tf32" if algorithm == "float16" else algorithm]

    @settings(max_examples=15)
    @given(problems())
    def check(problem):
        spec, (x, kernel, _), dy = problem
        with tiling(monkeypatch, number):
            found = cuda.conv2d_backward(spec, *put(device, {0: x, 1: kernel, 2: dy}).values(), algorithm=algorithm)
        x, kernel, dy = cast((x, kernel, dy), np.float64)
        expected = reference.conv2d_backward(spec, x, kernel, dy)
        largest = reference.conv2d_backward(spec, abs(x), abs(kernel), abs(dy))
        for array, value, most in zip(found[:2], expected[:2], largest[:2], strict=True):
            assert (abs(device.get(array) - value) <= 2.01 * rounding * most + 1e-6).all()

    check()


@pytest.mark.parametrize(("algorithm", "kind"), KINDS.items())
def test_algorithms_are_what_they_say(algorithm, kind, new_device):
    device = new_device()
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 6, 5, 8)), rng.standard_normal((3, 3, 8, 16))
    spec = ConvSpec.infer(x.shape, kernel.shape)
    dy = rng.standard_normal((2, 6, 5, 16))
    found = run(device, algorithm, spec, (x.astype("f4"), kernel.astype("f4"), None), dy.astype("f4"))
    expected = oracle(np.float64, spec, (x, kernel, None), dy)
    errors = {name: abs(found[name] - value).max() / abs(value).max() for name, value in expected.items()}
    rounding = ROUNDING.get(algorithm, 1e-6)
    assert rounding / 30 < errors["0 "] < 1.5 * rounding
    of_gradients = ROUNDING["tf32"] if algorithm == "float16" else rounding
    for name in ("1 ", "2 "):
        assert of_gradients / 30 < errors[name] < 1.5 * of_gradients
    assert errors["3 "] < 1e-7


@pytest.mark.parametrize("algorithm", ["simt", "float32"])
def test_long_sums_keep_their_digits(algorithm, new_device):
    """Tensor cores cut off where others round: their errors would add up."""
    device = new_device()
    rng = np.random.default_rng(0)
    x, kernel = rng.random((1, 4, 4, 200)).astype("f4"), rng.random((3, 3, 200, 8)).astype("f4")
    spec = ConvSpec.infer(x.shape, kernel.shape)
    dy = rng.random((1, 4, 4, 8)).astype("f4")
    expected = oracle(np.float64, spec, (x, kernel, None), dy)
    for name, value in run(device, algorithm, spec, (x, kernel, None), dy).items():
        assert abs(value - expected[name]).max() < 2e-6 * expected[name].max(), name


@pytest.mark.parametrize("algorithm", ["simt", "float32"])
def test_what_is_not_finite_stays_in_its_receptive_field(algorithm, new_device):
    device = new_device()
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 9, 8, 3)).astype("f4"), rng.standard_normal((3, 3, 3, 4)).astype("f4")
    spec = ConvSpec.infer(x.shape, kernel.shape)
    clean = device.get(cuda.conv2d(spec, device.put(x), kernel, None, algorithm=algorithm))
    for bad in (np.nan, np.inf, -np.inf):
        x[1, 4, 5, 1] = bad
        y = device.get(cuda.conv2d(spec, device.put(x), kernel, None, algorithm=algorithm))
        reached = np.zeros(y.shape, bool)
        reached[1, 3:6, 4:7] = True
        np.testing.assert_array_equal(np.isfinite(y), ~reached)
        np.testing.assert_array_equal(y[~reached], clean[~reached])


@pytest.mark.parametrize("algorithm", ["simt", "float32"])
def test_every_run_and_every_batch_have_the_same_bits(algorithm, monkeypatch, new_device):
    """The emulator runs blocks and threads in another order each time."""
    device = new_device()
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((3, 9, 8, 4)).astype("f4"), rng.standard_normal((3, 3, 4, 20)).astype("f4")
    dy = rng.standard_normal((3, 9, 8, 20)).astype("f4")
    spec = ConvSpec.infer(x.shape, kernel.shape)
    first = run(device, algorithm, spec, (x, kernel, None), dy)
    for _ in range(2):
        for name, value in run(device, algorithm, spec, (x, kernel, None), dy).items():
            np.testing.assert_array_equal(value, first[name])
    for number in range(3 + (algorithm == "float32")):
        with tiling(monkeypatch, number):
            part = run(device, algorithm, spec.with_batch(1), (x[1:2], kernel, None), dy[1:2])
        for name in ("0 ", "1 "):
            np.testing.assert_array_equal(part[name], first[name][1:2])


def test_a_slice_of_frames_that_is_not_aligned(new_device):
    device = new_device()
    x, kernel = np.random.default_rng(0).standard_normal(1 + 2 * 5 * 5 * 4).astype("f4"), np.ones((3, 3, 4, 4), "f4")
    spec = ConvSpec.infer((2, 5, 5, 4), kernel.shape)
    y = cuda.conv2d(spec, offset(device.put(x), 1).reshape(2, 5, 5, 4), kernel, None)
    expected = reference.conv2d(spec, x[1:].reshape(2, 5, 5, 4), kernel, None)
    np.testing.assert_allclose(device.get(y), expected, atol=1e-5)


def test_without_gradient_and_without_images(new_device):
    device = new_device()
    kernel = np.ones((3, 3, 2, 4), np.float32)
    spec = ConvSpec.infer((2, 4, 4, 2), kernel.shape)
    x = device.put(np.ones((2, 4, 4, 2), np.float32))
    gradients = cuda.conv2d_backward(spec, x, kernel, None)
    for gradient, shape in zip(gradients, (x.shape, kernel.shape, (4,)), strict=True):
        np.testing.assert_array_equal(device.get(gradient), np.zeros(shape, np.float32))
    empty = device.put(np.ones((0, 4, 4, 2), np.float32))
    assert device.get(cuda.conv2d(spec.with_batch(0), empty, kernel, None)).shape == (0, 4, 4, 4)

"""max_pool3d of the cuda engine, its kernels run on the processor: the very elements of the oracle win."""

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclstm.engines import reference
from fastclstm.spec import PoolSpec

cuda = importlib.import_module("fastclstm.engines.cuda.max_pool3d")


@st.composite
def problems(draw):
    pool_size = draw(st.tuples(*[st.integers(1, 3)] * 3))
    shape = draw(st.integers(0, 2)), *(k + draw(st.integers(0, 5)) for k in pool_size), draw(st.sampled_from([1, 3, 8]))
    pads = st.tuples(*[st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)) for k in pool_size])
    strides = draw(st.none() | st.tuples(*[st.integers(1, 4)] * 3))
    padding = draw(st.sampled_from(["valid", "same"]) | pads)
    spec = PoolSpec.infer(shape, pool_size, strides, padding=padding, ceil_mode=draw(st.booleans()))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    values = [-np.inf, -1, 0, 1, np.inf, np.nan]  # few, so that windows hold ties
    x = rng.choice(values, shape, p=[0.5, 0.1, 0.2, 0.1, 0.05, 0.05])
    return spec, x, rng.integers(-9, 10, spec.output_shape).astype(float)  # sums of integers are exact


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_max_pool3d(dtype, new_device):
    device = new_device()

    @settings(max_examples=60)
    @given(problems())
    def check(problem):
        spec, x, dy = problem
        x, dy = x.astype(dtype), dy.astype(dtype)
        expected, winners = reference.max_pool3d(spec, x, True)
        y, indices = cuda.max_pool3d(spec, device.put(x), True)
        dx = cuda.max_pool3d_backward(spec, indices, device.put(dy))
        alone, nothing = cuda.max_pool3d(spec, device.put(x), False)
        assert nothing is None
        for found, value in (
            (y, expected), (alone, expected), (indices, winners),
            (dx, reference.max_pool3d_backward(spec, winners, dy)),
        ):  # fmt: skip
            result = device.get(found)
            assert result.dtype == value.dtype
            np.testing.assert_array_equal(result, value)

    check()


@pytest.mark.parametrize("C", [3, 4])
@pytest.mark.parametrize(("H", "pool_size"), [(2, (2, 2, 2)), (5, (2, 3, 2)), (3, (3, 1, 1))])
def test_gradients_of_windows_that_overlap(C, H, pool_size, new_device):
    """As wide as the volume, where the window after the last one is that of the next row or frame."""
    device = new_device()
    rng = np.random.default_rng(0)
    spec = PoolSpec.infer((2, 4, H, 2, C), pool_size, 1)
    x, dy = rng.standard_normal((2, 4, H, 2, C)), rng.integers(1, 9, spec.output_shape).astype(float)
    _, winners = reference.max_pool3d(spec, x, True)
    dx = cuda.max_pool3d_backward(spec, device.put(winners), device.put(dy))
    np.testing.assert_array_equal(device.get(dx), reference.max_pool3d_backward(spec, winners, dy))


def test_without_a_gradient(new_device):
    device = new_device()
    spec = PoolSpec.infer((1, 2, 2, 2, 1))
    _, indices = cuda.max_pool3d(spec, device.put(np.ones((1, 2, 2, 2, 1), np.float32)), True)
    assert not device.get(cuda.max_pool3d_backward(spec, indices, None)).any()

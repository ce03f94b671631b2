"""Gradients of a convolution's input: how much memory they take."""

import numpy as np
import pytest

from fastclstm import functional
from fastclstm.engines.cpu import input_gradient, launch


@pytest.fixture
def borrowed(monkeypatch):
    """Sizes of the memory that was asked for."""
    sizes, borrow = [], launch.borrow
    monkeypatch.setattr(launch, "borrow", lambda size: (sizes.append(size), borrow(size))[1])
    return sizes


@pytest.mark.parametrize(("vjp", "B", "frames"), [(functional.conv2d_vjp, 192, ()), (functional.conv3d_vjp, 32, (4,))])
def test_strided_gradients_take_some_images_at_a_time(vjp, B, frames, borrowed):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, *frames, 32, 32, 32)).astype(np.float32)
    kernel = rng.standard_normal((*(3 for _ in frames), 3, 3, 32, 8)).astype(np.float32)
    y, pull = vjp(x, kernel, strides=2)
    dy = rng.standard_normal(y.shape).astype(np.float32)
    dx = pull(dy)["x"]
    columns = y.size // 8 * kernel.size // 8 * 4
    assert columns > 6 * input_gradient.FOLDED_BYTES
    assert 0 < max(borrowed) <= 2 * input_gradient.FOLDED_BYTES
    expected = vjp(x[-5:], kernel, strides=2, engine="reference")[1](dy[-5:])["x"]
    np.testing.assert_allclose(dx[-5:], expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(vjp(x[-5:], kernel, strides=2)[1](dy[-5:])["x"], dx[-5:])


def test_an_image_is_never_cut(monkeypatch, borrowed):
    monkeypatch.setattr(input_gradient, "FOLDED_BYTES", 1)
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((3, 2, 9, 8, 2)), rng.standard_normal((3, 3, 2, 12))
    recurrent = rng.standard_normal((3, 3, 3, 12))
    y, pull = functional.convlstm2d_vjp(x, kernel, recurrent, strides=2)
    expected = functional.convlstm2d_vjp(x, kernel, recurrent, strides=2, engine="reference")[1](y)["x"]
    np.testing.assert_allclose(pull(y)["x"], expected, rtol=0, atol=1e-12)
    assert 5 * 4 * 9 * 2 * 8 in borrowed

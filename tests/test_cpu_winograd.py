"""Winograd convolution: its matrices are exact, its error is known, and any size works."""

from fractions import Fraction

import numpy as np
import pytest

from fastclstm import functional
from fastclstm.engines.cpu import plans
from fastclstm.engines.cpu.kernels import winograd
from fastclstm.spec import ConvSpec

TILES = [(2, 3), (4, 3), (2, 5), (4, 5)]
every_tile = pytest.mark.parametrize(("m", "k"), TILES, ids=[f"F({m},{k})" for m, k in TILES])

TIMES_DIRECT = {(2, 3): 2, (4, 3): 6, (2, 5): 3, (4, 5): 8}
"""How many times the error of the direct algorithm each tile may err."""


@pytest.fixture
def tile_of(monkeypatch):
    """Function that makes the engine take tiles of m×m outputs."""
    return lambda m: monkeypatch.setattr(plans, "TILES", (m,))


def correlate(x, w):
    """Valid cross-correlation of (H, W, …) with (k, k, …), elementwise in the other axes."""
    size, k = len(x) - len(w) + 1, len(w)
    return np.array([[(x[i : i + k, j : j + k] * w).sum((0, 1)) for j in range(size)] for i in range(size)])


@every_tile
def test_matrices_are_exact_in_one_dimension(m, k):
    """Every element is a fraction that float64 holds nearly, and with fractions the identity has no error at all."""
    A_T, G, B_T = (
        [[Fraction(value).limit_denominator(10_000) for value in row] for row in matrix]
        for matrix in winograd.transforms(m, k)
    )
    rng = np.random.default_rng(0)
    w, x = ([Fraction(int(value), 7) for value in rng.integers(-9, 10, n)] for n in (k, m + k - 1))
    times = lambda matrix, vector: [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]  # noqa: E731
    products = [a * b for a, b in zip(times(G, w), times(B_T, x), strict=True)]
    assert times(A_T, products) == [sum(x[i + j] * w[j] for j in range(k)) for i in range(m)]


@every_tile
def test_matrices_are_those_fractions_rounded_once(m, k):
    for matrix in winograd.transforms(m, k):
        exact = np.array([[float(Fraction(value).limit_denominator(10_000)) for value in row] for row in matrix])
        np.testing.assert_array_equal(matrix, exact)


@every_tile
def test_one_tile_in_two_dimensions(m, k):
    A_T, G, B_T = winograd.transforms(m, k)
    alpha = m + k - 1
    rng = np.random.default_rng(1)
    x, w = rng.integers(-8, 9, (alpha, alpha, 6)) / 8, rng.integers(-8, 9, (k, k, 6)) / 8
    inputs = np.einsum("ip,jq,pqc->ijc", B_T, B_T, x)
    products = inputs * np.einsum("ip,jq,pqc->ijc", G, G, w)
    np.testing.assert_allclose(np.einsum("ip,jq,pqc->ijc", A_T, A_T, products), correlate(x, w), rtol=0, atol=1e-12)


def spec(kernel=(3, 3), **options):
    return ConvSpec.infer((1, 16, 16, 4), (*kernel, 4, 8), **({"padding": "same"} | options))


def test_fits_square_kernels_of_3_and_5_alike():
    for k in (3, 5):
        assert plans.fits((spec((k, k)),))
        assert plans.fits((spec((k, k)), spec((k, k), padding_mode="circular")))
        assert plans.fits((spec((k, k), padding="valid"),))
    for kernel in ((1, 1), (2, 2), (4, 4), (7, 7), (3, 5), (5, 3), (1, 3)):
        assert not plans.fits((spec(kernel),))
    for options in ({"strides": (1, 2)}, {"strides": (2, 1)}, {"dilation": (2, 1)}, {"dilation": (1, 2)}):
        assert not plans.fits((spec(**options),))
    assert not plans.fits((spec(), spec((5, 5))))
    assert not plans.fits((spec(), spec(dilation=(2, 2))))


@pytest.mark.parametrize("kernel", [(1, 1), (4, 4), (3, 5)])
def test_asked_for_in_vain_is_an_error(kernel):
    x, w = np.ones((1, 8, 8, 2), np.float32), np.ones((*kernel, 2, 4), np.float32)
    with pytest.raises(ValueError, match=r"square kernels of 3 or 5.*use 'auto' or 'direct'"):
        functional.conv2d(x, w, engine="cpu", algorithm="winograd")


@every_tile
@pytest.mark.parametrize("C", [1, 20])
def test_any_frame(tile_of, m, k, C):
    """Frames that tiles divide and do not, smaller than a tile too, against the oracle in float64."""
    tile_of(m)
    rng = np.random.default_rng(3)
    w, bias = rng.standard_normal((k, k, C, 7)), rng.standard_normal(7)
    for H, W in ((1, 1), (1, 9), (2, 3), (4, 4), (5, 8), (7, 13), (17, 6)):
        for options in ({"padding": "same"}, {"padding": ((k, 1), (0, k + 1))}, {"padding_mode": "circular"}):
            x = rng.standard_normal((2, H, W, C))
            arguments = {"x": x, "kernel": w, "bias": bias, "padding": "same"} | options
            result = functional.conv2d(**arguments, engine="cpu", algorithm="winograd")
            expected = functional.conv2d(**arguments, engine="reference")
            np.testing.assert_allclose(result, expected, rtol=0, atol=2e-12, err_msg=f"{H}x{W} {options}")


def sequence(T, k, C, F, scale=1.0, seed=4):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 1, (2, T, 12, 13, C)).astype(np.float32)
    kernels = [
        (scale * rng.uniform(-1, 1, (k, k, c, 4 * F)) * np.sqrt(6 / (k * k * (c + 4 * F)))).astype(np.float32)
        for c in (C, F)
    ]
    return x, *kernels


@every_tile
@pytest.mark.parametrize("T", [10, 100])
def test_error_after_many_steps(tile_of, m, k, T):
    """It is a stated multiple of the direct algorithm's, and does not grow with the sequence."""
    tile_of(m)
    arguments = sequence(T, k, C=3, F=16)
    exact = functional.convlstm2d(*(a.astype(np.float64) for a in arguments), engine="cpu", algorithm="direct")

    def error(algorithm):
        return np.abs(functional.convlstm2d(*arguments, engine="cpu", algorithm=algorithm) - exact).max()

    direct, fast = error("direct"), error("winograd")
    assert 0 < direct < 2e-6
    assert fast <= TIMES_DIRECT[m, k] * direct


@every_tile
def test_bits_do_not_depend_on_the_batch_or_the_sequence(tile_of, m, k):
    tile_of(m)
    x, *kernels = sequence(4, k, C=5, F=6)
    x = np.concatenate([x, x[:, ::-1], 2 * x])  # 6 images
    run = lambda part, **options: functional.convlstm2d(  # noqa: E731
        part, *kernels, **options, engine="cpu", algorithm="winograd"
    )
    whole, h, c = run(x, return_state=True)
    for part in (slice(0, 1), slice(1, 3), slice(3, 6)):
        np.testing.assert_array_equal(run(x[part]), whole[part])
    _, *state = run(x[:, :2], return_state=True)
    rest, *last = run(x[:, 2:], initial_state=tuple(state), return_state=True)
    for result, expected in zip((rest, *last), (whole[:, 2:], h, c), strict=True):
        np.testing.assert_array_equal(result, expected)

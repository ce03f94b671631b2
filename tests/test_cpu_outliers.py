"""Fill values, infinities and NaN spoil nothing beyond their receptive fields, forward or backward."""

import numpy as np
import pytest

from fastclstm import Conv2D, Conv3D, ConvLSTM2D, functional
from fastclstm.engines.cpu import outliers, plans, threads
from fastclstm.engines.cpu.kernels import weight_gradient, winograd
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.spec import ConvSpec

FILLS = (-9999, -999, 1e5, 1e20, 9.97e36)
every_fill = pytest.mark.parametrize("fill", FILLS)
every_size = pytest.mark.parametrize("k", [3, 5])
H, W, C, F = 24, 28, 16, 32


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def weights(*shape, seed=1):
    """Kernels that make outputs of order 1 of inputs of order 1."""
    return normal(*shape, seed=seed, scale=np.prod(shape[:-1]) ** -0.5)


def double(*arrays):
    return [array.astype(np.float64) for array in arrays]


def filled(array, fill):
    """The array with a corner of fill values in its second sample, and of that sample the pixels without."""
    array = array.copy()
    array[1, ..., :4, :5, :] = fill
    clean = np.ones(array.shape[1:-1], bool)
    clean[..., :4, :5] = False
    return array, clean


def away(clean, reach):
    """Pixels whose window, of so many pixels to each side, holds no fill value."""
    far = clean.copy()
    far[..., : 4 + reach, : 5 + reach] = False
    return far


@pytest.fixture
def launched(monkeypatch):
    """Kernels that have run, in order."""
    kernels, run = [], threads.run
    monkeypatch.setattr(threads, "run", lambda kernel, *args: (kernels.append(kernel), run(kernel, *args))[1])
    return kernels


def transforms(kernels):
    return [kernel for kernel in kernels if kernel in (*winograd.RUN.values(), weight_gradient.add_winograd)]


# What is found.


@pytest.mark.parametrize("size", [(7, 9, 5), (80, 90, 12)], ids=["NumPy looks", "a kernel looks"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_an_outlier(size, dtype):
    ordinary = normal(3, *size).astype(dtype)
    for fill in (*FILLS, np.nan, np.inf, -np.inf):
        assert outliers.find(filled(ordinary, fill)[0]).tolist() == [False, True, False], fill
        assert outliers.find(filled(0 * ordinary, fill)[0]).tolist() == [False, True, False], fill
    mostly = ordinary.copy()
    mostly[1, : size[0] * 9 // 10] = -9999
    assert outliers.find(mostly)[1]
    for fill, left in ((-9999, size[2] * 2), (65535, size[2] * 2), (1e7, 3), (9.97e36, 1)):
        all_but_some = np.full(ordinary.shape, fill, dtype)
        all_but_some[1].reshape(-1)[:left] = 0.5
        found = fill > 1e6 or left > ordinary[0].size / 256
        assert outliers.find(all_but_some).tolist() == [False, found, False], (fill, left)
    for harmless in (
        ordinary,
        filled(ordinary, 255)[0],
        filled(280 + 20 * ordinary, -9999)[0],  # kelvin: what a tile errs is as small as theirs are large
        1e30 * ordinary,
        5000 + 0 * ordinary,
        np.where(np.arange(ordinary.size).reshape(ordinary.shape) % 17, 300, 0 * ordinary),  # kelvin, some missing
        np.where(np.arange(ordinary.size).reshape(ordinary.shape) % 17, 4000, 0 * ordinary),  # counts of 12 bits
        np.random.default_rng(0).integers(0, 256, ordinary.shape).astype(dtype),
    ):
        assert not outliers.find(harmless).any()


@pytest.mark.parametrize("scalars", [1, 15, 17, 16384, 16385, 70001])
def test_every_scalar_is_looked_at_and_counted_once(scalars):
    for at in {0, scalars // 2, scalars - 1}:
        array = np.zeros((2, scalars), np.float32)
        array[1, at] = np.nan
        assert outliers.find(array).tolist() == [False, True]
    array = np.full((2, scalars), 4000, np.float32)
    most = scalars // 16  # a sixteenth may be small
    array[0, :most] = array[1, : most + 1] = 1
    assert outliers.find(array).tolist() == [False, scalars > 1]  # one alone is not among others


def test_steps_that_are_masked_are_not_looked_at():
    x, _ = filled(normal(3, 4, 9, 9, 16), 1e20)
    x[2, 3] = np.nan
    mask = np.ones((3, 4), bool)
    assert outliers.find(x, mask).tolist() == [False, True, True]
    mask[1], mask[2, 3] = False, False
    assert outliers.find(x, mask).tolist() == [False, False, False]
    kelvin = x[:1] + 300
    kelvin[:, 2] = 0
    assert outliers.find(kelvin, np.array([[True, True, False, True]])).tolist() == [False]


# What becomes of the others.


@every_fill
@every_size
def test_conv2d_away_from_fill_values(fill, k):
    x, clean = filled(normal(3, H, W, C), fill)
    dy, _ = filled(normal(3, H, W, F, seed=2), fill)
    kernel = weights(k, k, C, F)
    assert plans.choose((ConvSpec.infer(x.shape, kernel.shape),), "auto", 4) == Tile(4, 4, k, k)
    y, pull = functional.conv2d_vjp(x, kernel)
    expected, pull_expected = functional.conv2d_vjp(*double(x, kernel), engine="reference")
    far = away(clean, k // 2)
    np.testing.assert_allclose(y[1][far], expected[1][far], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(y[[0, 2]], functional.conv2d(x, kernel, algorithm="winograd")[[0, 2]])
    dx = pull(dy)["x"]
    np.testing.assert_allclose(dx[1][far], pull_expected(*double(dy))["x"][1][far], rtol=0, atol=1e-5)
    dkernel, exact = pull(normal(3, H, W, F))["kernel"], pull_expected(*double(normal(3, H, W, F)))["kernel"]
    np.testing.assert_allclose(dkernel, exact, rtol=0, atol=2e-6 * np.abs(exact).max())


def test_without_the_search_fill_values_would_do_harm(monkeypatch):
    monkeypatch.setattr(outliers, "find", lambda array, mask=None: np.zeros(len(array), bool))
    x, clean = filled(normal(3, H, W, C), -9999)
    kernel = weights(3, 3, C, F)
    error = functional.conv2d(x, kernel) - functional.conv2d(*double(x, kernel), engine="reference")
    assert np.abs(error[1][away(clean, 1)]).max() > 1e-3


@every_fill
@pytest.mark.parametrize("recompute", [False, True])
def test_convlstm2d_away_from_fill_values(fill, recompute):
    k, T, filters = 3, 3, 8
    x, clean = filled(normal(3, T, H, W, C), fill)
    arguments = x, weights(k, k, C, 4 * filters), weights(k, k, filters, 4 * filters, seed=3)
    dy = normal(3, T, H, W, filters, seed=2)
    y, pull = functional.convlstm2d_vjp(*arguments, recompute=recompute)
    expected, pull_expected = functional.convlstm2d_vjp(*double(*arguments), engine="reference")
    np.testing.assert_array_equal(functional.convlstm2d(*arguments), y)
    for t in range(T):
        far = away(clean[t], 1 + t)
        np.testing.assert_allclose(y[1, t][far], expected[1, t][far], rtol=0, atol=1e-5)
    gradients, exact = pull(dy), pull_expected(*double(dy))
    far = away(clean, 2 * T)
    np.testing.assert_allclose(gradients["x"][1][far], exact["x"][1][far], rtol=0, atol=1e-5)
    single = functional.convlstm2d_vjp(*arguments, engine="reference")[1](dy)
    for name in ("kernel", "recurrent_kernel"):
        scale = np.abs(exact[name]).max()
        error, unavoidable = (np.abs(g[name] - exact[name]).max() / scale for g in (gradients, single))
        assert error < 1e-5 + 3 * unavoidable, name


@every_fill
def test_an_initial_state_and_gradients_of_states_with_fill_values(fill):
    filters = 8
    arguments = normal(2, 2, H, W, C), weights(3, 3, C, 4 * filters), weights(3, 3, filters, 4 * filters, seed=3)
    h, clean = filled(normal(2, H, W, filters), fill)
    state = h, normal(2, H, W, filters, seed=4)
    for dh in (normal(2, H, W, filters, seed=5), filled(normal(2, H, W, filters, seed=5), fill)[0]):
        (y, *_), pull = functional.convlstm2d_vjp(*arguments, initial_state=state, return_state=True)
        (expected, *_), pull_expected = functional.convlstm2d_vjp(
            *double(*arguments), initial_state=tuple(double(*state)), return_state=True, engine="reference"
        )
        np.testing.assert_allclose(y[1, 0][away(clean, 1)], expected[1, 0][away(clean, 1)], rtol=0, atol=1e-5)
        gradients, exact = pull((None, dh, None)), pull_expected((None, dh.astype(np.float64), None))
        far = away(clean, 4)
        for got, want in ((gradients["x"], exact["x"]), (gradients["initial_state"][0], exact["initial_state"][0])):
            np.testing.assert_allclose(got[1][..., far, :], want[1][..., far, :], rtol=0, atol=1e-5)


@every_fill
def test_conv3d_away_from_fill_values(fill):
    x, clean = filled(normal(2, 3, H, W, C), fill)
    kernel = weights(3, 3, 3, C, F)
    y, pull = functional.conv3d_vjp(x, kernel)
    expected, pull_expected = functional.conv3d_vjp(*double(x, kernel), engine="reference")
    far = away(clean, 1)
    np.testing.assert_allclose(y[1][far], expected[1][far], rtol=0, atol=1e-5)
    dy, _ = filled(normal(2, 3, H, W, F, seed=2), min(fill, 1e20))  # of more the sum is infinite
    np.testing.assert_allclose(pull(dy)["x"][1][far], pull_expected(*double(dy))["x"][1][far], rtol=0, atol=2e-5)


def test_a_step_away_from_fill_values():
    x, clean = filled(normal(2, H, W, C), -9999)
    kernels = weights(3, 3, C, 32), weights(3, 3, 8, 32, seed=3)
    expected = functional.convlstm2d_step(*double(x, *kernels), engine="reference")
    for images in (slice(0, 2), slice(1, 2)):
        out = np.empty((len(x[images]), H, W, 8), np.float32), np.zeros((len(x[images]), H, W, 8), np.float32)
        functional.convlstm2d_step(x[images], *kernels, initial_state=(None, out[1]), out=out)
        for got, want in zip(out, expected, strict=True):
            far = away(clean, 1)
            np.testing.assert_allclose(got[-1][far], want[1][far], rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["auto", "winograd"])
def test_a_sample_with_fill_values_is_computed_alike_in_any_company(algorithm):
    x, _ = filled(normal(3, 2, H, W, C), -9999)
    kernels = weights(3, 3, C, 32), weights(3, 3, 8, 32, seed=3)
    dy = normal(3, 2, H, W, 8)
    whole, pull = functional.convlstm2d_vjp(x, *kernels, algorithm=algorithm)
    dx = pull(dy)["x"]
    alone, pull = functional.convlstm2d_vjp(x[1:2], *kernels, algorithm=algorithm)
    np.testing.assert_array_equal(alone, whole[1:2])
    np.testing.assert_array_equal(pull(dy[1:2])["x"], dx[1:2])


@pytest.mark.parametrize("bad", [np.nan, 1e20])
def test_masked_steps_cost_nothing(bad, launched):
    """They may hold anything: the transforms are used, and no bit changes."""
    x, mask = normal(3, 3, H, W, C), np.ones((3, 3), bool)
    mask[1, 1] = mask[2, 0] = False
    arguments = weights(3, 3, C, 64), weights(3, 3, 16, 64, seed=3)
    results = []
    for value in (0, bad):
        x[1, 1] = x[2, 0, :4] = value
        launched.clear()
        y, pull = functional.convlstm2d_vjp(x, *arguments, mask=mask)
        results.append([y, *pull(np.ones_like(y)).values()])
        results[-1].append(launched.copy())
    assert winograd.RUN["update_and_keep"] in results[0][-1]
    assert weight_gradient.add_winograd in results[0][-1]
    *arrays, kernels = results[1]
    assert transforms(kernels) == transforms(results[0][-1])
    for got, want in zip(arrays, results[0], strict=False):
        np.testing.assert_array_equal(got, want)


# "direct" forbids the transforms.


@pytest.mark.parametrize("make", [
    lambda **options: Conv2D(C, F, 3, **options),
    lambda **options: Conv3D(C, F, 3, **options),
    lambda **options: ConvLSTM2D(C, F, 3, **options),
    lambda **options: ConvLSTM2D(C, F, 3, normalization="layer", **options),
    lambda **options: ConvLSTM2D(C, F, 3, dropout=0.1, **options),
    lambda **options: ConvLSTM2D(C, F, 3, peephole="conv", **options),
    lambda **options: ConvLSTM2D(C, F, 3, activation="softplus", **options),
], ids=["Conv2D", "Conv3D", "ConvLSTM2D", "normalization", "dropout", "peephole", "softplus"])  # fmt: skip
def test_direct_forbids_the_transforms(make, launched):
    for algorithm in ("auto", "direct"):
        launched.clear()
        layer = make(algorithm=algorithm, seed=0)
        layer.backward(np.ones_like(layer(normal(1, 3, H, W, C), training=True)))
        assert bool(transforms(launched)) == (algorithm == "auto")


def test_direct_gradients_are_as_exact_as_in_numpy():
    x = normal(2, H, W, C)
    x[:, : H // 3] = -9999
    kernel, dy = weights(3, 3, C, F), normal(2, H, W, F, seed=2)
    exact = functional.conv2d_vjp(*double(x, kernel), engine="reference")[1](dy)["kernel"]
    errors = [
        np.abs(functional.conv2d_vjp(x, kernel, **how)[1](dy)["kernel"] - exact).max()
        for how in ({"algorithm": "direct"}, {"engine": "reference"})
    ]
    assert errors[0] < 3 * errors[1]


# The receptive field and no more, on the way back.


@pytest.mark.parametrize("algorithm", ["auto", "winograd", "direct"])
@pytest.mark.parametrize("place", ["dy", "x"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_what_it_should(algorithm, place, bad):
    x, kernel, dy = normal(2, H, W, C), weights(3, 3, C, F), normal(2, H, W, F, seed=2)
    {"x": x, "dy": dy}[place][1, 9, 10, 3] = bad
    gradients = functional.conv2d_vjp(x, kernel, algorithm=algorithm)[1](dy)
    expected = functional.conv2d_vjp(x, kernel, engine="reference")[1](dy)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(np.isfinite(gradient), np.isfinite(expected[name]), name)
    assert (~np.isfinite(gradients["x"]).all(-1)).sum() == (9 if place == "dy" else 0)
    assert (~np.isfinite(gradients["kernel"])).sum() == 9 * (C if place == "dy" else F)


def test_a_nan_in_dy_of_volumes_reaches_27_pixels():
    x, kernel, dy = normal(1, 5, H, W, C), weights(3, 3, 3, C, F), normal(1, 5, H, W, F, seed=2)
    dy[0, 2, 9, 10, 3] = np.nan
    assert np.isnan(functional.conv3d_vjp(x, kernel)[1](dy)["x"]).any(-1).sum() == 27


@pytest.mark.parametrize("output", [0, 1, 2])
def test_a_nan_in_a_gradient_of_one_step_reaches_9_pixels(output):
    x, kernels = normal(2, 1, H, W, C), (weights(3, 3, C, 64), weights(3, 3, 16, 64))
    state = normal(2, H, W, 16), normal(2, H, W, 16, seed=6)
    _, pull = functional.convlstm2d_vjp(x, *kernels, initial_state=state, return_state=True)
    cotangents = [np.ones((2, 1, H, W, 16), np.float32), *np.ones((2, 2, H, W, 16), np.float32)]
    clean = pull(cotangents)
    _, pull = functional.convlstm2d_vjp(x, *kernels, initial_state=state, return_state=True)
    cotangents[output][1, ..., 9, 10, 3] = np.nan
    gradients = pull(cotangents)
    for gradient in (gradients["x"], gradients["initial_state"][0]):
        assert np.isnan(gradient).any(-1).sum() == 9
    assert np.isnan(gradients["initial_state"][1]).sum() == 1
    np.testing.assert_array_equal(gradients["x"][0], clean["x"][0])


# Weights as large as can be.


@pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd"])
@pytest.mark.parametrize(("dtype", "huge"), [(np.float32, 2.5e38), (np.float64, 1.2e308)])
def test_huge_weights_times_zeros_are_zeros(algorithm, dtype, huge):
    kernel, recurrent = np.ones((3, 3, 2, 16), dtype), np.full((3, 3, 4, 16), 0.1, dtype)
    kernel[0, 0, 0] = huge
    x = np.zeros((1, 3, 8, 8, 2), dtype)
    x[..., 4:, 1] = 0.01
    expected = functional.convlstm2d(x, kernel, recurrent, engine="reference")
    y, pull = functional.convlstm2d_vjp(x, kernel, recurrent, algorithm=algorithm)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(functional.convlstm2d(x, kernel, recurrent, algorithm=algorithm), y)
    assert np.isfinite(pull(np.ones_like(y))["kernel"]).all()

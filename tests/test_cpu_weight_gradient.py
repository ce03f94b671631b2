"""Gradients of kernels: both algorithms, any geometry, accuracy over long sums."""

import numpy as np
import pytest

from fastclstm.engines.cpu import plans, weight_gradient
from fastclstm.engines.cpu.kernels.schedule import slots
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.engines.cpu.weight_gradient import WeightGradient
from fastclstm.spec import ConvSpec


def taps(spec, x, dz):
    """The gradient (KH, KW, C, F) by its definition: x (B, T, H, W, C) and dz (B, T, HO, WO, F)."""
    frames, gradient = x.reshape(-1, *x.shape[2:]), dz.reshape(-1, *dz.shape[2:])
    mode = {"mode": "wrap"} if spec.padding_mode == "circular" else {}
    padded = np.pad(frames, ((0, 0), *spec.padding, (0, 0)), **mode)
    result = np.empty((spec.KH, spec.KW, spec.C, spec.F))
    for k, j in np.ndindex(spec.KH, spec.KW):
        tap = padded[:, k * spec.dilation[0] :: spec.strides[0], j * spec.dilation[1] :: spec.strides[1]]
        result[k, j] = np.einsum("nhwc,nhwf->cf", tap[:, : spec.HO, : spec.WO], gradient)
    return result


def gradient(specs, xs, dz, algorithm, team=1):
    job = WeightGradient(specs, dz.dtype, dz.shape[0] * dz.shape[1], algorithm)
    for t in range(dz.shape[1]):  # in two uneven parts
        if t in (0, 1):
            part = slice(0, 1) if t == 0 else slice(1, None)
            arrays = [np.ascontiguousarray(x[:, part]) for x in (*xs, dz)]
            job.add(tuple(map(slots, arrays[:-1])), slots(arrays[-1]), *arrays[-1].shape[:2], team)
    return job.result()


GEOMETRIES = [
    {}, {"padding": "valid"}, {"padding_mode": "circular"}, {"padding": ((0, 3), (2, 1))}, {"strides": (2, 3)},
    {"dilation": (2, 1)}, {"dilation": (1, 2), "padding_mode": "circular"},
]  # fmt: skip


@pytest.mark.parametrize("k", [(3, 3), (5, 5), (2, 4), (1, 1), (9, 7)])
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_definition(k, options, algorithm):
    rng = np.random.default_rng(0)
    for B, T, H, W, C, F in ((1, 2, 9, 10, 3, 12), (2, 3, 17, 8, 20, 40), (1, 1, 9, 12, 1, 4)):
        spec = ConvSpec.infer((B, H, W, C), (*k, C, F), **({"padding": "same"} | options))
        if algorithm == "winograd" and not plans.alike((spec,)):
            continue
        x, dz = rng.standard_normal((B, T, H, W, C)), rng.standard_normal((B, T, spec.HO, spec.WO, F))
        (result,) = gradient((spec,), (x,), dz, algorithm)
        np.testing.assert_allclose(result, taps(spec, x, dz), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("size", "tile"), [((3, 3), Tile(2, 2, 3, 3)), ((3, 3), Tile(4, 4, 3, 3)),
                                            ((5, 5), Tile(2, 2, 5, 5)), ((5, 5), Tile(4, 4, 5, 5)),
                                            ((7, 4), Tile(4, 3, 3, 4))], ids=str)  # fmt: skip
def test_two_inputs_of_one_gradient(take, size, tile):
    """Each tile size, pieces; channels that fill no vector, side by side."""
    take(tile)
    rng = np.random.default_rng(1)
    for C, F in ((1, 5), (7, 16), (16, 20)):
        specs = tuple(ConvSpec.infer((2, 11, 9, c), (*size, c, 4 * F), padding="same") for c in (F, C))
        xs = [rng.standard_normal((2, 3, 11, 9, c)) for c in (F, C)]
        dz = rng.standard_normal((2, 3, 11, 9, 4 * F))
        for result, spec, x in zip(gradient(specs, xs, dz, "winograd"), specs, xs, strict=True):
            np.testing.assert_allclose(result, taps(spec, x, dz), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("algorithm", "roundings"), [("direct", 20), ("winograd", 160)])
def test_long_sums_are_accurate(algorithm, roundings):
    """Sums of 80 000 products err by a few roundings of their largest: they are taken in levels."""
    rng = np.random.default_rng(2)
    spec = ConvSpec.infer((1, 100, 100, 3), (3, 3, 3, 16))
    x, dz = rng.standard_normal((8, 1, 100, 100, 3), np.float32), rng.standard_normal((8, 1, 100, 100, 16), np.float32)
    (result,) = gradient((spec.with_batch(8),), (x,), dz, algorithm)
    expected = taps(spec, x.astype(float), dz.astype(float))
    assert np.abs(result - expected).max() <= roundings * np.finfo(np.float32).eps * np.abs(expected).max()


@pytest.mark.parametrize(("algorithm", "F", "shares"), [("direct", 20, 1), ("winograd", 20, 1), ("winograd", 3, 16)])
def test_bits_do_not_depend_on_the_team(algorithm, F, shares):
    rng = np.random.default_rng(3)
    specs = tuple(ConvSpec.infer((3, 30, 21, c), (3, 3, c, 4 * F)) for c in (F, 2))
    xs = [rng.standard_normal((3, 4, 30, 21, c), np.float32) for c in (F, 2)]
    dz = rng.standard_normal((3, 4, 30, 21, 4 * F), np.float32)
    if algorithm == "winograd":
        assert len(WeightGradient(specs, dz.dtype, 12, algorithm)._sums) == shares
    expected = gradient(specs, xs, dz, algorithm)
    for result, spec, x in zip(expected, specs, xs, strict=True):
        want = taps(spec, x.astype(float), dz.astype(float))
        assert np.abs(result - want).max() <= 2e-5 * np.abs(want).max()
    for team in (2, 3, 4):
        for result, value in zip(gradient(specs, xs, dz, algorithm, team), expected, strict=True):
            np.testing.assert_array_equal(result, value)


def test_auto_takes_tiles_where_they_pay():
    def choice(H, k=3, C=64, **options):
        return weight_gradient.choose((ConvSpec.infer((1, H, H, C), (k, k, C, 256), **options),), 10, "auto", 4)

    assert choice(64) == Tile(4, 4, 3, 3)
    assert choice(64, k=5) == Tile(4, 4, 5, 5)
    assert choice(64, strides=2) is choice(1) is choice(64, k=1) is None

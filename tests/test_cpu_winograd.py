"""Winograd convolution: its matrices are exact, its error is known, and any size works."""

from fractions import Fraction

import numpy as np
import pytest

from fastclstm import functional
from fastclstm.engines.cpu import launch, outliers, plans, tiles
from fastclstm.engines.cpu.kernels import simd, winograd
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.spec import ConvSpec

AXES = [(m, k) for k, choices in tiles.OUTPUTS.items() for m in choices]
every_axis = pytest.mark.parametrize(("m", "k"), AXES, ids=[f"F({m},{k})" for m, k in AXES])
TILES = [Tile(m, m, k, k) for m, k in ((2, 3), (4, 3), (2, 5), (4, 5))]
OTHERS = [Tile(3, 5, 2, 4), Tile(5, 3, 2, 4), Tile(3, 2, 4, 7), Tile(4, 3, 1, 6), Tile(5, 1, 4, 1), Tile(3, 4, 6, 1),
          Tile(2, 3, 7, 2), Tile(1, 5, 1, 2)]  # fmt: skip
"""With TILES these have every axis there is down and across. Each is compiled for itself, so they are not all pairs."""


def every(some):
    """Parametrize by tiles, one of which is repeated with narrower vectors."""
    params = [pytest.param(tile, marks=pytest.mark.vectors if tile == TILES[1] else ()) for tile in some]
    return pytest.mark.parametrize("tile", params, ids=str)


any_tile = every(TILES + OTHERS)

TIMES_DIRECT = {4: 2, 6: 6, 8: 8}
"""How many times the error of the direct algorithm a tile may err, by the longer side of its points."""


def correlate(x, w):
    """Valid cross-correlation of (H, W, …) with (KH, KW, …), elementwise in the other axes."""
    (KH, KW), (H, W) = w.shape[:2], x.shape[:2]
    return np.array(
        [[(x[i : i + KH, j : j + KW] * w).sum((0, 1)) for j in range(W - KW + 1)] for i in range(H - KH + 1)]
    )


@every_axis
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


@every_axis
def test_matrices_are_those_fractions_rounded_once(m, k):
    for matrix in winograd.transforms(m, k):
        exact = np.array([[float(Fraction(value).limit_denominator(10_000)) for value in row] for row in matrix])
        np.testing.assert_array_equal(matrix, exact)


@any_tile
def test_one_tile_in_two_dimensions(tile):
    down, across = winograd.transforms(tile.m_y, tile.k_y), winograd.transforms(tile.m_x, tile.k_x)
    size = tile.m_y + tile.k_y - 1, tile.m_x + tile.k_x - 1
    assert tile.points == size[0] * size[1]
    rng = np.random.default_rng(1)
    x, w = rng.integers(-8, 9, (*size, 6)) / 8, rng.integers(-8, 9, (tile.k_y, tile.k_x, 6)) / 8
    inputs = np.einsum("ip,jq,pqc->ijc", down.B_T, across.B_T, x)
    products = inputs * np.einsum("ip,jq,pqc->ijc", down.G, across.G, w)
    result = np.einsum("ip,jq,pqc->ijc", down.A_T, across.A_T, products)
    np.testing.assert_allclose(result, correlate(x, w), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", range(1, 24))
def test_pieces_have_each_tap_once_and_none_beyond_the_kernel(size):
    for k in tiles.OUTPUTS:
        if k <= size:
            cuts = tiles.cuts(size, k)
            assert [tap for cut in cuts for tap in range(cut.first + cut.skipped, cut.first + k)] == list(range(size))
            assert all(0 <= cut.first <= size - k and 0 <= cut.skipped < k for cut in cuts)
    for tile in tiles.choices((size, 3)):
        assert tile.m_y in tiles.OUTPUTS[tile.k_y]
        assert tile.k_y <= size


@pytest.mark.parametrize(
    ("size", "m", "d"), [(1, 4, 1), (9, 4, 1), (9, 4, 2), (8, 2, 4), (5, 2, 3), (3, 4, 5), (30, 5, 3)]
)
def test_tiles_cover_each_output_of_an_axis_once(size, m, d):
    corners = [winograd.corner.py_func(m, d, n) for n in range(tiles.along(size, m, d))]
    outputs = sorted(corner + i * d for corner in corners for i in range(m))
    assert [y for y in outputs if y < size] == list(range(size))
    assert all(corner < size for corner in corners)


def spec(kernel=(3, 3), **options):
    return ConvSpec.infer((1, 16, 16, 4), (*kernel, 4, 8), **({"padding": "same"} | options))


def test_fits_kernels_of_one_dilation():
    for kernel in ((3, 3), (5, 5), (1, 1), (2, 2), (4, 4), (7, 7), (3, 5), (1, 3), (9, 2), (11, 11)):
        assert plans.fits((spec(kernel),))
        assert plans.fits((spec(kernel), spec(kernel, padding_mode="circular")))
        assert plans.fits((spec(kernel, padding="valid"),))
    assert plans.fits((spec(dilation=(2, 3)), spec(dilation=(2, 3))))
    assert plans.fits((spec((1, 3), dilation=(2, 3)), spec((1, 3), dilation=(1, 3))))  # an axis of one tap has none
    assert not plans.fits((spec(), spec(dilation=(2, 2))))
    assert plans.alike((spec(), spec(padding="valid")))
    for options in ({"strides": (1, 2)}, {"strides": (2, 1)}, {"kernel": (5, 5)}):
        assert plans.fits((spec(), spec(**options)))
        assert not plans.alike((spec(), spec(**options)))


@pytest.mark.parametrize(("size", "strides"), [((3, 3), (2, 2)), ((5, 4), (3, 1)), ((1, 2), (2, 3))])
def test_lattices_have_each_tap_once_and_see_the_pixels_of_one_of_every_stride(size, strides):
    taps = np.arange(np.prod(size)).reshape(size)
    cut = tiles.lattices(*size, strides)
    assert sorted(tap for lattice in cut for tap in taps[lattice].ravel()) == taps.ravel().tolist()
    assert len(tiles.dense((spec(size, strides=strides),))) == len(cut)


def test_pixels_beyond_a_kernel_meet_zeros_in_large_tiles_only():
    """Else what a tile of two outputs errs would leave the receptive fields, which `outliers` relies on."""
    assert Tile(2, 2, 5, 5) in tiles.choices((5, 5))
    assert tiles.choices((5, 5), (3, 3)) == (Tile(4, 4, 5, 5), Tile(2, 2, 3, 3), Tile(4, 4, 3, 3))
    assert (
        tiles.choices((2, 2), (2, 1), (1, 2), (1, 1)) == tiles.choices((2, 2)) == (Tile(3, 3, 2, 2), Tile(5, 5, 2, 2))
    )


@pytest.mark.parametrize(("channels", "filters", "far"), [(16, 32, False), (256, 256, True)])
def test_blocks_of_many_tiles_are_within_bounds(channels, filters, far):
    tile = Tile(4, 4, 3, 3)
    least, most = winograd.BLOCK_TILES[far]
    for size in range(60, 140, 3):
        for B, threads in ((1, 1), (2, 2), (3, 2), (5, 4)):
            specs = (ConvSpec.infer((B, size, size, channels), (3, 3, channels, filters)),)
            work = plans.winograd_plan(specs, tile, "store", filters // 64 or 1, 4, threads).work[0]
            count = (-(-size // 4)) ** 2
            if B * count > winograd.MOST_TILES * threads:
                assert least <= work["block_tiles"] <= most, (size, B, threads)


def test_no_products_where_the_transform_of_fewer_taps_is_zero():
    """Taps that begin with a zero are 0 at the point 0: there x's lattices are left out, which come after h."""
    tile, F = Tile(4, 4, 3, 3), 4 * simd.lanes(4)
    x = ConvSpec.infer((1, 32, 32, 8), (3, 3, 8, F), strides=2)
    h = ConvSpec.infer((1, 16, 16, 16), (3, 3, 16, F))
    blocks = -(-16 // simd.lanes(4))
    for specs, finish in (((h, x), "update"), ((h,), "store")):
        work = plans.winograd_plan(specs, tile, finish, 1, 4, 1).work[0]
        assert (work["blocks_y"], work["blocks_x"]) == (blocks, blocks)
    packed = launch.pack((np.ones((3, 3, 8, F), np.float32),), None, np.ones(1), tile, strides=((2, 2),))
    points = packed.weights[: 36 * 4 * 8 * F].reshape(6, 6, -1)
    assert not points[0].any()
    assert not points[:, 0].any()
    assert points[1:, 1:].any(-1).all()


def test_values_stay_where_they_are_with_small_tiles_only():
    """What the tiles of two outputs err does not leave the receptive fields, nor what is not transformed."""
    for tile, spoils in ((Tile(2, 2, 3, 3), False), (Tile(2, 4, 3, 1), False), (Tile(1, 4, 1, 3), True),
                         (Tile(4, 2, 3, 3), True), (Tile(4, 4, 1, 1), False), (None, False)):  # fmt: skip
        assert outliers.spoil(tile) == spoils


def agrees(x, w, bias=None, **options):
    arguments = {"x": x, "kernel": w, "bias": bias, "padding": "same"} | options
    result = functional.conv2d(**arguments, engine="cpu", algorithm="winograd")
    expected = functional.conv2d(**arguments, engine="reference")
    np.testing.assert_allclose(result, expected, rtol=0, atol=4e-12, err_msg=f"{x.shape} {w.shape} {options}")


@any_tile
@pytest.mark.parametrize("C", [1, 20])
def test_any_frame(take, tile, C):
    """Frames that tiles divide and do not, smaller than a tile too, against the oracle in float64."""
    take(tile)
    rng = np.random.default_rng(3)
    k = max(tile.k_y, tile.k_x)
    w, bias = rng.standard_normal((tile.k_y, tile.k_x, C, 7)), rng.standard_normal(7)
    for H, W in ((1, 1), (1, 9), (2, 3), (4, 4), (5, 8), (7, 13), (17, 6)):
        for options in (
            {}, {"padding": ((k, 1), (0, k + 1))}, {"padding_mode": "circular"}, {"dilation": (2, 3)},
            {"dilation": (3, 1), "padding_mode": "circular"}, {"strides": (2, 3)},
        ):  # fmt: skip
            agrees(rng.standard_normal((2, H, W, C)), w, bias, **options)


@any_tile
def test_pieces_of_a_kernel(take, tile):
    """Kernels that whole tiles make up, and others, whose last pieces skip what earlier ones had."""
    take(tile)
    rng = np.random.default_rng(5)
    for kernel in ((2 * tile.k_y, tile.k_x), (tile.k_y + 1, 2 * tile.k_x + 1)):
        for options in (
            {},
            {"dilation": (1, 2)},
            {"padding_mode": "circular"},
            {"strides": (2, 1)},
        ):
            agrees(rng.standard_normal((2, 9, 12, 5)), rng.standard_normal((*kernel, 5, 20)), **options)


def sequence(T, tile, C, F, scale=1.0, seed=4):
    rng, size = np.random.default_rng(seed), (tile.k_y, tile.k_x)
    x = rng.uniform(0, 1, (2, T, 12, 13, C)).astype(np.float32)
    kernels = [
        (scale * rng.uniform(-1, 1, (*size, c, 4 * F)) * np.sqrt(6 / (np.prod(size) * (c + 4 * F)))).astype(np.float32)
        for c in (C, F)
    ]
    return x, *kernels


@every([*TILES, *OTHERS[:4]])
@pytest.mark.parametrize("T", [10, 100])
def test_error_after_many_steps(take, tile, T):
    """It is a stated multiple of the direct algorithm's, and does not grow with the sequence."""
    take(tile)
    arguments = sequence(T, tile, C=3, F=16)
    exact = functional.convlstm2d(*(a.astype(np.float64) for a in arguments), engine="cpu", algorithm="direct")

    def error(algorithm):
        return np.abs(functional.convlstm2d(*arguments, engine="cpu", algorithm=algorithm) - exact).max()

    direct, fast = error("direct"), error("winograd")
    assert 0 < direct < 2e-6
    assert fast <= TIMES_DIRECT[max(tile.m_y + tile.k_y, tile.m_x + tile.k_x) - 1] * direct


@every([*TILES, OTHERS[0]])
def test_bits_do_not_depend_on_the_batch_or_the_sequence(take, tile):
    take(tile)
    x, *kernels = sequence(4, tile, C=5, F=6)
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

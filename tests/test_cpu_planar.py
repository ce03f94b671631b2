"""Tiles in the lanes of vectors: to the bit what filters in the lanes give, and where they are chosen."""

import numpy as np
import pytest

import fastclstm
from fastclstm import functional
from fastclstm.engines.cpu import plans, threads
from fastclstm.engines.cpu.kernels import lanes, simd
from fastclstm.engines.cpu.kernels.entry import kernel, table
from fastclstm.engines.cpu.plans import DIRECT, Ways
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.spec import ConvSpec

F2 = Tile(2, 2, 3, 3)


@kernel
def there_and_back(job, worker, places, counts, planes):
    """Transpose a run at each of some places, then write one plane fewer to as many others."""
    table_of, count = simd.pointer(places), counts[0]
    lanes.gather(table_of, np.int64(counts[1]), count, simd.pointer(planes))
    lanes.scatter(simd.shift(table_of, places.shape[0] // 2), np.int64(counts[1]), count - 1, simd.pointer(planes))


@pytest.mark.vectors
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_runs_are_transposed_and_nothing_else_is_written(dtype):
    width = simd.lanes(np.dtype(dtype).itemsize)
    origin = np.random.default_rng(0).standard_normal((width, 60)).astype(dtype)
    for count in (*range(1, 20), 33, 50):
        target = np.full_like(origin, -1)
        planes = np.zeros((count + width, width), dtype)
        places = np.array([row.ctypes.data for array in (origin, target) for row in array], np.int64)
        counts = np.array([count, 5 * origin.itemsize], np.int64)
        threads.run(there_and_back, 1, (), table(places), table(counts), table(planes))
        np.testing.assert_array_equal(planes[:count], origin[:, 5 : 5 + count].T)
        expected = np.full_like(origin, -1)
        expected[:, 5 : 4 + count] = origin[:, 5 : 4 + count]
        np.testing.assert_array_equal(target, expected)


def problem(B, T, H, W, C, F, kernel, dtype, peephole=None, mask=False, state=False, **options):
    """Arguments of `convlstm2d`."""
    rng = np.random.default_rng([B, T, H, W, C, F])

    def draw(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(dtype)

    arguments = {
        "x": draw(B, T, H, W, C), "kernel": draw(*kernel, C, 4 * F, scale=0.3), "bias": draw(4 * F),
        "recurrent_kernel": draw(3, 3, F, 4 * F, scale=0.3), **options,
    }  # fmt: skip
    if peephole:
        shape = (F,) if peephole == "channel" else (H, W, F)
        arguments["peephole"] = {gate: draw(*shape) for gate in "ifo"}
    if mask:
        arguments["mask"] = rng.random((B, T)) < 0.6
        arguments["x"][~arguments["mask"]] = np.nan
    if state:
        arguments["initial_state"] = draw(B, H, W, F), draw(B, H, W, F)
    return arguments


CASES = {
    # one band of tiles, several bands, several images in a vector; tiles that end beyond the frame, and whole ones
    "direct": (DIRECT, (2, 3, 13, 9, 2, 3, (3, 3)), {}),
    "whole tiles": (DIRECT, (1, 2, 32, 64, 1, 1, (3, 3)), {}),
    "small frames": (DIRECT, (7, 2, 4, 5, 3, 8, (2, 4)), {"state": True}),
    "a line": (DIRECT, (3, 2, 1, 40, 2, 2, (1, 5)), {}),
    "circular": (DIRECT, (2, 2, 12, 20, 1, 5, (3, 3)), {"padding_mode": "circular"}),
    "dilated": (DIRECT, (2, 2, 12, 9, 1, 4, (3, 3)), {"dilation": (2, 3), "recurrent_dilation": (1, 2)}),
    "strides": (Ways(None, None, before=True), (2, 2, 11, 14, 3, 2, (5, 3)), {"strides": (2, 3)}),
    "channel peepholes": (DIRECT, (3, 3, 9, 10, 2, 3, (3, 3)), {"peephole": "channel", "mask": True}),
    "peepholes": (DIRECT, (2, 3, 8, 20, 1, 4, (3, 3)), {"peephole": "elementwise", "cell_clip": 0.5}),
    "Winograd": (Ways(F2, F2), (3, 3, 13, 21, 3, 3, (3, 3)), {"mask": True, "go_backwards": True}),
    "Winograd, many quads": (Ways(F2, F2), (1, 2, 6, 6, 20, 7, (3, 3)), {}),
    "Winograd, dilated": (
        Ways(F2, F2), (2, 2, 15, 17, 1, 6, (3, 3)), {"dilation": (2, 3), "recurrent_dilation": (2, 3)},
    ),
    "Winograd, strides": (Ways(F2, F2), (2, 2, 13, 18, 2, 5, (4, 3)), {"strides": (2, 3)}),
    "Winograd before": (Ways(F2, F2, before=True), (2, 3, 9, 11, 2, 5, (3, 3)), {"state": True}),
}  # fmt: skip


def force(monkeypatch, ways, planar):
    """Have both convolutions go some way, with tiles in the lanes or not."""
    monkeypatch.setattr(plans, "choose_ways", lambda *_: ways)
    monkeypatch.setattr(plans, "is_planar", lambda *_: planar)


def assert_same(results, expected):
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, value)


NARROW_TOO = ("direct", "small frames", "strides", "Winograd")
"""Cases that are repeated with narrower vectors."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.vectors if n in NARROW_TOO else ()) for n in CASES])
def test_same_bits_as_with_filters_in_the_lanes(name, monkeypatch):
    ways, sizes, options = CASES[name]
    arguments = problem(*sizes, np.float32, **options)
    results = {}
    for planar in (True, False):
        force(monkeypatch, ways, planar)
        results[planar] = functional.convlstm2d(**arguments, return_state=True)
    assert np.isfinite(results[True][0]).all()
    assert_same(results[True], results[False])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_training_keeps_is_the_same(dtype, monkeypatch):
    arguments = problem(2, 3, 7, 9, 2, 3, (3, 3), dtype, mask=dtype == np.float32)
    arguments["x"] = np.nan_to_num(arguments["x"])
    results = {}
    for planar in (True, False):
        force(monkeypatch, DIRECT, planar)
        y, pull_back = functional.convlstm2d_vjp(**arguments, algorithm="direct")
        gradients = pull_back(np.cos(y))
        results[planar] = [y, *(gradients[n] for n in ("x", "kernel", "recurrent_kernel", "bias"))]
    assert_same(results[True], results[False])


def test_convolutions_that_store_are_the_same_and_notice_what_is_not_finite(monkeypatch):
    rng = np.random.default_rng(0)
    for F in (1, 3, 6):
        x, kernel = rng.standard_normal((3, 10, 11, 5), np.float32), rng.standard_normal((3, 3, 5, F), np.float32)
        results = {}
        for planar in (True, False):
            monkeypatch.setattr(plans, "is_planar", lambda *_, planar=planar: planar)
            results[planar] = [functional.conv2d(x, kernel, algorithm=how) for how in ("direct", "winograd")]
        assert_same(results[True], results[False])
    monkeypatch.setattr(plans, "is_planar", lambda *_: True)
    x[1, 2, 3] = np.inf  # Winograd's tiles would spread it: its image, alone, is computed directly
    with np.errstate(invalid="ignore"):
        y = functional.conv2d(x, kernel, algorithm="winograd")
    np.testing.assert_array_equal(y[1], functional.conv2d(x[1:2], kernel, algorithm="direct")[0])
    np.testing.assert_array_equal(y[0], functional.conv2d(x[:1], kernel, algorithm="winograd")[0])


def test_bits_do_not_depend_on_the_thread_count(monkeypatch):
    force(monkeypatch, DIRECT, True)
    arguments = problem(1, 6, 130, 70, 2, 3, (3, 3), np.float32)
    before, results = fastclstm.get_num_threads(), []
    try:
        for count in (1, 2):
            fastclstm.set_num_threads(count)
            results.append(functional.convlstm2d(**arguments, return_state=True))
    finally:
        fastclstm.set_num_threads(before)
    assert_same(*results)


def is_planar(C, F, k, size=64, gates=True):
    """Whether tiles would be the lanes, with the algorithm that is cheapest."""
    specs = tuple(ConvSpec.infer((2, size, size, n), (k, k, n, 4 * F), padding="same") for n in (F, C))
    tile = plans.choose(specs, "auto", 4, gates=gates)
    return plans.is_planar(specs, tile, 4, gates)


@pytest.mark.vectors
def test_tiles_are_the_lanes_where_filters_are_few():
    few = [F for F in (1, 2, 4, 8) if simd.lanes(4) > F]
    assert all(is_planar(C, F, k) for C in (1, 3, 8) for F in few for k in (1, 3, 5))
    assert not any(is_planar(C, F, k) for C in (1, 16, 64) for F in (64, 128) for k in (1, 3, 5))


@pytest.mark.vectors
def test_what_is_chosen_for_few_filters_is_what_was_measured_to_be_fastest():
    if simd.lanes(4) < 16:
        pytest.skip("measured with vectors of 16")
    for H, C, F, k, tiles_fit, planar in ((54, 8, 2, 3, True, True), (31, 103, 2, 3, True, True),
                                          (31, 64, 4, 3, True, False), (32, 47, 6, 2, True, True),
                                          (16, 197, 1, 4, False, True)):  # fmt: skip
        specs = tuple(ConvSpec.infer((4, H, H, n), (k, k, n, 4 * F), padding="same") for n in (F, C))
        tile = plans.choose(specs, "auto", 4, gates=True)
        assert bool(tile) == tiles_fit
        assert plans.is_planar(specs, tile, 4, gates=True) == planar

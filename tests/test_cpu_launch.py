"""The choice of algorithm, and what a call does with its plan."""

import numpy as np
import pytest

from fastclstm import functional
from fastclstm.engines.cpu import launch, plans, threads
from fastclstm.engines.cpu.tiles import Tile
from fastclstm.spec import ConvSpec


def choose(algorithm, B=1, H=64, W=64, C=64, F=256, K=3, **options):
    return plans.choose((ConvSpec.infer((B, H, W, C), (K, K, C, F), **options),), algorithm, 4)


def test_direct_is_always_to_be_had():
    assert choose("direct") is None


@pytest.mark.parametrize("options", [{"strides": 3}, {"K": 1}, {"H": 1, "W": 1}], ids=lambda options: str(options))
def test_auto_is_direct_where_tiles_do_not_fit_or_do_not_pay(options):
    assert choose("auto", **options) is None


@pytest.mark.parametrize("K", [3, 5])
def test_auto_takes_small_tiles_on_small_frames_where_weights_are_many(K):
    assert choose("auto", K=K) == Tile(4, 4, K, K)
    many = {"H": 6, "W": 6, "K": K, "C": 256, "F": 512}
    assert choose("auto", **many) == Tile(2, 2, K, K)
    assert choose("auto", **(many | {"C": 64, "F": 128})) == Tile(4, 4, K, K)


def test_auto_weighs_the_batch_but_winograd_does_not():
    assert choose("auto", B=1, H=8, W=8, C=256) == Tile(2, 2, 3, 3)
    assert choose("auto", B=16, H=8, W=8, C=256) == Tile(4, 4, 3, 3)
    assert choose("winograd", B=16, H=8, W=8) == choose("winograd", B=1, H=8, W=8)


def test_strided_kernels_have_the_tiles_of_their_lattices():
    assert choose("auto", strides=2) == Tile(5, 5, 2, 2)
    assert choose("auto", strides=2, K=5) == Tile(4, 4, 3, 3)
    assert choose("winograd", strides=(1, 2), K=7) == Tile(5, 5, 4, 4)  # two pieces downwards


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_a_hidden_state_of_zeros_is_the_same_given_or_not(algorithm):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 3, 9, 10, 17), np.float32), rng.standard_normal((3, 3, 17, 80), np.float32)
    recurrent_kernel, zeros = rng.standard_normal((3, 3, 20, 80), np.float32), np.zeros((2, 9, 10, 20), np.float32)
    result, given = (
        functional.convlstm2d(x, kernel, recurrent_kernel, initial_state=state, algorithm=algorithm)
        for state in (None, (zeros, zeros))
    )
    np.testing.assert_array_equal(result, given)


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_one_image_keeps_every_worker_busy(algorithm):
    tile, spec = Tile(4, 4, 3, 3) if algorithm == "winograd" else None, ConvSpec.infer((1, 64, 64, 8), (3, 3, 8, 64))
    for workers in (2, 3, 16):
        plan = plans.plan((spec,), tile, "store", 1, 4, workers)
        assert plan.pieces >= workers


def test_a_long_sequence_is_computed_in_pieces_with_the_same_bits(monkeypatch):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 11, 9, 9, 3), np.float32), rng.standard_normal((3, 3, 3, 32), np.float32)
    recurrent_kernel, mask = rng.standard_normal((3, 3, 8, 32), np.float32), rng.random((2, 11)) < 0.7
    calls = []
    run = threads.run

    def counted(kernel, team, variant, flows, *tables):
        calls.append(team)
        return run(kernel, team, variant, flows, *tables)

    for algorithm in ("direct", "winograd"):
        for options in ({}, {"mask": mask}, {"go_backwards": True}, {"return_sequences": False}):
            monkeypatch.setattr(launch, "PIECE_FLOPS", 10**10)
            whole = functional.convlstm2d(
                x, kernel, recurrent_kernel, algorithm=algorithm, return_state=True, **options
            )
            monkeypatch.setattr(launch, "PIECE_FLOPS", 1)
            monkeypatch.setattr(launch, "PIECE_SECONDS", 0)
            monkeypatch.setattr(threads, "run", counted)
            calls.clear()
            pieces = functional.convlstm2d(
                x, kernel, recurrent_kernel, algorithm=algorithm, return_state=True, **options
            )
            assert len(calls) == 11
            for a, b in zip(whole, pieces, strict=True):
                np.testing.assert_array_equal(a, b)


def test_memory_belongs_to_a_call():
    """Whoever asks within a call gets other memory; only what was given back is lent again."""
    first = launch.borrow(1000)
    second = launch.borrow(1000)
    assert first[0] != second[0]
    launch.give_back(*first)
    assert launch.borrow(500)[0] == first[0]
    large = launch.borrow(launch.SPARE_BYTES + 1)
    launch.give_back(*large)
    assert launch.borrow(launch.SPARE_BYTES + 1)[0] != large[0] or not any(
        memory is large[1] for _, memory in launch._spare
    )

"""Batches: what is drawn, how it may be given, and what is refused; through fit in test_layers_training.py."""

import numpy as np
import pytest

from fastclstm.training import batches

X, Y = np.arange(10.0)[:, None], -np.arange(10.0)[:, None]


def drawn(data, *args):
    return [batch["x"][:, 0].astype(int).tolist() for batch in data.batches(*args)]


def test_arrays_are_cut_into_batches():
    data = batches.read("fit", {"x": X, "y": Y}, 4)
    assert data.steps == 3
    assert drawn(data) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for batch in data.batches(0, 0, 7):
        np.testing.assert_array_equal(batch["y"], -batch["x"])
    shuffled = drawn(data, 1, 0, 7)
    assert sorted(n for part in shuffled for n in part) == list(range(10))
    assert drawn(data, 1, 2, 7) == shuffled[2:]  # a resumed epoch goes on with the same samples
    assert drawn(data, 2, 0, 7) != shuffled


def test_a_split_takes_the_last_samples():
    first, last = batches.read("fit", {"x": X, "y": Y}, 16).split(0.25)
    assert drawn(first) == [list(range(8))]
    assert drawn(last) == [[8, 9]]
    with pytest.raises(ValueError, match=r"validation_split=0.05 of 10 samples leaves 10 to train on and 0"):
        batches.read("fit", {"x": X, "y": Y}, 16).split(0.05)


def test_an_iterator_is_read_from_where_it_is():
    pairs = [(X[n : n + 1], Y[n : n + 1]) for n in range(10)]
    data = batches.read("fit", {"x": iter(pairs)}, 1, 3)
    assert [drawn(data, epoch) for epoch in range(2)] == [[[0], [1], [2]], [[3], [4], [5]]]
    assert drawn(batches.read("fit", {"x": iter(pairs)}, 1, 3), 1, 1) == [[4], [5]]  # after an interruption


def test_what_a_batch_may_be():
    weights = np.ones(10)
    for item in ((X, Y, weights), [X, Y, weights], {"x": X, "y": Y, "sample_weight": weights}):
        (batch,) = batches.read("fit", {"x": [item]}, 1).batches()
        assert batch.keys() == {"x", "y", "sample_weight"}
    for item, words in (((X,), "got 1 items"), ({"x": X, "z": Y}, "has 'z'"), ((X, Y[:3]), "as many samples")):
        with pytest.raises(ValueError, match=words):
            list(batches.read("fit", {"x": [item]}, 1).batches())
    with pytest.raises(TypeError, match=r"must be \(x, y\), .* got ndarray"):
        list(batches.read("fit", {"x": [X]}, 1).batches())

"""Copies from one order in memory to another, and whether memory is the same."""

import itertools

import numba
import numpy as np
import pytest

from fastclstm import dispatch
from fastclstm.engines.cpu import memory, threads


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.fixture
def always(monkeypatch):
    """Kernels for arrays of any size."""
    monkeypatch.setattr(memory, "SMALL_BYTES", -1)
    monkeypatch.setattr(memory, "PARALLEL_BYTES", 1)


CASES = [
    ((4 * 5, 3 + 5, 3, 3), (2, 3, 1, 0)),  # a cell's weights
    ((4 * 16, 2, 1, 1), (2, 3, 1, 0)),
    ((300, 7, 1, 2), (2, 3, 1, 0)),  # more rows than a panel has
    ((2, 3, 21, 4, 5), (0, 1, 3, 4, 2)),  # frames
    ((2, 3, 1, 4, 5), (0, 1, 3, 4, 2)),
    ((2, 0, 3, 4, 5), (0, 1, 3, 4, 2)),
    ((17, 33), (1, 0)),
    ((3, 4, 5), (0, 1, 2)),  # nothing to turn round
]


@pytest.mark.vectors
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("team", [1, 3])
def test_copies_are_numpys(always, monkeypatch, dtype, team):
    """There and back, whole and of a part, with either sign; nothing beside the target is written to."""
    monkeypatch.setattr(threads, "usable_threads", lambda: team)
    launched, run = [], threads.run
    monkeypatch.setattr(threads, "run", lambda *arguments: (launched.append(arguments[0]), run(*arguments)))
    for (shape, axes), part, negated in itertools.product(CASES, (np.s_[:], np.s_[1:-1]), (False, True)):
        theirs = normal(*shape, dtype=dtype)[part].transpose(axes)
        ours = np.full(theirs.shape, 7, dtype)
        memory.copy(theirs, ours, negated=negated)
        np.testing.assert_array_equal(ours, -theirs if negated else theirs)
        whole = np.full(shape, 7, dtype)
        expected = whole.copy()
        expected[part].transpose(axes)[...] = -ours if negated else ours
        memory.copy(ours, whole[part].transpose(axes), negated=negated)
        np.testing.assert_array_equal(whole, expected)
    assert len(launched) > 30  # of 64, some of nothing


def test_tables_stay_small(always, monkeypatch):
    """However many pixels a frame has; those that are kept most of all."""
    sizes = {}
    for shape in ((1, 7, 2, 1024, 1024), (300, 2, 64, 64), (2, 2, 5, 7, 9, 11)):
        frames = np.moveaxis(np.empty(shape, np.float32), -3, -1)
        tables = memory._turn(frames.shape, frames.strides, np.empty(frames.shape, np.float32).strides, frames.dtype)
        sizes[shape] = sum(int(np.prod(one.place[1:])) for one in tables)
    assert max(sizes.values()) < 1 << 15, sizes
    thin = np.empty((2, 5, 2, 5), np.float32).transpose(0, 3, 2, 1)
    assert memory._turn(thin.shape, thin.strides, np.empty(thin.shape, np.float32).strides, thin.dtype) is None
    monkeypatch.setattr(memory, "RUN", 12)  # frames of several rows
    memory._kept_turn.cache_clear()
    frames = np.moveaxis(normal(3, 40, 6, 4), 1, -1)
    made = np.empty(frames.shape, np.float32)
    memory.copy(frames, made)
    np.testing.assert_array_equal(made, frames)
    memory._kept_turn.cache_clear()


def test_without_kernels_numpy_copies(always, monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    monkeypatch.setattr(threads, "run", None)
    x = np.moveaxis(normal(2, 3, 17, 9), 1, -1)
    np.testing.assert_array_equal(dispatch.contiguous(x), x)
    assert memory.is_in(dispatch.contiguous(x), memory.contents(dispatch.contiguous(x)))


def test_what_no_kernel_copies_numpy_does(always):
    for dtype in (np.int32, np.bool_, np.float16, ">f4"):
        array = normal(20, 30).astype(dtype)
        made = np.empty(array.T.shape, dtype)
        memory.copy(array.T, made)
        np.testing.assert_array_equal(made, array.T)
    shifted = np.zeros(20 * 30 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(20, 30)
    shifted[...] = normal(20, 30)
    made = np.empty((30, 20), np.float32)
    memory.copy(shifted.T, made)
    np.testing.assert_array_equal(made, shifted.T)


def test_frames_become_contiguous(always):
    """Also those that a caller may not write to."""
    x = np.moveaxis(normal(2, 3, 17, 9, 8), 2, -1)
    x.flags.writeable = False
    for made in (dispatch.contiguous(x), dispatch.native(x, np.dtype(np.float32))):
        assert made.flags.c_contiguous
        assert made.flags.writeable
        np.testing.assert_array_equal(made, x)


@pytest.mark.parametrize("team", [1, 2])
def test_a_changed_bit_is_seen(always, monkeypatch, team):
    monkeypatch.setattr(threads, "usable_threads", lambda: team)
    array = normal(3, 9001)
    array[0, 0] = np.nan
    copied = memory.contents(array)
    assert memory.is_in(array, copied)
    bits = array.reshape(-1).view(np.uint32)
    for place in (*range(130), 16384, -1):  # of each vector that is read, and of what no whole number of them is
        bits[place] ^= 1 << 31
        assert not memory.is_in(array, copied)
        bits[place] ^= 1 << 31
    assert memory.is_in(array, copied)
    assert memory.is_in(np.empty((0, 3), np.float32), bytearray())
    odd = np.arange(9001, dtype=np.uint8)  # of no whole number of words
    assert memory.is_in(odd, memory.contents(odd))

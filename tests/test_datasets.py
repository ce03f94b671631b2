"""The moving digits, and the synthetic radar."""

import sys

import numpy as np
import pytest

from fastclstm import datasets
from fastclstm.datasets import moving_digits, synthetic_radar


@pytest.fixture(autouse=True)
def digits():
    """The digits, which are scikit-learn's."""
    pytest.importorskip("sklearn")


def test_shape_and_range():
    films = moving_digits(2, 5, 32, seed=0)
    assert films.shape == (2, 5, 32, 32, 1)
    assert films.dtype == np.float32
    assert films.min() == 0
    assert 0.8 < films.max() <= 1


def test_the_seed_decides():
    assert np.array_equal(moving_digits(2, 3, seed=1), moving_digits(2, 3, seed=1))
    assert not np.array_equal(moving_digits(2, 3, seed=1), moving_digits(2, 3, seed=2))


def test_films_and_frames_differ():
    films = moving_digits(3, 6, seed=0)
    assert (np.abs(np.diff(films, axis=1)).max((2, 3, 4)) > 0.1).all()
    assert not np.array_equal(films[0], films[1])


def test_longer_films_begin_alike():
    assert np.array_equal(moving_digits(2, 4, seed=3), moving_digits(2, 9, seed=3)[:, :4])


@pytest.mark.parametrize("size", [33, 64])
def test_digits_bounce_and_stay_inside(size):
    films = moving_digits(8, 60, size, digits=1, seed=0)
    mass = films.sum((2, 3, 4))  # of what is seen: a digit that left the frame would lose some
    assert (mass.max(1) / mass.min(1) < 1.02).all()
    edges = np.concatenate([films[:, :, [0, -1]].ravel(), films[:, :, :, [0, -1]].ravel()])
    assert edges.max() < 0.3
    place = (films.sum((3, 4)) * np.arange(size)).sum(-1) / mass
    turns = (np.diff(np.sign(np.diff(place, axis=1)), axis=1) != 0).sum(1)
    assert turns.max() >= 2


def test_more_digits_are_more_light():
    assert moving_digits(4, 2, digits=4, seed=0).sum() > 1.5 * moving_digits(4, 2, digits=1, seed=0).sum()


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_parts_share_no_digit(monkeypatch, part):
    """With the digits of one part blank, its films are black and those of the other part as before."""
    images, films = datasets._load_digits(), {p: moving_digits(5, 2, part=p, seed=7) for p in ("train", "test")}
    blank = images.copy()
    blank[(np.arange(len(images)) % 3 == 0) == (part == "test")] = 0
    monkeypatch.setattr(datasets, "_load_digits", lambda: blank)
    assert films[part].any((1, 2, 3, 4)).all()
    for other, before in films.items():
        after = moving_digits(5, 2, part=other, seed=7)
        np.testing.assert_array_equal(after, 0 if other == part else before)


def test_unknown_part():
    with pytest.raises(ValueError, match=r"part must be one of 'all', 'train', 'test', got 'validation'"):
        moving_digits(1, 1, part="validation")


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"steps": 0}, {"size": 9}, {"digits": 0}])
def test_too_small(wrong):
    with pytest.raises(ValueError, match=f"moving_digits: {next(iter(wrong))} must be at least"):
        moving_digits(**{"batch": 1, "steps": 1, **wrong})


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'fastclstm\[demo\]'"):
        moving_digits(1, 1)


# The synthetic radar


def test_rain_with_units_coordinates_and_a_sector_that_is_missing():
    pytest.importorskip("xarray")
    rain = synthetic_radar(30, (20, 26), minutes=10, pixel=500, start="2026-01-01T12:00", seed=0)
    assert dict(rain.sizes) == {"time": 30, "y": 20, "x": 26}
    assert (rain.dtype, rain.name, rain.units, rain.y.units) == (np.float32, "rain", "mm h-1", "m")
    assert np.unique(np.diff(rain.x)).tolist() == [500]
    assert np.unique(np.diff(rain.time)) == np.timedelta64(10, "m")
    assert str(rain.time.values[0])[:16] == "2026-01-01T12:00"
    missing = np.isnan(rain.values)
    assert (missing == missing[0]).all()
    assert 0.02 < missing.mean() < 0.15
    values = rain.values[~missing]
    assert 0.1 < (values > 0).mean() < 0.9
    assert ((values == 0) | (values >= 0.1)).all()
    np.testing.assert_array_equal(synthetic_radar(30, (20, 26), seed=0).values, rain.values)
    assert not np.isnan(synthetic_radar(3, 16, missing=False, seed=0)).any()
    assert not np.array_equal(synthetic_radar(3, 16, seed=0), synthetic_radar(3, 16, seed=1), equal_nan=True)


def test_rain_moves_by_parts_of_pixels_and_grows_and_decays():
    pytest.importorskip("xarray")
    from fastclstm.baselines import motion

    speed = [np.hypot(*np.median(motion(np.log1p(synthetic_radar(4, 64, speed=v, noise=0, missing=False, seed=3))),
                                 (1, 2))) for v in (0.0, 1.2)]  # fmt: skip
    assert speed[0] < 0.2  # growth looks like some motion
    assert 0.4 < speed[1] < 2
    still = synthetic_radar(20, 32, speed=0, noise=0, missing=False, seed=0).values
    change = np.diff(still.max((1, 2)))
    assert (change > 0).any()
    assert (change < 0).any()


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"size": 7}, {"minutes": 0}, {"minutes": np.inf}, {"cells": 0}, {"speed": -1}, {"noise": np.nan}],
)
def test_radar_options_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=f"synthetic_radar: {next(iter(wrong))}"):
        synthetic_radar(**{"steps": 1, **wrong})


def test_radar_without_xarray(monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match=r"pip install 'fastclstm\[xarray\]'"):
        synthetic_radar(1)

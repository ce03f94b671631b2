"""Persistence and optical flow: motion of parts of pixels, found and carried on."""

import sys

import numpy as np
import pytest

from fastclstm import baselines


def blobs(steps, velocity, size=(40, 36), seed=0):
    """Smooth blots that all move by `velocity` rows and columns a step: (steps, H, W)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    film = np.zeros((steps, *size))
    for _ in range(14):
        (cy, cx), wide, high = rng.uniform(-4, np.add(size, 4)), rng.uniform(3, 6), rng.uniform(0.3, 1)
        for t in range(steps):
            film[t] += high * np.exp(-((y - cy - velocity[0] * t) ** 2 + (x - cx - velocity[1] * t) ** 2) / wide**2)
    return film


@pytest.mark.parametrize("velocity", [(0.3, -0.4), (0.0, 0.15), (1.7, 2.2), (-4.0, 2.5)])
@pytest.mark.parametrize("holes", [False, True])
def test_motion_of_parts_of_pixels(velocity, holes):
    film = blobs(4, velocity)
    if holes:
        film[:, 10:20, 12:18] = np.nan
        film[2, :, 25:] = np.nan
    field = baselines.motion(film)
    assert field.shape == (2, 40, 36)
    inner = field[:, 8:-8, 8:-8]
    np.testing.assert_allclose(inner.mean((1, 2)), velocity, rtol=0, atol=0.05)
    np.testing.assert_allclose(np.median(inner, (1, 2)), velocity, rtol=0, atol=0.05)


def test_two_motions_at_once():
    film = np.concatenate([blobs(3, (0.5, 0), (40, 60)), blobs(3, (-0.5, 0), (40, 60), seed=1)], 2)
    field = baselines.motion(film)
    assert np.median(field[0, :, 10:40]) == pytest.approx(0.5, abs=0.1)
    assert np.median(field[0, :, 80:110]) == pytest.approx(-0.5, abs=0.1)


def test_what_does_not_move_or_is_not_there():
    still = np.repeat(blobs(1, (0, 0)), 3, 0)
    np.testing.assert_allclose(baselines.motion(still), 0, atol=1e-12)
    assert not baselines.motion(np.zeros((2, 5, 7))).any()
    assert not baselines.motion(np.full((2, 30, 30), np.nan)).any()
    assert baselines.motion(np.random.default_rng(0).random((2, 1, 1))).shape == (2, 1, 1)
    with pytest.raises(ValueError, match=r"motion: frames must be \(T, H, W\) with T >= 2, got shape \(1, 4, 4\)"):
        baselines.motion(np.zeros((1, 4, 4)))


def test_advection_by_whole_and_by_half_pixels():
    frame = np.zeros((5, 6))
    frame[2, 1] = 8
    field = np.stack([np.zeros((5, 6)), np.ones((5, 6))])
    made = baselines.advect(frame, field, 3)
    for step in range(3):
        assert made[step, 2, 2 + step] == 8
        assert np.isnan(made[step, :, : step + 1]).all()  # from outside
        assert np.nansum(made[step]) == 8
    half = baselines.advect(frame, field / 2, 1, outside=0)[0]
    np.testing.assert_array_equal(half[2], [0, 4, 4, 0, 0, 0])
    np.testing.assert_array_equal(baselines.advect(frame[..., None], field, 1, outside=-1)[0, :, 0, 0], -1)


def test_advection_follows_a_field_that_turns():
    n = 41
    y, x = np.mgrid[:n, :n] - n // 2
    angle = np.pi / 24
    field = angle * np.stack([x, -y])  # a solid turns from columns to rows
    frame = np.exp(-(y**2 + (x - 10) ** 2) / 8)
    quarter = baselines.advect(frame, field, 12, outside=0)[-1]
    row, column = np.unravel_index(quarter.argmax(), frame.shape)
    assert (row - n // 2, column - n // 2) == (10, 0)
    assert quarter.max() > 0.9


def test_missing_is_carried_along():
    frame = np.arange(12.0).reshape(2, 6)
    frame[:, 2] = np.nan
    made = baselines.advect(frame, np.stack([np.zeros((2, 6)), np.ones((2, 6))]), 1)[0]
    np.testing.assert_array_equal(np.isnan(made), [[True, False, False, True, False, False]] * 2)
    np.testing.assert_array_equal(made[0, 4:], frame[0, 3:5])


def test_extrapolation_beats_persistence_on_slow_rain():
    """By less than half a pixel a step, where a shift by whole pixels is none."""
    film = np.stack([blobs(12, (0.25, -0.4)), blobs(12, (-0.1, 0.45), seed=1)]).astype(np.float32)[..., None]
    given, truth = film[:, :4], film[:, 4:]
    made = baselines.extrapolation(given, 8, engine="own")
    assert (made.dtype, made.shape) == (np.float32, truth.shape)
    there = np.isfinite(made)
    assert there.mean() > 0.8
    last = baselines.persistence(given, 8)
    errors = [np.square(forecast - truth)[there].mean() for forecast in (made, last)]
    assert errors[0] < 0.02 * errors[1]
    assert not np.isnan(baselines.extrapolation(given, 8, outside=0, engine="own")).any()
    np.testing.assert_array_equal(last, np.stack([given[:, -1]] * 8, 1))


def test_whole_numbers_and_channels():
    film = np.rint(100 * blobs(5, (0.5, 0.5))).astype(np.uint8)[None, ..., None]
    made = baselines.extrapolation(film[:, :3].repeat(2, -1), 2, engine="own")
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made[..., 0], made[..., 1])
    with pytest.raises(ValueError, match=r"frames must be \(B, T, H, W, C\) with T >= 2"):
        baselines.extrapolation(film[:, :1], 2)
    with pytest.raises(ValueError, match="engine must be one of 'own', 'pysteps', got 'opencv'"):
        baselines.extrapolation(film, 2, engine="opencv")
    with pytest.raises(ValueError, match="persistence: steps must be an integer >= 1"):
        baselines.persistence(film, -1)
    with pytest.raises(ValueError, match=r"persistence: frames must be \(…, T, H, W, C\)"):
        baselines.persistence(film[0, 0], 1)
    for foretell in (baselines.persistence, baselines.extrapolation):
        with pytest.raises(TypeError, match=r"frames is a masked array, .*filled\(np.nan\)"):
            foretell(np.ma.array(film), 2)


def test_pysteps_where_it_is(monkeypatch):
    film = blobs(8, (0.3, -0.4), (64, 64))[None, ..., None]
    if baselines.has_pysteps():
        made = baselines.extrapolation(film[:, :4], 4)
        there = np.isfinite(made)
        errors = [np.square(f - film[:, 4:])[there].mean() for f in (made, baselines.persistence(film[:, :4], 4))]
        assert errors[0] < 0.3 * errors[1]
        return
    with pytest.raises(ImportError, match="pip install pysteps"):
        baselines.extrapolation(film[:, :4], 4, engine="pysteps")
    assert "pysteps" not in sys.modules

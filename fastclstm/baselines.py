"""Forecasts that need no training, which one that was trained is to beat: persistence and optical flow.

The second is what radar nowcasting calls extrapolation: a field of motion that explains how the frames given follow one
another (Lucas & Kanade), along which the last one is carried on (semi-Lagrangian advection). Both are of parts of
pixels: rain moves by less than one between two scans. Missing values are NaN and stay so: nothing is made of them.
"""

from __future__ import annotations

import importlib.util
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from fastclstm.spec import choice, integers, refuse_masked

ENGINES = ("own", "pysteps")

SMALLEST = 12
"""Pixels a side of the coarsest level of the pyramid, or more."""
PASSES = 3
"""Times that the motion is bettered on each level."""
WINDOW = 6.0
"""Standard deviation, in pixels of a level, of the window whose pixels are taken to move alike."""
WHOLE = 0.02
"""Weight of the whole frame beside a window: where a window shows nothing that moves, it moves as the whole does."""
LOOKED_AT = 4
"""Of the frames given, so many of the last tell the motion: it changes with the hours."""
STEEPNESS = 1e-3
"""What is added to the normal equations, as a share of their mean: along an edge nothing is seen to move."""


def persistence(frames: np.ndarray, steps: int) -> np.ndarray:
    """Return the last of `frames` (…, T, H, W, C), `steps` times; raise ValueError for other shapes.

    Examples
    --------
    >>> persistence(np.arange(3.0).reshape(1, 3, 1, 1, 1), 2).ravel()
    array([2., 2.])
    """
    films, (steps,) = _frames("persistence", frames), integers("persistence", "steps", steps, 1, 1)
    if films.ndim < 4 or films.shape[-4] < 1:
        raise ValueError(f"persistence: frames must be (…, T, H, W, C) with T >= 1, got shape {films.shape}")
    return films[..., -1:, :, :, :].repeat(steps, axis=-4)


def extrapolation(frames: np.ndarray, steps: int, *, outside: float = np.nan, engine: str | None = None) -> np.ndarray:
    """Return the last of `frames`, carried on by their optical flow: that of the last four of them.

    Parameters
    ----------
    frames : array (B, T, H, W, C)
        With T of 2 or more; several channels move alike. Rain rates are seen best in their logarithm. NaN is missing.
    steps : int
    outside : float
        What comes in over the edge, of which nothing is known.
    engine : "own" or "pysteps", optional
        Whose optical flow: `motion`, or the Lucas–Kanade of pysteps, followed by its semi-Lagrangian extrapolation.
        None: that of pysteps where it is installed (with OpenCV, which it needs).

    Returns
    -------
    array (B, steps, H, W, C)
        Of the dtype of `frames`, float32 of integers. NaN where what was carried there is missing.

    Raises
    ------
    ValueError
        Other shapes; an unknown engine.
    ImportError
        pysteps was asked for and is not installed.

    Examples
    --------
    >>> y, x = np.mgrid[:24, :24]
    >>> blob = [np.exp(-((y - 12) ** 2 + (x - 8 - 0.4 * t) ** 2) / 18) for t in range(6)]
    >>> film = np.array(blob)[None, ..., None]
    >>> made = extrapolation(film[:, :3], 3, outside=0, engine="own")
    >>> bool(np.abs(made - film[:, 3:]).max() < 0.25 * np.abs(persistence(film[:, :3], 3) - film[:, 3:]).max())
    True
    """
    films = _frames("extrapolation", frames)
    if films.ndim != 5 or films.shape[1] < 2:
        raise ValueError(f"extrapolation: frames must be (B, T, H, W, C) with T >= 2, got shape {films.shape}")
    (steps,) = integers("extrapolation", "steps", steps, 1, 1)
    if engine is None:
        engine = ENGINES[has_pysteps()]
    choice("extrapolation", "engine", engine, ENGINES)
    if engine == "pysteps" and not has_pysteps():
        raise ImportError("extrapolation: pysteps, or OpenCV, which it needs, is not installed; pip install pysteps "
                          "opencv-python-headless, or engine='own'")  # fmt: skip
    films = films if films.dtype.kind == "f" else films.astype(np.float32)
    made = np.empty((len(films), steps, *films.shape[2:]), films.dtype)
    carry = _pysteps if engine == "pysteps" else _own
    for film, target in zip(films, made, strict=True):
        target[...] = carry(film, steps, outside)
    return made


def has_pysteps() -> bool:
    """Whether the optical flow of pysteps is there."""
    return all(importlib.util.find_spec(name) is not None for name in ("pysteps", "cv2"))


def motion(frames: np.ndarray) -> np.ndarray:
    """Return how far each pixel moves from one frame to the next: a smooth field, by Lucas and Kanade.

    Parameters
    ----------
    frames : array (T, H, W)
        T of 2 or more; all pairs of neighbours have a say. NaN is missing, and has none.

    Returns
    -------
    array (2, H, W) of float64
        Rows and columns a step; 0 where nothing is seen to move anywhere.

    Raises
    ------
    ValueError
        Other shapes.

    Notes
    -----
    Around each pixel the least squares of ``I(t + 1, p) = I(t, p - v)`` over a Gaussian window, from coarse to fine in
    a pyramid of frames of half the size: Lucas & Kanade, "An iterative image registration technique with an application
    to stereo vision", IJCAI 1981; Bouguet, "Pyramidal implementation of the Lucas Kanade feature tracker", Intel 2000.
    Where a window holds no more than an edge, or nothing, the whole frame decides.

    Examples
    --------
    >>> y, x = np.mgrid[:32, :32]
    >>> frames = np.array([np.sin((x - 0.3 * t) / 4) * np.sin((y + 0.2 * t) / 5) for t in range(3)])
    >>> motion(frames)[:, 16, 16].round(1) + 0.0
    array([-0.2,  0.3])
    """
    array = _frames("motion", frames).astype(np.float64)
    if array.ndim != 3 or len(array) < 2:
        raise ValueError(f"motion: frames must be (T, H, W) with T >= 2, got shape {array.shape}")
    there = np.isfinite(array)
    levels = [(np.where(there, array, 0.0), there)]
    while min(levels[-1][0].shape[1:]) >= 2 * SMALLEST:
        levels.append(_halved(*levels[-1]))
    field = np.zeros((2, *levels[-1][0].shape[1:]))
    for values, seen in reversed(levels):
        if field.shape[1:] != values.shape[1:]:
            field = 2 * _enlarged(field, values.shape[1:])
        for _ in range(PASSES):
            field = field + _bettered(values, seen, field)
    return field


def advect(frame: np.ndarray, field: np.ndarray, steps: int, *, outside: float = np.nan) -> np.ndarray:
    """Carry a frame on along a field of motion that stays as it is.

    Parameters
    ----------
    frame : array (H, W) or (H, W, C)
        NaN is missing.
    field : array (2, H, W)
        Rows and columns a step, as of `motion`.
    steps : int
    outside : float
        What comes in over the edge.

    Returns
    -------
    array (steps, H, W) or (steps, H, W, C)
        Each interpolated, bilinearly, from `frame` itself; NaN where more than half of that is missing.

    Notes
    -----
    Semi-Lagrangian: where the value at a pixel was before is found backwards, step by step, at the middle of the way:
    Germann & Zawadzki, "Scale-dependence of the predictability of precipitation from continental radar images. Part I",
    Mon. Weather Rev. 130 (2002).

    Examples
    --------
    >>> field = np.stack([np.zeros((1, 4)), np.full((1, 4), 0.5)])
    >>> advect(np.array([[0.0, 0.0, 8.0, 0.0]]), field, 2, outside=0)[:, 0]
    array([[0., 0., 4., 4.],
           [0., 0., 0., 8.]])
    """
    place = np.mgrid[: field.shape[1], : field.shape[2]].astype(np.float64)
    there = np.isfinite(frame)
    values, weights = np.where(there, frame, 0), there.astype(np.float64)
    H, W = field.shape[1:]
    made = []
    for _ in range(steps):
        half = place - _sampled(field, place) / 2
        place = place - _sampled(field, half)
        inside = (place[0] > -0.5) & (place[0] < H - 0.5) & (place[1] > -0.5) & (place[1] < W - 0.5)
        weight = _sampled_last(weights, place)
        with np.errstate(invalid="ignore", divide="ignore"):
            carried = np.where(weight >= 0.5, _sampled_last(values, place) / weight, np.nan)
        made.append(np.where(inside.reshape(inside.shape + (1,) * (frame.ndim - 2)), carried, outside))
    return np.array(made)


def _frames(op: str, frames: Any) -> np.ndarray:
    refuse_masked(op, "frames", frames, "np.nan")
    return np.asarray(frames)


def _own(film: np.ndarray, steps: int, outside: float) -> np.ndarray:
    """Return the frames that follow a film (T, H, W, C)."""
    return advect(film[-1], motion(film[-LOOKED_AT:].mean(-1, dtype=np.float64)), steps, outside=outside)


def _pysteps(film: np.ndarray, steps: int, outside: float) -> np.ndarray:
    with redirect_stdout(None):  # pysteps tells where its settings are
        from pysteps.extrapolation.semilagrangian import extrapolate
        from pysteps.motion.lucaskanade import dense_lucaskanade

    seen = np.ma.masked_invalid(film[-LOOKED_AT:].mean(-1, dtype=np.float64))
    field = dense_lucaskanade(seen, verbose=False)
    channels = [extrapolate(channel, field, steps, outval=outside, allow_nonfinite_values=True)
                for channel in np.moveaxis(film[-1].astype(np.float64), -1, 0)]  # fmt: skip
    return np.stack(channels, -1)


def _bettered(values: np.ndarray, seen: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Return what is to be added to a field of motion (2, H, W) of frames (T, H, W) and which of their pixels count."""
    H, W = values.shape[1:]
    places = np.mgrid[:H, :W] - field
    normal, right = np.zeros((2, 2, H, W)), np.zeros((2, H, W))
    for before, after, was, now in zip(values[:-1], values[1:], seen[:-1], seen[1:], strict=True):
        inside = (places >= 0).all(0) & (places[0] <= H - 1) & (places[1] <= W - 1)
        known = (_sampled(was[None].astype(np.float64), places)[0] > 0.999) & now & inside
        moved = _sampled(before[None], places)[0]
        slopes = np.stack([_slope(moved, known, 0), _slope(moved, known, 1)])
        lost = np.where(known, after - moved, 0.0)
        normal += slopes[:, None] * slopes
        right -= slopes * lost
    sums = np.concatenate([normal.reshape(4, H, W), right])
    total = sums.mean((1, 2), keepdims=True)
    sums = _smooth(sums, WINDOW) + WHOLE * total
    steep = (total[0] + total[3]).item()
    if steep <= 0:
        return np.zeros_like(field)
    (a, b, _, d), (p, q) = sums[:4], sums[4:]
    a, d = a + STEEPNESS * steep, d + STEEPNESS * steep
    moved = np.stack([d * p - b * q, a * q - b * p]) / (a * d - b * b)
    return np.clip(moved, -1.5, 1.5)  # what is further is seen on a coarser level


def _slope(image: np.ndarray, known: np.ndarray, axis: int) -> np.ndarray:
    """Return the central difference along an axis; 0 where a pixel or a neighbour is not known, and at the edges."""
    slope = np.zeros_like(image)
    n = image.shape[axis]
    if n < 3:
        return slope
    first, middle, last = (tuple(part if a == axis else slice(None) for a in range(2))
                           for part in (slice(0, n - 2), slice(1, n - 1), slice(2, n)))  # fmt: skip
    slope[middle] = np.where(known[first] & known[middle] & known[last], (image[last] - image[first]) / 2, 0.0)
    return slope


def _halved(values: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return frames (T, H, W) of half the size: means of what is there of 2×2 pixels, half of them at least."""
    H, W = (n // 2 * 2 for n in values.shape[1:])

    def summed(a: np.ndarray) -> Any:
        return a[:, :H, :W].reshape(len(a), H // 2, 2, W // 2, 2).sum((2, 4), np.float64)

    counts = summed(seen)
    return summed(values) / np.maximum(counts, 1), counts >= 2


def _enlarged(field: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Return a field of motion (2, h, w) at the pixels of frames of twice the size."""
    places = (np.mgrid[: size[0], : size[1]] - 0.5) / 2
    return _sampled(field, places)


def _sampled(images: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return images (N, H, W) at places (2, h, w), bilinearly; outside as at the edge."""
    return np.moveaxis(_sampled_last(np.moveaxis(images, 0, -1), places), -1, 0)


def _sampled_last(image: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return an image (H, W) or (H, W, C) at places (2, h, w), bilinearly; outside as at the edge."""
    cells, shares = [], []
    for place, n in zip(places, image.shape, strict=False):
        inside = np.clip(place, 0, n - 1)
        cell = np.minimum(inside.astype(np.intp), max(n - 2, 0))
        share = inside - cell
        cells.append((cell, np.minimum(cell + 1, n - 1)))
        shares.append(share.reshape(share.shape + (1,) * (image.ndim - 2)))
    (top, bottom), (left, right) = cells
    down, along = shares
    upper = image[top, left] * (1 - along) + image[top, right] * along
    return upper * (1 - down) + (image[bottom, left] * (1 - along) + image[bottom, right] * along) * down


def _smooth(maps: np.ndarray, sigma: float) -> np.ndarray:
    """Return means of maps (N, H, W) under a Gaussian window, of what of it is within the map."""
    rows, columns = (_gaussian(n, sigma) for n in maps.shape[1:])
    return rows @ maps @ columns.T


def _gaussian(n: int, sigma: float) -> np.ndarray:
    distance = np.arange(n)[:, None] - np.arange(n)
    weights = np.exp(-(distance**2) / (2 * sigma**2))
    return weights / weights.sum(1, keepdims=True)

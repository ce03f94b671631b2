"""Real input to try things on, from data that needs no download."""

from __future__ import annotations

import numpy as np

from fastclstm.spec import choice

_DIGIT = 8  # pixels a side of scikit-learn's digits
_BOX = _DIGIT + 2  # the digit and the margin that its smooth enlargement takes up


def moving_digits(
    batch: int, steps: int, size: int = 64, *, digits: int = 2, part: str = "all", seed: int | None = None
) -> np.ndarray:
    """Film handwritten digits that glide over the frame and bounce off its edges.

    The digits are the 1797 of 8×8 pixels that ship with scikit-learn. Each is enlarged to about half the frame by
    quadratic B-splines, at positions between pixels too, so that it moves smoothly.

    Parameters
    ----------
    batch, steps : int
        Number of films and of frames in each; at least 1.
    size : int
        Height and width of the frames, at least 10.
    digits : int
        Digits in each film, at least 1; where they overlap the brighter one shows.
    part : "all", "train" or "test"
        Which digits may glide: "test" is every third of them, "train" are the others, so that no film of one part shows
        a digit of the other.
    seed : int, optional
        The same seed gives the same films.

    Returns
    -------
    array (batch, steps, size, size, 1) of float32 in [0, 1]

    Raises
    ------
    ValueError
        A count or a size that is too small, another part.
    ImportError
        scikit-learn is not installed.

    Examples
    --------
    >>> moving_digits(2, 5, seed=0).shape
    (2, 5, 64, 64, 1)
    """
    for name, value, minimum in (("batch", batch, 1), ("steps", steps, 1), ("size", size, _BOX), ("digits", digits, 1)):
        if value < minimum:
            raise ValueError(f"moving_digits: {name} must be at least {minimum}, got {value}")
    choice("moving_digits", "part", part, ("all", "train", "test"))
    images = _load_digits()
    if part != "all":
        images = images[(np.arange(len(images)) % 3 == 0) == (part == "test")]
    rng = np.random.default_rng(seed)
    chosen = images[rng.integers(len(images), size=(batch, digits))]
    box = 0.55 * size
    room = size - box
    start = rng.uniform(0, room, (batch, 1, digits, 2))
    angle = rng.uniform(0, 2 * np.pi, (batch, 1, digits))
    velocity = size / 12 * np.stack((np.sin(angle), np.cos(angle)), axis=-1)
    travelled = start + velocity * np.arange(steps)[:, np.newaxis, np.newaxis]
    corner = room - np.abs(travelled % (2 * room) - room)  # a triangle wave: there and back again
    rows = _spline_weights(corner[..., 0], box, size)
    columns = _spline_weights(corner[..., 1], box, size)
    drawn = (rows @ chosen[:, np.newaxis] @ columns.swapaxes(-1, -2)).max(axis=2)
    sharper = drawn**2 * (3 - 2 * drawn)  # smoothstep: dims the blurred edge, keeps 0 and 1
    return sharper[..., np.newaxis].astype(np.float32)


def _load_digits() -> np.ndarray:
    """Return scikit-learn's digits (1797, 8, 8), in [0, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"the handwritten digits come with scikit-learn ({error}); pip install 'fastclstm[demo]'"
        ) from error
    return load_digits().images / 16


def _spline_weights(corner: np.ndarray, box: float, size: int) -> np.ndarray:
    """Return each digit pixel's weight in every frame pixel of one axis, (..., size, 8), for boxes at `corner`."""
    scale = box / _BOX
    position = (np.arange(size) + 0.5 - corner[..., np.newaxis]) / scale - 1.5  # 0: the centre of the first digit pixel
    distance = np.abs(position[..., np.newaxis] - np.arange(_DIGIT))
    inner = 0.75 - distance**2
    outer = 0.5 * np.maximum(1.5 - distance, 0) ** 2
    return np.where(distance < 0.5, inner, outer)

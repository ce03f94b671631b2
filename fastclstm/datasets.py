"""Real input to try things on, from data that needs no download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastclstm.spec import choice, integers

if TYPE_CHECKING:
    import xarray

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


_LIFE = (8, 30)  # steps that a cell of rain lives
_DRIZZLE = 0.1  # mm/h, less than which a radar does not see
_WARM_UP = 36  # steps before the first


def synthetic_radar(
    steps: int, size: int | tuple[int, int] = 64, *, minutes: float = 5, pixel: float = 1000, cells: float = 0.6,
    speed: float = 0.5, noise: float = 0.1, missing: bool = True, start: str = "2026-07-01T00:00",
    seed: int | None = None,
) -> xarray.DataArray:  # fmt: skip
    """Make rain as a weather radar would see it: cells that drift with a slowly turning wind, grow and decay.

    It is a stand-in for an archive that nobody has at hand, with what makes such an archive hard: rain that moves by
    less than a pixel between scans, that is born and dies, speckle, and a sector that the radar does not see.

    Parameters
    ----------
    steps : int
        Scans.
    size : int or (int, int)
        Rows and columns.
    minutes, pixel : float
        Between two scans; side of a pixel in metres.
    cells : float
        How many cells are born a scan, of a frame of 64×64 pixels; larger ones have more in proportion.
    speed : float
        Of the wind, in pixels a scan. It turns and changes by up to a half in the course of hours.
    noise : float
        Standard deviation of the speckle, of the logarithm of the rates.
    missing : bool
        Whether a sector of the circle around the radar is missing: NaN.
    start : str
        Date and time of the first scan.
    seed : int, optional
        The same seed gives the same rain.

    Returns
    -------
    xarray.DataArray (time, y, x) of float32
        "rain", in mm h-1, with the attributes of the CF conventions; y and x in metres from the radar.

    Raises
    ------
    ValueError
        A count, a size or a rate that is too small.
    ImportError
        xarray is not installed.
    """
    op = "synthetic_radar"
    (steps,) = integers(op, "steps", steps, 1, 1)
    H, W = integers(op, "size", size, 2, 8)
    for name, value in (("minutes", minutes), ("pixel", pixel), ("cells", cells)):
        if not 0 < value < np.inf:
            raise ValueError(f"{op}: {name} must be more than 0, and finite, got {value!r}")
    for name, value in (("speed", speed), ("noise", noise)):
        if not 0 <= value < np.inf:
            raise ValueError(f"{op}: {name} must not be negative, and finite, got {value!r}")
    try:
        import xarray
    except ImportError as error:
        raise ImportError(f"{op} needs xarray ({error}); pip install 'fastclstm[xarray]'") from error
    rng = np.random.default_rng(seed)
    rain = _rain(rng, steps, (H, W), cells, speed)
    if noise:
        rain *= np.exp(noise * rng.standard_normal(rain.shape, np.float32))
    rain[rain < _DRIZZLE] = 0
    y, x = (pixel * (np.arange(n) - (n - 1) / 2) for n in (H, W))
    if missing:
        bearing = np.arctan2(x, y[:, None])  # clockwise from north
        rain[:, np.abs(bearing - 0.9) < 0.15] = np.nan
    nanoseconds = np.arange(steps) * np.timedelta64(round(minutes * 60e9), "ns")
    far = {"units": "m", "axis": "Y", "standard_name": "projection_y_coordinate", "long_name": "north of the radar"}
    coords: dict[str, Any] = {
        "time": ("time", np.datetime64(start, "ns") + nanoseconds, {"standard_name": "time", "axis": "T"}),
        "y": ("y", y, far),
        "x": ("x", x, far | {"axis": "X", "standard_name": "projection_x_coordinate",
                             "long_name": "east of the radar"}),
    }  # fmt: skip
    attrs = {"units": "mm h-1", "standard_name": "rainfall_rate", "long_name": "synthetic rain rate"}
    return xarray.DataArray(rain, coords, ("time", "y", "x"), "rain", attrs)


def _rain(rng: np.random.Generator, steps: int, size: tuple[int, int], cells: float, speed: float) -> np.ndarray:
    """Return rates (steps, H, W) of cells that drift over the frame and what is around it."""
    margin = 16 + int(speed * _LIFE[1])
    H, W = size
    area = (H + 2 * margin) * (W + 2 * margin)
    hours = np.arange(-_WARM_UP, steps) / 12
    phases = rng.uniform(0, 2 * np.pi, 3)
    heading = phases[0] + 0.8 * np.sin(hours / 2.3 + phases[1]) + 0.05 * hours
    pace = speed * (1 + 0.5 * np.sin(hours / 3.1 + phases[2]))
    wind = np.stack([pace * np.sin(heading), pace * np.cos(heading)], 1)
    activity = 1 + 0.6 * np.sin(hours / 4.7 + phases[1])
    rows, columns = np.arange(H, dtype=np.float32)[:, None], np.arange(W, dtype=np.float32)
    rain = np.zeros((steps, H, W), np.float32)
    for born, share in enumerate(activity):
        for _ in range(rng.poisson(cells * share * area / 64**2)):
            place = rng.uniform((-margin, -margin), (H + margin, W + margin))
            life = int(rng.integers(*_LIFE))
            own, radius, most = 0.1 * speed * rng.standard_normal(2), rng.uniform(2, 5.5), 12 * rng.lognormal(-0.5, 0.8)
            long, turned = rng.uniform(1, 1.8), rng.uniform(0, np.pi)
            for age in range(min(life, steps + _WARM_UP - born)):
                place = place + wind[born + age] + own
                t = born + age - _WARM_UP
                if t < 0:
                    continue
                grown = np.sin(np.pi * (age + 1) / (life + 1))
                wide = radius * (0.6 + 0.4 * grown)
                reach = int(3.5 * wide * long) + 1
                (top, left), (bottom, right) = (np.clip((place + d).astype(int), 0, size) for d in (-reach, reach + 1))
                if top >= bottom or left >= right:
                    continue
                dy, dx = rows[top:bottom] - place[0], columns[left:right] - place[1]
                along, across = dx * np.cos(turned) + dy * np.sin(turned), dy * np.cos(turned) - dx * np.sin(turned)
                rain[t, top:bottom, left:right] += (
                    most * grown**2 * np.exp(-((along / long) ** 2 + across**2) / wide**2)
                )
    return rain

"""A nowcast from xarray's DataArrays, some pixels missing: train on an archive and forecast an ensemble, both lazy.

Run it with ``python examples/nowcast_xarray.py``; it needs xarray and Dask, no data, and about half a minute. It ends
in the errors by lead time beside persistence's and, with matplotlib, in a picture, nowcast_xarray.png.
"""

import importlib.util

import numpy as np
import xarray

from fastclstm import EncoderForecaster
from fastclstm.adapters.xarray import Windows, forecast

GIVEN, STEPS, SIZE = 6, 6, 32


def radar(times, seed):
    """Cells of rain that drift, grow and decay, in mm/h every five minutes; the radar sees nothing of one sector."""
    rng = np.random.default_rng(seed)
    pixels = np.arange(SIZE, dtype=np.float32)
    rain = np.zeros((times, SIZE, SIZE), np.float32)
    for born in range(-8, times):
        (y, x), radius, most = rng.uniform(0, SIZE, 2), rng.uniform(2, 4), rng.uniform(2, 10)
        for age in range(16):
            if 0 <= (t := born + age) < times:
                dy, dx = np.abs(pixels - (y + 0.5 * age) % SIZE), np.abs(pixels - (x + 1.0 * age) % SIZE)
                distance = np.minimum(dy, SIZE - dy)[:, None] ** 2 + np.minimum(dx, SIZE - dx) ** 2
                rain[t] += most * np.sin(np.pi * (age + 0.5) / 16) * np.exp(-distance / radius**2)
    north, east = np.meshgrid(pixels - SIZE / 2, pixels - SIZE / 2, indexing="ij")
    rain[:, np.abs(np.arctan2(north, east) - 1) < 0.2] = np.nan
    coords = {
        "time": np.datetime64("2026-07-01T00:00", "ns") + np.arange(times) * np.timedelta64(5, "m"),
        "y": ("y", pixels * 1000, {"units": "m"}),
        "x": ("x", pixels * 1000, {"units": "m"}),
    }
    return xarray.DataArray(rain, coords, ("time", "y", "x"), "rain_rate", {"units": "mm/h"})


def logarithm(rain):
    """Bring rates to where most of them are between 0 and 1."""
    return (np.log1p(rain) / 3).astype(np.float32)


archive = logarithm(radar(300, seed=0)).chunk(time=50)  # lazy, as xarray.open_mfdataset would give it
network = EncoderForecaster(1, (16,), 3, head_activation="linear", seed=0)
history = network.fit(Windows(archive, GIVEN, STEPS, every=2, seed=0, missing=0.0), epochs=6, seed=0, quiet=True)
print("loss by epoch:", *(f"{loss:.4f}" for loss in history["loss"]))

truth = xarray.concat([radar(60, seed).isel(time=slice(0, GIVEN + STEPS)) for seed in range(10, 18)], "member")
given = truth.isel(time=slice(0, GIVEN))
made = forecast(network, logarithm(given).chunk(member=2), STEPS, missing=0.0)  # still lazy, two members at once
made = np.expm1(3 * made.compute()).clip(0).assign_attrs(units="mm/h")
persistence = given.isel(time=-1, drop=True).expand_dims(time=made.time)

print(made.isel(member=0).to_dataset(name="rain_rate"))
print("\nlead time   error (mm/h, root mean square)   of persistence")
for lead, time in enumerate(made.time, 1):
    errors = [float(np.sqrt(((film - truth).sel(time=time) ** 2).mean())) for film in (made, persistence)]
    print(f"{5 * lead:3d} minutes {errors[0]:20.3f} {errors[1]:27.3f}")

if importlib.util.find_spec("matplotlib"):
    films = xarray.concat([truth.sel(time=made.time), made], xarray.Variable("what", ["radar", "forecast"]))
    grid = films.isel(member=0, time=slice(None, None, 2)).plot(row="what", col="time", cmap="YlGnBu", vmin=0, vmax=8)
    grid.fig.savefig("nowcast_xarray.png", dpi=100)

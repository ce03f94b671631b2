"""
A precipitation nowcast
=======================

Radar frames in NetCDF files, some pixels missing, and the question what the next hour brings: train on an archive,
foretell, and verify as the field does, beside persistence and optical flow. It needs
``pip install 'fastclstm[nowcast]'``, no data, and less than a minute; the command line does the same:
``python -m fastclstm train --data FILES.nc --variable rain``.
"""

# %%
# An archive. Cells of rain drift by half a pixel a scan, grow and decay; there is speckle, and a sector that the radar
# does not see. It goes to NetCDF files, and comes back from them as yours would.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from fastclstm import EncoderForecaster
from fastclstm.adapters.xarray import Windows
from fastclstm.adapters.xarray_files import open_frames, write_frames
from fastclstm.baselines import extrapolation, persistence
from fastclstm.datasets import synthetic_radar
from fastclstm.nn.losses import WeightedSum
from fastclstm.nn.optimizers import Adam
from fastclstm.nn.transforms import Transform
from fastclstm.verification import Verification

GIVEN, STEPS, SIZE = 5, 8, 40
EPOCHS = 6
with tempfile.TemporaryDirectory() as folder:
    for day in range(2):
        rain = synthetic_radar(288, SIZE, start=f"2026-07-0{day + 1}T00:00", seed=day)
        write_frames(Path(folder, f"{day}.nc"), rain, "a synthetic radar")
    archive, _ = open_frames("example", folder, "rain")
print(archive.sizes, archive.units)

# %%
# Rates become logarithms, in which drizzle and downpours are as far apart. The last sixth of the time is for
# verification.

log = Transform("log", 0, float(archive.max()), offset=0.1)
cut = archive.sizes["time"] * 5 // 6
train, test = log(archive[:cut]), log(archive[cut:])

# %%
# An encoder reads five frames, a forecaster makes the eight that follow, as changes to the last one given: so it starts
# as persistence. Pixels that are missing weigh nothing, and those with much rain more than dry ones, of which there are
# many.


def changes(epoch):
    """Yield batches of an epoch."""
    for x, y, weights in windows(epoch):
        yield x, y - x[:, -1:], weights


windows = Windows(train, GIVEN, STEPS, every=2, missing=0.0, seed=0, weigh=lambda y: 1 + 5 * y[..., 0] ** 2)
network = EncoderForecaster(1, (24,), 3, patch_size=2, inputs="nothing", head_activation="linear", seed=0)
history = network.fit(changes, steps_per_epoch=len(windows), epochs=EPOCHS, loss=WeightedSum(("mse", "mae"), (1, 2)),
                      optimizer=Adam(3e-3, clip_norm=1.0), seed=0, quiet=True)  # fmt: skip
print(f"{network.num_parameters:,} parameters, {sum(history['seconds']):.0f} s of training")

# %%
# Scores by lead time: events are rates of 1 mm/h and more, on pixels that all three forecasts and the radar have.

table = Verification(thresholds=[0.1, 1], scale=5, similar=log)
for x, y, _ in Windows(test, GIVEN, STEPS, every=2, missing=np.nan):
    seen = np.where(np.isnan(x), np.float32(0), x)
    made = {"ConvLSTM": seen[:, -1:] + network.forecast(seen, STEPS), "flow": extrapolation(x, STEPS),
            "last": persistence(x, STEPS)}  # fmt: skip
    films = {name: log.inverse(film) for name, film in made.items()}
    table.add(log.inverse(y), films)
leads = [f"+{5 * n} min" for n in range(1, STEPS + 1)]
print(table.table(leads, "mm h-1", rows=4))

# %%
# The last forecast of the test: what the radar saw, what the network made, what optical flow made.

rows = {"radar": log.inverse(y)[-1]} | {name: film[-1] for name, film in films.items() if name != "last"}
shown = (0, 2, 4, 7)
figure, panels = plt.subplots(len(rows), len(shown), figsize=(9, 6.4), layout="constrained")
for line, (name, film) in zip(panels, rows.items(), strict=True):
    for panel, step in zip(line, shown, strict=True):
        image = panel.imshow(film[step, ..., 0], "YlGnBu", vmin=0, vmax=10, origin="lower")
        panel.set(xticks=[], yticks=[], facecolor="0.8", title=leads[step] if name == "radar" else "")
    line[0].set_ylabel(name)
figure.colorbar(image, ax=panels, label="mm h-1", shrink=0.8, extend="max")
plt.show()

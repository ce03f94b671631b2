"""
ConvGRU and ConvLSTM side by side
=================================

The ConvGRU has one state and three convolutions a step where the ConvLSTM has two and four: fewer parameters, less
time. Is the forecast as good? The same encoder–forecaster learns the same films with either cell. It needs
``pip install 'fastclstm[viz]'`` and half a minute.
"""

# %%
# Films of two soft blobs that drift on a torus, each its own way, and shine through each other.

import statistics
import time

import matplotlib.pyplot as plt
import numpy as np

from fastclstm import EncoderForecaster, get_num_threads, viz
from fastclstm.nn.optimizers import Adam

plt.style.use(viz.theme())
GIVEN, STEPS, SIZE, FILTERS = 5, 5, 24, 24
EPOCHS = 12


def films(count, seed):
    """Draw films (count, GIVEN + STEPS, SIZE, SIZE, 1)."""
    rng = np.random.default_rng(seed)
    start, speed = rng.uniform(0, SIZE, (count, 1, 2, 2)), rng.uniform(-2, 2, (count, 1, 2, 2))
    middle = start + speed * np.arange(GIVEN + STEPS)[:, None, None]
    away = np.arange(SIZE) - middle[..., None]
    away = np.minimum(away % SIZE, -away % SIZE)
    lines = np.exp(-(away**2) / 12)  # (count, T, blob, axis, pixel)
    return (1 - (1 - lines[:, :, :, 0, :, None] * lines[:, :, :, 1, None]).prod(2))[..., None].astype(np.float32)


train, test = films(160, seed=0), films(64, seed=1)

# %%
# One class, one option: ``cell``. Everything else is the same, the seed too.

rows = {}
for cell in ("ConvLSTM2D", "ConvGRU2D"):
    network = EncoderForecaster(1, (FILTERS,), 3, cell=cell, patch_size=2, inputs="nothing", padding_mode="circular",
                                seed=0)  # fmt: skip
    history = network.fit(train[:, :GIVEN], train[:, GIVEN:], loss="mse", optimizer=Adam(4e-3, clip_norm=1.0),
                          epochs=EPOCHS, batch_size=8, validation_data=(test[:, :GIVEN], test[:, GIVEN:]), seed=0,
                          quiet=True)  # fmt: skip
    times = []
    for _ in range(20):
        start = time.perf_counter()
        made = network.forecast(test[:8, :GIVEN], STEPS)
        times.append(1e3 * (time.perf_counter() - start))
    made = network.forecast(test[:, :GIVEN], STEPS)
    steps = EPOCHS * len(train) // 8
    rows[cell] = {
        "parameters": network.num_parameters, "forecast": statistics.median(times[1:]),
        "training": 1e3 * sum(history["seconds"][1:]) / steps * EPOCHS / (EPOCHS - 1), "loss": history["val_loss"],
        "by step": ((made - test[:, GIVEN:]) ** 2).mean((0, 2, 3, 4)), "made": made[0, ..., 0],
    }  # fmt: skip

# %%
# Parameters, time and error.

print(f"{GIVEN} frames of {SIZE}×{SIZE} pixels to {STEPS}, {FILTERS} filters, {get_num_threads()} threads\n")
print(f"{'':12}{'parameters':>11}{'8 forecasts':>13}{'training step':>15}{'test error (MSE)':>18}")
for cell, row in rows.items():
    print(
        f"{cell:12}{row['parameters']:11,}{row['forecast']:10.1f} ms{row['training']:12.1f} ms{row['loss'][-1]:18.5f}"
    )

# %%
# How they learn, and how far ahead they see. Persistence repeats the last frame.

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
persistence = ((test[:, GIVEN - 1 : GIVEN] - test[:, GIVEN:]) ** 2).mean((0, 2, 3, 4))
for cell, row in rows.items():
    left.plot(range(1, EPOCHS + 1), row["loss"], marker="o", label=f"{cell}, {row['parameters']:,} parameters")
    right.plot(range(1, STEPS + 1), row["by step"], marker="o", label=f"{cell}, {row['forecast']:.1f} ms")
right.plot(range(1, STEPS + 1), persistence, color="C2", linestyle=":", label="persistence")
left.set(title="error on the test while they learn", xlabel="epoch", ylabel="MSE", yscale="log")
right.set(title="error by lead time", xlabel="frames ahead", ylabel="MSE", yscale="log", xticks=range(1, STEPS + 1))
left.legend()
right.legend()

# %%
# The same film, made by both.

viz.filmstrip(plt.figure(), [
    viz.Row("given, truth", test[0, ..., 0], "amounts", limit=1),
    *(viz.Row(cell, row["made"], "amounts", limit=1, first=GIVEN) for cell, row in rows.items()),
])  # fmt: skip
plt.show()

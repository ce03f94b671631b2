"""
A Keras model accelerated in place
==================================

Before and after ``accelerate``: the same numbers, the same ``fit``, less time. Two ConvLSTM2D layers and a convolution
learn the next frame of bars that move. It needs ``pip install 'fastclstm[keras,viz]'``, the backend of your choice
(``KERAS_BACKEND=torch``, jax or tensorflow; without one it takes the first that is installed) and some seconds.
"""

# %%
# A model of Keras, and films for it.

import importlib.util
import os
import statistics
import time

import matplotlib.pyplot as plt
import numpy as np

backends = [name for name in ("torch", "jax", "tensorflow") if importlib.util.find_spec(name)]
os.environ.setdefault("KERAS_BACKEND", backends[0])

import keras
from keras import layers

from fastclstm import viz
from fastclstm.adapters.keras import accelerate

plt.style.use(viz.theme())
SIZE, EPOCHS, ROUNDS = 24, 4, 3


def build():
    """Return a model from frames (B, T, SIZE, SIZE, 1) to the frame after each."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((None, SIZE, SIZE, 1)),
        layers.ConvLSTM2D(16, 3, padding="same", return_sequences=True),
        layers.ConvLSTM2D(16, 3, padding="same", return_sequences=True),
        layers.TimeDistributed(layers.Conv2D(1, 3, padding="same", activation="sigmoid")),
    ])  # fmt: skip
    model.compile(keras.optimizers.Adam(1e-2), "binary_crossentropy")
    return model


def moving_bars(count, steps, seed=1):
    """Draw films (count, steps, SIZE, SIZE, 1) of an upright and a lying bar that move and come in again."""
    generator = np.random.default_rng(seed)
    start = generator.integers(0, SIZE, (count, 1, 2))
    speed = generator.integers(1, 4, (count, 1, 2))
    places = (start + speed * np.arange(steps)[:, None]) % SIZE
    near = (np.arange(SIZE) - places[..., None]) % SIZE < 4  # (count, steps, 2, SIZE)
    return (near[:, :, 0, :, None] | near[:, :, 1, None, :]).astype("float32")[..., None]


def timed(call):
    """Return the median time of a call in milliseconds; the first one warms up."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


# %%
# The same model twice, once accelerated: it compares, swaps, and prints what it did. ``fit``, ``predict`` and ``save``
# are Keras's own, as ever.

films = moving_bars(32, 7)
x, y = films[:, :-1], films[:, 1:]
models = {"Keras": build(), "accelerated": accelerate(build())}
losses, predicted, times = {}, {}, {}
for name, model in models.items():
    fitted = model.fit(x, y, batch_size=8, epochs=EPOCHS, shuffle=False, verbose=0)
    losses[name], predicted[name] = fitted.history["loss"], model.predict(x[:8], batch_size=8, verbose=0)
for name, model in models.items():
    times[name] = [timed(lambda model=model: model.predict_on_batch(x[:8])),
                   timed(lambda model=model: model.train_on_batch(x[:8], y[:8]))]  # fmt: skip

# %%
# What came of it.

difference = predicted["accelerated"] - predicted["Keras"]
print(f"after training, predictions differ by at most {np.abs(difference).max():.1e}")
print(f"Keras {keras.__version__} on {keras.backend.backend()}\n")
print(f"{'':14} {'Keras':>10} {'accelerated':>12} {'factor':>7}")
for name, one, other in zip(("inference", "training step"), *times.values(), strict=True):
    print(f"{name:14} {one:7.1f} ms {other:9.1f} ms {one / other:6.1f}×")
print(f"{'loss':14} {losses['Keras'][-1]:10.5f} {losses['accelerated'][-1]:12.5f}")

# %%
# The last frames of a film, the next one of each, and what both models made of it.

last = slice(1, 6)
viz.filmstrip(plt.figure(), [
    viz.Row("frame", x[0, last, ..., 0], limit=1), viz.Row("the next", y[0, last, ..., 0], limit=1),
    viz.Row("Keras", predicted["Keras"][0, last, ..., 0], limit=1),
    viz.Row("accelerated", predicted["accelerated"][0, last, ..., 0], limit=1),
    viz.Row("difference", 1e6 * difference[0, last, ..., 0], "signed", unit="millionths"),
], [f"t = {t}" for t in range(1, 6)], width=6)  # fmt: skip
plt.show()

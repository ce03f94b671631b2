"""
A trained Keras model served without Keras
==========================================

Keras trains a next-frame model, in a process of its own, and saves it. This process never imports Keras: it reads the
``.keras`` file by ``from_keras``, and gives the same numbers in less time. Needs ``pip install 'fastclstm[h5,viz]'``,
and Keras with a backend to make the file, about half a minute. Where Keras is not installed, an untrained network of
the same layers stands in for what the file would give, and there is nothing to compare with.
"""

# %%
# Films (B, T, 24, 24, 1) of an upright and a lying bar that move, and come in again on the other side.

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from fastclstm import BatchNormalization, Conv2D, ConvLSTM2D, Sequential, TimeDistributed, from_keras, viz

plt.style.use(viz.theme())
SIZE = 24


def moving_bars(count, steps, seed):
    """Draw films."""
    rng = np.random.default_rng(seed)
    start, speed = rng.integers(0, SIZE, (count, 1, 2)), rng.integers(1, 3, (count, 1, 2))
    places = (start + speed * np.arange(steps)[:, None]) % SIZE
    near = (np.arange(SIZE) - places[..., None]) % SIZE < 3
    return (near[:, :, 0, :, None] | near[:, :, 1, None, :]).astype(np.float32)[..., None]


films, test = moving_bars(64, 10, seed=0), moving_bars(8, 10, seed=1)

# %%
# What whoever trains has: a script of Keras, with nothing of ours in it.

TRAIN = """
import sys, time
import keras, numpy as np
from keras import layers

folder = sys.argv[1]
films, test = (np.load(f"{folder}/{name}.npy") for name in ("films", "test"))
keras.utils.set_random_seed(0)
model = keras.Sequential([
    keras.Input((None, 24, 24, 1)),
    layers.ConvLSTM2D(8, 3, padding="same", return_sequences=True),
    layers.BatchNormalization(momentum=0.8),
    layers.ConvLSTM2D(8, 3, padding="same", return_sequences=True),
    layers.TimeDistributed(layers.Conv2D(1, 3, padding="same", activation="sigmoid")),
])
model.compile(keras.optimizers.Adam(1e-2), "binary_crossentropy")
model.fit(films[:, :-1], films[:, 1:], batch_size=8, epochs=8, verbose=0)
model.save(f"{folder}/model.keras")
times = []
for _ in range(6):
    start = time.perf_counter()
    made = model.predict_on_batch(test[:, :-1])
    times.append(1e3 * (time.perf_counter() - start))
np.savez(f"{folder}/keras.npz", made=made, milliseconds=np.median(times[1:]))
print(f"Keras {keras.__version__} on {keras.backend.backend()}: trained and saved")
"""

backends = [name for name in ("torch", "jax", "tensorflow") if importlib.util.find_spec(name)]
there_is_keras = bool(importlib.util.find_spec("keras") and backends)
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
if there_is_keras:
    np.save(folder / "films.npy", films)
    np.save(folder / "test.npy", test)
    environment = {"KERAS_BACKEND": backends[0]} | os.environ
    done = subprocess.run([sys.executable, "-c", TRAIN, folder], env=environment, check=True, text=True,
                          stdout=subprocess.PIPE)  # fmt: skip
    print(done.stdout, end="")
else:
    print("Keras or a backend of it is not installed: a network of the same layers, untrained, stands in")

# %%
# The one line that it takes. Layers, options and weights come from the file; nothing in it is executed.

if there_is_keras:
    model = from_keras(folder / "model.keras")
    with np.load(folder / "keras.npz") as saved:
        theirs, their_time = saved["made"], float(saved["milliseconds"])
else:
    model = Sequential([
        ConvLSTM2D(1, 8, 3, seed=0), BatchNormalization(8), ConvLSTM2D(8, 8, 3, seed=1),
        TimeDistributed(Conv2D(8, 1, 3, activation="sigmoid", seed=2)),
    ])  # fmt: skip
temporary.cleanup()
print(model.summary(test[:, :-1].shape))

# %%
# Served: the same numbers.

times = []
for _ in range(6):
    start = time.perf_counter()
    ours = model.predict(test[:, :-1])
    times.append(1e3 * (time.perf_counter() - start))
our_time = float(np.median(times[1:]))
print(f"\n8 films of 9 frames: {our_time:.1f} ms")
if there_is_keras:
    print(f"Keras: {their_time:.1f} ms; predictions differ by at most {np.abs(ours - theirs).max():.0e}")

# %%
# The last frames of a film that the model has never seen, and the frame after each as the model sees it coming.

film = slice(4, 9)
rows = [
    viz.Row("frame", test[0, film, ..., 0], limit=1),
    viz.Row("the next", test[0, 5:10, ..., 0], limit=1),
    viz.Row("fastclstm", ours[0, film, ..., 0], limit=1),
]
if there_is_keras:
    rows.insert(2, viz.Row("Keras", theirs[0, film, ..., 0], limit=1))
    rows.append(viz.Row("difference", 1e6 * (ours - theirs)[0, film, ..., 0], "signed", unit="millionths"))
viz.filmstrip(plt.figure(), rows, [f"t = {t}" for t in range(4, 9)], width=6)
plt.show()

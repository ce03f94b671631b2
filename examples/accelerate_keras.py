"""A model of Keras before and after `accelerate`: the same numbers, the same `fit`, less time.

Two ConvLSTM2D layers and a convolution learn the next frame of bars that move. Run it with
``KERAS_BACKEND=torch python examples/accelerate_keras.py``, or with jax or tensorflow; it takes less than a minute.
With matplotlib it also draws what the model predicts into accelerate_keras.png.
"""

import statistics
import time

import keras
import numpy as np
from keras import layers

from fastclstm.adapters.keras import accelerate

ROUNDS = 3


def build():
    """Return a model from frames (B, T, 32, 32, 1) to the frame after each."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((None, 32, 32, 1)),
        layers.ConvLSTM2D(16, 3, padding="same", return_sequences=True),
        layers.ConvLSTM2D(16, 3, padding="same", return_sequences=True),
        layers.TimeDistributed(layers.Conv2D(1, 3, padding="same", activation="sigmoid")),
    ])  # fmt: skip
    model.compile(keras.optimizers.Adam(3e-3), "binary_crossentropy")
    return model


def moving_bars(count, steps, seed=1):
    """Draw films (count, steps, 32, 32, 1) of an upright and a lying bar that move and come in again."""
    generator = np.random.default_rng(seed)
    start = generator.integers(0, 32, (count, 1, 2))
    speed = generator.integers(1, 4, (count, 1, 2))
    places = (start + speed * np.arange(steps)[:, None]) % 32
    near = (np.arange(32) - places[..., None]) % 32 < 4  # (count, steps, 2, 32)
    return (near[:, :, 0, :, None] | near[:, :, 1, None, :]).astype("float32")[..., None]


def timed(call):
    """Return the median time of a call in milliseconds; the first one warms up."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def draw(films, predicted):
    """Draw the last frame seen, the truth and the prediction."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    names = "last frame seen", "next frame", "predicted"
    figure, axes = plt.subplots(1, 3, figsize=(8, 2.8))
    for axis, name, frame in zip(axes, names, (films[0, -2], films[0, -1], predicted[0, -1]), strict=True):
        axis.imshow(frame[..., 0], vmin=0, vmax=1)
        axis.set_title(name)
        axis.axis("off")
    figure.savefig("accelerate_keras.png", dpi=100, bbox_inches="tight")
    print("drawn: accelerate_keras.png")


def main():
    """Compare a model with itself, accelerated."""
    films = moving_bars(16, 11)
    x, y = films[:, :-1], films[:, 1:]
    figures = []
    for prepare in (lambda model: model, accelerate):
        model = prepare(build())
        fitted = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history["loss"]
        predicted = model.predict(x, batch_size=8, verbose=0)
        milliseconds = [timed(lambda model=model: model.predict_on_batch(x[:8])),
                        timed(lambda model=model: model.train_on_batch(x[:8], y[:8]))]  # fmt: skip
        figures.append((milliseconds, fitted[-1], predicted))
    (before, loss, expected), (after, our_loss, found) = figures
    print(f"\nafter training, predictions differ by at most {np.abs(expected - found).max():.1e}")
    print(f"Keras {keras.__version__} on {keras.backend.backend()}\n")
    print(f"{'':14} {'Keras':>10} {'accelerated':>12} {'factor':>7}")
    for name, one, other in zip(("inference", "training step"), before, after, strict=True):
        print(f"{name:14} {one:7.1f} ms {other:9.1f} ms {one / other:6.1f}×")
    print(f"{'loss':14} {loss:10.5f} {our_loss:12.5f}")
    draw(films, found)


if __name__ == "__main__":
    main()

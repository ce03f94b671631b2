"""
What does not belong there
==========================

A network that has only ever seen normal video foretells normal video: what it cannot foretell is worth a look. A
camera watches a street on which people walk; then a cyclist comes through, someone runs, and a van drives where nobody
should. No frame of the training shows any of that, and nobody labels anything. It needs
``pip install 'fastclstm[viz]'`` and half a minute.
"""

# %%
# The street: people are soft spots that walk to the left or the right on their own lines, at their own pace.

import matplotlib.pyplot as plt
import numpy as np

from fastclstm import Conv2D, ConvLSTM2D, Sequential, viz
from fastclstm.nn.optimizers import Adam

plt.style.use(viz.theme())
SIZE, WINDOW, EPOCHS = (24, 48), 8, 6
ROWS, COLUMNS = np.mgrid[: SIZE[0], : SIZE[1]]
EVENTS = {"cyclist": (60, 3.0, 1.5, 3.0), "runner": (130, -2.2, 1.6, 1.6), "van": (200, 1.0, 3.5, 7.0)}
"""When it comes, its speed in pixels a frame, and its height and width."""


def street(frames, seed, events=None):
    """Film the street: frames (T, 24, 48), and whether something that does not belong there is seen, (T,)."""
    rng = np.random.default_rng(seed)
    film, odd = np.zeros((frames, *SIZE), np.float32), np.zeros(frames, bool)

    def add(start, speed, row, tall, wide):
        x = -3.0 if speed > 0 else SIZE[1] + 3.0
        for t in range(max(start, 0), frames):
            at = x + speed * (t - start)
            if not -8 < at < SIZE[1] + 8:
                break
            spot = np.exp(-(((ROWS - row) / tall) ** 2) - ((COLUMNS - at) / wide) ** 2)
            film[t] = np.maximum(film[t], spot)
            yield t if 0 <= at < SIZE[1] else None

    for start in range(-60, frames, 7):
        pace = rng.choice([-1, 1]) * rng.uniform(0.6, 1.0)
        for _ in add(start + int(rng.integers(7)), pace, rng.uniform(3, SIZE[0] - 4), 1.6, 1.2):
            pass
    for start, speed, tall, wide in (events or {}).values():
        seen = [t for t in add(start, speed, SIZE[0] / 2, tall, wide) if t is not None]
        odd[seen] = True
    return film + 0.03 * rng.standard_normal(film.shape, np.float32), odd


# %%
# Normal video to learn from, in pieces of 20 frames.

normal, _ = street(1600, seed=0)
pieces = normal.reshape(-1, 20, *SIZE)[..., np.newaxis]

# %%
# From each frame and those before it to the next one: a ConvLSTM and a convolution.

model = Sequential([ConvLSTM2D(1, 12, 5, seed=0), Conv2D(12, 1, 3, seed=1)])
history = model.fit(pieces[:, :-1], pieces[:, 1:], loss="mse", optimizer=Adam(5e-3, clip_norm=1.0), epochs=EPOCHS,
                    batch_size=8, seed=0, quiet=True)  # fmt: skip
print(f"{model.num_parameters:,} parameters, {sum(history['seconds']):.0f} s of training")
print("loss by epoch:", *(f"{loss:.5f}" for loss in history["loss"]))


def surprises(film):
    """Return what was expected of frames 1, 2, …, the squared errors, and the largest of 4×4 pixels in each."""
    expected = model(film[np.newaxis, :-1, :, :, np.newaxis])[0, ..., 0]
    errors = (expected - film[1:]) ** 2
    inner = errors[:, :, 4:-4]  # who comes in from the side is always news
    patches = inner.reshape(len(inner), SIZE[0] // 4, 4, -1, 4).mean((2, 4))
    return expected, errors, patches.max((1, 2))


# %%
# The alarm rings above what 99.5 % of normal frames stay below. Which frames it should ring at is used for nothing but
# the figures: the area under the ROC curve is the chance that an odd frame scores higher than a normal one.

_, _, usual = surprises(street(800, seed=1)[0])
alarm = np.quantile(usual[WINDOW:], 0.995)
film, odd = street(260, seed=2, events=EVENTS)
expected, errors, score = surprises(film)
odd = odd[1:]
auc = (score[odd][:, None] > score[~odd]).mean()
print(f"area under the ROC curve: {auc:.3f}; alarm at {np.mean(score[odd] > alarm):.0%} of {odd.sum()} odd frames, "
      f"at {np.mean(score[~odd] > alarm):.1%} of {(~odd).sum()} normal ones")  # fmt: skip

# %%
# The score over time, and what the camera saw when it was highest during each event, and once when all was well.

figure = plt.figure(figsize=(8, 4.6))
grid = figure.add_gridspec(4, 4, height_ratios=(2.2, 1, 1, 1))
axes = figure.add_subplot(grid[0, :])
axes.plot(score, label="surprise: largest mean squared error of 4×4 pixels")
axes.axhline(alarm, color="C2", linestyle=":", label="alarm")
axes.fill_between(np.arange(len(odd)), 0, 1, where=odd, transform=axes.get_xaxis_transform(), color="C1", alpha=0.18,
                  linewidth=0, label="what does not belong there")  # fmt: skip
axes.set(xlabel="frame", xlim=(0, len(score) - 1), yscale="log", ylim=(0.5 * score.min(), 6 * score.max()))
axes.legend(ncols=3, loc="upper center")
moments = {"a usual frame": 40}
for name, (start, *_) in EVENTS.items():
    moments[name] = start + int(score[start : start + 40].argmax())
panels = []
for column, (name, t) in enumerate(moments.items()):
    axes.plot(t, score[t], "o", color="C0", markersize=7)
    for row, (image, kind, limit) in enumerate(
        ((film[t + 1], "frames", 1), (expected[t], "frames", 1), (errors[t], "amounts", 0.3)), 1
    ):
        panel = figure.add_subplot(grid[row, column])
        panels.append(panel)
        drawn = viz.show(panel, image, kind, limit)
        panel.set_title(f"{name}, frame {t}" if row == 1 else "expected" if row == 2 else "squared error", fontsize=8)
figure.colorbar(drawn, ax=panels[2::3], label="squared error", aspect=8)
plt.show()

"""
What is it doing?
=================

Activities are told by motion: in any one frame a stick figure that waves and one that jumps may stand alike. Two
ConvLSTM layers with pooling between them read a clip, a dense layer names what is done. The clips are drawn here, each
figure of its own size, speed and place, under noise. It needs ``pip install 'fastclstm[viz]'`` and half a minute.
"""

# %%
# Stick figures: head, trunk, arms and legs, whose angles swing as the activity has it.

import matplotlib.pyplot as plt
import numpy as np

from fastclstm import ConvLSTM2D, Dense, Dropout, GlobalMaxPooling2D, MaxPooling3D, Sequential, viz
from fastclstm.nn.optimizers import Adam

plt.style.use(viz.theme())
ACTIVITIES = ("standing", "waving", "jumping jack", "squatting", "walking")
STEPS, SIZE = 12, 32
EPOCHS = 12


def limbs(activity, phase):
    """Return the segments (6, 2, 2) of a figure of height 1 whose hip is at 0: (x, y) of both ends, y downwards."""
    swing, half = np.sin(phase), (1 - np.cos(phase)) / 2
    arms, legs, drop = [0.35, -0.35], [0.18, -0.18], 0.0  # radians from straight down; how far the hip sinks
    if activity == "waving":
        arms = [2.6 + 0.5 * swing, -0.35]
    elif activity == "jumping jack":
        arms, legs, drop = [0.3 + 2.4 * half, -0.3 - 2.4 * half], [0.1 + 0.5 * half, -0.1 - 0.5 * half], -0.08 * half
    elif activity == "squatting":
        arms, drop = [1.5 * half + 0.2, 0.2 - 1.5 * half], 0.2 * half
    elif activity == "walking":
        arms, legs = [0.6 * swing, -0.6 * swing], [-0.5 * swing, 0.5 * swing]
    up = np.array([0, -1.0])
    hip = -drop * up
    neck, shoulder = hip + 0.38 * up, hip + 0.33 * up
    hands = [shoulder + 0.34 * np.array([np.sin(a), np.cos(a)]) for a in arms]
    feet = [np.array([0.48 * np.sin(a), 0.47 + min(drop, 0)]) for a in legs]  # on the ground, but in a jump
    return np.array([(hip, neck), (neck + 0.09 * up, neck + 0.12 * up), *((shoulder, hand) for hand in hands),
                     *((hip, foot) for foot in feet)])  # fmt: skip


def clip(activity, rng):
    """Draw a clip (STEPS, SIZE, SIZE, 1)."""
    height, place = rng.uniform(16, 21), rng.uniform((12, 15), (20, 20))
    start, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.0)
    pixels = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE)), -1)
    frames = []
    for t in range(STEPS):
        a, b = (height * limbs(activity, start + speed * t) + place).swapaxes(0, 1)[:, :, None, None]
        along = ((pixels - a) * (b - a)).sum(-1) / np.maximum(((b - a) ** 2).sum(-1), 1e-9)
        nearest = a + along.clip(0, 1)[..., None] * (b - a)
        distance = np.linalg.norm(pixels - nearest, axis=-1)
        thick = np.array([1.2, 2.2, 0.8, 0.8, 1, 1])[:, None, None]
        frames.append((thick + 0.5 - distance).clip(0, 1).max(0))
    noisy = np.array(frames) + 0.1 * rng.standard_normal((STEPS, SIZE, SIZE))
    return noisy.clip(0, 1).astype(np.float32)[..., np.newaxis]


def clips(count, seed):
    """Draw clips (count, STEPS, SIZE, SIZE, 1) and the indices of their activities."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(ACTIVITIES))
    return np.stack([clip(ACTIVITIES[label], rng) for label in labels]), labels


# %%
# 300 clips to learn from, and 150 that are not looked at before the end.

x, y = clips(300, seed=0)
test, truth = clips(150, seed=1)

# %%
# Of the second layer only the last output is used, and only that is held in memory.

model = Sequential([
    ConvLSTM2D(1, 8, 3, stride=2, seed=0), MaxPooling3D((1, 2, 2)), Dropout(0.2, seed=3),
    ConvLSTM2D(8, 24, 3, return_sequences=False, seed=1), GlobalMaxPooling2D(),
    Dense(24, len(ACTIVITIES), "softmax", seed=2),
])  # fmt: skip
history = model.fit(x, y, loss="sparse_categorical_crossentropy", optimizer=Adam(0.01, clip_norm=1.0), epochs=EPOCHS,
                    batch_size=12, seed=0, quiet=True)  # fmt: skip
probabilities = model.predict(test)
named = probabilities.argmax(1)
print("loss by epoch:", *(f"{loss:.2f}" for loss in history["loss"]))
print(f"{model.num_parameters:,} parameters, {history.epochs} epochs in {sum(history['seconds']):.0f} s")
print(f"of {len(truth)} clips never seen before, {np.mean(named == truth):.1%} are named rightly")

# %%
# What it takes for what.

table = np.zeros((len(ACTIVITIES),) * 2, int)
np.add.at(table, (truth, named), 1)
figure, axes = plt.subplots(figsize=(5, 3.8))
image = axes.imshow(table, vmin=0)
for (row, column), count in np.ndenumerate(table):
    if count:
        colour = viz.THEMES["light"]["paper" if count > table.max() / 2 else "ink"]
        axes.text(column, row, count, ha="center", va="center", color=colour)
axes.grid(visible=False)
axes.set_xticks(range(len(ACTIVITIES)), ACTIVITIES, rotation=35, ha="right")
axes.set_yticks(range(len(ACTIVITIES)), ACTIVITIES)
axes.set(title=f"{np.mean(named == truth):.1%} right", xlabel="named", ylabel="done")
figure.colorbar(image, label="clips")

# %%
# A clip of each activity, every other frame, and how sure the network is of it.

firsts = [int(np.flatnonzero(truth == label)[0]) for label in range(len(ACTIVITIES))]
viz.filmstrip(plt.figure(), [
    viz.Row(f"{ACTIVITIES[named[n]]}, {probabilities[n].max():.0%}", test[n, ::2, ..., 0], limit=1) for n in firsts
], [f"t = {t}" for t in range(0, STEPS, 2)], width=7)  # fmt: skip
plt.show()

"""
Frame by frame, as a camera gives them
======================================

Where frames arrive one by one, a cell takes one step at a time: its state is all that is kept, and with arrays given
for the new state nothing of the size of a frame is allocated. How long does a frame take, and how long the slowest of
many? It needs NumPy and, for the picture, ``pip install 'fastclstm[viz]'``; some seconds.
"""

# %%
# A stand-in for a camera: 96×96 pixels, in which a spot wanders over noise. With a real one this is a loop over
# ``cv2.VideoCapture(0).read()``, its frames made grey and scaled to [0, 1].

import time

import matplotlib.pyplot as plt
import numpy as np

from fastclstm import Conv2D, ConvLSTM2D, ConvLSTM2DCell, get_num_threads, viz

plt.style.use(viz.theme())
SIZE, FILTERS, FRAMES, WARM = 96, 16, 600, 20


def camera(count):
    """Yield frames (1, 96, 96, 1)."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for t in range(count):
        row, column = SIZE * (0.5 + 0.3 * np.sin([t / 17, t / 11 + 1]))
        spot = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 60)
        noisy = 0.8 * spot + 0.1 * rng.standard_normal((SIZE, SIZE))
        yield noisy.astype(np.float32)[np.newaxis, :, :, np.newaxis]


# %%
# A cell and a head that makes one map of its hidden channels. Two pairs of arrays take turns as the old state and the
# new one; the loop below is all there is to streaming.

cell = ConvLSTM2DCell(1, FILTERS, 3, seed=0)  # random weights; yours come by ConvLSTM2DCell.load("weights.safetensors")
cell.recurrent_kernel = 0.3 * cell.recurrent_kernel  # so that it forgets what is long gone
head = Conv2D(FILTERS, 1, 1, seed=1)


def pair():
    """Return arrays for a hidden state and a cell state."""
    return tuple(np.zeros((1, SIZE, SIZE, FILTERS), np.float32) for _ in "hc")


state, spare = pair(), pair()
milliseconds, seen, maps = [], [], []
for frame in camera(WARM + FRAMES):
    start = time.perf_counter()
    state, spare = cell.step(frame, *state, out=spare), state
    result = head(state[0])
    milliseconds.append(1e3 * (time.perf_counter() - start))
    seen.append(frame[0, ..., 0])
    maps.append(result[0, ..., 0])
milliseconds = np.array(milliseconds[WARM:])  # without the first ones, which compile and warm up

# %%
# It is the same to the bit as a layer that is given the whole film.

film = np.stack(seen)[np.newaxis, :50, :, :, np.newaxis]
layer = ConvLSTM2D(1, FILTERS, 3)
layer.set_parameters({f"layers.0.{name}": array for name, array in cell.parameters.items()})
assert np.array_equal(head(layer(film)[0, -1:])[0, ..., 0], maps[49])

# %%
# What a camera at 30 frames a second leaves is 33 ms. The median tells what a frame costs, the last percentile whether
# one comes too late.

median, late, slowest = np.percentile(milliseconds, [50, 99, 100])
print(f"{FRAMES} frames of {SIZE}×{SIZE} pixels, {FILTERS} filters, {get_num_threads()} threads")
print(f"median {median:.2f} ms, 99 of 100 within {late:.2f} ms, the slowest {slowest:.2f} ms")

figure = plt.figure(figsize=(8, 4.6))
grid = figure.add_gridspec(2, 4, height_ratios=(1, 1.3))
shown = (FRAMES // 3, FRAMES // 2)
for n, t in enumerate(shown):
    for column, (image, kind) in enumerate(((seen[WARM + t], "frames"), (maps[WARM + t], "signed"))):
        axes = figure.add_subplot(grid[0, 2 * n + column])
        viz.show(axes, image, kind, 1 if kind == "frames" else np.abs(maps[WARM + t]).max())
        axes.set_aspect("equal")
        axes.set_title(f"frame {t}" if kind == "frames" else "map of the hidden state")
axes = figure.add_subplot(grid[1, :3])
axes.plot(milliseconds, ".", markersize=2)
axes.axhline(median, label=f"median {median:.2f} ms")
axes.axhline(late, color="C1", linestyle="--", label=f"99 % within {late:.2f} ms")
axes.set(title="time of each frame", xlabel="frame", ylabel="ms", ylim=(0, 1.3 * late))
axes.legend(loc="upper right", ncols=2)
side = figure.add_subplot(grid[1, 3], sharey=axes)
side.hist(milliseconds, np.linspace(0, 1.3 * late, 60), orientation="horizontal")
side.tick_params(labelleft=False)
side.set(title="distribution", xlabel="frames")
plt.show()

"""
A ConvLSTM in ONNX Runtime
==========================

Exported once, run on sequences of any size, and frame by frame: a ConvLSTM becomes one Scan over time, whose states
may be inputs and outputs. It needs ``pip install 'fastclstm[onnx,viz]' onnxruntime`` and some seconds.
"""

# %%
# A graph from frames (B, T, H, W, 1) to as many: two ConvLSTM layers and a head. No size is fixed.

import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import onnxruntime

from fastclstm import Conv2D, ConvLSTM2D, Input, Model, get_num_threads, to_onnx, viz

plt.style.use(viz.theme())
frames = Input((None, None, None, 1), name="frames")
hidden = ConvLSTM2D(1, 16, 3, leaky_relu_slope=0.1, num_layers=2, peephole="channel", seed=0, name="lstm")(frames)
model = Model(frames, Conv2D(16, 1, 1, activation="sigmoid", seed=1)(hidden))


def sequence(batch, steps, height, width):
    """Draw blobs that drift."""
    start, speed = np.random.default_rng(0).random((2, batch, 1, 1, 1, 2))
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    middle = start * [height, width] + 4 * (speed - 0.5) * np.arange(steps).reshape(-1, 1, 1, 1)
    return np.exp(-np.square(grid - middle).sum(-1) / 20)[..., np.newaxis].astype(np.float32)


# %%
# Two files: one for whole sequences, one for a stream, which has the states as inputs and outputs. The runtime gets as
# many threads as we have.


def session(path):
    """Return what runs a file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = get_num_threads()
    return onnxruntime.InferenceSession(path, options)


with tempfile.TemporaryDirectory() as folder:
    whole, pieces = Path(folder, "whole.onnx"), Path(folder, "pieces.onnx")
    to_onnx(model, whole)
    to_onnx(model, pieces, states=True)
    print(f"{whole.name} and {pieces.name}: {whole.stat().st_size / 1024:.0f} KiB each")
    whole, pieces = session(whole), session(pieces)


def run(x):
    """Return the outputs of whole sequences."""
    return whole.run(None, {"frames": x})[0]


def stream(x):
    """Return the outputs of a sequence that comes frame by frame: the states of a call go into the next one."""
    B, _, H, W, _ = x.shape
    states = [each.name for each in pieces.get_inputs() if each.name != "frames"]
    feeds = dict.fromkeys(states, np.zeros((B, H, W, 16), np.float32))
    outputs = []
    for step in range(x.shape[1]):
        y, *after = pieces.run(None, {"frames": x[:, step : step + 1]} | feeds)
        feeds = dict(zip(states, after, strict=True))
        outputs.append(y)
    return np.concatenate(outputs, 1)


def timed(function, x):
    """Return a result and the milliseconds of a second call."""
    function(x)
    start = time.perf_counter()
    result = function(x)
    return result, (time.perf_counter() - start) * 1e3


# %%
# The same file takes any batch, length and frame size, and agrees with ours.

print(f"\n{'':28} {'difference':>10} {'ONNX Runtime':>13} {'fastclstm':>11}")
for name, shape, function in (
    ("one of 3, other frames", (1, 3, 48, 80), run),
    ("frame by frame", (4, 10, 64, 64), stream),
    ("4 sequences of 10 frames", (4, 10, 64, 64), run),
):
    x = sequence(*shape)
    theirs, their_time = timed(function, x)
    ours, our_time = timed(model, x)
    difference = np.abs(theirs - ours).max()
    print(f"{name:28} {difference:10.1e} {their_time:10.1f} ms {our_time:8.1f} ms")
    assert difference < 1e-5, "the runtime computes something else"

# %%
# A sequence, what both make of it, and how far apart they are.

low, high = ours[0].min(), ours[0].max()
viz.filmstrip(plt.figure(), [
    viz.Row("frames", x[0, ..., 0], limit=1),
    viz.Row("fastclstm", (ours[0, ..., 0] - low) / (high - low), "amounts", limit=1),
    viz.Row("ONNX Runtime", (theirs[0, ..., 0] - low) / (high - low), "amounts", limit=1),
    viz.Row("difference", 1e6 * (theirs - ours)[0, ..., 0], "signed", unit="millionths"),
])  # fmt: skip
plt.show()

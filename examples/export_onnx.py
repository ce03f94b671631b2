"""A ConvLSTM in ONNX Runtime: exported once, run on sequences of any size, and frame by frame.

Run it with ``python examples/export_onnx.py``; it needs ``pip install 'fastclstm[onnx]' onnxruntime`` and some seconds.
It prints how far the runtime's numbers are from ours, and how long both took.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

from fastclstm import Conv2D, ConvLSTM2D, Input, Model, get_num_threads, to_onnx


def forecaster():
    """Return a graph from frames (B, T, H, W, 1) to as many: two ConvLSTM layers, a skip, and a head."""
    frames = Input((None, None, None, 1), name="frames")
    hidden = ConvLSTM2D(1, 16, 3, leaky_relu_slope=0.1, num_layers=2, peephole="channel", seed=0, name="lstm")(frames)
    return Model(frames, Conv2D(16, 1, 1, activation="sigmoid", seed=1)(hidden))


def sequence(batch, steps, height, width):
    """Draw blobs that drift."""
    start, speed = np.random.default_rng(0).random((2, batch, 1, 1, 1, 2))
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    middle = start * [height, width] + (speed - 0.5) * np.arange(steps).reshape(-1, 1, 1, 1)
    return np.exp(-np.square(grid - middle).sum(-1) / 20)[..., np.newaxis].astype(np.float32)


def session(path):
    """Return what runs a file, on as many threads as we do."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = get_num_threads()
    return onnxruntime.InferenceSession(path, options)


def stream(run, x):
    """Return the outputs of a sequence that comes frame by frame: the states of a call go into the next one."""
    B, _, H, W, _ = x.shape
    states = [each.name for each in run.get_inputs() if each.name != "frames"]
    feeds = dict.fromkeys(states, np.zeros((B, H, W, 16), np.float32))
    outputs = []
    for step in range(x.shape[1]):
        y, *after = run.run(None, {"frames": x[:, step : step + 1]} | feeds)
        feeds = dict(zip(states, after, strict=True))
        outputs.append(y)
    return np.concatenate(outputs, 1)


def timed(function, *arguments):
    """Return a result and the milliseconds of a second call."""
    function(*arguments)
    start = time.perf_counter()
    result = function(*arguments)
    return result, (time.perf_counter() - start) * 1e3


def main():
    """Export, run and compare."""
    model = forecaster()
    with tempfile.TemporaryDirectory() as folder:
        whole, pieces = Path(folder, "whole.onnx"), Path(folder, "pieces.onnx")
        to_onnx(model, whole)
        to_onnx(model, pieces, states=True)
        print(f"{whole.name} and {pieces.name}, which has the states as inputs and outputs: "
              f"{whole.stat().st_size / 1024:.0f} KiB each")  # fmt: skip
        whole, pieces = session(whole), session(pieces)
    print(f"\n{'':28} {'difference':>10} {'ONNX Runtime':>13} {'fastclstm':>11}")
    for name, shape, run in (
        ("4 sequences of 10 frames", (4, 10, 64, 64), lambda x: whole.run(None, {"frames": x})[0]),
        ("one of 3, other frames", (1, 3, 48, 80), lambda x: whole.run(None, {"frames": x})[0]),
        ("frame by frame", (4, 10, 64, 64), lambda x: stream(pieces, x)),
    ):
        x = sequence(*shape)
        theirs, their_time = timed(run, x)
        ours, our_time = timed(model, x)
        difference = np.abs(theirs - ours).max()
        print(f"{name:28} {difference:10.1e} {their_time:10.1f} ms {our_time:8.1f} ms")
        assert difference < 1e-5, "the runtime computes something else"


if __name__ == "__main__":
    main()

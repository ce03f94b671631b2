"""What the tests of to_onnx share: models written to a file and run by ONNX Runtime, compared with our own numbers."""

import numpy as np
import pytest
from layer_checks import normal

import fastclstm
from fastclstm import to_onnx
from fastclstm.layers import ConvLSTM2D
from fastclstm.layers.symbolic import leaves, mapped_shapes
from fastclstm.nn.normalization import Normalization

N = None
REF = {"engine": "reference"}
FIRST = {"data_format": "channels_first"}
FRAMES, SEQUENCES = (N, N, N, 4), (N, N, N, N, 4)
CHANNELS_FIRST = (N, N, 4, N, N)

CELLS = [
    {"num_layers": 3, "out_channels": [3, 2, 3], "leaky_relu_slope": 0.1, "return_sequences": False},
    {"num_layers": 2, "stride": 2, "kernel_size": [3, (2, 4)], "recurrent_activation": "hard_sigmoid"},
    {"bidirectional": True, "num_layers": 2, "leaky_relu_slope": 0.3, "go_backwards": True},
    {"bidirectional": True, "merge_mode": "sum", "return_sequences": False, "num_layers": 2, "return_state": True},
    {"bidirectional": True, "merge_mode": "mul", **FIRST, "go_backwards": True, "return_sequences": False},
    {"bidirectional": True, "merge_mode": "ave", "time_major": True, "return_state": True},
    {"bidirectional": True, "merge_mode": None, **FIRST},
    {"go_backwards": True, "num_layers": 2, "use_bias": False, "time_major": True, **FIRST},
    {"padding": "valid", "recurrent_kernel_size": (5, 2), "dilation": 2, "recurrent_dilation": (2, 1)},
    {"padding": ((2, 0), (1, 1)), "stride": (2, 1), "padding_mode": "circular", "return_state": True},
    {"padding_mode": "circular", "stride": 2, "peephole": "conv", "peephole_size": 2, "recurrent_kernel_size": 9},
    {"padding": 1, "peephole": "channel", "activation": "relu6", "output_activation": "elu", "return_state": True},
    {"peephole": "elementwise", "frame_size": (5, 6), "stride": (1, 2), "kernel_size": 2},
    {"peephole": "conv", "use_bias": False, "num_layers": 2},
    {"normalization": "layer", "peephole": "channel", "cell_clip": 0.5, "num_layers": 2},
    {"normalization": Normalization("group", groups=2, separate=True)},
    {"normalization": Normalization("batch", separate=True), "bidirectional": True},
    {"normalization": "batch"},
    {"normalization": Normalization("layer", elementwise=True, separate=True), "frame_size": (5, 6), "use_bias": False},
    {"normalization": Normalization("layer", elementwise=True), "frame_size": (5, 6)},
]  # fmt: skip


def lstm(**options):
    return drawn(ConvLSTM2D(**{"in_channels": 4, "out_channels": 3, "kernel_size": 3, **REF} | options))


def sequences(layer, batch, steps, height, width, seed=0):
    """Frames in a layer's layout, and a mask of theirs, one sample of which begins late and one is empty."""
    height, width = layer.frame_size or (height, width)
    x, valid = np.float32(normal(batch, steps, height, width, 4, seed=seed)), normal(batch, steps, seed=seed + 1) > -0.4
    valid[0, :2], valid[1:2], valid[-1, -1] = False, False, False
    x = np.moveaxis(x, -1, 2) if layer.data_format == "channels_first" else x
    return (np.ascontiguousarray(x.swapaxes(0, 1)), valid.T.copy()) if layer.time_major else (x, valid)


def sized(shape, batch, base):
    """A shape with sizes for the unknown axes: the batch, then others."""
    return tuple(n if n is not None else base + axis % 2 if axis else batch for axis, n in enumerate(shape))


def values(shape, layer, batch, base):
    """Inputs of a layer, one or a list."""
    seeds = iter(range(9))
    reads = "".join(type(part).__name__ for part in fastclstm.layers.container.parts(layer))

    def draw(known):
        x = normal(*sized(known, batch, base), seed=next(seeds))
        return np.clip(np.abs(4 * x), 0, 8).astype(np.int64) if "Embedding" in reads else np.float32(x)

    return mapped_shapes(draw, shape)


def drawn(layer, seed=0, scale=0.3):
    """A layer with parameters that are all different, variances above 0."""
    rng = np.random.default_rng(seed)
    new = {}
    for name, old in layer.parameters.items():
        array = rng.normal(scale=scale, size=old.shape)
        new[name] = np.abs(array) + 0.5 if "variance" in name else array
    layer.set_parameters(new)
    return layer


class Exported:
    """A model written to a file, checked, and run by ONNX Runtime."""

    def __init__(self, model, folder, **options):
        onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        self.path = folder / "model.onnx"
        to_onnx(model, self.path, **options)
        self.proto = onnx.load(self.path)
        onnx.checker.check_model(self.proto, full_check=True)
        self.kinds = [node.op_type for node in self.proto.graph.node]
        quiet = runtime.SessionOptions()
        quiet.log_severity_level, quiet.intra_op_num_threads = 3, 1
        self.session = runtime.InferenceSession(self.path, quiet)
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]

    def __call__(self, *arrays, **named):
        feeds = dict(zip(self.inputs, arrays, strict=False)) | named
        return self.session.run(None, feeds)


def agree(made, expected, tolerance=1e-5):
    """Compare what ONNX made with our own, of any structure: shapes, dtypes and numbers."""
    expected = list(leaves(expected))
    assert len(made) == len(expected)
    for a, b in zip(made, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

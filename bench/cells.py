"""The ConvLSTM of the peers: its step is written once, for tensors of PyTorch, nodes of ONNX and layers of ncnn.

`step` computes with `+` and `*` and with what a builder (`_Torch`, `_Onnx`, `_Ncnn`) knows: activations, normalization,
limits, and the four gates' parts of an array. Arrays are channels-first here, kernels (4F, C, KH, KW).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from bench.cases import Arrays
from fastclstm.nn.normalization import Normalization
from fastclstm.spec import ConvLSTMSpec, ConvSpec


class Unavailable(Exception):
    """An implementation cannot run here, or not this case; the message says why."""


class _Builder(Protocol):
    """What a peer knows beside `+` and `*`."""

    def activation(self, name: str, z: Any) -> Any: ...

    def normalize(self, how: Normalization, z: Any, weights: Arrays) -> Any: ...

    def limit(self, c: Any, most: float) -> Any: ...

    def gates(self, z: Any) -> tuple[Any, Any, Any, Any]: ...


def step(build: _Builder, spec: ConvLSTMSpec, weights: Arrays, z: Any, c: Any) -> tuple[Any, Any]:
    """Return h and c after a step, from the sum z of the convolutions and the bias."""
    if spec.normalization is not None:
        z = build.normalize(spec.normalization, z, weights["normalization_weights"])
    i, f, g, o = build.gates(z)
    peephole = weights.get("peephole")
    if peephole is not None:
        i, f = i + c * peephole["i"], f + c * peephole["f"]
    squash = partial(build.activation, _name(spec.recurrent_activation))
    c = squash(f) * c + squash(i) * build.activation(_name(spec.activation), g)
    if spec.cell_clip is not None:
        c = build.limit(c, spec.cell_clip)
    if peephole is not None:
        o = o + c * peephole["o"]
    return squash(o) * build.activation(_name(spec.output_activation), c), c


def is_joint(spec: ConvLSTMSpec) -> bool:
    """Whether one convolution of cat[x, h] gives the sum of both."""
    return _geometry(spec.input) == _geometry(spec.recurrent)


def channels_first(arrays: Arrays) -> Arrays:
    """Return the arrays of a case as the peers want them: (B, T, C, H, W), (4F, C, KH, KW), weights that broadcast."""
    turned = {
        "x": arrays["x"].transpose(0, 1, 4, 2, 3),
        "kernel": arrays["kernel"].transpose(3, 2, 0, 1),
        "recurrent_kernel": arrays["recurrent_kernel"].transpose(3, 2, 0, 1),
    }
    named: Arrays = {name: np.ascontiguousarray(array) for name, array in turned.items()}
    for name in ("bias", "mask", "normalization_weights"):
        if name in arrays:
            named[name] = arrays[name]
    if "peephole" in arrays:
        named["peephole"] = {
            gate: np.ascontiguousarray(
                np.moveaxis(weight, -1, 0).reshape(weight.shape[-1], *(weight.shape[:-1] or (1, 1)))
            )
            for gate, weight in arrays["peephole"].items()
        }
    if "dropout_masks" in arrays:  # (4, B, H, W, C) to (B, 4C, H, W): what each gate's group of channels is scaled by
        named["dropout_masks"] = {
            name: np.ascontiguousarray(mask.transpose(1, 0, 4, 2, 3).reshape(mask.shape[1], -1, *mask.shape[2:4]))
            for name, mask in arrays["dropout_masks"].items()
        }
    return named


def _name(activation: Any) -> str:
    return activation if isinstance(activation, str) else str(activation.name)


def _geometry(conv: ConvSpec) -> tuple[Any, ...]:
    return conv.KH, conv.KW, conv.strides, conv.dilation, conv.padding, conv.padding_mode


def _known(peer: str, what: str, table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise Unavailable(f"{peer} has no {what} {name!r}")
    return table[name]


# PyTorch -------------------------------------------------------------------------------------------------------------


class _Torch:
    def __init__(self) -> None:
        import torch

        self.torch, f = torch, torch.nn.functional
        self.functions: dict[str, Callable[[Any], Any]] = {
            "tanh": torch.tanh, "sigmoid": torch.sigmoid, "hard_sigmoid": f.hardsigmoid, "relu": f.relu,
            "leaky_relu": partial(f.leaky_relu, negative_slope=0.2), "elu": f.elu, "selu": f.selu, "gelu": f.gelu,
            "silu": f.silu, "softplus": f.softplus, "softsign": f.softsign,
            "hard_sigmoid_keras2": lambda z: (0.2 * z + 0.5).clamp(0, 1), "linear": lambda z: z,
        }  # fmt: skip

    def activation(self, name: str, z: Any) -> Any:
        return _known("torch", "activation", self.functions, name)(z)

    def normalize(self, how: Normalization, z: Any, weights: Any) -> Any:
        functions = self.torch.nn.functional
        if how.kind == "batch":
            return functions.batch_norm(z, weights["mean"], weights["variance"], weights["gamma"], weights["beta"],
                                        eps=how.epsilon)  # fmt: skip
        return functions.group_norm(z, _groups(how), weights["gamma"], weights["beta"], how.epsilon)

    def limit(self, c: Any, most: float) -> Any:
        return c.clamp(-most, most)

    def gates(self, z: Any) -> Any:
        return z.chunk(4, 1)

    def convolve(self, x: Any, weight: Any, bias: Any, conv: ConvSpec, groups: int = 1) -> Any:
        functions = self.torch.nn.functional
        (top, bottom), (left, right) = conv.padding
        padding = (top, left)
        if conv.padding_mode == "circular" or (top, left) != (bottom, right):
            mode = "circular" if conv.padding_mode == "circular" else "constant"
            x, padding = functions.pad(x, (left, right, top, bottom), mode=mode), (0, 0)
        return functions.conv2d(x, weight, bias, conv.strides, padding, conv.dilation, groups)


def _groups(how: Normalization) -> int:
    return 1 if how.kind == "layer" else how.groups or 4


def torch_module(case: Any, split: bool, channels_last: bool) -> Any:
    """Return a torch module ``x (B, T, C, H, W) -> (B, T, F, H, W)``; with channels_last both sides have C at the end.

    With `split`, the convolution of x runs once for all time steps; otherwise one convolution of cat[x, h] a step.
    """
    import torch

    build, spec, weights = _Torch(), case.spec, channels_first(case.arrays())
    if not split and ("dropout_masks" in weights or not is_joint(spec)):
        raise Unavailable("no single convolution of cat[x, h] is the sum of both")
    wx, wh = (torch.from_numpy(weights[name]) for name in ("kernel", "recurrent_kernel"))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def parameter(array: Any) -> Any:
        tensor = torch.as_tensor(array)
        tensor = tensor.contiguous(memory_format=memory_format) if tensor.ndim == 4 else tensor
        return torch.nn.Parameter(tensor, requires_grad=False)

    def constant(array: np.ndarray) -> Any:
        tensor = torch.from_numpy(array)
        return tensor.contiguous(memory_format=memory_format) if tensor.ndim == 4 else tensor

    dropout = {name: constant(mask) for name, mask in weights.get("dropout_masks", {}).items()}
    mask = torch.from_numpy(weights["mask"])[..., None, None, None] if "mask" in weights else None
    groups = {name: 4 if name in dropout else 1 for name in ("x", "h")}

    class ConvLSTM(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input = parameter(wx if split else torch.cat([wx, wh], 1))
            self.recurrent = parameter(wh) if split else None
            self.bias = parameter(weights["bias"]) if "bias" in weights else None
            self.cell = torch.nn.ModuleDict({
                name: torch.nn.ParameterDict({key: parameter(value) for key, value in weights[name].items()})
                for name in ("peephole", "normalization_weights") if name in weights
            })  # fmt: skip
            self.weights = {name: dict(table.items()) for name, table in self.cell.items()}

        def forward(self, x: Any) -> Any:
            if channels_last:
                x = x.permute(0, 1, 4, 2, 3)
            B, T = x.shape[:2]
            h = x.new_zeros(B, spec.F, spec.HO, spec.WO).contiguous(memory_format=memory_format)
            c = h
            if split:
                frames = x.repeat(1, 1, 4, 1, 1) * dropout["x"][:, None] if "x" in dropout else x
                zx = build.convolve(frames.flatten(0, 1), self.input, self.bias, spec.input, groups["x"])
                zx = zx.unflatten(0, (B, T))
            outputs = []
            for step_number in range(T):
                t = spec.source_step(step_number)
                if split:
                    seen = h.repeat(1, 4, 1, 1) * dropout["h"] if "h" in dropout else h
                    z = build.convolve(seen, self.recurrent, None, spec.recurrent, groups["h"]) + zx[:, t]
                else:
                    z = build.convolve(torch.cat([x[:, t], h], 1), self.input, self.bias, spec.input)
                new_h, new_c = step(build, spec, self.weights, z, c)
                if mask is not None:
                    new_h, new_c = torch.where(mask[:, t], new_h, h), torch.where(mask[:, t], new_c, c)
                h, c = new_h, new_c
                outputs.append(h.permute(0, 2, 3, 1) if channels_last else h)
            return torch.stack(outputs, 1)

    return ConvLSTM().eval()


# ONNX ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """A value of a graph that is being built, by its name."""

    graph: Any
    name: str

    def __add__(self, other: _Value) -> _Value:
        return self.graph.add(self, other)

    def __mul__(self, other: _Value) -> _Value:
        return self.graph.multiply(self, other)


class _Onnx:
    """A graph of ONNX, node by node."""

    _PLAIN: ClassVar[dict[str, str]] = {
        "tanh": "Tanh", "sigmoid": "Sigmoid", "relu": "Relu", "softplus": "Softplus", "softsign": "Softsign",
        "gelu": "Gelu", "elu": "Elu", "selu": "Selu", "linear": "Identity",
    }  # fmt: skip
    _SHAPED: ClassVar[dict[str, tuple[str, dict[str, Any]]]] = {
        "hard_sigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
        "hard_sigmoid_keras2": ("HardSigmoid", {"alpha": 0.2, "beta": 0.5}),
        "leaky_relu": ("LeakyRelu", {"alpha": 0.2}),
    }

    def __init__(self) -> None:
        import onnx

        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.names = map("v{}".format, iter(range(1 << 30)))

    def several(self, kind: str, inputs: list[_Value], count: int, **attributes: Any) -> list[_Value]:
        outputs = [next(self.names) for _ in range(count)]
        self.nodes.append(self.onnx.helper.make_node(kind, [value.name for value in inputs], outputs, **attributes))
        return [_Value(self, name) for name in outputs]

    def node(self, kind: str, *inputs: _Value, **attributes: Any) -> _Value:
        return self.several(kind, list(inputs), 1, **attributes)[0]

    def constant(self, array: Any) -> _Value:
        name = next(self.names)
        self.constants[name] = np.array(array, order="C")
        return _Value(self, name)

    def add(self, a: _Value, b: _Value) -> _Value:
        return self.node("Add", a, b)

    def multiply(self, a: _Value, b: _Value) -> _Value:
        return self.node("Mul", a, b)

    def activation(self, name: str, z: _Value) -> _Value:
        if name == "silu":
            return z * self.node("Sigmoid", z)
        kind, attributes = self._SHAPED.get(name) or (_known("ONNX", "activation", self._PLAIN, name), {})
        return self.node(kind, z, **attributes)

    def normalize(self, how: Normalization, z: _Value, weights: Any) -> _Value:
        if how.kind == "batch":
            given = [weights[name] for name in ("gamma", "beta", "mean", "variance")]
            return self.node("BatchNormalization", z, *given, epsilon=how.epsilon)
        return self.node("GroupNormalization", z, weights["gamma"], weights["beta"], num_groups=_groups(how),
                         epsilon=how.epsilon)  # fmt: skip

    def limit(self, c: _Value, most: float) -> _Value:
        return self.node("Clip", c, self.constant(np.float32(-most)), self.constant(np.float32(most)))

    def gates(self, z: _Value) -> Any:
        return self.several("Split", [z], 4, axis=1, num_outputs=4)

    def convolve(self, x: _Value, weight: _Value, bias: _Value | None, conv: ConvSpec) -> _Value:
        (top, bottom), (left, right) = conv.padding
        pads = [top, left, bottom, right]
        if conv.padding_mode == "circular":
            around = self.constant(np.array([0, 0, top, left, 0, 0, bottom, right]))
            x, pads = self.node("Pad", x, around, mode="wrap"), [0] * 4
        return self.node("Conv", x, weight, *([] if bias is None else [bias]), pads=pads, strides=conv.strides,
                         dilations=conv.dilation, kernel_shape=[conv.KH, conv.KW])  # fmt: skip

    def save(self, path: Path, x: tuple[str, np.ndarray], result: _Value, shape: tuple[int, ...]) -> None:
        onnx, (name, array) = self.onnx, x
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        graph = onnx.helper.make_graph(
            self.nodes, "convlstm", [onnx.helper.make_tensor_value_info(name, kind, array.shape)],
            [onnx.helper.make_tensor_value_info(result.name, kind, shape)],
            [onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )  # fmt: skip
        opset = [onnx.helper.make_opsetid("", 21)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def save_onnx(case: Any, path: Path) -> np.ndarray:
    """Write the graph, unrolled over time, to `path` and return its input (B, T, C, H, W).

    It convolves cat[x, h] at each step, or where that cannot be, all of x before the steps.
    """
    spec, build, arrays = case.spec, _Onnx(), channels_first(case.arrays())
    if arrays["x"].dtype != np.float32:
        raise Unavailable("the runtimes of ONNX convolve in float32 only")
    if "dropout_masks" in arrays:
        raise Unavailable("the ONNX graph is for inference: without dropout")
    weights: Arrays = {
        name: {key: build.constant(value) for key, value in arrays[name].items()}
        for name in ("peephole", "normalization_weights") if name in arrays
    }  # fmt: skip
    x, joint, steps = arrays["x"], is_joint(spec), range(spec.T)
    source, first = _Value(build, "x"), build.constant(np.array([1]))
    bias = build.constant(arrays["bias"]) if "bias" in arrays else None
    if joint:
        kernel = build.constant(np.concatenate([arrays["kernel"], arrays["recurrent_kernel"]], 1))
        seen = source
    else:
        kernel = build.constant(arrays["recurrent_kernel"])
        flat = build.node("Reshape", source, build.constant(np.array([-1, *x.shape[2:]])))
        sums = build.convolve(flat, build.constant(arrays["kernel"]), bias, spec.input)
        shape = np.array([spec.B, spec.T, 4 * spec.F, spec.HO, spec.WO])
        seen = build.node("Reshape", sums, build.constant(shape))
    parts = build.several("Split", [seen], spec.T, axis=1, num_outputs=spec.T)
    frames = [build.node("Squeeze", part, first) for part in parts]
    masks = build.constant(arrays["mask"].T[..., None, None, None]) if "mask" in arrays else None
    h = c = build.constant(np.zeros((spec.B, spec.F, spec.HO, spec.WO), x.dtype))
    outputs = []
    for t in map(spec.source_step, steps):
        if joint:
            z = build.convolve(build.node("Concat", frames[t], h, axis=1), kernel, bias, spec.input)
        else:
            z = frames[t] + build.convolve(h, kernel, None, spec.recurrent)
        new_h, new_c = step(build, spec, weights, z, c)
        if masks is not None:
            valid = build.node("Gather", masks, build.constant(np.array(t)), axis=0)
            new_h, new_c = build.node("Where", valid, new_h, h), build.node("Where", valid, new_c, c)
        h, c = new_h, new_c
        outputs.append(build.node("Unsqueeze", h, first))
    result = build.several("Concat", outputs, 1, axis=1)[0]
    build.save(path, ("x", x), result, (spec.B, spec.T, spec.F, spec.HO, spec.WO))
    return x


# ncnn ----------------------------------------------------------------------------------------------------------------


class _Ncnn:
    """A net of ncnn, layer by layer, as the text and the bytes of its two files."""

    _ACTIVATIONS: ClassVar[dict[str, tuple[str, str]]] = {
        "tanh": ("TanH", ""), "sigmoid": ("Sigmoid", ""), "relu": ("ReLU", ""), "leaky_relu": ("ReLU", "0=0.2"),
        "hard_sigmoid": ("HardSigmoid", f"0={1 / 6:.9f} 1=0.5"), "hard_sigmoid_keras2": ("HardSigmoid", "0=0.2 1=0.5"),
        "elu": ("ELU", "0=1.0"), "selu": ("SELU", ""), "gelu": ("GELU", "0=0"), "silu": ("Swish", ""),
    }  # fmt: skip

    def __init__(self) -> None:
        self.layers: list[tuple[str, list[str], list[str], str]] = []
        self.data: list[bytes] = []
        self.names = map("v{}".format, iter(range(1 << 30)))

    def several(self, kind: str, inputs: list[_Value], count: int, options: str = "") -> list[_Value]:
        outputs = [next(self.names) for _ in range(count)]
        self.layers.append((kind, [value.name for value in inputs], outputs, options))
        return [_Value(self, name) for name in outputs]

    def layer(self, kind: str, *inputs: _Value, options: str = "") -> _Value:
        return self.several(kind, list(inputs), 1, options)[0]

    def put(self, *arrays: np.ndarray) -> None:
        """Append weights of the layer that follows."""
        self.data += [np.ascontiguousarray(array, np.float32).tobytes() for array in arrays]

    def constant(self, array: np.ndarray) -> _Value:
        channels, height, width = array.shape
        self.put(array)
        return self.layer("MemoryData", options=f"0={width} 1={height} 2={channels}")

    def add(self, a: _Value, b: _Value) -> _Value:
        return self.layer("BinaryOp", a, b, options="0=0")

    def multiply(self, a: _Value, b: _Value | np.ndarray) -> _Value:
        return self.layer("BinaryOp", a, b if isinstance(b, _Value) else self.constant(b), options="0=2")

    def activation(self, name: str, z: _Value) -> _Value:
        if name == "linear":
            return z
        kind, options = _known("ncnn", "activation", self._ACTIVATIONS, name)
        return self.layer(kind, z, options=options)

    def normalize(self, how: Normalization, z: _Value, weights: Any) -> _Value:
        if how.kind == "batch":
            self.put(*(weights[name] for name in ("gamma", "mean", "variance", "beta")))
            return self.layer("BatchNorm", z, options=f"0={weights['gamma'].size} 1={how.epsilon}")
        self.put(weights["gamma"], weights["beta"])
        return self.layer("GroupNorm", z, options=f"0={_groups(how)} 1={weights['gamma'].size} 2={how.epsilon} 3=1")

    def limit(self, c: _Value, most: float) -> _Value:
        return self.layer("Clip", c, options=f"0={-most} 1={most}")

    def gates(self, z: _Value) -> Any:
        return self.several("Slice", [z], 4, "-23300=4,-233,-233,-233,-233 1=0")

    def convolve(self, x: _Value, weight: np.ndarray, bias: np.ndarray | None, conv: ConvSpec) -> _Value:
        if conv.padding_mode != "zeros":
            raise Unavailable(f"ncnn has no {conv.padding_mode} padding")
        (top, bottom), (left, right) = conv.padding
        self.data.append(bytes(4))  # what follows is float32
        self.put(weight, *([] if bias is None else [bias]))
        return self.layer("Convolution", x, options=(
            f"0={conv.F} 1={conv.KW} 11={conv.KH} 2={conv.dilation[1]} 12={conv.dilation[0]} 3={conv.strides[1]} "
            f"13={conv.strides[0]} 4={left} 15={right} 14={top} 16={bottom} 5={int(bias is not None)} 6={weight.size}"
        ))  # fmt: skip

    def _lines(self, outputs: list[_Value]) -> Iterator[tuple[str, list[str], list[str], str]]:
        """Return the layers with a Split behind every value that is read more than once."""
        readers = Counter(name for _, inputs, _, _ in self.layers for name in inputs)
        readers.update(value.name for value in outputs)
        copies = {name: [f"{name}_{n}" for n in range(count)] for name, count in readers.items() if count > 1}
        waiting = {name: list(names) for name, names in copies.items()}
        for kind, inputs, written, options in self.layers:
            yield kind, [waiting[name].pop() if name in waiting else name for name in inputs], written, options
            for name in written:
                if name in copies:
                    yield "Split", [name], copies[name], ""
        self.results = [waiting[value.name].pop() if value.name in waiting else value.name for value in outputs]

    def net(self, threads: int, outputs: list[_Value]) -> tuple[Any, list[str]]:
        """Return the net and the names of its outputs."""
        import ncnn

        net = ncnn.Net()
        net.opt.num_threads = threads
        for precision in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage"):
            setattr(net.opt, f"use_{precision}", False)
        lines = list(self._lines(outputs))
        blobs = sum(len(written) for _, _, written, _ in lines)
        text = ["7767517", f"{len(lines)} {blobs}"]
        for number, (kind, inputs, written, options) in enumerate(lines):
            text.append(f"{kind} l{number} {len(inputs)} {len(written)} {' '.join([*inputs, *written])} {options}")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "net.param").write_text("\n".join(text) + "\n")
            (Path(folder) / "net.bin").write_bytes(b"".join(self.data))
            if net.load_param(f"{folder}/net.param") or net.load_model(f"{folder}/net.bin"):
                raise Unavailable("ncnn does not load the net")
        return net, self.results


def ncnn_convlstm(
    case: Any, threads: int, split: bool
) -> tuple[Callable[[], list[list[Any]]], Callable[..., np.ndarray]]:
    """Return a function that runs ncnn, a net a step and image, and the conversion of its result to channels-last.

    The net convolves cat[x, h], or with `split` each for itself. States stay in ncnn's own layout between the steps.
    """
    import ncnn

    spec, arrays, build = case.spec, channels_first(case.arrays()), _Ncnn()
    if arrays["x"].dtype != np.float32:
        raise Unavailable("ncnn computes in float32 only")
    if "dropout_masks" in arrays:
        raise Unavailable("ncnn is for inference: without dropout")
    if not split and not is_joint(spec):
        raise Unavailable("no single convolution of cat[x, h] is the sum of both")
    ncnn.set_omp_num_threads(threads)
    x, h, c = (build.layer("Input") for _ in range(3))
    kernels, bias = (arrays["kernel"], arrays["recurrent_kernel"]), arrays.get("bias")
    if split:
        z = build.convolve(x, kernels[0], bias, spec.input) + build.convolve(h, kernels[1], None, spec.recurrent)
    else:
        z = build.convolve(build.layer("Concat", x, h, options="0=0"), np.concatenate(kernels, 1), bias, spec.input)
    net, (h_name, c_name) = build.net(threads, list(step(build, spec, arrays, z, c)))

    def owned(array: np.ndarray) -> Any:
        """Return a Mat with memory of its own: one of an array is a view, whose channels do not lie as ncnn's do."""
        channels, height, width = array.shape
        mat = ncnn.Mat(width, height, channels)
        mat.numpy()[...] = array
        return mat

    frames = [[owned(frame) for frame in sequence] for sequence in arrays["x"]]
    zero = owned(np.zeros((spec.F, spec.HO, spec.WO), np.float32))
    mask = arrays.get("mask", np.ones((spec.B, spec.T), bool))
    order = [spec.source_step(t) for t in range(spec.T)]

    def run() -> list[list[Any]]:
        results = []
        for sequence, valid in zip(frames, mask, strict=True):
            h_mat, c_mat, outputs = zero, zero, []
            for t in order:
                if valid[t]:
                    extractor = net.create_extractor()
                    for name, mat in ((x.name, sequence[t]), (h.name, h_mat), (c.name, c_mat)):
                        extractor.input(name, mat)
                    _, h_mat = extractor.extract(h_name, 1)  # 1: as it lies
                    _, c_mat = extractor.extract(c_name, 1)
                outputs.append(h_mat)
            results.append(outputs)
        return results

    def channels_last(results: list[list[Any]]) -> np.ndarray:
        def plain(mat: Any) -> np.ndarray:
            whole = ncnn.Mat()
            ncnn.convert_packing(mat, whole, 1)
            return np.array(whole).transpose(1, 2, 0)

        return np.stack([np.stack([plain(mat) for mat in outputs]) for outputs in results])

    return run, channels_last

"""Weights of PyTorch's own layers for ours: a row of a table for each class. PyTorch itself is not needed.

`Layer.load_torch` is what users call; ConvLSTMs come by `fastclstm.convert.torch.from_torch`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastclstm import dispatch
from fastclstm.io import torch_files
from fastclstm.io.bounds import shown
from fastclstm.spec import Shape


class _Weight(NamedTuple):
    """Where PyTorch has a parameter, and in which order its axes become ours."""

    name: str
    axes: tuple[int, ...] | None = None
    """None: as they are."""
    legend: str = ""
    """PyTorch's axes, for people."""


_BIAS = _Weight("bias")
_NORM = {"gamma": _Weight("weight"), "beta": _BIAS}
_KERNEL_2D = _Weight("weight", (2, 3, 1, 0), "(out, in, height, width)")
_KERNEL_3D = _Weight("weight", (2, 3, 4, 1, 0), "(out, in, time, height, width)")

ROWS: dict[str, dict[str, _Weight]] = {
    "BatchNormalization": _NORM | {"moving_mean": _Weight("running_mean"), "moving_variance": _Weight("running_var")},
    "Conv2D": {"kernel": _KERNEL_2D, "bias": _BIAS},
    "Conv2DTranspose": {"kernel": _KERNEL_2D._replace(legend="(in, out, height, width)"), "bias": _BIAS},
    "Conv3D": {"kernel": _KERNEL_3D, "bias": _BIAS},
    "Conv3DTranspose": {"kernel": _KERNEL_3D._replace(legend="(in, out, time, height, width)"), "bias": _BIAS},
    "Dense": {"kernel": _Weight("weight", (1, 0), "(out, in)"), "bias": _BIAS},
    "Embedding": {"embeddings": _Weight("weight")},
    "GroupNormalization": _NORM,
    "InstanceNormalization": _NORM,
    "LayerNormalization": _NORM,
    "PReLU": {"alpha": _Weight("weight")},
}
"""Of each class of layers its parameters; a transposed convolution's kernel is (height, width, out, in) in ours."""

_IGNORED = {"num_batches_tracked"}
_EPSILON = 1e-5
"""PyTorch's, of all normalizations."""


def load(layer: Any, source: Any, prefix: str = "", *, key: str | None = None, flattened: Any = None) -> None:
    """Give a layer the weights of a layer of PyTorch; `Layer.load_torch` tells the rest."""
    op = f"{type(layer).__name__}.load_torch"
    row = ROWS.get(type(layer).__name__)
    if row is None:
        raise ValueError(f"{op}: only {shown(ROWS, len(ROWS))} load PyTorch's weights by themselves; of a container "
                         f"load each of its layers, and a ConvLSTM is made by from_torch")  # fmt: skip
    if flattened is not None and "out_features" not in layer.options:
        raise ValueError(f"{op}: flattened=… is for a Dense that stands after Flatten; leave it out")
    state = state_dict(op, source, key)
    start = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    if not any(name.startswith(start) for name in state):
        start = start.removeprefix("module.")
    own = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    direct = {name for name in own if "." not in name} - _IGNORED
    needed = {name: row[name] for name in layer.parameters}
    missing = [start + weight.name for weight in needed.values() if weight.name not in direct]
    unknown = [start + name for name in sorted(direct - {weight.name for weight in needed.values()})]
    if missing or unknown:
        has = f"; it has {shown(own)}" if missing else ""
        advice = "; perhaps use_bias, or center and scale, is another" if bool(missing) != bool(unknown) else ""
        names = f"missing {shown(missing)}, unknown {shown(unknown)}"
        raise ValueError(f"{op}: {names} under prefix={start!r}{has}{advice}")
    arrays = {
        name: _native(op, layer, name, weight, start, array(op, start + weight.name, own[weight.name]), flattened)
        for name, weight in needed.items()
    }
    epsilon = getattr(layer, "epsilon", _EPSILON)
    if epsilon != _EPSILON:
        warnings.warn(f"{op}: epsilon is {epsilon}, and PyTorch's is {_EPSILON} unless a module was made with another, "
                      f"which weights do not tell", UserWarning, stacklevel=3)  # fmt: skip
    layer.set_parameters(arrays)


def _native(
    op: str, layer: Any, name: str, weight: _Weight, start: str, given: np.ndarray, flattened: Any
) -> np.ndarray:
    """Return a weight of PyTorch's as the layer's parameter."""
    shape: Shape = layer.parameters[name].shape
    axes = weight.axes
    if len(shape) > 1 and axes is None and layer.options.get("shape") is not None:  # frames: (…, C, H, W) there
        axes = (*range(len(shape) - 3), -2, -1, -3) if len(shape) > 2 else None
    order = None if axes is None else tuple(axis % len(shape) for axis in axes)
    expected = shape if order is None else tuple(shape[order.index(axis)] for axis in range(len(shape)))
    if given.shape == shape and weight.axes is None:  # of frames that are channels_first in ours too
        order = None if given.shape != expected else order
    elif given.shape != expected:
        legend = f", {weight.legend}" if weight.legend else ""
        raise ValueError(f"{op}: {start}{weight.name} has shape {given.shape}, but the layer's options ask for "
                         f"{expected}{legend}")  # fmt: skip
    if flattened is not None and name == "kernel":
        given = _reflattened(op, given, flattened)
    return given if order is None else given.transpose(order)


def _reflattened(op: str, weight: np.ndarray, flattened: Any) -> np.ndarray:
    """Bring the features (…, C, H, W) of a weight (out, in) into the order (…, H, W, C)."""
    sizes = tuple(flattened) if isinstance(flattened, tuple | list) else ()
    if len(sizes) < 3 or not all(isinstance(n, int) for n in sizes) or np.prod(sizes) != weight.shape[1]:
        raise ValueError(f"{op}: flattened must be the sizes (…, channels, height, width) of what PyTorch flattened to "
                         f"the layer's {weight.shape[1]} features, got {flattened!r}")  # fmt: skip
    return np.moveaxis(weight.reshape(-1, *sizes), -3, -1).reshape(weight.shape)


def state_dict(op: str, source: Any, key: str | None) -> Mapping[str, Any]:
    """Return the tensors, by name, in a file, a mapping, a checkpoint or anything that has a method state_dict.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        There is no state_dict, or several.
    TypeError
        Something else.
    """
    if isinstance(source, str | os.PathLike):
        return torch_files.read(source, key)
    if hasattr(source, "state_dict"):
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise TypeError(f"{op}: source must be a path, a mapping of names to tensors or arrays, or a module, "
                        f"got {type(source).__name__}")  # fmt: skip
    return torch_files.plain_names(torch_files.find_state_dict(f"{op}: the source", source, key, _tensors))


def _tensors(value: Any) -> dict[str, Any]:
    """Return the tensors and arrays in a mapping or in what has a state_dict."""
    value = value.state_dict() if hasattr(value, "state_dict") else value
    if not isinstance(value, Mapping):
        return {}
    return {n: v for n, v in value.items() if isinstance(n, str) and (hasattr(v, "shape") or isinstance(v, list))}


def array(op: str, name: str, value: Any) -> np.ndarray:
    """Return a tensor or array as an array of NumPy's."""
    if hasattr(value, "detach") and not value.is_meta:  # a tensor, perhaps a parameter, perhaps on another device
        value = value.detach().cpu()
    return dispatch.as_numpy(op, name, value)

"""What several layers are made of in ONNX: activations, convolutions, normalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastclstm.convert.onnx_builder import Builder, Size, Value
from fastclstm.nn import activations
from fastclstm.spec import window_padding

Lengths = Callable[[int], Size]
"""The size of each axis of frames, their batch and channels aside."""

ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "hard_sigmoid_keras2": ("HardSigmoid", {"alpha": 0.2, "beta": 0.5}),
    "relu": ("Relu", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": activations.LEAKY_RELU_SLOPE}),
    "elu": ("Elu", {"alpha": 1.0}),
    "selu": ("Selu", {"alpha": activations.SELU_ALPHA, "gamma": activations.SELU_SCALE}),
    "gelu": ("Gelu", {}),
    "softplus": ("Softplus", {}),
    "softsign": ("Softsign", {}),
    "exponential": ("Exp", {}),
    "mish": ("Mish", {}),
}
"""Those that are one operator: the others are `silu`, `relu6` and `linear`."""


def activate(g: Builder, spec: Any, x: Value) -> Value:
    """Return an activation of x; softmax is over the last of our axes."""
    if isinstance(spec, str) and spec == "softmax":
        return g.elementwise("Softmax", x, axis=x.order[-1])
    if not activations.is_named(spec):
        name = activations.get(spec).name
        raise ValueError(
            f"to_onnx: the activation {name!r} is a function of yours, of which ONNX knows nothing; take one with a "
            f"name ({', '.join(activations.TABLE)})"
        )
    name = activations.get(spec).name
    if name == "linear":
        return x
    if name == "silu":
        return g.elementwise("Mul", x, g.elementwise("Sigmoid", x))
    if name == "relu6":
        return g.elementwise("Clip", x, 0.0, 6.0)
    kind, attributes = ACTIVATIONS[name]
    return g.elementwise(kind, x, **attributes)


def to_channels_first(g: Builder, x: Value) -> Value:
    """Return (B, …, C) as (B, C, …)."""
    return g.move(x, x.rank - 1, 1)


def to_channels_last(g: Builder, x: Value) -> Value:
    """Return (B, C, …) as (B, …, C)."""
    return g.move(x, 1, x.rank - 1)


def lengths(g: Builder, x: Value) -> Lengths:
    """Return the sizes of what is between batch and channels of x (N, C, …), computed where they are asked for."""
    return lambda axis: g.length(x, axis + 2)


def paddings(
    g: Builder, sizes: Lengths, padding: Any, window: Sequence[int], strides: Sequence[int]
) -> list[tuple[Size, Size]]:
    """Return how frames are padded: where "same" strides over sizes that are not known, by what is computed of them."""
    if padding != "same" or max(strides) == 1:
        given = window_padding("to_onnx", padding, (1,) * len(window), tuple(window), tuple(strides))
        return [(before, after) for before, after in given]
    pairs = []
    for axis, (k, s) in enumerate(zip(window, strides, strict=True)):
        n = sizes(axis)
        reach = g.count("Add", g.count("Mul", g.count("Div", g.count("Sub", n, 1), s), s), k)  # of all windows
        total = g.count("Max", g.count("Sub", reach, n), 0)
        before = g.count("Div", total, 2)
        pairs.append((before, g.count("Sub", total, before)))
    return pairs


def padding_attributes(
    g: Builder, x: Value, padding: Any, window: Sequence[int], strides: Sequence[int]
) -> dict[str, Any]:
    """Return what tells an operator of ONNX how it is to pad x (N, C, …)."""
    if padding == "same" and max(strides) > 1 and None in x.shape[2:]:
        return {"auto_pad": "SAME_UPPER"}
    pairs = paddings(g, lengths(g, x), padding, window, strides)
    return {"pads": [pair[end] for end in (0, 1) for pair in pairs]}


def output_sizes(g: Builder, sizes: Lengths, padding: Any, window: Sequence[int], strides: Sequence[int]) -> list[Size]:
    """Return how many windows fit on each axis of frames."""
    if padding == "same":
        return [ceil(g, sizes(axis), s) for axis, s in enumerate(strides)]
    made = []
    pairs = paddings(g, sizes, padding, window, strides)
    for axis, ((before, after), k, s) in enumerate(zip(pairs, window, strides, strict=True)):
        padded = g.count("Add", sizes(axis), g.count("Add", before, after))
        made.append(g.count("Add", g.count("Div", g.count("Sub", padded, k), s), 1))
    return made


def ceil(g: Builder, n: Size, s: int) -> Size:
    """Return n / s, rounded up."""
    return g.count("Div", g.count("Add", n, s - 1), s)


def windows(kernel_size: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return how far dilated kernels reach."""
    return [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]


def convolve(
    g: Builder, x: Value, kernel: np.ndarray, bias: np.ndarray | None = None, *, strides: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None, padding: Any = "same", padding_mode: str = "zeros", groups: int = 1,
) -> Value:  # fmt: skip
    """Convolve x (N, C, …) with a kernel (…, C / groups, F)."""
    count = kernel.ndim - 2
    strides, dilation = strides or (1,) * count, dilation or (1,) * count
    window = windows(kernel.shape[:count], dilation)
    options: dict[str, Any] = {}
    if padding_mode == "circular":
        x = g.wrap(x, dict(enumerate(paddings(g, lengths(g, x), padding, window, strides), 2)))
    else:
        options = padding_attributes(g, x, padding, window, strides)
    weights = kernel.transpose(count + 1, count, *range(count))
    return g.node("Conv", x, weights, *([] if bias is None else [bias]), strides=strides, dilations=dilation,
                  kernel_shape=kernel.shape[:count], group=groups, **options)  # fmt: skip


def normalize_groups(g: Builder, x: Value, groups: int, epsilon: float, gamma: np.ndarray, beta: np.ndarray) -> Value:
    """Normalize each group of channels of each sample of x (N, C, …)."""
    stash = g.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(x.dtype))
    return g.node("GroupNormalization", x, gamma, beta, num_groups=groups, epsilon=epsilon, stash_type=stash)


def where(g: Builder, valid: Value, new: Value, old: Value | float) -> Value:
    """Return `new` where `valid` (B,) is True, `old` elsewhere."""
    names = [g.unsqueeze(valid, range(1, new.rank)).name, g.plain(new)]
    names.append(g.plain(old) if isinstance(old, Value) else g.constant(np.asarray(old, new.dtype)))
    (name,) = g.several("Where", names, 1)
    return Value(name, new.dtype, tuple(range(new.rank)), new.shape)

"""Tables that the kernels read: the taps of a convolution or of its transpose, and numbers for names."""

from __future__ import annotations

import numpy as np

from fastclstm.nn import activations
from fastclstm.spec import ConvLSTMSpec, ConvSpec, Pair

ACTIVATIONS = (
    "tanh", "sigmoid", "hard_sigmoid", "hard_sigmoid_keras2", "relu", "leaky_relu", "elu", "selu", "gelu", "silu",
    "softplus", "softsign", "exponential", "linear", "relu6", "mish",
)  # fmt: skip
"""Names in the order of `Activation` in csrc/activations.cuh."""

STANDARD = (ACTIVATIONS.index("sigmoid"), ACTIVATIONS.index("tanh"), ACTIVATIONS.index("tanh"))
"""Codes (of the gates, of g, of the cell) that kernels have compiled in."""


def activation_codes(spec: ConvLSTMSpec) -> tuple[int, int, int] | None:
    """Return the codes of the activations of the gates, of g and of the cell; None if one is a caller's own."""
    used = spec.recurrent_activation, spec.activation, spec.output_activation
    if not all(map(activations.is_named, used)):
        return None
    gates, g, cell = (ACTIVATIONS.index(activation.name) for activation in used)
    return gates, g, cell


def taps(spec: ConvSpec, channels: int | None = None) -> np.ndarray:
    """Return what each step of the depth of a convolution's product reads: (KH · KW · channels, 4) int32.

    A row is (rows, columns) from the pixel that the output pixel stands on, the channel, and the number of the weight
    among KH · KW, -1 where frames padded to `channels` hold nothing.
    """
    channels = spec.C if channels is None else channels
    (top, _), (left, _) = spec.padding
    kh, kw = np.divmod(np.arange(spec.KH * spec.KW), spec.KW)
    return _table(kh * spec.dilation[0] - top, kw * spec.dilation[1] - left, np.arange(kh.size), spec.C, channels)


def transposed_taps(spec: ConvSpec, channels: int | None = None) -> np.ndarray:
    """Return the same of the transpose, which gives dx of dy (B, HO, WO, F): (…, 4) int32.

    Offsets are in pixels of dy times the strides: those that the strides do not divide hold nothing. A circular
    convolution whose padding repeats pixels has taps for each turn around the frame.
    """
    channels = spec.F if channels is None else channels
    turns = [[0], [0]]
    if spec.padding_mode == "circular" and not wraps(spec):
        turns = [
            list(range(-((before + n - 1) // n), (after + n - 1) // n + 1))
            for (before, after), n in zip(spec.padding, (spec.H, spec.W), strict=True)
        ]
    (top, _), (left, _) = spec.padding
    number = np.arange(spec.KH * spec.KW)
    kh, kw = np.divmod(number, spec.KW)
    blocks = [
        _table(top + down * spec.H - kh * spec.dilation[0], left + right * spec.W - kw * spec.dilation[1], number,
               spec.F, channels)
        for down in turns[0]
        for right in turns[1]
    ]  # fmt: skip
    return np.concatenate(blocks)


def wraps(spec: ConvSpec) -> bool:
    """Whether the transpose of a circular convolution is one too: each pixel stands once under every tap."""
    reach = _reach(spec)
    return (
        spec.padding_mode == "circular"
        and spec.strides == (1, 1)
        and all(sum(pads) == n for pads, n in zip(spec.padding, reach, strict=True))
    )


def padded_to_blocks(table: np.ndarray, depth: int) -> np.ndarray:
    """Return a table with rows of nothing up to a multiple of `depth`."""
    missing = -len(table) % depth
    return np.concatenate([table, np.full((missing, 4), [0, 0, 0, -1], np.int32)])


def _reach(spec: ConvSpec) -> Pair:
    return (spec.KH - 1) * spec.dilation[0], (spec.KW - 1) * spec.dilation[1]


def _table(rows: np.ndarray, columns: np.ndarray, numbers: np.ndarray, used: int, channels: int) -> np.ndarray:
    table = np.empty((len(rows), channels, 4), np.int32)
    table[..., 0], table[..., 1], table[..., 3] = rows[:, None], columns[:, None], numbers[:, None]
    table[..., 2] = np.arange(channels)
    table[:, used:, 3] = -1
    return table.reshape(-1, 4)

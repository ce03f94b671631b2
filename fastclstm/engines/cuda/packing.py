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
    gates, g, cell = [ACTIVATIONS.index(activation.name) for activation in used]
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


def by_chunks(table: np.ndarray, channels: int, depth: int, fewest: int) -> tuple[np.ndarray, int]:
    """Return the rows of a table in the order of csrc/halo.cuh, and how many blocks all channels of a chunk take.

    A chunk is `depth` channels: of each tap all of them one after the other, up to a multiple of the quarter that one
    product takes; then rows of nothing up to whole blocks of `depth`, `fewest` of them at least. Only the last chunk
    may have fewer channels.
    """
    taps = table.reshape(-1, channels, 4)
    chunks = []
    for first in range(0, channels, depth):
        chunk = taps[:, first : first + depth]
        missing = -chunk.shape[1] % (depth // 4)
        beyond = np.repeat(chunk[:, -1:], missing, axis=1)
        beyond[..., 3] = -1
        rows = np.concatenate([chunk, beyond], axis=1).reshape(-1, 4)
        chunks.append(padded_to_blocks(rows, depth, fewest))
    return np.concatenate(chunks), max(len(taps), fewest)


def halo_offsets(table: np.ndarray, depth: int, corner: Pair, size: Pair) -> np.ndarray:
    """Return where in a halo each product of a table `by_chunks` begins, by 16 bytes: (blocks, 4) int32.

    corner: the first row and column of the halo, seen from the first pixel of the tile; size: its rows and columns.
    """
    plane = size[0] * size[1] | 1
    product = depth // 4
    first = table[::product]
    pixels = (first[:, 0] - corner[0]) * size[1] + first[:, 1] - corner[1]
    offsets = pixels + first[:, 2] % depth // product * (2 * plane)
    nothing = first[:, 3] < 0  # read zeros, of channels that are not there
    return np.where(nothing, 6 * plane, offsets).astype(np.int32).reshape(-1, 4)


def wraps(spec: ConvSpec) -> bool:
    """Whether the transpose of a circular convolution is one too: each pixel stands once under every tap."""
    reach = _reach(spec)
    return (
        spec.padding_mode == "circular"
        and spec.strides == (1, 1)
        and all(sum(pads) == n for pads, n in zip(spec.padding, reach, strict=True))
    )


def padded_to_blocks(table: np.ndarray, depth: int, fewest: int = 0) -> np.ndarray:
    """Return a table with rows of nothing up to a multiple of `depth`, and up to `fewest` of them."""
    missing = max(-(-len(table) // depth), fewest) * depth - len(table)
    return np.concatenate([table, np.full((missing, 4), [0, 0, 0, -1], np.int32)])


def _reach(spec: ConvSpec) -> Pair:
    return (spec.KH - 1) * spec.dilation[0], (spec.KW - 1) * spec.dilation[1]


def _table(rows: np.ndarray, columns: np.ndarray, numbers: np.ndarray, used: int, channels: int) -> np.ndarray:
    table = np.empty((len(rows), channels, 4), np.int32)
    table[..., 0], table[..., 1], table[..., 3] = rows[:, None], columns[:, None], numbers[:, None]
    table[..., 2] = np.arange(channels)
    table[:, used:, 3] = -1
    return table.reshape(-1, 4)

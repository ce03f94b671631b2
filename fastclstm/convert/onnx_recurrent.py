"""Recurrent layers in ONNX: each is a Scan over time.

A Scan reads a sequence from its beginning or its end, and writes so too, which is all that go_backwards and
bidirectional ask for: stacked layers are one Scan, and so are two directions, halves that know nothing of each other.

Within it everything is (B, C, H, W), of vectors (B, N), and sequences are (T, B, …). A step convolves [x, h] at once
where both convolutions have the same geometry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastclstm.convert.onnx_builder import LAST, Builder, Size, Value
from fastclstm.convert.onnx_export import Export
from fastclstm.convert.onnx_operators import (
    activate,
    convolve,
    lengths,
    normalize_groups,
    output_sizes,
    paddings,
    where,
    windows,
)
from fastclstm.layers import (
    GRU,
    LSTM,
    ConvGRU2DCell,
    ConvLSTM2DCell,
    ConvLSTM3DCell,
    ConvRNN2DCell,
)
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.layers.recurrent import Recurrent
from fastclstm.layers.recurrent_cell import RecurrentCell
from fastclstm.layers.states import each_state
from fastclstm.layers.symbolic import Known, tried
from fastclstm.spec import GATES, NORMALIZED_PARTS, Shape, integers

Take = Callable[[Builder, Value, list[Value]], tuple[Value, list[Value]]]
"""Takes an item of a sequence and states; returns the output and the states after it."""


@dataclass(frozen=True)
class Chain:
    """Cells, one on the other, that go through a sequence in one direction."""

    take: Take
    backwards: bool
    states: list[Value]
    hidden: int
    """Which of them has the shape of the output."""


def run(
    g: Builder, sequence: Value, mask: Value | None, chains: Sequence[Chain], *, return_sequences: bool,
    zero_output_for_mask: bool = False,
) -> tuple[list[Value], list[list[Value]]]:  # fmt: skip
    """Run chains over a sequence (T, B, …) in one Scan; return the output of each, and its last states.

    Sequences come out in the order in which the first chain computes them. Where the mask (T, B) is False states stay,
    and an output is the one before, zeros before the first, or with `zero_output_for_mask` zeros everywhere.
    """
    masked = mask is not None
    sequences = [(each, chain.backwards) for chain in chains for each in (sequence, mask) if each is not None]
    states: list[Value] = []
    for chain in chains:
        states += chain.states
        if masked:  # the output so far
            like = chain.states[chain.hidden]
            states.append(g.full([g.length(like, axis) for axis in range(like.rank)], like.dtype))

    def body(inner: Builder, before: list[Value], items: list[Value]) -> tuple[list[Value], list[Value]]:
        after: list[Value] = []
        made: list[Value] = []
        for number, chain in enumerate(chains):
            count = len(chain.states)
            own = before[len(after) : len(after) + count]
            output, new = chain.take(inner, items[number * (1 + masked)], own)
            if masked:
                valid, held = items[number * 2 + 1], before[len(after) + count]
                new = [where(inner, valid, n, old) for n, old in zip(new, own, strict=True)]
                held = where(inner, valid, output, held)
                output = where(inner, valid, output, 0.0) if zero_output_for_mask else held
                new.append(held)
            after += new
            made.append(output)
        return after, made if return_sequences else []

    directions = [chain.backwards != chains[0].backwards for chain in chains] if return_sequences else []
    last, outputs = g.scan(body, states, sequences, directions)
    ends: list[list[Value]] = []
    for chain in chains:
        start = sum(len(end) for end in ends) + masked * len(ends)
        ends.append(last[start : start + len(chain.states)])
        if not return_sequences:
            output = last[start + len(chain.states)] if masked else ends[-1][chain.hidden]
            if mask is not None and zero_output_for_mask:
                step = g.node("Gather", mask, np.array(0 if chain.backwards else -1), axis=0, rank=1)
                output = where(g, step, output, 0.0)
            outputs.append(output)
    return outputs, ends


def steps_mask(g: Builder, mask: Value | None, lengths: Value | None, sequence: Value) -> Value | None:
    """Return the mask (T, B) of a mask (B, T), or of lengths (B,), for a sequence (T, B, …)."""
    if lengths is not None:
        steps = g.unsqueeze(g.range(0, g.length(sequence, 0)), [1])
        return g.node("Less", steps, g.unsqueeze(g.cast(lengths, "int64"), [0]), dtype="bool")
    return None if mask is None else g.transpose(g.cast(mask, "bool"), (1, 0))


def _expect_states(e: Export, layer: ConvRecurrent | Recurrent) -> None:
    if layer.stateful and not e.wants_states:
        raise ValueError("to_onnx: the layer is stateful, but a graph of ONNX remembers nothing between calls; give "
                         "states=True, which makes its states inputs and outputs, or set stateful=False")  # fmt: skip


def _gates(g: Builder, layer: Any, z: Sequence[Value], c: Value, peep: Callable[[str, Value, Value], Value]) -> Any:
    """Return h and c of the pre-activations of i, f, g, o; `peep` is what a gate sees of the cell."""
    squash, (z_i, z_f, z_g, z_o) = partial(activate, g, layer.recurrent_activation), z
    i, f = squash(peep("i", z_i, c)), squash(peep("f", z_f, c))
    new = g.elementwise("Mul", i, activate(g, layer.activation, z_g))
    c = g.elementwise("Add", g.elementwise("Mul", f, c), new)
    if (clip := getattr(layer, "cell_clip", None)) is not None:
        c = g.elementwise("Clip", c, -clip, clip)
    told = getattr(layer, "output_activation", None)
    o = squash(peep("o", z_o, c))
    return g.elementwise("Mul", o, activate(g, layer.activation if told is None else told, c)), c


# Convolutional layers


def convolutional(
    e: Export, layer: ConvRecurrent, x: Value, initial_state: Any = None, mask: Value | None = None,
    lengths: Value | None = None,
) -> Any:  # fmt: skip
    """Convert a ConvLSTM2D or its like: to one Scan, or where both directions are stacked one a layer."""
    g = e.g
    _expect_states(e, layer)
    frames = _read(g, layer, x, 2)
    if layer.in_channels == 0:
        frames = g.full([1 if axis == 2 else g.length(frames, axis) for axis in range(frames.rank)], frames.dtype)
    if layer.time_major:
        mask = None if mask is None else g.transpose(mask, (1, 0))
    else:
        frames = _swapped(g, frames)
    steps = steps_mask(g, mask, lengths, frames)
    given = _given_states(e, layer, x, initial_state)
    before = _filled_states(g, layer, given, frames)
    slope, each, width = layer.leaky_relu_slope, layer._stack.layers, len(layer._state_names)
    groups = [[[cell] for cell in one.cells] for one in each] if layer.bidirectional else [[list(layer.cells)]]
    last: list[Value] = []
    made = [frames]
    for index, directions in enumerate(groups):
        final, y = index == len(groups) - 1, made[0]
        if index and slope is not None:
            y = g.elementwise("LeakyRelu", y, alpha=slope)
        chains = []
        for number, cells in enumerate(directions):
            states, before = before[: width * len(cells)], before[width * len(cells) :]
            backwards = (layer.go_backwards and index == 0) != bool(number)
            chains.append(Chain(partial(_through, cells, slope), backwards, states, -width))
        outputs, ends = run(g, y, steps, chains, return_sequences=layer.return_sequences or not final,
                            zero_output_for_mask=layer.zero_output_for_mask and final)  # fmt: skip
        made = _merged(g, outputs, layer.merge_mode, frames.rank - 2)
        last += [state for end in ends for state in end]
        if index == 0 and steps is not None and layer.go_backwards:
            steps = g.slice(steps, {0: (-1, -LAST, -1)})  # what the first layer hands on is as it was processed
    after = [_written(g, layer, state) for state in last]
    e.keep_states(given, after)
    if layer.return_sequences and not layer.time_major:
        made = [_swapped(g, part) for part in made]
    written = tuple(_written(g, layer, part) for part in made)
    result = written if len(written) > 1 else written[0]
    by_cell = [tuple(after[n : n + width]) for n in range(0, len(after), width)]
    return (result, by_cell) if layer.return_state else result


def one_step(e: Export, cell: RecurrentCell, x: Value, states: Sequence[Value]) -> list[Value]:
    """Convert one step of a cell; return the states after it."""
    x, *states = (_read(e.g, cell, value, 1) for value in (x, *states))
    return [_written(e.g, cell, state) for state in _STEPS[type(cell)](g=e.g, cell=cell, x=x, states=states)]


def _read(g: Builder, layer: ConvRecurrent | RecurrentCell, value: Value, leading: int) -> Value:
    """Return sequences (B, T, C, H, W), or frames, of a caller's; rows are frames of a height of 1."""
    first = value if layer.data_format == "channels_first" else g.move(value, value.rank - 1, leading)
    return g.unsqueeze(first, [leading + 1]) if layer._rank == 1 else first


def _swapped(g: Builder, x: Value) -> Value:
    """Return (B, T, …) as (T, B, …), and the other way round."""
    return g.transpose(x, (1, 0, *range(2, x.rank)))


def _written(g: Builder, layer: ConvRecurrent | RecurrentCell, value: Value) -> Value:
    """Return (…, C, H, W) as the layer has it."""
    if layer._rank == 1:
        value = g.squeeze(value, value.rank - 2)
    if layer.data_format == "channels_first":
        return value
    return g.move(value, value.rank - 1 - layer._rank, value.rank - 1)


def _merged(g: Builder, outputs: list[Value], mode: str | None, axes: int) -> list[Value]:
    """Return both directions' outputs as one, of which the last `axes` are those of a frame, or as they are."""
    if len(outputs) == 1 or mode is None:
        return outputs
    if mode == "concat":
        return [g.concatenate(outputs, outputs[0].rank - axes)]
    merged = g.elementwise("Mul" if mode == "mul" else "Add", *outputs)
    return [g.elementwise("Mul", merged, 0.5) if mode == "ave" else merged]


def _given_states(e: Export, layer: ConvRecurrent, x: Value, initial_state: Any) -> list[Value | None]:
    """Return the states of every cell that a call is given, or that are inputs of the graph, as the layer has them."""
    count, each = len(layer.cells), layer._state_names
    if initial_state is None:
        names = [f"{cell}.{name}" for cell in range(count) for name in each]

        def shapes(shape: Shape) -> list[Shape]:
            layout = layer._layout(shape)
            B, _, *frame = layout.read_shape("x", shape, sequence=True)
            return [layout.shape(state) for state in layer._state_shapes((B, *frame)) for _ in each]

        flat = e.state(names, tried(shapes, x.shape), x.dtype)
    else:
        states = each_state("to_onnx", "initial_state", initial_state, each, count, layer._each)
        flat = [value for state in states for value in (state or (None,) * len(each))]
    return flat


def _filled_states(g: Builder, layer: ConvRecurrent, given: Sequence[Value | None], sequence: Value) -> list[Value]:
    """Return the states (B, F, H, W), zeros where none are given."""
    read = [s if s is None else _read(g, layer, g.cast(s, sequence.dtype), 1) for s in given]
    if all(state is not None for state in read):
        return [state for state in read if state is not None]
    zeros: list[Value] = []
    sizes: list[Size] = [g.length(sequence, axis) for axis in range(3, sequence.rank)]
    for one in layer._stack.layers:
        for cell in one.cells:
            strides, window, _ = _geometry(cell)
            made = output_sizes(g, sizes.__getitem__, cell.padding, window, strides)
            zero = g.full([g.length(sequence, 1), cell.out_channels, *made], sequence.dtype)
            zeros += [zero] * len(layer._state_names)
        sizes = made
    return [zero if state is None else state for state, zero in zip(read, zeros, strict=True)]


def _geometry(cell: RecurrentCell) -> tuple[Shape, Shape, Shape]:
    """Return strides, dilated extent and dilation of the input's convolution."""
    size = cell.kernel.shape[:-2]
    strides, dilation = (integers("to_onnx", "stride", n, len(size), 1) for n in (cell.stride, cell.dilation))
    return strides, tuple(windows(size, dilation)), dilation


def _through(
    cells: Sequence[RecurrentCell], slope: float | None, g: Builder, x: Value, states: list[Value]
) -> tuple[Value, list[Value]]:
    """Take x through cells one on the other, each with as many of the states."""
    after: list[Value] = []
    for number, cell in enumerate(cells):
        if number and slope is not None:
            x = g.elementwise("LeakyRelu", x, alpha=slope)
        own = states[len(after) : len(after) + len(states) // len(cells)]
        x, *others = _STEPS[type(cell)](g=g, cell=cell, x=x, states=own)
        after += [x, *others]
    return x, after


def _lstm_step(g: Builder, cell: Any, x: Value, states: Sequence[Value]) -> list[Value]:
    """Return h and c of a step."""
    h, c = states
    parts = g.split(_pre_activations(g, cell, x, h), len(GATES), 1)
    return list(_gates(g, cell, parts, c, partial(_peep, g, cell)))


def _rnn_step(g: Builder, cell: Any, x: Value, states: Sequence[Value]) -> list[Value]:
    """Return h of a step."""
    return [activate(g, cell.activation, _pre_activations(g, cell, x, states[0]))]


def _gru_step(g: Builder, cell: Any, x: Value, states: Sequence[Value]) -> list[Value]:
    """Return h of a step."""
    strides, _, dilation = _geometry(cell)
    recurrent_dilation = integers("to_onnx", "recurrent_dilation", cell.recurrent_dilation, len(strides), 1)
    options = {"strides": strides, "dilation": dilation, "padding": cell.padding, "padding_mode": cell.padding_mode}
    of_x = partial(convolve, g, **options)
    of_h = partial(convolve, g, dilation=recurrent_dilation, padding_mode=cell.padding_mode)
    normalized = None if cell.normalization is None else partial(_normalized, g, cell, part="")
    return [_gru(g, cell, of_x, of_h, x, states[0], normalized)]


def _pre_activations(g: Builder, cell: Any, x: Value, h: Value) -> Value:
    """Return the convolutions of x and of h with the bias, normalized."""
    strides, window, dilation = _geometry(cell)
    recurrent_dilation = integers("to_onnx", "recurrent_dilation", cell.recurrent_dilation, len(window), 1)
    options = {"strides": strides, "dilation": dilation, "padding": cell.padding, "padding_mode": cell.padding_mode}
    of_h = {"dilation": recurrent_dilation, "padding_mode": cell.padding_mode}
    how, bias = cell.normalization, cell.bias
    separate = how is not None and how.separate
    same = paddings(g, lengths(g, h), "same", window, (1,) * len(window))
    kernel = _kernel(cell)
    if (
        not separate
        and max(strides) == 1
        and (kernel.shape[:-2], dilation) == (cell.recurrent_kernel.shape[:-2], recurrent_dilation)
        and paddings(g, lengths(g, x), cell.padding, window, strides) == same
    ):
        both = np.concatenate([kernel, cell.recurrent_kernel], -2)
        z = convolve(g, g.concatenate([x, h], 1), both, bias, **options)
    else:
        z_x = convolve(g, x, kernel, None if separate else bias, **options)
        z_h = convolve(g, h, cell.recurrent_kernel, **of_h)
        if separate:
            of_x, of_h_ = NORMALIZED_PARTS[True]
            z_x, z_h = _normalized(g, cell, z_x, of_x), _normalized(g, cell, z_h, of_h_)
        z = g.elementwise("Add", z_x, z_h)
        if separate and bias is not None:
            z = g.elementwise("Add", z, _by_channel(bias, z))
    return z if how is None or separate else _normalized(g, cell, z, "")


def _kernel(cell: Any) -> np.ndarray:
    """Return the kernel of x, of one channel where a cell reads none: no convolution in ONNX has none."""
    *size, C, width = cell.kernel.shape
    return cell.kernel if C else np.zeros((*size, 1, width), cell.kernel.dtype)


def _normalized(g: Builder, cell: Any, z: Value, part: str, columns: slice = slice(None)) -> Value:
    """Return normalized pre-activations, or the `columns` of them that z is."""
    how, have = cell.normalization, cell._parameters
    gamma, beta = (have[f"{name}{part}"][..., columns] for name in ("gamma", "beta"))
    if how.kind == "batch":
        return g.node("BatchNormalization", z, gamma, beta, have[f"moving_mean{part}"], have[f"moving_variance{part}"],
                      epsilon=how.epsilon)  # fmt: skip
    width = cell.kernel.shape[-1]
    groups = 1 if how.kind == "layer" else (how.groups or width // cell.out_channels) * gamma.shape[-1] // width
    if not getattr(how, "elementwise", False):
        return normalize_groups(g, z, groups, how.epsilon, gamma, beta)
    ones = np.ones(gamma.shape[-1:], gamma.dtype)
    z = normalize_groups(g, z, groups, how.epsilon, ones, 0 * ones)
    return g.elementwise("Add", g.elementwise("Mul", z, _by_channel(gamma, z)), _by_channel(beta, z))


def _peep(g: Builder, cell: Any, gate: str, z: Value, c: Value) -> Value:
    """Return z with what its gate sees of the cell."""
    kind = getattr(cell, "peephole", None)
    if kind is None:
        return z
    weight = cell._parameters[f"peephole_{gate}"]
    if kind == "conv":
        bias = cell._parameters.get(f"peephole_bias_{gate}")
        return g.elementwise("Add", z, convolve(g, c, weight, bias, padding_mode=cell.padding_mode))
    return g.elementwise("Add", z, g.elementwise("Mul", c, _by_channel(weight, c)))


def _by_channel(weights: np.ndarray, like: Value) -> np.ndarray:
    """Return weights (F,) or (HO, WO, F) so that they broadcast against (B, F, HO, WO)."""
    return np.moveaxis(weights.reshape((1,) * (like.rank - 1 - weights.ndim) + weights.shape), -1, 0)


_STEPS: dict[type, Callable[..., list[Value]]] = {
    ConvGRU2DCell: _gru_step, ConvLSTM2DCell: _lstm_step, ConvLSTM3DCell: _lstm_step, ConvRNN2DCell: _rnn_step,
}  # fmt: skip


# LSTM and GRU over vectors


def recurrent(
    e: Export, layer: Recurrent, x: Value, initial_state: Any = None, mask: Value | None = None,
    lengths: Value | None = None,
) -> Any:  # fmt: skip
    """Convert an LSTM or a GRU."""
    g, names = e.g, layer._state_names
    _expect_states(e, layer)
    sequence = g.transpose(x, (1, 0, 2))
    shape: Known = (x.shape[0], layer.units)
    if initial_state is None:
        given = e.state(names, [shape] * len(names), x.dtype)
    else:
        flat = layer._in_order(initial_state, lambda item: not isinstance(item, list | tuple))
        given = [state if state is None else g.cast(state, x.dtype) for state in flat]
    before = [g.full([g.length(x, 0), layer.units], x.dtype) if state is None else state for state in given]
    take: Take = partial(_OF_VECTORS[type(layer)], layer)
    chain = Chain(take, layer.go_backwards, before, -len(names))
    outputs, (after,) = run(
        g, sequence, steps_mask(g, mask, lengths, sequence), [chain], return_sequences=layer.return_sequences
    )
    e.keep_states(given, after)
    y = g.transpose(outputs[0], (1, 0, 2)) if layer.return_sequences else outputs[0]
    return (y, [tuple(after)]) if layer.return_state else y


def _product(g: Builder, a: Value, kernel: np.ndarray, bias: np.ndarray | None = None) -> Value:
    made = g.node("MatMul", a, kernel)
    return made if bias is None else g.elementwise("Add", made, bias)


def _lstm_of_vectors(layer: LSTM, g: Builder, x: Value, states: list[Value]) -> tuple[Value, list[Value]]:
    h, c = states
    kernel = np.concatenate([layer.kernel, layer.recurrent_kernel])
    z = _product(g, g.concatenate([x, h], 1), kernel, layer.bias)
    h, c = _gates(g, layer, g.split(z, len(GATES), 1), c, lambda gate, z, c: z)
    return h, [h, c]


def _gru_of_vectors(layer: GRU, g: Builder, x: Value, states: list[Value]) -> tuple[Value, list[Value]]:
    h = _gru(g, layer, partial(_product, g), partial(_product, g), x, states[0])
    return h, [h]


def _gru(
    g: Builder, layer: Any, of_x: Callable[..., Value], of_h: Callable[..., Value], x: Value, h: Value,
    normalized: Callable[..., Value] | None = None,
) -> Value:  # fmt: skip
    """Take a step of `functional.gru.gru_vjp`, with the products, or convolutions, of x and of h by kernels given."""
    bias, R = layer.bias, layer.recurrent_kernel
    F = R.shape[-1] // 3
    parts = slice(0, 2 * F), slice(2 * F, 3 * F)  # of z and r, and of n
    bias_x, bias_h = (None, None) if bias is None else (bias[0], bias[1]) if layer.reset_after else (bias, None)
    zx = of_x(x, _kernel(layer), bias_x)
    gates_x, n_x = (g.slice(zx, {1: (part.start, part.stop, 1)}) for part in parts)
    if layer.reset_after:
        zh = of_h(h, R, bias_h)
        gates_h, n_h = (g.slice(zh, {1: (part.start, part.stop, 1)}) for part in parts)
    else:
        gates_h = of_h(h, R[..., parts[0]])
    gates = g.elementwise("Add", gates_x, gates_h)
    if normalized is not None:
        gates = normalized(z=gates, columns=parts[0])
    z, r = g.split(activate(g, layer.recurrent_activation, gates), 2, 1)
    seen = g.elementwise("Mul", r, n_h) if layer.reset_after else of_h(g.elementwise("Mul", r, h), R[..., parts[1]])
    a = g.elementwise("Add", n_x, seen)
    if normalized is not None:
        a = normalized(z=a, columns=parts[1])
    new = g.elementwise("Mul", g.elementwise("Sub", 1.0, z), activate(g, layer.activation, a))
    return g.elementwise("Add", g.elementwise("Mul", z, h), new)


_OF_VECTORS: dict[type, Callable[..., tuple[Value, list[Value]]]] = {LSTM: _lstm_of_vectors, GRU: _gru_of_vectors}

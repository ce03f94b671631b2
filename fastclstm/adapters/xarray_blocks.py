"""Networks over Dask arrays: samples in blocks, time in pieces that hand states on, space in overlapping tiles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import dask.array
import numpy as np
from dask.array.overlap import overlap, trim_overlap
from dask.delayed import delayed

from fastclstm import layers
from fastclstm.adapters.xarray_samples import is_channels_first, of_samples
from fastclstm.layers import Layer
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.models import EncoderForecaster
from fastclstm.models.graph import Graph, Slot, chain, filled, slots
from fastclstm.models.network import Network

POINTWISE = (layers.Activation, layers.LeakyReLU, layers.ReLU, layers.Dropout, layers.GaussianNoise, layers.Rescaling,
             layers.SpatialDropout2D, layers.BatchNormalization, layers.Dense, layers.Softmax)  # fmt: skip
"""Layers that make each pixel of that pixel alone."""
CONVOLUTIONS = (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D)
BY_FRAME = (*POINTWISE, *CONVOLUTIONS, layers.PReLU, layers.Conv2DTranspose, layers.MaxPooling2D,
            layers.AveragePooling2D, layers.UpSampling2D, layers.ZeroPadding2D, layers.Cropping2D, layers.SpaceToDepth,
            layers.DepthToSpace, layers.PixelShuffle, layers.PixelUnshuffle, layers.TimeDistributed)  # fmt: skip
"""Layers that make each frame of that frame alone."""
MERGING = (layers.Add, layers.Average, layers.Subtract, layers.Multiply, layers.Maximum)
"""Layers that make each pixel of that pixel of several arrays."""

Run = Callable[..., np.ndarray]
"""``(network, block (…, T, H, W, C), valid (…, T, 1, 1, 1)) -> what the network makes of each sample``."""


def over_forecasts(op: str, network: Layer, data: Any, steps: int, run: Callable[..., Any], dtype: Any) -> Any:
    """Return the forecast of so many frames of a Dask array (…, T, H, W, C), lazily.

    Samples are computed in blocks, and space in tiles where the network sees the pixels around alone.
    """
    time, rows, columns = data.ndim - 4, data.ndim - 3, data.ndim - 2
    data = data.rechunk({time: -1, data.ndim - 1: -1})
    depth: dict[int, int] = {}
    if (data.numblocks[rows], data.numblocks[columns]) != (1, 1):
        try:
            if not isinstance(network, EncoderForecaster) or is_channels_first(network):
                raise _not_local(op, network, "may see all of a frame")
            reached = reach_of_forecast(op, network, data.shape[time], steps)
            patch = _pair(network.patch_size)
            if any(n % p for axis, p in zip((rows, columns), patch, strict=True) for n in data.chunks[axis]):
                raise _not_local(op, network, "has patches that chunks cut through")
            whole = [-(-n // p) * p for n, p in zip(reached, patch, strict=True)]
            data, depth = _overlapping(data, whole)
        except ValueError:
            data = data.rechunk({rows: -1, columns: -1})
    chunks = (*data.chunks[:time], (steps,), *data.chunks[time + 1 :])
    y = data.map_blocks(run, network=delayed(network, traverse=False), steps=steps, dtype=dtype, chunks=chunks,
                        meta=np.empty((0,) * data.ndim, dtype))  # fmt: skip
    return trim_overlap(y, depth, boundary=dict.fromkeys(depth, "none")) if depth else y


def _overlapping(data: Any, reached: Sequence[int]) -> tuple[Any, dict[int, int]]:
    """Return tiles of a Dask array with as many rows and columns around them, and how many on which axis."""
    depth: dict[int, int] = {}
    for axis, n in zip((data.ndim - 3, data.ndim - 2), reached, strict=True):
        if data.numblocks[axis] > 1 and 2 * n >= data.shape[axis]:
            data = data.rechunk({axis: -1})  # a tile would be all of it
        if data.numblocks[axis] > 1:
            depth[axis] = n
    return (overlap(data, depth, boundary=dict.fromkeys(depth, "none")) if depth else data), depth


def over_blocks(op: str, network: Layer, run: Run, data: Any, valid: Any, made: Sequence[int], dtype: Any) -> Any:
    """Return what a network makes of a Dask array (…, T, H, W, C), lazily.

    made: the sizes that it makes of one sample: (T, H, W, F), (H, W, F), (T, F) or (F,).

    Raises
    ------
    ValueError
        Chunks of time or space, and a network that needs all of it at once.
    """
    data = data.rechunk({data.ndim - 1: -1})
    time, rows, columns = data.ndim - 4, data.ndim - 3, data.ndim - 2
    depth: dict[int, int] = {}
    if data.numblocks[rows] > 1 or data.numblocks[columns] > 1:
        data, depth = _overlapping(data, reach(op, network, data.shape[time]))
    valid = valid.rechunk({axis: data.chunks[axis] for axis in range(time + 1)})
    if data.numblocks[time] > 1:
        y = _pieces(Pieces(op, network), data, valid, made, dtype)
    else:
        y = _blocks(network, run, data, valid, made, dtype)
    if depth:
        shift = 4 - len(made)
        moved = {axis - shift: n for axis, n in depth.items()}
        y = trim_overlap(y, moved, boundary=dict.fromkeys(moved, "none"))
    return y


def reach(op: str, network: Layer, steps: int) -> tuple[int, int]:
    """Return how many rows and columns away a pixel is still seen, after so many steps.

    A recurrent layer sees a frame n steps ago through its input convolution and n recurrent ones; one that starts from
    states sees those a step further.

    Raises
    ------
    ValueError
        A layer that sees all of a frame, or makes another size of it.
    """
    graph = _graph(network)
    far: dict[Slot, np.ndarray] = {slot: np.zeros(2, int) for slot in graph.inputs}
    for step in graph.steps:
        before = np.max([far[slot] for slot in step.read], axis=0)
        after = before + _seen(op, step.layer, steps)
        if step.options.get("initial_state") is not None:
            cells: Any = getattr(step.layer, "cells", ())
            after = after + np.sum([_cell(op, cell)[1] for cell in cells], axis=0)
        far |= dict.fromkeys(slots(step.y), after)
    rows, columns = np.max([far[slot] for slot in slots(graph.outputs)], axis=0)
    return int(rows), int(columns)


def reach_of_forecast(op: str, network: EncoderForecaster, given: int, steps: int) -> tuple[int, int]:
    """Return the same of a forecast of so many steps from frames `given`, at one scale.

    Raises
    ------
    ValueError
        As `reach`; several scales, or noise, which is drawn anew for each tile.
    """
    if network.strides is not None or network.inputs == "noise":
        raise _not_local(op, network, "has several scales, or reads noise")
    cells = [_cell(op, cell) for layer in (network.encoder, *network.forecaster) for cell in layer.cells]
    count = len(cells) // 2
    states, frame = [np.zeros(2, int)] * count, np.zeros(2, int)
    for step in range(given + steps):
        here = cells[:count] if step < given else cells[count:]
        seen = frame if step >= given and network.inputs in (None, "frames") else np.zeros(2, int)
        for n, (of_x, of_h) in enumerate(here):
            states[n] = seen = np.maximum(states[n] + of_h if step else 0, seen + of_x)
        frame = np.max(states, axis=0) if step >= given else frame
    rows, columns = (frame + 1) * _pair(network.patch_size) - 1  # a pixel stands anywhere in its patch
    return int(rows), int(columns)


def _graph(network: Layer) -> Graph:
    return network._graph if isinstance(network, Network) else chain([network])


def _seen(op: str, layer: Any, steps: int) -> np.ndarray:
    """Return the reach of one layer."""
    if isinstance(layer, Network):
        return np.array(reach(op, layer, steps))
    if isinstance(layer, layers.TimeDistributed):
        return np.array(reach(op, layer.layer, 1))
    if isinstance(layer, CONVOLUTIONS):
        return _convolution(op, layer)
    if isinstance(layer, ConvRecurrent):
        cells = [_cell(op, cell) for cell in layer.cells]
        return np.sum([of_x + max(steps - 1, 0) * of_h for of_x, of_h in cells], axis=0)
    pointwise = isinstance(layer, (*POINTWISE, *MERGING)) or _joins_channels(layer)
    if not (pointwise or (isinstance(layer, layers.PReLU) and set(layer.shape[:-1]) <= {1})):
        raise _not_local(op, layer, "sees more than the pixels around, or makes frames of another size")
    return np.zeros(2, int)


def _joins_channels(layer: Any) -> bool:
    return isinstance(layer, layers.Concatenate) and layer.axis == -1


def _convolution(op: str, layer: Any) -> np.ndarray:
    """Return the reach of a layer's convolution, which is to make frames of the same size."""
    if _pair(layer.stride) != (1, 1) or layer.padding != "same" or getattr(layer, "padding_mode", "zeros") != "zeros":
        raise _not_local(op, layer, "has strides, a padding other than 'same', or a periodic domain")
    return _reach(layer.kernel_size, layer.dilation)


def _reach(kernel_size: Any, dilation: Any) -> np.ndarray:
    return np.array([-(-(k - 1) * d // 2) for k, d in zip(_pair(kernel_size), _pair(dilation), strict=True)])


def _cell(op: str, cell: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return how far away a step of a cell sees its x, and the states before it."""
    normalization = getattr(cell, "normalization", None)
    if getattr(normalization, "kind", normalization) not in (None, "batch"):
        raise _not_local(op, cell, "normalizes over whole frames")
    if getattr(cell, "frame_size", None) is not None:
        raise _not_local(op, cell, "has weights for every pixel")
    own, size = _convolution(op, cell), cell.recurrent_kernel.shape[:2]
    step, peeped = _reach(size, cell.recurrent_dilation), np.zeros(2, int)
    if getattr(cell, "peephole", None) == "conv":
        peeped = _reach(size if cell.peephole_size is None else cell.peephole_size, 1)
    if getattr(cell, "reset_after", True) is False:  # what the reset gate saw is convolved once more
        own, step = own + step, 2 * step
    return own + peeped, np.maximum(step, peeped) + peeped


class Pieces:
    """A network that takes a sequence piece by piece, with the states between them."""

    def __init__(self, op: str, network: Layer):
        self._channels_first = is_channels_first(network)
        self._graph = _graph(network)
        self._layers = [self._piecewise(op, step.layer, step.options) for step in self._graph.steps]
        for step in self._graph.steps:
            if isinstance(step.layer, ConvRecurrent) and step.layer.return_state \
                    and slots(step.y[1]) & self._graph.read:  # fmt: skip
                raise _not_local(op, step.layer, "hands its last states to another layer", "time")

    @staticmethod
    def _piecewise(op: str, layer: Any, options: Any) -> Any:
        """Return what takes a layer's part."""
        if options:
            raise _not_local(op, layer, f"is given {', '.join(options)}", "time")
        if isinstance(layer, Network):
            return Pieces(op, layer)
        if isinstance(layer, ConvRecurrent):
            if layer.bidirectional or layer.go_backwards or layer.stateful:
                raise _not_local(op, layer, "needs all steps at once: bidirectional, backwards or stateful", "time")
            layer = copy.copy(layer)  # the caller's stays as it is; the parameters are shared
            layer.return_state = True
        elif not (isinstance(layer, (*BY_FRAME, *MERGING)) or _joins_channels(layer)):
            raise _not_local(op, layer, "may need all steps at once", "time")
        return layer

    def __call__(self, block: np.ndarray, valid: np.ndarray, before: Any) -> tuple[np.ndarray, Any]:
        """Return what becomes of a piece (…, T, H, W, C), and what the next one starts from."""
        after: list[Any] = []
        mask = None if valid.all() else valid.reshape(-1, valid.shape[-4])
        y = of_samples(self._channels_first, block, lambda x: self._run(x, mask, before, after))
        return y, after

    def _run(self, x: np.ndarray, mask: np.ndarray | None, before: Any, after: list[Any]) -> np.ndarray:
        """Return what becomes of a batch; append to `after` what each layer with states ends with."""
        held, (start,) = iter(before or ()), self._graph.inputs
        arrays, masks = {start: x}, {start: mask}
        for step, layer in zip(self._graph.steps, self._layers, strict=True):
            given, steps = filled(step.x, arrays), next(masks[slot] for slot in slots(step.x))
            if isinstance(layer, Pieces):
                after.append([])
                y = layer._run(given, steps, next(held, None), after[-1])
            elif isinstance(layer, ConvRecurrent):
                y, ended = _recurrent(layer, given, steps, next(held, (None, None)))
                after.append(ended)
                steps = steps if layer.return_sequences else None
            else:
                y = layer(given)
            slot = step.y if isinstance(step.y, Slot) else step.y[0]  # whose states nobody reads
            arrays[slot], masks[slot] = y, steps
        made: np.ndarray = arrays[self._graph.outputs]
        return made


def _recurrent(layer: Any, x: np.ndarray, mask: np.ndarray | None, before: Any) -> tuple[np.ndarray, Any]:
    """Return what a recurrent layer makes of a piece, and its states and last output."""
    states, output = before
    one = copy.copy(layer)
    one.return_sequences = True
    y, states = one(x, initial_state=states, mask=mask)
    if mask is not None and output is not None and not layer.zero_output_for_mask:
        early = ~np.logical_or.accumulate(mask, 1)[..., None, None, None]  # the output before is repeated
        y = np.where(early, output[:, None], y)
    return (y if layer.return_sequences else y[:, -1]), (states, y[:, -1])


def _pieces(pieces: Pieces, data: Any, valid: Any, made: Sequence[int], dtype: Any) -> Any:
    """Return the pieces' outputs, each computed after the one before it."""
    ndim, time = data.ndim, data.ndim - 4
    sequences = len(made) == 4 or (len(made) == 2)
    blocks, valids, run = data.to_delayed(), valid.to_delayed(), delayed(pieces, traverse=False)
    step = delayed(_piece, nout=2)
    spatial = len(made) >= 3
    out = np.empty([n if axis != time or sequences else 1 for axis, n in enumerate(data.numblocks)], object)
    for index in np.ndindex(*(n for axis, n in enumerate(data.numblocks) if axis != time)):
        states = None
        for t in range(data.numblocks[time]):
            where = (*index[:time], t, *index[time:])
            block = blocks[where]
            y, states = step(run, block, valids[(*where[: time + 1], 0, 0, 0)], states)
            sizes = [data.chunks[axis][where[axis]] for axis in range(ndim)]
            shape = (*sizes[:time], *(sizes[time : time + 1] if sequences else ()),
                     *(sizes[time + 1 : time + 3] if spatial else ()), made[-1])  # fmt: skip
            if sequences or t == data.numblocks[time] - 1:
                out[(*index[:time], t if sequences else 0, *index[time:])] = dask.array.from_delayed(y, shape, dtype)
    axes = [axis for axis in range(ndim) if not (axis == time and not sequences)]
    if not spatial:
        axes = [axis for axis in axes if axis not in (time + 1, time + 2)]
    return dask.array.block(out.reshape([out.shape[axis] for axis in axes]).tolist())


def _piece(pieces: Pieces, block: np.ndarray, valid: np.ndarray, before: Any) -> tuple[np.ndarray, Any]:
    return pieces(block, valid, before)


def _blocks(network: Layer, run: Run, data: Any, valid: Any, made: Sequence[int], dtype: Any) -> Any:
    time = data.ndim - 4
    gone = {4: (), 3: (time,), 2: (time + 1, time + 2), 1: (time, time + 1, time + 2)}[len(made)]
    own = {time: made[0]} if len(made) in (2, 4) else {}
    chunks = [
        (own[axis],) if axis in own else (made[-1],) if axis == data.ndim - 1 else data.chunks[axis]
        for axis in range(data.ndim) if axis not in gone
    ]  # fmt: skip
    if len(made) >= 3 and data.numblocks[time + 1 : time + 3] == (1, 1):
        chunks[-3:-1] = [(made[-3],), (made[-2],)]
    return dask.array.map_blocks(
        run, delayed(network, traverse=False), data, valid, dtype=dtype, chunks=tuple(chunks),
        drop_axis=list(gone), meta=np.empty((0,) * len(chunks), dtype),
    )  # fmt: skip


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if np.ndim(value) == 0 else tuple(value)


def _not_local(op: str, layer: Any, why: str, what: str = "space") -> ValueError:
    dims = "(x=-1, y=-1)" if what == "space" else "(time=-1)"
    return ValueError(f"{op}: {type(layer).__name__} {why}, so chunks of {what} cannot be computed one by one; make it "
                      f"one chunk, as by frames.chunk{dims}")  # fmt: skip

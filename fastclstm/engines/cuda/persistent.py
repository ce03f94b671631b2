"""All time steps of convlstm2d in one launch (csrc/persistent.cu), where a launch for each takes much of the time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from fastclstm.engines.cuda import product
from fastclstm.engines.cuda.device import Device, DeviceArray
from fastclstm.engines.cuda.product import Frames, Tiling, int32, offset
from fastclstm.spec import ConvLSTMSpec

FEWEST_STEPS = 2

MOST_TILES = 4
"""Tiles of a step that a block takes, one after another."""

MOST_WORK = 1 << 24
"""Multiply-adds of a step for each multiprocessor: 5 to 50 µs, depending on the kind. A guess; no GPU was asked."""

MOST_LATE = 2
"""Blocks of depth of h that may come element by element, waited for, as on tensor cores with an F that 4 does not
divide. A guess too."""

_allowed: ContextVar[bool] = ContextVar("_allowed", default=True)


class Call(Protocol):
    """What a forward pass computes, where, and the memory for its results."""

    spec: ConvLSTMSpec
    device: Device
    kind: int
    mask: DeviceArray | None
    frame: int
    """Elements of a state of one image."""
    pixels: int
    """Of the states of all images."""
    output: DeviceArray
    h_last: DeviceArray
    c_last: DeviceArray


@contextmanager
def forbidden() -> Iterator[None]:
    """Launch a kernel for each step inside: for tests and benchmarks. The results are the same to the bit."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def allowed() -> bool:
    """Whether no `forbidden` is around."""
    return _allowed.get()


def blocks(
    device: Device, tiling: Tiling, macros: Mapping[str, int | str], spec: ConvLSTMSpec, h: Frames, x: Frames
) -> int:
    """Return how many blocks compute all steps in one launch; 0: a launch for each step is better.

    They do where a step is little work, and where the blocks that the device runs at once have few tiles each.
    """
    if tiling.on_warpgroups:  # whose pixels come through the first-level cache
        return 0
    late = h.blocks if tiling.on_tensor_cores and h.size[2] % (16 // h.data.dtype.itemsize) else 0
    down, across = tiling.grid(spec.B * spec.HO * spec.WO, 4 * spec.F)
    tiles = down * across
    work = tiles * tiling.rows * tiling.columns * (h.blocks + x.blocks) * tiling.depth
    if not allowed() or spec.T < FEWEST_STEPS or work > MOST_WORK * device.multiprocessors or late > MOST_LATE:
        return 0
    resident = device.resident_blocks(_kernel(device, tiling, macros), tiling.threads, tiling.shared_bytes)
    return min(tiles, resident) if tiles <= MOST_TILES * resident else 0


def run(
    call: Call, tiling: Tiling, macros: Mapping[str, int | str], count: int, h_frames: Frames, x_frames: Frames,
    weights: DeviceArray, bias: DeviceArray | None, h: DeviceArray | None, c: DeviceArray | None,
    peepholes: tuple[Any, ...], cell: tuple[Any, ...],
) -> None:  # fmt: skip
    """Launch all steps of a call that saves nothing, as `count` blocks."""
    spec, device, frame = call.spec, call.device, call.frame
    source, direction = spec.source_step(0), -1 if spec.go_backwards else 1
    channels = h_frames.size[2]
    places = product.operand_memory(device, (2, *spec.state_shape[:3], channels), spec.F, h_frames.data.dtype)
    if h is not None:
        product.convert(device, call.kind, h, channels, places)
    x_step = x_frames.size[0] * x_frames.size[1] * x_frames.size[2]
    x_first = replace(x_frames, data=offset(x_frames.data, source * x_step))
    y_stride, y_step = (spec.T * frame, frame) if spec.return_sequences else (frame, 0)
    mask = None if call.mask is None else offset(call.mask, source)
    product.check_pixels(call.pixels)
    device.launch(
        _kernel(device, tiling, macros), (count,), (tiling.threads,), tiling.shared_bytes,
        *replace(h_frames, data=places).arguments(), *x_first.arguments(),
        np.int64(direction * x_step), np.int32(spec.T), device.zeros((1,), np.int32), weights,
        *int32(tiling.padded(4 * spec.F), call.pixels, spec.HO, spec.WO, spec.F), bias, places,
        h, call.h_last, c, call.c_last, call.output, np.int64(y_stride), np.int64(y_step), *peepholes,
        mask, np.int32(direction), *cell, cooperative=True,
    )  # fmt: skip


def _kernel(device: Device, tiling: Tiling, macros: Mapping[str, int | str]) -> Any:
    return device.kernel("persistent.cu", "convlstm2d_steps", {**macros, **dict(tiling.macros)})

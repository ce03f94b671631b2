"""Where a convolution's input comes from, and how a piece of it is padded into scratch memory."""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd
from fastclstm.spec import ConvSpec

SOURCE = np.dtype([(name, np.int64) for name in (
    "H", "W", "C", "KH", "KW", "top", "left", "stride_y", "stride_x", "dilation_y", "dilation_x", "circular",
    "hidden",  # 1: it is the hidden state, which the step before left
    "scratch",  # index of this source's piece of the scratch memory
)])  # fmt: skip
"""One convolved input of a time step (x, and in a ConvLSTM h): its frame and the geometry of its kernel."""


def source(spec: ConvSpec, hidden: bool = False) -> tuple[int, ...]:
    """Fields of `SOURCE` for the input of a convolution."""
    (top, _), (left, _) = spec.padding
    return (spec.H, spec.W, spec.C, spec.KH, spec.KW, top, left, *spec.strides, *spec.dilation,
            int(spec.padding_mode == "circular"), int(hidden), 0)  # fmt: skip


@inline
def copy_run(target, origin, count):
    """Copy `count` scalars."""
    step = simd.vector_lanes(target)
    whole = count - count % step
    for k in range(0, whole, step):
        simd.store(simd.shift(target, k), simd.load(simd.shift(origin, k)))
    for k in range(whole, count):
        target[k] = origin[k]


@inline
def clear_run(target, count):
    """Set `count` scalars to zero."""
    step = simd.vector_lanes(target)
    whole = count - count % step
    zero = simd.zeros(target)
    for k in range(0, whole, step):
        simd.store(simd.shift(target, k), zero)
    for k in range(whole, count):
        target[k] = 0.0


@inline
def copy_patch(src, frame, y0, x0, height, width, patch):
    """Copy rows y0.. and columns x0.. of a frame (H, W, C) to patch (height, width, C), with what its padding holds."""
    C = src.C
    for row in range(height):
        y = y0 + row
        target = simd.shift(patch, row * width * C)
        if src.circular:
            line = simd.shift(frame, (y % src.H) * src.W * C)
            for column in range(width):
                copy_run(simd.shift(target, column * C), simd.shift(line, ((x0 + column) % src.W) * C), C)
        elif y < 0 or y >= src.H:
            clear_run(target, width * C)
        else:
            first = min(max(-x0, 0), width)
            last = max(min(src.W - x0, width), first)
            clear_run(target, first * C)
            copy_run(simd.shift(target, first * C), simd.shift(frame, (y * src.W + x0 + first) * C), (last - first) * C)
            clear_run(simd.shift(target, last * C), (width - last) * C)

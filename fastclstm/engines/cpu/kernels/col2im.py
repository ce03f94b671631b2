"""What the taps of a kernel add to the pixels of its input, summed: the transpose of gathering windows."""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.padding import clear_run
from fastclstm.engines.cpu.kernels.team import grain, next_item

WORK = np.dtype([
    ("B", np.int64), ("T", np.int64), ("HO", np.int64), ("WO", np.int64),
    *((f"{name}{field}", kind) for name in ("taps", "dx")
      for field, kind in (("", np.uint64), ("_image", np.int64), ("_step", np.int64))),
])  # fmt: skip


@inline
def _add_run(target, origin, count):
    step = simd.vector_lanes(target)
    whole = count - count % step
    for k in range(0, whole, step):
        simd.store(simd.shift(target, k), simd.load(simd.shift(target, k)) + simd.load(simd.shift(origin, k)))
    for k in range(whole, count):
        target[k] += origin[k]


@inline
def _add_row(work, src, taps, ky, row):
    """Add what tap row ky of a row of outputs, taps (WO, KH, KW, C), gives to a row (W, C) of pixels."""
    size = src.KH * src.KW * src.C
    for kx in range(src.KW):
        x0 = kx * src.dilation_x - src.left
        origin = simd.shift(taps, (ky * src.KW + kx) * src.C)
        first, last = 0, work.WO
        if not src.circular:
            first = min(max(0, -(x0 // src.stride_x)), last)
            last = max(min(last, (src.W - 1 - x0) // src.stride_x + 1), first)
        if src.C == 1 and not src.circular:
            for j in range(first, last):
                row[x0 + j * src.stride_x] += origin[j * size]
            continue
        for j in range(first, last):
            x = x0 + j * src.stride_x
            if src.circular:
                x = x % src.W
            _add_run(simd.shift(row, x * src.C), simd.shift(origin, j * size), src.C)


@kernel
def fold(job, worker, like, works, sources):
    """Sum what the taps of a kernel give to each row of pixels."""
    work, src = works[0], sources[0]
    rows = work.B * work.T * src.H
    size = src.KH * src.KW * src.C
    reach = (src.KH - 1) * src.dilation_y + (work.HO - 1) * src.stride_y
    piece = grain(job, rows)
    n = next_item(job, -1, piece)
    while n < rows:
        b, t, y = n // (work.T * src.H), n // src.H % work.T, n % src.H
        taps = simd.at(like, np.uint64(np.int64(work.taps) + b * work.taps_image + t * work.taps_step))
        frame = simd.at(like, np.uint64(np.int64(work.dx) + b * work.dx_image + t * work.dx_step))
        row = simd.shift(frame, y * src.W * src.C)
        clear_run(row, src.W * src.C)
        padded = y + src.top  # and, where padding repeats the frame, every H-th row before and after
        if src.circular:
            padded = padded % src.H
        while padded <= reach:
            for ky in range(src.KH):
                i = padded - ky * src.dilation_y
                if i >= 0 and i % src.stride_y == 0 and i // src.stride_y < work.HO:
                    _add_row(work, src, simd.shift(taps, i // src.stride_y * work.WO * size), ky, row)
            if not src.circular:
                break
            padded += src.H
        n = next_item(job, n, piece)

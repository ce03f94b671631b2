"""What the taps of a kernel add to the pixels of its input, summed: the transpose of gathering windows."""

from __future__ import annotations

import numba
import numpy as np

from fastclstm.engines.cpu import threads
from fastclstm.engines.cpu.compilation import inline, kernel
from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.kernels.padding import SOURCE, clear_run, source
from fastclstm.engines.cpu.kernels.schedule import Slots
from fastclstm.spec import ConvSpec

JOB = np.dtype([
    ("B", np.int64), ("T", np.int64), ("HO", np.int64), ("WO", np.int64), ("workers", np.int64),
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
def _add_row(job, src, taps, ky, row):
    """Add what tap row ky of a row of outputs, taps (WO, KH, KW, C), gives to a row (W, C) of pixels."""
    size = src.KH * src.KW * src.C
    for kx in range(src.KW):
        x0 = kx * src.dilation_x - src.left
        origin = simd.shift(taps, (ky * src.KW + kx) * src.C)
        first, last = 0, job.WO
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


@inline
def _work(like, job, src, worker):
    rows = job.B * job.T * src.H
    size = src.KH * src.KW * src.C
    reach = (src.KH - 1) * src.dilation_y + (job.HO - 1) * src.stride_y
    for n in range(rows * worker // job.workers, rows * (worker + 1) // job.workers):
        b, t, y = n // (job.T * src.H), n // src.H % job.T, n % src.H
        taps = simd.at(like, np.uint64(np.int64(job.taps) + b * job.taps_image + t * job.taps_step))
        frame = simd.at(like, np.uint64(np.int64(job.dx) + b * job.dx_image + t * job.dx_step))
        row = simd.shift(frame, y * src.W * src.C)
        clear_run(row, src.W * src.C)
        padded = y + src.top  # and, where padding repeats the frame, every H-th row before and after
        if src.circular:
            padded = padded % src.H
        while padded <= reach:
            for ky in range(src.KH):
                i = padded - ky * src.dilation_y
                if i >= 0 and i % src.stride_y == 0 and i // src.stride_y < job.HO:
                    _add_row(job, src, simd.shift(taps, i // src.stride_y * job.WO * size), ky, row)
            if not src.circular:
                break
            padded += src.H


@kernel()
def _serial(like, jobs, sources):
    _work(like, jobs[0], sources[0], 0)


@kernel(parallel=True)
def _parallel(like, jobs, sources):
    for worker in numba.prange(jobs[0].workers):
        _work(like, jobs[0], sources[0], worker)


KERNELS = _serial, _parallel


def fold(spec: ConvSpec, dtype: np.dtype, taps: Slots, dx: Slots, T: int, team: int) -> None:
    """Sum taps (B, T, HO, WO, KH, KW, C) to dx (B, T, H, W, C)."""
    job = np.zeros(1, JOB)
    job[0] = (spec.B, T, spec.HO, spec.WO, team, *taps[:3], *dx[:3])
    threads.run(KERNELS, team, np.empty(0, dtype), job, np.array([source(spec)], SOURCE))

"""Gradients of convolution kernels: sums over images, steps and pixels of inputs times gradients, on register tiles.

Both algorithms take turns at two phases. The inputs and the gradient of a block of pixels (direct) or of tiles
(Winograd) are gathered into scratch memory, shared among the threads; then each element of the sums is brought up to
date by the one thread that owns it. So results depend on the thread count in no bit.

Direct: dW[k, l] = Σ x[i·s + k·d, j·s + l·d]ᵀ dz[i, j]. Winograd: the transpose of the forward algorithm,
dW = Gᵀ [Σ_tiles (Bᵀ x B)ᵀ (A dz Aᵀ)] G, where Aᵀ, G and Bᵀ are those of F(m×m, k×k), and the sum of each point of the
transformed tile is a matrix product.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from fastclstm.engines.cpu import launch, threads
from fastclstm.engines.cpu.compilation import inline, kernel
from fastclstm.engines.cpu.kernels import direct, kernel_transform, simd, winograd
from fastclstm.engines.cpu.kernels.gates import take
from fastclstm.engines.cpu.kernels.padding import SOURCE, copy_patch, source
from fastclstm.engines.cpu.kernels.schedule import Slots
from fastclstm.engines.cpu.kernels.winograd import CHUNK0, CHUNK1, CHUNK2, CHUNK3, CHUNKS
from fastclstm.spec import ConvSpec

BLOCK_PIXELS = 512
"""Pixels of one block of the direct algorithm, at most."""

BLOCK_TILES = 64
"""Tiles between two visits of the sums, at most: many make the visits rare."""

SCRATCH_BYTES = 12 << 20
"""Size of the gathered blocks or tiles, about: small enough for the last-level cache."""

JOB = np.dtype([
    ("T", np.int64),  # steps of an image
    ("frames", np.int64),  # of all images
    ("workers", np.int64),
    *((f"{name}{field}", kind) for name in ("dz", "source0", "source1")
      for field, kind in (("", np.uint64), ("_image", np.int64), ("_step", np.int64))),
    ("scratch", np.uint64),
])  # fmt: skip

WORK = np.dtype([(name, np.int64) for name in (
    "m", "k",  # of Winograd
    "HO", "WO", "columns",
    "height", "parts",  # direct: rows of a block, blocks of a frame
    "tiles_x", "tiles",  # Winograd: tiles of a frame
    "count",  # blocks or tiles gathered at once
    "rows", "pairs",  # of the sums: pairs of vectors
    "item", "point",  # direct: scalars of a gathered block; Winograd: of a point's tiles
    "pitch",  # Winograd: scalars between the inputs of two tiles
    "gradients",  # index of the gathered gradients: in a block, or in a point's tiles
    "patches", "patch_size",  # index of the workers' patches in the scratch memory
)])  # fmt: skip

RUNS = ("source", "offset", "rows", "chunk", "sums_row")
"""Rows that are neighbours in the gathered inputs: of which source, from where, how many, in tiles of how many, and
their place in the sums."""


@intrinsic(prefer_literal=True)
def accumulate(typingctx, rows, inputs, step, line, gradients, apart, lines, count, sums):
    """sums[r, v] += Σ inputs[i·line + j·step + r] · gradients[v][i·count + j], i < lines, j < count, v < two vectors.

    apart: scalars between the gradients of the two vectors.
    """
    nr, nv = rows.literal_value, 2
    vector = simd.llvm_vector(inputs.dtype)

    def codegen(context, builder, sig, args):
        _, inputs, step, line, gradients, apart, lines, count, sums = args
        start = [simd.constant(vector, 0.0)] * (nr * nv)  # what is added is summed apart: fewer roundings of large sums
        for n in range(nr * nv):
            simd.emit_prefetch(builder, builder.gep(sums, [simd.INT64(n * vector.count)]), 3)

        def outer(builder, i, carried):
            origin = builder.gep(inputs, [builder.mul(i, line)])

            def inner(builder, j, carried):
                values, weights, sums = carried[0], carried[1], list(carried[2:])
                w = [simd.emit_load(builder, builder.gep(weights, [builder.mul(apart, simd.INT64(v))]), vector)
                     for v in range(nv)]  # fmt: skip
                for r in range(nr):
                    value = simd.splat(builder, builder.load(builder.gep(values, [simd.INT64(r)])))
                    for v in range(nv):
                        sums[r * nv + v] = simd.emit_fma(builder, value, w[v], sums[r * nv + v])
                return [builder.gep(values, [step]), builder.gep(weights, [simd.INT64(vector.count)]), *sums]

            return simd.emit_loop(builder, simd.INT64(0), count, 1, [origin, *carried], inner)[1:]

        carried = simd.emit_loop(builder, simd.INT64(0), lines, 1, [gradients, *start], outer)
        for n, value in enumerate(carried[1:]):
            simd.emit_store(builder, builder.fadd(simd.emit_load(builder, sums, vector, n), value), sums, n)
        return context.get_dummy_value()

    return types.void(rows, inputs, types.intp, types.intp, inputs, types.intp, types.intp, types.intp, sums), codegen


@inline
def _accumulate(chunk, inputs, step, line, gradients, apart, lines, count, sums):
    if chunk == CHUNK0:
        accumulate(CHUNK0, inputs, step, line, gradients, apart, lines, count, sums)
    elif chunk == CHUNK1:
        accumulate(CHUNK1, inputs, step, line, gradients, apart, lines, count, sums)
    elif chunk == CHUNK2:
        accumulate(CHUNK2, inputs, step, line, gradients, apart, lines, count, sums)
    else:
        accumulate(CHUNK3, inputs, step, line, gradients, apart, lines, count, sums)


@inline
def _frame_at(job, base, image, step, n):
    return np.uint64(np.int64(base) + n // job.T * image + n % job.T * step)


@inline
def _source_frame(job, s, n):
    if s == 0:
        return _frame_at(job, job.source0, job.source0_image, job.source0_step, n)
    return _frame_at(job, job.source1, job.source1_image, job.source1_step, n)


@inline
def _gradient_frame(job, n):
    return _frame_at(job, job.dz, job.dz_image, job.dz_step, n)


# ---------------------------------------------------------------------------------------------------------- direct


@inline
def _gather_block(like, job, work, sources, item, slot):
    """Copy the padded inputs of one block of rows, and its gradients: [vector][pixel]."""
    n, y0 = item // work.parts, item % work.parts * work.height
    height = min(work.height, work.HO - y0)
    base = simd.shift(simd.at(like, job.scratch), slot * work.item)
    for s in range(len(sources)):
        src = sources[s]
        rows = (height - 1) * src.stride_y + (src.KH - 1) * src.dilation_y + 1
        columns = (work.WO - 1) * src.stride_x + (src.KW - 1) * src.dilation_x + 1
        frame = simd.at(like, _source_frame(job, s, n))
        copy_patch(src, frame, y0 * src.stride_y - src.top, -src.left, rows, columns, simd.shift(base, src.scratch))
    pixels = height * work.WO
    step = simd.vector_lanes(base)
    origin = simd.shift(simd.at(like, _gradient_frame(job, n)), y0 * work.WO * work.columns)
    target = simd.shift(base, work.gradients)
    for p in range(pixels):
        for j in range(0, work.columns, step):
            value = take(simd.shift(origin, p * work.columns + j), min(step, work.columns - j))
            simd.store(simd.shift(target, j * pixels + p * step), value)


@inline
def _add_blocks(like, job, work, sources, runs, sums, first, count, worker):
    """Add the blocks first .. first + count to a worker's share of the sums [pair][row][two vectors]."""
    pair0, pair1 = work.pairs * worker // job.workers, work.pairs * (worker + 1) // job.workers
    target = simd.pointer(sums)
    step = simd.vector_lanes(target)
    for slot in range(count):
        y0 = (first + slot) % work.parts * work.height
        height = min(work.height, work.HO - y0)
        base = simd.shift(simd.at(like, job.scratch), slot * work.item)
        for q in range(pair0, pair1):
            panel = height * work.WO * step
            gradients = simd.shift(base, work.gradients + 2 * q * panel)
            apart = panel if (2 * q + 1) * step < work.columns else 0
            for n in range(len(runs)):
                src, chunk = sources[runs[n, 0]], runs[n, 3]
                columns = (work.WO - 1) * src.stride_x + (src.KW - 1) * src.dilation_x + 1
                for r in range(0, runs[n, 2], chunk):
                    inputs = simd.shift(base, runs[n, 1] + r)
                    row = simd.shift(target, (q * work.rows + runs[n, 4] + r) * 2 * step)
                    _accumulate(chunk, inputs, src.stride_x * src.C, src.stride_y * columns * src.C, gradients, apart,
                                height, work.WO, row)  # fmt: skip


@inline
def _direct_gather_share(like, job, work, sources, first, count, worker):
    for slot in range(count * worker // job.workers, count * (worker + 1) // job.workers):
        _gather_block(like, job, work, sources, first + slot, slot)


@kernel()
def _direct_serial(like, jobs, works, sources, runs, sums):
    job, work = jobs[0], works[0]
    items = job.frames * work.parts
    for first in range(0, items, work.count):
        count = min(work.count, items - first)
        _direct_gather_share(like, job, work, sources, first, count, 0)
        _add_blocks(like, job, work, sources, runs, sums, first, count, 0)


@kernel(parallel=True)
def _direct_parallel(like, jobs, works, sources, runs, sums):
    workers, items, most = jobs[0].workers, jobs[0].frames * works[0].parts, works[0].count
    for first in range(0, items, most):
        count = min(most, items - first)
        for worker in numba.prange(workers):
            _direct_gather_share(like, jobs[0], works[0], sources, first, count, worker)
        for worker in numba.prange(workers):
            _add_blocks(like, jobs[0], works[0], sources, runs, sums, first, count, worker)


# -------------------------------------------------------------------------------------------------------- Winograd


@inline
def _gather_tile(like, job, work, sources, index, slot, patch):
    """Transform the inputs of one tile, [point][tile][channel], and its gradients, [point][vector][tile]."""
    n, tile = index // work.tiles, index % work.tiles
    ty, tx = tile // work.tiles_x * work.m, tile % work.tiles_x * work.m
    base = simd.at(like, job.scratch)
    step = simd.vector_lanes(base)
    target = simd.shift(base, slot * work.pitch)
    for s in range(len(sources) - 1):
        src = sources[s]
        frame = simd.at(like, _source_frame(job, s, n))
        winograd.transform_tile(work, src, frame, ty - src.top, tx - src.left, target, step, work.point, patch)
        target = simd.shift(target, src.C)  # over the zeros that end the channels before
    target = simd.shift(base, work.gradients + slot * step)
    frame = simd.at(like, _gradient_frame(job, n))
    gradient = sources[len(sources) - 1]
    winograd.transform_gradient_tile(work, gradient, frame, ty, tx, target, work.count * step, work.point, patch)


@inline
def _add_tiles(like, job, work, runs, sums, count, worker):
    """Add the gathered tiles to a worker's share of the sums [point][pair][row][two vectors]."""
    points = (work.m + work.k - 1) ** 2
    share = points * work.pairs
    base, target = simd.at(like, job.scratch), simd.pointer(sums)
    step = simd.vector_lanes(target)
    panel = work.count * step
    for n in range(share * worker // job.workers, share * (worker + 1) // job.workers):
        origin = simd.shift(base, n // work.pairs * work.point)
        pair = n % work.pairs
        gradients = simd.shift(origin, work.gradients + 2 * pair * panel)
        apart = panel if (2 * pair + 1) * step < work.columns else 0
        for run in range(len(runs)):
            chunk = runs[run, 3]
            for r in range(0, runs[run, 2], chunk):
                inputs = simd.shift(origin, runs[run, 1] + r)
                row = simd.shift(target, (n * work.rows + runs[run, 4] + r) * 2 * step)
                _accumulate(chunk, inputs, work.pitch, 0, gradients, apart, 1, count, row)


@inline
def _winograd_gather_share(like, job, work, sources, first, count, worker):
    patch = simd.shift(simd.at(like, job.scratch), work.patches + worker * work.patch_size)
    for slot in range(count * worker // job.workers, count * (worker + 1) // job.workers):
        _gather_tile(like, job, work, sources, first + slot, slot, patch)


@kernel()
def _winograd_serial(like, jobs, works, sources, runs, sums):
    job, work = jobs[0], works[0]
    tiles = job.frames * work.tiles
    for first in range(0, tiles, work.count):
        count = min(work.count, tiles - first)
        _winograd_gather_share(like, job, work, sources, first, count, 0)
        _add_tiles(like, job, work, runs, sums, count, 0)


@kernel(parallel=True)
def _winograd_parallel(like, jobs, works, sources, runs, sums):
    workers, tiles, most = jobs[0].workers, jobs[0].frames * works[0].tiles, works[0].count
    for first in range(0, tiles, most):
        count = min(most, tiles - first)
        for worker in numba.prange(workers):
            _winograd_gather_share(like, jobs[0], works[0], sources, first, count, worker)
        for worker in numba.prange(workers):
            _add_tiles(like, jobs[0], works[0], runs, sums, count, worker)


DIRECT, WINOGRAD = (_direct_serial, _direct_parallel), (_winograd_serial, _winograd_parallel)

# -------------------------------------------------------------------------------------------------------- planning


class _Plan(NamedTuple):
    kernels: tuple[Any, Any]
    work: np.ndarray
    sources: np.ndarray
    runs: np.ndarray
    sums_shape: tuple[int, ...]
    scratch_scalars: int
    patch_scalars: int


class WeightGradient:
    """The growing gradients of the kernels of convolutions `specs` (same output grid, own inputs) of up to T steps."""

    def __init__(self, specs: tuple[ConvSpec, ...], dtype: np.dtype, T: int, algorithm: str = "auto"):
        self._specs, self._dtype = specs, dtype
        self._m = choose(specs, T, algorithm, dtype.itemsize)
        tiles = specs[0].B * T
        self._plan = (_winograd_plan(specs, self._m, tiles, dtype.itemsize) if self._m else
                      _direct_plan(specs, tiles, dtype.itemsize))  # fmt: skip
        self._sums = np.zeros(self._plan.sums_shape, dtype)

    def add(self, inputs: tuple[Slots, ...], dz: Slots, B: int, T: int, team: int) -> None:
        """Add what T steps of B images contribute: inputs (B, T, H, W, C) of each convolution, dz (B, T, HO, WO, F)."""
        plan = self._plan
        job = np.zeros(1, JOB)
        itemsize = self._dtype.itemsize
        scratch = launch.scratch((plan.scratch_scalars + team * plan.patch_scalars) * itemsize, "weight_gradient")
        places = (*dz[:3], *(field for slot in (*inputs, *inputs)[:2] for field in slot[:3]))
        job[0] = (T, B * T, team, *places, scratch.ctypes.data)
        sums = self._sums.reshape(-1)
        threads.run(plan.kernels, team, sums[:0], job, plan.work, plan.sources, plan.runs, sums)

    def result(self) -> list[np.ndarray]:
        """Return the gradients (KH, KW, C, F) of the kernels."""
        if self._m:
            gradients = [np.empty((spec.KH, spec.KW, spec.C, spec.F), self._dtype) for spec in self._specs]
            kernel_transform.pull_back(self._sums, winograd.transforms(self._m, self._specs[0].KH).G, gradients)
            return gradients
        matrix = self._sums.swapaxes(0, 1).reshape(self._sums.shape[1], -1)[:, : self._specs[0].F]
        return [
            np.concatenate([matrix[row : row + length] for source, _, length, _, row in self._plan.runs if source == s])
            .reshape(spec.KH, spec.KW, spec.C, spec.F)
            for s, spec in enumerate(self._specs)
        ]  # fmt: skip


def choose(specs: tuple[ConvSpec, ...], T: int, algorithm: str, itemsize: int) -> int:
    """Outputs of a Winograd tile on each axis; 0: direct."""
    if algorithm == "direct" or not winograd.fits(specs):
        return 0
    costs = {m: _winograd_cost(specs, m, T, itemsize) for m in winograd.TILES}
    if algorithm == "auto":
        costs[0] = T * direct.cost(specs, specs[0].B, itemsize)
    return min(costs, key=lambda m: costs[m])


def _winograd_cost(specs: tuple[ConvSpec, ...], m: int, T: int, itemsize: int) -> float:
    """Estimate the work in multiply-adds of vectors (see `direct.cost`)."""
    lanes, spec = simd.lanes(itemsize), specs[0]
    tiles = T * spec.B * -(-spec.HO // m) * -(-spec.WO // m)
    points = (m + spec.KH - 1) ** 2
    rows, vectors = sum(s.C for s in specs), -(-spec.F // lanes)
    transforms = 10 * tiles * points * (vectors + sum(-(-s.C // lanes) for s in specs))
    visits = (4 * -(-tiles // BLOCK_TILES) + 40) * points * rows * vectors
    return tiles * points * rows * vectors / 0.9 + transforms + visits


def _chunk(rows: int) -> int:
    return min(CHUNKS, key=lambda chunk: -(-rows // chunk) * (chunk + 0.75))


def _pairs(columns: int, itemsize: int) -> int:
    return -(-columns // (2 * simd.lanes(itemsize)))


def _record(**fields: int) -> np.ndarray:
    """One `WORK` with some fields."""
    work = np.zeros(1, WORK)
    for name, value in fields.items():
        work[0][name] = value
    return work


def _round_up(count: int) -> int:
    return -(-count // 16) * 16 + 16


@lru_cache(maxsize=64)
def _direct_plan(specs: tuple[ConvSpec, ...], frames: int, itemsize: int) -> _Plan:
    spec = specs[0]
    height = min(spec.HO, max(1, BLOCK_PIXELS // spec.WO))
    sources = np.array([source(s) for s in specs], SOURCE)
    runs, at, row = [], 0, 0
    for n, s in enumerate(specs):
        sources[n]["scratch"] = at
        columns = (spec.WO - 1) * s.strides[1] + (s.KW - 1) * s.dilation[1] + 1
        taps = 1 if s.dilation[1] == 1 else s.KW
        length = s.KW * s.C // taps
        chunk = _chunk(length)
        for ky in range(s.KH):
            for tap in range(taps):
                offset = at + (ky * s.dilation[0] * columns + tap * s.dilation[1]) * s.C
                runs.append((n, offset, length, chunk, row))
                row += -(-length // chunk) * chunk
        at += _round_up(((height - 1) * s.strides[0] + (s.KH - 1) * s.dilation[0] + 1) * columns * s.C)
    pairs = _pairs(spec.F, itemsize)
    width = 2 * simd.lanes(itemsize)
    item = at + _round_up(pairs * height * spec.WO * width)
    parts = -(-spec.HO // height)
    count = max(1, min(frames * parts, SCRATCH_BYTES // (item * itemsize)))
    work = _record(HO=spec.HO, WO=spec.WO, columns=spec.F, height=height, parts=parts, count=count, rows=row,
                   pairs=pairs, item=item, gradients=at)  # fmt: skip
    return _Plan(DIRECT, work, sources, np.array(runs, np.int64), (pairs, row, width), item * count, 0)


@lru_cache(maxsize=64)
def _winograd_plan(specs: tuple[ConvSpec, ...], m: int, frames: int, itemsize: int) -> _Plan:
    spec, lanes = specs[0], simd.lanes(itemsize)
    k = spec.KH
    points, pairs, width = (m + k - 1) ** 2, _pairs(spec.F, itemsize), 2 * lanes
    gradient = ConvSpec(spec.B, spec.HO, spec.WO, spec.F, 1, 1, 1, spec.HO, spec.WO, (1, 1), (1, 1), ((0, 0), (0, 0)),
                        "zeros")  # fmt: skip
    sources = np.array([source(s) for s in (*specs, gradient)], SOURCE)
    channels = sum(s.C for s in specs)
    chunk = _chunk(channels)
    rows = -(-channels // chunk) * chunk
    pitch = (-(-channels // lanes) + 1 | 1) * lanes  # an odd number of vectors: tiles in different sets of the cache
    tiles_x, tiles_y = -(-spec.WO // m), -(-spec.HO // m)
    size = points * (pitch + pairs * width)
    count = max(8, min(frames * tiles_x * tiles_y, BLOCK_TILES, SCRATCH_BYTES // (size * itemsize)))
    gradients = count * pitch + lanes
    point = (gradients + pairs * count * width) // lanes * lanes + 2 * lanes
    work = _record(m=m, k=k, HO=spec.HO, WO=spec.WO, columns=spec.F, tiles_x=tiles_x, tiles=tiles_x * tiles_y,
                   count=count, rows=rows, pairs=pairs, point=point, pitch=pitch, gradients=gradients,
                   patches=points * point, patch_size=points * lanes)  # fmt: skip
    runs = np.array([(0, 0, channels, chunk, 0)], np.int64)
    return _Plan(WINOGRAD, work, sources, runs, (points, pairs, rows, width), points * point, points * lanes)

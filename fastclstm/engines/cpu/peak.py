"""What this machine can do, measured: multiply-adds a second and bytes a second, to tell shares of."""

from __future__ import annotations

import time

import numpy as np
from numba import types
from numba.extending import intrinsic

from fastclstm.engines.cpu import threads
from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.padding import copy_run
from fastclstm.engines.cpu.kernels.team import workers_of
from fastclstm.engines.lending import aligned_empty

CHAINS = 24 if simd.REGISTERS == 32 else 12
"""Independent sums: more than the latency of a multiply-add times the units that compute them."""


@intrinsic
def _multiply_add(typingctx, like, rounds, value):
    """Sum over the lanes and chains of `rounds` multiply-adds each, all in registers."""
    vector = simd.llvm_vector(like.dtype)

    def codegen(context, builder, sig, args):
        factor = simd.splat(builder, args[2])
        chains = [simd.constant(vector, float(n)) for n in range(CHAINS)]

        def body(builder, index, chains):
            return [simd.emit_fma(builder, factor, chain, factor) for chain in chains]

        chains = simd.emit_loop(builder, simd.INT64(0), args[1], 1, chains, body)
        total = chains[0]
        for chain in chains[1:]:
            total = builder.fadd(total, chain)
        return builder.extract_element(total, simd.INT32(0))

    return like.dtype(like, types.intp, like.dtype), codegen


@kernel
def _multiply_add_everywhere(job, worker, rounds, factors, sums):
    sums[worker] = _multiply_add(sums, rounds[0], factors[worker])


@kernel
def _copy_everywhere(job, worker, source, target):
    share = source.size // workers_of(job)
    copy_run(simd.shift(simd.pointer(target), worker * share), simd.shift(simd.pointer(source), worker * share), share)


def fma_peak_gflops(team: int | None = None, dtype: str = "float32", *, milliseconds: float = 4.0) -> float:
    """Measure the GFLOP/s of multiply-adds that never leave the registers, on `team` threads.

    Parameters
    ----------
    team : int, optional
        Threads; None: those that the engine uses.
    dtype : "float32" or "float64"
    milliseconds : float
        About how long one of the five rounds lasts; the fastest counts.
    """
    team = threads.usable_threads() if team is None else team
    factors, sums = np.full(team, 0.5, dtype), np.empty(team, dtype)
    flops = 2 * CHAINS * simd.lanes(sums.itemsize) * team
    rounds = int(milliseconds * 1e-3 * 100e9 * team / flops)
    return rounds * flops / _fastest(_multiply_add_everywhere, team, np.array([rounds]), factors, sums) / 1e9


def bandwidth_gbs(team: int | None = None, *, megabytes: int = 256) -> float:
    """Measure the GB/s, read and written together, of copying memory that no cache holds, on `team` threads."""
    team = threads.usable_threads() if team is None else team
    count = megabytes * (1 << 20) // 4
    source, target = aligned_empty(count, np.dtype(np.float32)), aligned_empty(count, np.dtype(np.float32))
    source.fill(1.0)  # memory that was never written is one page, and would be read from the cache
    target.fill(0.0)
    return 2 * source.nbytes / _fastest(_copy_everywhere, team, source, target) / 1e9


def _fastest(kernel, team, *arrays) -> float:
    seconds = []
    threads.run(kernel, team, (), *arrays)
    for _ in range(5):
        start = time.perf_counter()
        threads.run(kernel, team, (), *arrays)
        seconds.append(time.perf_counter() - start)
    return min(seconds)

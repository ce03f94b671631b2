"""How large the scalars of frames are."""

from __future__ import annotations

from fastclstm.engines.cpu.kernels import simd
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.gates import take
from fastclstm.engines.cpu.kernels.team import claim

CHUNK = 1 << 14
"""Scalars of a piece, at most: float32 can count them."""


@kernel
def measure(job, worker, values, limits, result):
    """Of frames (frames, scalars): the largest magnitudes, NaN for what is not finite, and how many are below a limit.

    result: two vectors (frames, chunks, 2, lanes) for each frame and chunk; left as it is where the limit is negative.
    """
    frames, size = values.shape
    chunks = result.shape[1]
    n = claim(job)
    while n < frames * chunks:
        frame, start = n // chunks, n % chunks * CHUNK
        if limits[frame] >= 0.0:
            target = simd.shift(simd.pointer(result), n * 2 * result.shape[3])
            step = simd.vector_lanes(target)
            line, count = simd.shift(simd.pointer(values), frame * size + start), min(CHUNK, size - start)
            most = unusual = below = zero = simd.zeros(line)
            one, limit = simd.broadcast(zero, 1.0), simd.broadcast(zero, limits[frame])
            for i in range(0, count, step):
                value = take(simd.shift(line, i), min(step, count - i))  # and zeros after the end
                magnitude = simd.absolute(value)
                most = simd.maximum(most, magnitude)
                unusual = simd.fma(value, zero, unusual)
                below = below + simd.select_less(magnitude, limit, one, zero)
            simd.store(target, most + unusual)
            simd.store(simd.shift(target, step), below)
        n = claim(job)

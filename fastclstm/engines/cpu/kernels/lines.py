"""Activations along a line of scratch memory, whose last vector may hold more than counts."""

from __future__ import annotations

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import simd, vmath


@inline
def line_at(lines, pitch, number, k):
    """The k-th place of a line."""
    return simd.shift(lines, number * pitch + k)


@inline
def activate(code, source, target, count):
    """Apply an activation; the usual ones in loops of their own, several vectors of which are under way."""
    lanes = simd.vector_lanes(source)
    if code == 0:
        for k in range(0, count, lanes):
            simd.store(simd.shift(target, k), vmath.tanh(simd.load(simd.shift(source, k))))
    elif code == 1:
        for k in range(0, count, lanes):
            simd.store(simd.shift(target, k), vmath.sigmoid(simd.load(simd.shift(source, k))))
    else:
        for k in range(0, count, lanes):
            simd.store(simd.shift(target, k), vmath.activate(code, simd.load(simd.shift(source, k))))


@inline
def slopes(code, source, values, target, count):
    """Derivatives of an activation whose values are known."""
    lanes = simd.vector_lanes(source)
    if code <= 1:
        for k in range(0, count, lanes):
            y = simd.load(simd.shift(values, k))
            simd.store(simd.shift(target, k), y * (1.0 - y) if code == 1 else 1.0 - y * y)
    else:
        for k in range(0, count, lanes):
            x, y = simd.load(simd.shift(source, k)), simd.load(simd.shift(values, k))
            simd.store(simd.shift(target, k), vmath.slope(code, x, y))

"""Convolutions of groups of channels that do not see each other, down to one channel a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.functional.arguments import Gradients
from fastclstm.spec import ConvSpec


def grouped_vjp(
    vjp: Callable[..., Any], x: Any, kernel: Any, bias: Any, *, groups: int, **options: Any
) -> tuple[Any, Callable[..., Gradients]]:
    """Compute a convolution by its `vjp` in groups of channels: x (…, C), kernel (…, C / groups, F); and its pullback.

    The first F / groups filters see the first C / groups channels, and so on.
    """
    if groups == 1:
        return vjp(x, kernel, bias, **options)
    c, f = x.shape[-1] // groups, kernel.shape[-1] // groups
    parts = []
    for group in range(groups):
        filters = slice(group * f, (group + 1) * f)
        part = x[..., group * c : (group + 1) * c]
        parts.append(vjp(part, kernel[..., filters], None if bias is None else bias[filters], **options))
    y = np.concatenate([part for part, _ in parts], axis=-1)

    def pullback(dy: Any, **options: Any) -> Gradients:
        cut = [pull(dy[..., g * f : (g + 1) * f], **options) for g, (_, pull) in enumerate(parts)]
        return {
            name: np.concatenate([dispatch.to_view(gradients[name]) for gradients in cut], axis=-1) for name in cut[0]
        }

    return y, pullback


def depthwise_vjp(spec: ConvSpec, x: np.ndarray, kernel: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], Any]]:
    """Convolve each channel of x (B, H, W, C) with filters of its own, kernel (KH, KW, C, M): y (B, HO, WO, C·M).

    In NumPy, tap by tap. The pullback takes dy and returns (dx, dkernel).
    """
    (top, bottom), (left, right) = spec.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    B, (C, M) = len(x), kernel.shape[2:]
    shape = (B, spec.HO, spec.WO, C, M)

    def tap(frames: np.ndarray, kh: int, kw: int) -> np.ndarray:
        (sh, sw), (dh, dw) = spec.strides, spec.dilation
        return frames[:, kh * dh :: sh, kw * dw :: sw][:, : spec.HO, : spec.WO]

    y = np.zeros(shape, np.result_type(x, kernel))
    for kh, kw in np.ndindex(spec.KH, spec.KW):
        y += tap(padded, kh, kw)[..., np.newaxis] * kernel[kh, kw]

    def pullback(dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        dy = dy.reshape(shape)
        dpadded, dkernel = np.zeros(padded.shape, dy.dtype), np.empty(kernel.shape, dy.dtype)
        for kh, kw in np.ndindex(spec.KH, spec.KW):
            tap(dpadded, kh, kw)[...] += (dy * kernel[kh, kw]).sum(-1)
            dkernel[kh, kw] = np.einsum("bhwc,bhwcm->cm", tap(padded, kh, kw), dy)
        return np.ascontiguousarray(dpadded[:, top : top + spec.H, left : left + spec.W]), dkernel

    return y.reshape(B, spec.HO, spec.WO, C * M), pullback

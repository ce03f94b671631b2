"""conv2d on the cuda engine: one implicit matrix product forward, one for dx, one over the pixels for dkernel."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from fastclstm.engines.cuda import choice, product, recorded
from fastclstm.engines.cuda.device import DeviceArray
from fastclstm.engines.cuda.product import on_device
from fastclstm.engines.cuda.weight_gradient import column_sums, weight_gradient
from fastclstm.spec import ConvSpec

Weights = np.ndarray | DeviceArray


def conv2d(
    spec: ConvSpec, x: DeviceArray, kernel: Weights, bias: Weights | None, *, algorithm: str = "auto"
) -> DeviceArray:
    """Convolve x (B, H, W, C) with kernel (KH, KW, C, F): y (B, HO, WO, F)."""
    device, dtype = x.device, x.dtype
    if not spec.B:
        return device.empty((0, spec.HO, spec.WO, spec.F), dtype)
    kind = product.kind(device, dtype, algorithm)

    def compute(x: DeviceArray, kernel: DeviceArray, bias: DeviceArray | None) -> DeviceArray:
        tiling = choice.choose(kind, dtype, x.device, spec.B * spec.HO * spec.WO, spec.F, frame=(spec.HO, spec.WO),
                               windows=[product.window(spec)])  # fmt: skip
        return product.convolve(spec, tiling, x, kernel, bias)

    arrays = x, on_device(device, kernel), None if bias is None else on_device(device, bias)
    y: DeviceArray = recorded.call(device, ("conv2d", spec, kind, dtype), arrays, compute)
    return y


def conv2d_backward(
    spec: ConvSpec, x: DeviceArray, kernel: Weights, dy: DeviceArray | None, *, algorithm: str = "auto",
    wanted: Collection[str] = ("x", "kernel", "bias"),
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Pull dy (B, HO, WO, F) back through `conv2d`: dx, dkernel, dbias, None for what is not `wanted`.

    Only dkernel looks at x, only dx at kernel: what is not looked at may be any array of the dtype.
    """
    device, dtype = x.device, x.dtype
    names = tuple(name for name in ("x", "kernel", "bias") if name in wanted)
    if dy is None or not dy.size:
        shapes = {
            "x": (spec.B, spec.H, spec.W, spec.C),
            "kernel": (spec.KH, spec.KW, spec.C, spec.F),
            "bias": (spec.F,),
        }
        found = {name: device.zeros(shapes[name], dtype) for name in names}
        return found.get("x"), found.get("kernel"), found.get("bias")
    kind = product.backward_kind(product.kind(device, dtype, algorithm))

    def compute(x: DeviceArray | None, kernel: DeviceArray | None, dy: DeviceArray) -> dict[str, DeviceArray]:
        results = {}
        dy_operand = product.operands(dy.device, kind, dy)[0]
        if kernel is not None:
            results["x"] = input_gradient(spec, kind, kernel, dy_operand)
        if x is not None:
            results["kernel"] = weight_gradient(spec, kind, dtype, product.operands(x.device, kind, x)[0], dy_operand)
        if "bias" in names:
            results["bias"] = column_sums(dy, spec.F, dtype)
        return results

    arrays = x if "kernel" in names else None, on_device(device, kernel) if "x" in names else None, dy
    found = recorded.call(device, ("conv2d_backward", spec, kind, dtype, names), arrays, compute)
    return found.get("x"), found.get("kernel"), found.get("bias")


def input_gradient(
    spec: ConvSpec, kind: int, kernel: DeviceArray, dy: DeviceArray, *, stride: int | None = None,
    residual: DeviceArray | None = None, cut: bool = True,
) -> DeviceArray:  # fmt: skip
    """Return dx (B, H, W, C) of dy (B, HO, WO, F), operands `stride` elements from image to image, plus `residual`.

    cut: the depth may be cut into shares, by the number of pixels: then other bits for another batch.
    """
    device, dtype = kernel.device, kernel.dtype
    pixels = spec.B * spec.H * spec.W
    dx = device.empty((spec.B, spec.H, spec.W, spec.C), dtype)
    channels = product.operand_channels(kind, spec.F)
    depth = spec.KH * spec.KW * channels if cut else None
    tiling = choice.choose(kind, dtype, device, pixels, spec.C, depth=depth, frame=(spec.H, spec.W),
                           windows=[product.window(spec)])  # fmt: skip
    frames = product.transposed_frames(device, spec, dy, tiling.depth, stride=stride, channels=channels,
                                       tile=tiling.tile)  # fmt: skip
    weights = product.pack(device, tiling, (kernel,), [frames], spec.C, transposed=True)
    shares = choice.shares(tiling, dtype, device, pixels, spec.C, frames.blocks) if cut else 1
    partial = dx if shares == 1 else device.empty((shares, *dx.shape), dtype)
    product.launch_conv2d(device, tiling, frames, weights, (pixels, spec.H, spec.W), spec.C, partial,
                          residual=residual if shares == 1 else None, shares=shares)  # fmt: skip
    if shares > 1:
        product.add_depth(device, partial, residual, dx)
    return dx

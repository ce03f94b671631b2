"""conv2d on the cuda engine: one implicit matrix product forward, one for dx, one over the pixels for dkernel."""

from __future__ import annotations

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
        tiling = choice.choose(kind, dtype, x.device, spec.B * spec.HO * spec.WO, spec.F)
        return product.convolve(spec, tiling, x, kernel, bias)

    arrays = x, on_device(device, kernel), None if bias is None else on_device(device, bias)
    y: DeviceArray = recorded.call(device, ("conv2d", spec, kind, dtype), arrays, compute)
    return y


def conv2d_backward(
    spec: ConvSpec, x: DeviceArray, kernel: Weights, dy: DeviceArray | None, *, algorithm: str = "auto"
) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
    """Pull dy (B, HO, WO, F) back through `conv2d`: dx, dkernel, dbias."""
    device, dtype = x.device, x.dtype
    if dy is None or not dy.size:
        return device.zeros(x.shape, dtype), device.zeros(kernel.shape, dtype), device.zeros((spec.F,), dtype)
    kind = product.backward_kind(product.kind(device, dtype, algorithm))

    def compute(x: DeviceArray, kernel: DeviceArray, dy: DeviceArray) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
        x_operand, dy_operand = (product.operands(x.device, kind, array)[0] for array in (x, dy))
        dx = input_gradient(spec, kind, kernel, dy_operand)
        dkernel = weight_gradient(spec, kind, dtype, x_operand, dy_operand)
        return dx, dkernel, column_sums(dy, spec.F, dtype)

    arrays = x, on_device(device, kernel), dy
    dx, dkernel, dbias = recorded.call(device, ("conv2d_backward", spec, kind, dtype), arrays, compute)
    return dx, dkernel, dbias


def input_gradient(
    spec: ConvSpec, kind: int, kernel: DeviceArray, dy: DeviceArray, *, stride: int | None = None,
    residual: DeviceArray | None = None,
) -> DeviceArray:  # fmt: skip
    """Return dx (B, H, W, C) of dy (B, HO, WO, F), operands `stride` elements from image to image, plus `residual`."""
    device, dtype = kernel.device, kernel.dtype
    pixels = spec.B * spec.H * spec.W
    dx = device.empty((spec.B, spec.H, spec.W, spec.C), dtype)
    tiling = choice.choose(kind, dtype, device, pixels, spec.C)
    frames = product.transposed_frames(device, spec, dy, tiling.depth, stride=stride,
                                       channels=product.operand_channels(kind, spec.F))  # fmt: skip
    weights = product.pack(device, tiling, (kernel,), [frames], spec.C, transposed=True)
    product.launch_conv2d(device, tiling, frames, weights, (pixels, spec.H, spec.W), spec.C, dx, residual=residual)
    return dx

"""Gradients of kernels: products over pixels (csrc/weight_gradient.cu) in shares that are added in their order."""

from __future__ import annotations

import numpy as np

from fastclstm.engines.cuda import product
from fastclstm.engines.cuda.device import DeviceArray
from fastclstm.engines.cuda.product import KINDS, Tiling, int32, over
from fastclstm.spec import ConvSpec

SHARE = 4096
"""Pixels that one block of a kernel's gradient sums at most, unless what all blocks sum took more memory than …"""
PARTIAL_BYTES = 256 << 20
"""… this."""

PLACE_BYTES = 16
"""Where one pixel stands, in shared memory."""


def weight_gradient(
    spec: ConvSpec, kind: int, dtype: np.dtype, x: DeviceArray, dy: DeviceArray, *, inner: int = 1,
    strides: tuple[int, int] | None = None, mask: DeviceArray | None = None, more: DeviceArray | None = None,
) -> DeviceArray:  # fmt: skip
    """Return dkernel (KH, KW, C, F) of dy (images, HO, WO, F), plus `more`.

    x and dy are operands of the kind of product, whose channels may be padded. Images of x come as (outer, inner),
    `strides` elements apart; by default one after the other. Where `mask` (images,) is 0 they are not read.
    """
    device = x.device
    channels, dy_channels = (product.operand_channels(kind, count) for count in (spec.C, spec.F))
    pixels, rows = dy.size // dy_channels, spec.KH * spec.KW * channels
    product.check_pixels(pixels)
    frame = spec.H * spec.W * channels
    outer_stride, stride = (inner * frame, frame) if strides is None else strides
    frames = product.frames(device, spec, x, 16, stride=stride, channels=channels)
    tiling = gradient_tiling(kind, dtype.itemsize, rows, spec.F)
    share, shares = gradient_shares(tiling, device.multiprocessors, dtype.itemsize, pixels, rows, spec.F)
    partial = device.empty((shares, spec.KH * spec.KW * spec.C, spec.F), dtype)
    macros = {"REAL": product.real(dtype), **dict(tiling.macros)}
    kernel = device.kernel("weight_gradient.cu", "weight_gradient", macros)
    down, across = tiling.grid(rows, spec.F)
    device.launch(kernel, (across, down, shares), (tiling.threads,), tiling.shared_bytes, *frames.arguments(),
                  np.int32(inner), np.int64(outer_stride), mask, dy,
                  *int32(dy_channels, pixels, spec.HO, spec.WO, rows, spec.C, spec.F, share), partial)  # fmt: skip
    dkernel = device.empty((spec.KH, spec.KW, spec.C, spec.F), dtype)
    product.add_shares(device, partial, more, dkernel)
    return dkernel


def gradient_tilings(kind: int, itemsize: int) -> list[Tiling]:
    """Return the tilings of a kernel's gradient: rows are taps and channels, columns are filters."""
    result = []
    if kind:
        operand = "unsigned short" if kind >= KINDS["bfloat16"] else "float"
        for warps_m, warps_n, row_tiles in ((2, 4, 4), (1, 4, 2), (4, 1, 2)):
            rows, columns = warps_m * row_tiles * 16, warps_n * 32
            depth = 32 if kind >= KINDS["bfloat16"] else 16
            shared = 3 * 64 * (rows + columns + 16) + 3 * depth * PLACE_BYTES
            macros: dict[str, int | str] = {"KIND": kind, "OPERAND": operand, "WARPS_M": warps_m, "WARPS_N": warps_n,
                                            "ROW_TILES": row_tiles}  # fmt: skip
            result.append(Tiling(kind, rows, columns, warps_m * warps_n * 32, shared, 16, tuple(macros.items())))
        return result
    for tile in (128, 64) if itemsize == 4 else (64,):
        shared = 4 * 16 * (tile + 4) * itemsize + 3 * 16 * PLACE_BYTES
        result.append(Tiling(0, tile, tile, 256, shared, 16, (("KIND", 0), ("TILE", tile))))
    return result


def gradient_tiling(kind: int, itemsize: int, depth: int, filters: int) -> Tiling:
    """Return the largest tiling of a kernel's gradient of those that compute least in vain."""
    candidates = gradient_tilings(kind, itemsize)
    areas = [t.grid(depth, 1)[0] * t.rows * t.padded(filters) for t in candidates]
    return next(t for t, area in zip(candidates, areas, strict=True) if area <= product.WASTE * min(areas))


def gradient_shares(
    tiling: Tiling, multiprocessors: int, itemsize: int, pixels: int, depth: int, filters: int
) -> tuple[int, int]:
    """Return the pixels of a share of a kernel's gradient and the number of shares."""
    down, across = tiling.grid(depth, filters)
    wanted = max(-(-pixels // SHARE), min(-(-2 * multiprocessors // (down * across)), -(-pixels // 256)))
    most = max(1, min(PARTIAL_BYTES // (depth * filters * itemsize), 65535))
    share = -(-pixels // min(wanted, most))
    return share, -(-pixels // share)


def column_sums(
    rows: DeviceArray, columns: int, dtype: np.dtype, *, kind: int = 0, more: DeviceArray | None = None
) -> DeviceArray:
    """Return the sums (N,) of the first `columns` of rows (…, M), operands of a kind; in float64, plus `more`."""
    device = rows.device
    width = rows.shape[-1]
    count = rows.size // width
    shares = min(1024, -(-count // 256))
    partial = device.empty((shares, columns), np.float64)
    macros = product.element_macros(dtype, kind)
    kernel = device.kernel("elementwise.cu", "column_sums", macros)
    device.launch(kernel, (-(-columns // 32), shares), (32, 8), 2048, rows, np.int64(count), *int32(width, columns),
                  partial)  # fmt: skip
    sums = device.empty((columns,), dtype)
    add = device.kernel("elementwise.cu", "add_sums", macros)
    over(device, add, columns, partial, np.int32(shares), np.int64(columns), more, sums)
    return sums

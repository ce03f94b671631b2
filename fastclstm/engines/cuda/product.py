"""Implicit matrix products on a device: which tiles, how the operands lie, and the launch (csrc/gemm.cu)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastclstm.engines import remembered
from fastclstm.engines.cuda import packing
from fastclstm.engines.cuda.device import Device, DeviceArray
from fastclstm.spec import ConvSpec, Pair, Shape

ALGORITHMS = ("simt", "float32", "tf32", "bfloat16", "float16")
"""What the products are computed with: ordinary float32 (or float64) units; or tensor cores on float32 operands split
into three tf32 products (float32's own error), rounded to tf32, or stored as bfloat16 or float16. Sums and states are
float32 always; gradients of float16 are computed in tf32."""

KINDS = {"simt": 0, "tf32": 1, "float32": 3, "bfloat16": 4, "float16": 5}
"""The macro KIND of csrc/."""

TENSOR_CORES = 80
"""The oldest architecture with tensor cores for tf32 and bfloat16, and with cp.async."""

WARPGROUPS = 90
"""The only architecture with wgmma."""

LARGEST_FRAME = 2**31 - 1
"""Of elements in one frame: kernels count them in 32 bits."""

MOST_PIXELS = 2**30
"""Of all images of one launch, for the same reason."""

TILE_WIDTH = 16
"""Columns of a tile of pixels that keeps a halo, as in csrc/frames.cuh."""

HALO_STAGES = 4
"""Blocks of weights that are under way beside a halo."""

WASTE = 1.25
"""How much more a larger tiling may compute beside the edges than the smallest does."""


def kind(device: Device, dtype: np.dtype, algorithm: str) -> int:
    """Return the kind of product that an algorithm means.

    Raises ValueError for tensor cores on a GPU that has none for it, or in float64.
    """
    has_cores = device.architecture >= TENSOR_CORES and dtype == np.float32
    if algorithm == "auto":
        algorithm = "float32" if has_cores else "simt"
    if algorithm not in KINDS:
        raise ValueError(f"algorithm must be 'auto' or one of {', '.join(map(repr, ALGORITHMS))}, got {algorithm!r}")
    if dtype == np.float64:  # there is one way only
        return KINDS["simt"]
    if algorithm != "simt" and not has_cores:
        if algorithm == "float32":  # the same precision without tensor cores
            return KINDS["simt"]
        raise ValueError(f"algorithm {algorithm!r} needs tensor cores of sm_{TENSOR_CORES} or newer, but this GPU is "
                         f"sm_{device.architecture}; pass algorithm='auto' or 'simt'")  # fmt: skip
    return KINDS[algorithm]


def backward_kind(kind: int) -> int:
    """Return the kind for gradients, whose range float16 does not hold: tf32, with as many digits, for that."""
    return KINDS["tf32"] if kind == KINDS["float16"] else kind


def operand_type(kind: int, dtype: np.dtype) -> np.dtype:
    """Return the type of the frames and weights that a kind of product reads."""
    return np.dtype(np.uint16) if kind >= KINDS["bfloat16"] else dtype


def operand_channels(kind: int, channels: int) -> int:
    """Return the channels that frames have in memory: those of 16 bits are padded to 8."""
    return -(-channels // 8) * 8 if kind >= KINDS["bfloat16"] else channels


def operand_memory(device: Device, shape: Shape, used: int, dtype: np.dtype) -> DeviceArray:
    """Return memory for operands, of whose channels `used` are written; products read the others, which are zeros."""
    make = device.empty if shape[-1] == used else device.zeros
    return make(shape, dtype)


def real(dtype: np.dtype) -> str:
    """Return the C type of float32 or float64, or of a mask's bytes."""
    return {1: "unsigned char", 4: "float", 8: "double"}[dtype.itemsize]


@dataclass(frozen=True)
class Window:
    """What a product whose taps are equally far from every pixel reads around it."""

    taps: int
    reach: Pair
    """Rows and columns beside the pixel's own."""

    def halo(self, rows: int) -> Pair:
        """Return the size of what `rows` pixels read, TILE_WIDTH beside each other."""
        return rows // TILE_WIDTH + self.reach[0], TILE_WIDTH + self.reach[1]


def window(spec: ConvSpec) -> Window | None:
    """Return the window of a convolution, or of its transpose; None where taps are not equally far from every pixel."""
    if spec.padding_mode == "circular" or spec.strides != (1, 1):
        return None
    reach = (spec.KH - 1) * spec.dilation[0], (spec.KW - 1) * spec.dilation[1]
    return Window(spec.KH * spec.KW, reach)


@dataclass(frozen=True)
class Tiling:
    """How a product is cut into blocks."""

    kind: int
    rows: int
    """Pixels of a block."""
    columns: int
    threads: int
    shared_bytes: int
    depth: int
    """Steps of depth in a block of it."""
    macros: tuple[tuple[str, int | str], ...]
    parts: int = 1
    """In which each weight is packed."""
    frame: Pair | None = None
    """Rows and columns of the pixels, where a tile is of one image and keeps its halo; else tiles are any pixels."""
    windows: tuple[Window, ...] = ()
    """What keeps it, then."""

    @property
    def tile(self) -> Pair | None:
        """Rows and columns of the pixels of a tile that keeps its halo."""
        return None if self.frame is None else (self.rows // TILE_WIDTH, TILE_WIDTH)

    @property
    def fetched(self) -> float:
        """Pixels that are fetched for a step of depth."""
        halos = [math.prod(window.halo(self.rows)) / window.taps for window in self.windows]
        return max(halos, default=self.rows)

    @property
    def unit(self) -> int:
        """Blocks of depth that belong together: of the last window."""
        return max(self.windows[-1].taps, HALO_STAGES - 1) if self.windows else 1

    @property
    def on_warpgroups(self) -> bool:
        """Whether wgmma.cuh computes it."""
        return "WARPGROUPS" in dict(self.macros)

    @property
    def on_tensor_cores(self) -> bool:
        """Whether mma.cuh or wgmma.cuh computes it, else simt.cuh."""
        return self.kind != 0

    def grid(self, pixels: int, columns: int) -> Pair:
        """Blocks along the pixels and the columns."""
        across = -(-columns // self.columns)
        if self.frame is None:
            return -(-pixels // self.rows), across
        rows, width = self.frame
        images = -(-pixels // (rows * width))
        return images * -(-rows * TILE_WIDTH // self.rows) * -(-width // TILE_WIDTH), across

    def padded(self, columns: int) -> int:
        """Columns with those that fill the last block."""
        return self.grid(1, columns)[1] * self.columns

    def weights(self, blocks: int, columns: int) -> int:
        """Elements of the packed weights of `blocks` blocks of depth."""
        return blocks * self.depth * self.parts * self.padded(columns)


def simt(itemsize: int, rows: int, quads: int, thread_rows: int, thread_quads: int) -> Tiling:
    """Return a tiling of simt.cuh: a thread owns thread_rows pixels and thread_quads quads of columns."""
    depth = 16
    threads = rows // thread_rows * (quads // thread_quads)
    shared = 2 * depth * (rows + 4 + quads * 4) * itemsize
    macros: dict[str, int | str] = {"KIND": 0, "OPERAND": "real", "TILE_ROWS": rows, "TILE_QUADS": quads,
                                    "ROWS": thread_rows, "QUADS": thread_quads}  # fmt: skip
    return Tiling(0, rows, quads * 4, threads, shared, depth, tuple(macros.items()))


def tensor_cores(kind: int, warps_m: int, warps_n: int, row_tiles: int, stages: int) -> Tiling:
    """Return a tiling of mma.cuh: a warp owns row_tiles · 16 pixels and 32 columns; copies run `stages` ahead."""
    rows, columns = warps_m * row_tiles * 16, warps_n * 32
    short = kind >= KINDS["bfloat16"]
    macros: dict[str, int | str] = {"KIND": kind, "OPERAND": "unsigned short" if short else "float", "WARPS_M": warps_m,
                                    "WARPS_N": warps_n, "ROW_TILES": row_tiles, "STAGES": stages}  # fmt: skip
    shared = max(stages * (rows + columns) * 80, rows * columns * 4)  # the sums, in the end
    return Tiling(kind, rows, columns, warps_m * warps_n * 32, shared, 32 if short else 16, tuple(macros.items()))


def warpgroups(kind: int, count: int, columns: int, stages: int) -> Tiling:
    """Return a tiling of wgmma.cuh: each of `count` warpgroups owns 64 pixels and all columns (64, 128 or 256)."""
    rows, short = 64 * count, kind >= KINDS["bfloat16"]
    parts = 2 if kind == KINDS["float32"] else 1
    macros: dict[str, int | str] = {"KIND": kind, "OPERAND": "unsigned short" if short else "float",
                                    "WARPGROUPS": count, "COLUMNS": columns, "STAGES": stages}  # fmt: skip
    shared = 1024 + stages * (rows + parts * columns) * 128  # and what it takes to start at a multiple of 1024
    return Tiling(kind, rows, columns, 128 * count, shared, 64 if short else 32, tuple(macros.items()), parts)


def with_halo(kind: int, row_tiles: int, columns: int, frame: Pair, windows: tuple[Window, ...]) -> Tiling:
    """Return a tiling of halo.cuh for frames: two warpgroups own row_tiles times 64 pixels each, and all columns."""
    plain = warpgroups(kind, 2 * row_tiles, columns, HALO_STAGES)
    macros = dict(plain.macros) | {"WARPGROUPS": 2, "ROW_TILES": row_tiles, "HALO": 1}
    planes = [math.prod(window.halo(plain.rows)) | 1 for window in windows]
    weights = HALO_STAGES * plain.parts * columns * 128
    shared = max(1024 + weights + 2 * 8 * 16 * max(planes), plain.rows * columns * 4)  # two halos; or the sums
    return replace(plain, threads=256, shared_bytes=shared, macros=tuple(macros.items()), frame=frame, windows=windows)


def halo_tilings(kind: int, frame: Pair, windows: tuple[Window, ...]) -> list[Tiling]:
    """Return the tilings of halo.cuh, from the largest to the smallest."""
    forms = [(2, 128), (2, 64), (1, 64)][kind == KINDS["float32"] :]  # whose sums are kept twice
    return [with_halo(kind, *form, frame, windows) for form in forms] if kind else []


def of_form(tiling: Tiling, frame: Pair, windows: Sequence[Window | None]) -> Tiling:
    """Return a tiling for other frames; the smallest of all where it keeps a halo and these do not let it."""
    if tiling.frame is None:
        return tiling
    if None in windows:
        return tilings(tiling.kind, 4)[-1]
    candidates = halo_tilings(tiling.kind, frame, tuple(window for window in windows if window is not None))
    return next(candidate for candidate in candidates if candidate.macros == tiling.macros)


def warpgroup_tilings(kind: int) -> list[Tiling]:
    """Return the tilings of wgmma.cuh, from the largest to the smallest."""
    forms = [(2, 128, 4), (2, 64, 4)] if kind == KINDS["float32"] else [(2, 256, 4), (2, 128, 3), (2, 64, 4)]
    return [warpgroups(kind, *form) for form in forms] if kind else []


def tilings(kind: int, itemsize: int) -> list[Tiling]:
    """Return the tilings of a kind for every architecture, from the largest to the smallest."""
    if kind:
        return [tensor_cores(kind, *form) for form in ((2, 4, 4, 3), (2, 2, 2, 4), (4, 1, 2, 4), (1, 1, 2, 6))]
    forms = [(64, 16, 4, 1), (128, 4, 4, 1)]
    if itemsize == 4:
        forms.insert(0, (128, 32, 8, 2))
    return [simt(itemsize, *form) for form in forms]


@dataclass(frozen=True)
class Halo:
    """How the halo of a tile lies beside it (csrc/halo.cuh)."""

    corner: Pair
    """Its first row and column, seen from the tile's."""
    size: Pair
    offsets: DeviceArray
    """Where each product's part of it begins."""
    chunk: int
    """Blocks of depth that are computed from one."""


@dataclass(frozen=True)
class Frames:
    """Channels-last frames as one operand of a product (csrc/frames.cuh)."""

    data: DeviceArray
    stride: int
    size: tuple[int, int, int]
    """Height, width and channels as they lie in memory."""
    step: Pair
    divide: Pair
    circular: bool
    taps: DeviceArray
    count: int
    """Of taps, without those that fill the last block."""
    depth: int
    halo: Halo | None = None

    @property
    def blocks(self) -> int:
        """Blocks of depth that they take."""
        return -(-self.count // self.depth)

    def arguments(self) -> tuple[Any, ...]:
        """Arguments of the kernels."""
        return self.data, *self.rest(self.data, self.stride)

    def rest(self, data: DeviceArray, stride: int, *, left_out: bool = False) -> tuple[Any, ...]:
        """Arguments after `data` where other frames of the same kind are read, or none."""
        piece = 16 // data.dtype.itemsize if data.dtype.itemsize < 8 else 4
        whole = not (self.size[2] % piece or stride % piece or data.pointer % 16)
        taps, halo = self.taps, int32()
        if self.halo is not None:
            taps, halo = self.halo.offsets, int32(*self.halo.corner, *self.halo.size, self.halo.chunk)
        return (np.int64(stride), *int32(*self.size, *self.step, *self.divide, self.circular, whole), taps,
                np.int32(0 if left_out else self.blocks), *halo)  # fmt: skip


def frames(
    device: Device, spec: ConvSpec, data: DeviceArray, depth: int, *, stride: int | None = None,
    channels: int | None = None, tile: Pair | None = None,
) -> Frames:  # fmt: skip
    """Return the frames that a convolution reads, padded to `channels` in memory, `stride` elements apart.

    tile: rows and columns of the tiles that keep their halos.
    """
    size = spec.H, spec.W, channels or spec.C
    circular = spec.padding_mode == "circular"
    return _frames(device, data, stride, size, spec.strides, (1, 1), circular, packing.taps,
                   (spec.with_batch(1), channels), depth, tile)  # fmt: skip


def transposed_frames(
    device: Device, spec: ConvSpec, data: DeviceArray, depth: int, *, stride: int | None = None,
    channels: int | None = None, tile: Pair | None = None,
) -> Frames:  # fmt: skip
    """Return the frames dy that the transpose of a convolution reads, padded as those of `frames`."""
    size = spec.HO, spec.WO, channels or spec.F
    return _frames(device, data, stride, size, (1, 1), spec.strides, packing.wraps(spec), packing.transposed_taps,
                   (spec.with_batch(1), channels), depth, tile)  # fmt: skip


def _frames(
    device: Device, data: DeviceArray, stride: int | None, size: tuple[int, int, int], step: Pair, divide: Pair,
    circular: bool, table: Callable[..., np.ndarray], arguments: tuple[Any, ...], depth: int, tile: Pair | None,
) -> Frames:  # fmt: skip
    elements = size[0] * size[1] * size[2]
    if elements > LARGEST_FRAME:
        raise ValueError(f"engine 'cuda' counts the elements of a frame in 32 bits, but one of {size} has {elements}; "
                         f"pass engine='cpu'")  # fmt: skip
    rows, halo = table(*arguments), None
    if tile is not None:
        rows, chunk = packing.by_chunks(rows, size[2], depth, HALO_STAGES - 1)
        used = rows[rows[:, 3] >= 0]
        (top, left), (bottom, right) = (tuple(map(int, of(used[:, :2], axis=0))) for of in (np.min, np.max))
        corner, extent = (top, left), (tile[0] + bottom - top, tile[1] + right - left)
        halo = Halo(corner, extent, device.put(packing.halo_offsets(rows, depth, corner, extent)), chunk)
    taps = device.put(packing.padded_to_blocks(rows, depth))
    return Frames(
        data, elements if stride is None else stride, size, step, divide, circular, taps, len(rows), depth, halo
    )


def pack(
    device: Device, tiling: Tiling, kernels: Sequence[DeviceArray], parts: Sequence[Frames], columns: int, *,
    gates: bool = False, transposed: bool = False,
) -> DeviceArray:  # fmt: skip
    """Return kernels (KH, KW, C, F), one for each of `parts`, as the product of `columns` columns reads them."""
    dtype = kernels[0].dtype
    padded = tiling.padded(columns)
    depths = [part.blocks * tiling.depth for part in parts]
    packed = device.empty((sum(depths) * tiling.parts, padded), operand_type(tiling.kind, dtype))
    macros = element_macros(dtype, tiling.kind)
    if tiling.on_warpgroups:  # which read them as they are
        macros["KIND"] = tiling.kind
    launch = device.kernel("elementwise.cu", "pack", macros)
    first = 0
    for part, weights, depth in zip(parts, kernels, depths, strict=True):
        over(device, launch, depth * padded, weights, part.taps,
             *int32(depth, tiling.depth if tiling.on_tensor_cores else 1, padded, 8 if tiling.on_tensor_cores else 1,
                    columns, gates, transposed, *weights.shape[2:]),
             offset(packed, first))  # fmt: skip
        first += tiling.weights(part.blocks, columns)
    return packed


def element_macros(dtype: np.dtype, kind: int = 0) -> dict[str, int | str]:
    """Return the macros of csrc/elementwise.cu."""
    if kind < KINDS["bfloat16"]:
        return {"REAL": real(dtype), "OPERAND": "real", "KIND": 0}
    return {"REAL": real(dtype), "OPERAND": "unsigned short", "KIND": kind}


def operands(device: Device, kind: int, x: DeviceArray) -> tuple[DeviceArray, int]:
    """Return x (…, C) as a product reads it, and its channels in memory: itself, or 16 bits padded to 8 channels."""
    channels = x.shape[-1]
    if x.dtype == operand_type(kind, x.dtype):
        return x, channels
    padded = operand_channels(kind, channels)
    converted = device.empty((*x.shape[:-1], padded), np.uint16)
    convert(device, kind, x, padded, converted)
    return converted, padded


def convert(device: Device, kind: int, x: DeviceArray, padded: int, to: DeviceArray) -> None:
    """Write x (…, C) as a product reads it, with `padded` channels, to the beginning of an array."""
    kernel = device.kernel("elementwise.cu", "convert", element_macros(x.dtype, kind))
    pixels, channels = x.size // x.shape[-1], x.shape[-1]
    over(device, kernel, pixels * padded, x, np.int64(pixels), *int32(channels, padded), to)


def multiply(
    device: Device, name: str, tiling: Tiling, macros: dict[str, int | str], pixels: int, columns: int,
    *arguments: Any, shares: int = 1, source: str = "gemm.cu",
) -> None:  # fmt: skip
    """Launch a kernel of csrc/`source` over its tiles, for each share of the depth."""
    check_pixels(pixels)
    kernel = device.kernel(source, name, {**macros, **dict(tiling.macros)})
    grid = *tiling.grid(pixels, columns), shares
    device.launch(kernel, grid, (tiling.threads,), tiling.shared_bytes, *arguments)


def convolve(
    spec: ConvSpec, tiling: Tiling, x: DeviceArray, kernel: DeviceArray, bias: DeviceArray | None
) -> DeviceArray:
    """Convolve x (B, H, W, C) with kernel (KH, KW, C, F), by a tiling: y (B, HO, WO, F)."""
    device = x.device
    y = device.empty((spec.B, spec.HO, spec.WO, spec.F), x.dtype)
    data, channels = operands(device, tiling.kind, x)
    operand = frames(device, spec, data, tiling.depth, channels=channels, tile=tiling.tile)
    weights = pack(device, tiling, (kernel,), [operand], spec.F)
    grid = spec.B * spec.HO * spec.WO, spec.HO, spec.WO
    launch_conv2d(device, tiling, operand, weights, grid, spec.F, y, bias=bias)
    return y


def launch_conv2d(
    device: Device, tiling: Tiling, frames: Frames, weights: DeviceArray, grid: tuple[int, int, int],
    filters: int, y: DeviceArray, *, bias: DeviceArray | None = None, residual: DeviceArray | None = None,
    shares: int = 1,
) -> None:  # fmt: skip
    """Write frames times packed weights, plus `bias` and `residual`, to y; `grid`: its pixels, rows, columns.

    With `shares`, no more than blocks of depth, or than chunks of a halo, y is (shares, …): the sums of each, `bias` in
    the first. There is no `residual` then.
    """
    unit = 1 if frames.halo is None else frames.halo.chunk
    share = -(-frames.blocks // (unit * shares)) * unit
    multiply(device, "conv2d", tiling, {"REAL": real(y.dtype), "STANDARD": 1}, grid[0], filters, *frames.arguments(),
             weights, *int32(tiling.padded(filters), *grid), bias, residual, y, *int32(filters, share),
             shares=shares)  # fmt: skip


def add_shares(device: Device, partial: DeviceArray, more: DeviceArray | None, to: DeviceArray) -> None:
    """Write the sum of partial (shares, …), added in this order, plus `more`, to an array."""
    add = device.kernel("elementwise.cu", "add_products", element_macros(to.dtype))
    over(device, add, to.size, partial, np.int32(partial.shape[0]), np.int64(to.size), more, to)


def add_depth(device: Device, partial: DeviceArray, residual: DeviceArray | None, to: DeviceArray) -> None:
    """Write the sum of shares of a product's depth (shares, …), and of `residual`, as a step of the way back adds."""
    add = device.kernel("elementwise.cu", "add_depth", element_macros(to.dtype))
    over(device, add, to.size, partial, np.int32(partial.shape[0]), np.int64(to.size), residual, to)


def check_pixels(count: int) -> None:
    """Raise ValueError where there are too many pixels for one launch."""
    if count > MOST_PIXELS:
        raise ValueError(f"engine 'cuda' takes {MOST_PIXELS} pixels at a time, but there are {count}; split the batch")


def over(device: Device, kernel: Any, count: int, *arguments: Any) -> None:
    """Launch a kernel with one thread an element."""
    if count:
        device.launch(kernel, (-(-count // 256),), (256,), 0, *arguments)


def offset(array: DeviceArray, elements: int) -> DeviceArray:
    """Return the array from an element on; its shape is no longer told."""
    pointer = array.pointer + elements * array.dtype.itemsize
    return DeviceArray(pointer, (array.size - elements,), array.dtype, array.owner, array.device, array.stream)


def int32(*values: int) -> tuple[np.int32, ...]:
    """Return kernel arguments."""
    return tuple(map(np.int32, values))


def on_device(device: Device, array: np.ndarray | DeviceArray) -> DeviceArray:
    """Return an array on the device: itself, or a copy of NumPy's, made once for as long as its values are the same."""
    if isinstance(array, DeviceArray):
        return array
    return remembered.remember((array,), (device, device.stream_key()), lambda: device.put(array))

"""The oracle: every operation in plain NumPy, forward and backward, written to be read beside the papers.

It defines what the other engines must compute and is the baseline their speed is told against: convolutions are matrix
products in BLAS, nothing loops over pixels. All arrays of a call share one dtype, which the results keep. Where the
mathematics is analytic, complex arrays work too, so that complex-step differentiation can check the backward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from fastclstm.engines import cell_updates, cells, recurrence
from fastclstm.spec import CellSpec, ConvLSTMSpec, ConvSpec, PoolSpec

ALGORITHMS = ("direct",)

COLUMN_BYTES = 4 << 20
"""Size of the matrix that a convolution gathers before each matrix product."""

Arrays = dict[str, np.ndarray]


def conv2d(
    spec: ConvSpec, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None, *, algorithm: str = "auto"
) -> np.ndarray:
    """Cross-correlate x (B, H, W, C) with kernel (KH, KW, C, F): y (B, HO, WO, F).

    ``y[b, i, j] = Σ_{k, l, c} x[b, i·s + k·d, j·s + l·d, c] kernel[k, l, c] + bias``, x being padded: equation 9.9 of
    Goodfellow, Bengio & Courville, "Deep Learning" (2016), with stride s and dilation d.
    """
    y = np.empty((spec.B, spec.HO, spec.WO, spec.F), x.dtype)
    matrix = kernel.reshape(-1, spec.F)
    padded = _pad(spec, x)
    for b, rows in _blocks(spec, x.itemsize):
        np.matmul(_columns(spec, padded, b, rows), matrix, out=y[b, rows].reshape(-1, spec.F))
    return y if bias is None else np.add(y, bias, out=y)


def conv2d_backward(
    spec: ConvSpec, x: np.ndarray, kernel: np.ndarray, dy: np.ndarray | None, *, algorithm: str = "auto",
    wanted: Collection[str] = ("x", "kernel", "bias"),
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Pull dy (B, HO, WO, F) back through `conv2d`: dx, dkernel, dbias, None for what is not `wanted`.

    The transposes of the forward pass: ``dkernel[k, l] = Σ x[.., i·s + k·d, j·s + l·d, :]ᵀ dy[.., i, j, :]`` and
    ``dx[.., i·s + k·d, j·s + l·d, :] += dy[.., i, j, :] kernel[k, l]ᵀ``. Only dkernel looks at x, only dx at kernel:
    what is not looked at may be any array of the dtype.
    """
    if dy is None:
        dy = np.zeros((spec.B, spec.HO, spec.WO, spec.F), x.dtype)
    dx = _input_gradient(spec, kernel, dy) if "x" in wanted else None
    dkernel = _kernel_gradient(spec, x, dy) if "kernel" in wanted else None
    return dx, dkernel, recurrence.total(dy, (0, 1, 2)) if "bias" in wanted else None


def _input_gradient(spec: ConvSpec, kernel: np.ndarray, dy: np.ndarray) -> np.ndarray:
    matrix = kernel.reshape(-1, spec.F)
    dpadded = _pad(spec, np.zeros((spec.B, spec.H, spec.W, spec.C), dy.dtype))
    for b, rows in _blocks(spec, dy.itemsize):
        dcolumns = dy[b, rows].reshape(-1, spec.F) @ matrix.T
        dcolumns = dcolumns.reshape(rows.stop - rows.start, spec.WO, spec.KH, spec.KW, spec.C)
        for kh, kw in np.ndindex(spec.KH, spec.KW):
            _tap(spec, dpadded, kh, kw)[b, rows] += dcolumns[:, :, kh, kw]
    return _unpad(spec, dpadded)


def _kernel_gradient(spec: ConvSpec, x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    padded, dkernel = _pad(spec, x), np.zeros((spec.KH, spec.KW, spec.C, spec.F), x.dtype)
    for b, rows in _blocks(spec, x.itemsize):
        dkernel.reshape(-1, spec.F)[...] += _columns(spec, padded, b, rows).T @ dy[b, rows].reshape(-1, spec.F)
    return dkernel


def convlstm2d(
    spec: ConvLSTMSpec,
    x: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None,
    h: np.ndarray | None,
    c: np.ndarray | None,
    peephole: Arrays | None,
    mask: np.ndarray | None,
    *,
    normalization: Arrays | None = None,
    dropout: Arrays | None = None,
    algorithm: str = "auto",
    save: bool | str = False,
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, recurrence.Saved | None]:
    """Run a ConvLSTM over x (B, T, H, W, C): see `recurrence.forward` for the equations."""
    arguments = x, kernel, recurrent_kernel, bias, h, c, peephole, mask
    return recurrence.forward(
        spec, conv2d, *arguments, normalization=normalization, dropout=dropout, save=save, out=out
    )


def convlstm2d_backward(
    spec: ConvLSTMSpec,
    saved: recurrence.Saved,
    dy: np.ndarray | None,
    dh: np.ndarray | None,
    dc: np.ndarray | None,
    *,
    input_gradient: bool = True,
) -> dict[str, Any]:
    """Pull gradients of the output, the last h and the last c back through time: see `recurrence.backward`."""
    return recurrence.backward(spec, conv2d_backward, saved, dy, dh, dc, input_gradient=input_gradient)


def recurrent(
    spec: CellSpec,
    x: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None,
    states: tuple[np.ndarray | None, ...],
    mask: np.ndarray | None,
    *,
    normalization: Arrays | None = None,
    dropout: Arrays | None = None,
    algorithm: str = "auto",
    save: bool = False,
    convolution: Callable[..., Any] | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, ...], cells.Saved | None]:
    """Run a cell over x (B, T, *space, C): see `cells` for the equations.

    `convolution` makes one of (spec, kernel, bias, algorithm), where it is none of frames.
    """
    tools = cells.Tools(convolution or partial(cells.Convolution, conv2d, conv2d_backward), cell_updates.Updates)
    inputs = cells.Inputs(x, kernel, recurrent_kernel, bias, states, mask, normalization, dropout, algorithm)
    return cells.forward(spec, tools, inputs, save)


def recurrent_backward(
    spec: CellSpec,
    saved: cells.Saved,
    dy: np.ndarray | None,
    dstates: Sequence[np.ndarray | None],
    *,
    input_gradient: bool = True,
) -> dict[str, Any]:
    """Pull gradients of the output and of the last states back through time: see `cells.backward`."""
    return cells.backward(spec, saved, dy, dstates, input_gradient=input_gradient)


def max_pool3d(spec: PoolSpec, x: np.ndarray, return_indices: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Take the maximum of each window of x (B, T, H, W, C): y (B, TO, HO, WO, C), and where it stands.

    ``y[o] = max_k x[o·s + k]`` over the pixels of a window inside x. An index is the flat one, (t·H + h)·W + w, of the
    first NaN of its window or else of the first of its largest pixels.
    """
    pixels = _windows(spec, _surround(spec, x, -np.inf))
    if not return_indices:
        y = next(pixels).copy()
        for pixel in pixels:
            np.maximum(y, pixel, out=y)
        return y, None
    y = np.full(spec.output_shape, -np.inf, x.dtype)
    indices = np.full(spec.output_shape, -1)
    volume = np.arange(spec.T * spec.H * spec.W).reshape(1, spec.T, spec.H, spec.W, 1)
    for pixel, index in zip(pixels, _windows(spec, _surround(spec, volume, -1)), strict=True):
        wins = (indices < 0) | (pixel > y) | (np.isnan(pixel) & ~np.isnan(y))
        np.copyto(y, pixel, where=wins)
        np.copyto(indices, index, where=wins)
    return y, indices


def max_pool3d_backward(spec: PoolSpec, indices: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Add each element of dy (B, TO, HO, WO, C) to the pixel of dx (B, T, H, W, C) that won its window."""
    dx = np.zeros((spec.B, spec.T * spec.H * spec.W, spec.C), dy.dtype)
    sample = np.arange(spec.B).reshape(-1, 1, 1, 1, 1)
    flat = (sample * dx.shape[1] + indices) * spec.C + np.arange(spec.C)
    np.add.at(dx.reshape(-1), flat.reshape(-1), dy.reshape(-1))
    return dx.reshape(spec.B, spec.T, spec.H, spec.W, spec.C)


def _pad(spec: ConvSpec, x: np.ndarray) -> np.ndarray:
    """Surround frames x (B, H, W, C) by their padding."""
    if spec.padding_mode == "circular":
        rows, columns = _wrapped(spec)
        return x[:, rows][:, :, columns]
    (top, bottom), (left, right) = spec.padding
    padded = np.zeros((spec.B, top + spec.H + bottom, left + spec.W + right, spec.C), x.dtype)
    padded[:, top : top + spec.H, left : left + spec.W] = x
    return padded


def _unpad(spec: ConvSpec, dpadded: np.ndarray) -> np.ndarray:
    """Pull a gradient back through `_pad`."""
    if spec.padding_mode == "circular":
        rows, columns = _wrapped(spec)
        by_row = np.zeros((spec.B, spec.H, *dpadded.shape[2:]), dpadded.dtype)
        for padded_row, row in enumerate(rows):
            by_row[:, row] += dpadded[:, padded_row]
        dx = np.zeros((spec.B, spec.H, spec.W, spec.C), dpadded.dtype)
        for padded_column, column in enumerate(columns):
            dx[:, :, column] += by_row[:, :, padded_column]
        return dx
    (top, _), (left, _) = spec.padding
    return np.ascontiguousarray(dpadded[:, top : top + spec.H, left : left + spec.W])


def _wrapped(spec: ConvSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return which row and which column of a frame each row and column of the circularly padded frame repeats."""
    (top, bottom), (left, right) = spec.padding
    return np.arange(-top, spec.H + bottom) % spec.H, np.arange(-left, spec.W + right) % spec.W


def _tap(spec: ConvSpec, padded: np.ndarray, kh: int, kw: int) -> np.ndarray:
    """View the pixels of padded frames that tap (kh, kw) of the kernel meets: (B, HO, WO, C)."""
    (sh, sw), (dh, dw) = spec.strides, spec.dilation
    return padded[:, kh * dh :: sh, kw * dw :: sw][:, : spec.HO, : spec.WO]


def _columns(spec: ConvSpec, padded: np.ndarray, b: int, rows: slice) -> np.ndarray:
    """Gather the windows under some rows of output b as a matrix (rows · WO, KH · KW · C)."""
    columns = np.empty((rows.stop - rows.start, spec.WO, spec.KH, spec.KW, spec.C), padded.dtype)
    for kh, kw in np.ndindex(spec.KH, spec.KW):
        columns[:, :, kh, kw] = _tap(spec, padded, kh, kw)[b, rows]
    return columns.reshape(len(columns) * spec.WO, spec.KH * spec.KW * spec.C)


def _blocks(spec: ConvSpec, itemsize: int) -> Iterator[tuple[int, slice]]:
    """Yield samples and runs of their output rows whose windows fit in `COLUMN_BYTES`."""
    count = max(1, COLUMN_BYTES // max(1, spec.WO * spec.KH * spec.KW * spec.C * itemsize))
    for b in range(spec.B):
        for start in range(0, spec.HO, count):
            yield b, slice(start, min(start + count, spec.HO))


def _surround(spec: PoolSpec, volume: np.ndarray, value: float) -> np.ndarray:
    """Surround a volume (_, T, H, W, _) by `value` as far as the windows reach."""
    sizes = zip((spec.TO, spec.HO, spec.WO), spec.strides, spec.pool_size, spec.padding, volume.shape[1:4], strict=True)
    pads = [(before, max((count - 1) * s + k - n - before, 0)) for count, s, k, (before, _), n in sizes]
    return np.pad(volume, [(0, 0), *pads, (0, 0)], constant_values=value)


def _windows(spec: PoolSpec, volume: np.ndarray) -> Iterator[np.ndarray]:
    """Yield views of a surrounded volume: the first pixel of every window, the second, … in (t, h, w) order."""
    st, sh, sw = spec.strides
    for t, h, w in np.ndindex(spec.pool_size):
        yield volume[:, t::st, h::sh, w::sw][:, : spec.TO, : spec.HO, : spec.WO]

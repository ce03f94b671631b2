"""The oracle: every operation in plain NumPy, forward and backward, written to be read beside the papers.

It defines what the other engines must compute and is the baseline their speed is told against: convolutions are matrix
products in BLAS, nothing loops over pixels. All arrays of a call share one dtype, which the results keep. Where the
mathematics is analytic, complex arrays work too, so that complex-step differentiation can check the backward passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm.spec import GATES, ConvLSTMSpec, ConvSpec, PoolSpec

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
    spec: ConvSpec, x: np.ndarray, kernel: np.ndarray, dy: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pull dy (B, HO, WO, F) back through `conv2d`: dx, dkernel, dbias.

    The transposes of the forward pass: ``dkernel[k, l] = Σ x[.., i·s + k·d, j·s + l·d, :]ᵀ dy[.., i, j, :]`` and
    ``dx[.., i·s + k·d, j·s + l·d, :] += dy[.., i, j, :] kernel[k, l]ᵀ``.
    """
    dkernel = np.zeros_like(kernel)
    if dy is None:
        return np.zeros_like(x), dkernel, np.zeros(spec.F, x.dtype)
    matrix, dmatrix = kernel.reshape(-1, spec.F), dkernel.reshape(-1, spec.F)
    padded = _pad(spec, x)
    dpadded = np.zeros_like(padded)
    for b, rows in _blocks(spec, x.itemsize):
        block = dy[b, rows].reshape(-1, spec.F)
        dmatrix += _columns(spec, padded, b, rows).T @ block
        dcolumns = (block @ matrix.T).reshape(-1, spec.WO, spec.KH, spec.KW, spec.C)
        for kh, kw in np.ndindex(spec.KH, spec.KW):
            _tap(spec, dpadded, kh, kw)[b, rows] += dcolumns[:, :, kh, kw]
    return _unpad(spec, dpadded), dkernel, dy.sum((0, 1, 2))


@dataclass(frozen=True)
class Saved:
    """What `convlstm2d_backward` needs of the forward pass."""

    x: np.ndarray
    kernel: np.ndarray
    recurrent_kernel: np.ndarray
    peephole: Arrays | None
    mask: np.ndarray | None
    steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    """Of each step the h and c it started from, and its pre-activations (B, HO, WO, 4F)."""


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
    algorithm: str = "auto",
    save: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Saved | None]:
    """Run a ConvLSTM over x (B, T, H, W, C): output (B, T, HO, WO, F) or its last step, h, c, and what backward needs.

    Equation 3 of Shi et al., "Convolutional LSTM Network" (NeurIPS 2015)::

        i_t = σ(W_xi * x_t + W_hi * h_{t-1} + W_ci ∘ c_{t-1} + b_i)
        f_t = σ(W_xf * x_t + W_hf * h_{t-1} + W_cf ∘ c_{t-1} + b_f)
        c_t = f_t ∘ c_{t-1} + i_t ∘ tanh(W_xc * x_t + W_hc * h_{t-1} + b_c)
        o_t = σ(W_xo * x_t + W_ho * h_{t-1} + W_co ∘ c_t + b_o)
        h_t = o_t ∘ tanh(c_t)
    """
    sigma, tanh, tanh_c = spec.recurrent_activation, spec.activation, spec.output_activation
    h = np.zeros(spec.state_shape, x.dtype) if h is None else h.copy()
    c = np.zeros(spec.state_shape, x.dtype) if c is None else c.copy()
    output = np.zeros(spec.state_shape, x.dtype)
    sequence = np.empty(spec.output_shape, x.dtype) if spec.return_sequences else None
    saved = Saved(x, kernel, recurrent_kernel, peephole, mask, []) if save else None

    for t in range(spec.T):
        x_t, valid = _frame(spec, x, mask, t)
        z = conv2d(spec.input, x_t, kernel, bias)
        z += conv2d(spec.recurrent, h, recurrent_kernel, None)
        if saved is not None:
            saved.steps.append((h, c, z))
        z_i, z_f, z_g, z_o = _gates(z)
        if peephole is not None:
            z_i += _peep(spec, peephole, "i", c)
            z_f += _peep(spec, peephole, "f", c)
        i, f, g = sigma.forward(z_i), sigma.forward(z_f), tanh.forward(z_g)
        c_t = _clip(spec, f * c + i * g)
        if peephole is not None:
            z_o += _peep(spec, peephole, "o", c_t)
        o = sigma.forward(z_o)
        h_t = o * tanh_c.forward(c_t)

        h, c, output = _choose(valid, h_t, h), _choose(valid, c_t, c), _choose(valid, h_t, output)
        if sequence is not None:
            sequence[:, t] = output
    return output.copy() if sequence is None else sequence, h, c, saved


def convlstm2d_backward(
    spec: ConvLSTMSpec, saved: Saved, dy: np.ndarray | None, dh: np.ndarray | None, dc: np.ndarray | None
) -> dict[str, Any]:
    """Pull gradients of the output, the last h and the last c back through time.

    The lines of `convlstm2d` in reverse order, each by the chain rule: backpropagation through time with peepholes as
    in Gers, Schraudolph & Schmidhuber, "Learning Precise Timing with LSTM Recurrent Networks" (JMLR 2002), not
    truncated, with the convolutions of Shi et al. 2015. Where the cell was clipped nothing passes.

    Returns
    -------
    dict
        Gradients under "x", "kernel", "recurrent_kernel", "bias", of the initial states under "h" and "c", and under
        "peephole" a dict of the given weights' gradients, or None.
    """
    sigma, tanh, tanh_c = spec.recurrent_activation, spec.activation, spec.output_activation
    x, peephole = saved.x, saved.peephole
    zeros = np.zeros(spec.state_shape, x.dtype)
    dh, dc = (zeros if d is None else d for d in (dh, dc))
    doutput = zeros if spec.return_sequences or dy is None else dy
    dx = np.empty_like(x)
    dkernel, drecurrent = np.zeros_like(saved.kernel), np.zeros_like(saved.recurrent_kernel)
    dbias = np.zeros(4 * spec.F, x.dtype)
    dpeephole = {name: np.zeros_like(weight) for name, weight in (peephole or {}).items()}

    for t in reversed(range(spec.T)):
        x_t, valid = _frame(spec, x, saved.mask, t)
        h, c, z = saved.steps[t]
        z_i, z_f, z_g, z_o = _gates(z)
        i, f, g, o = sigma.forward(z_i), sigma.forward(z_f), tanh.forward(z_g), sigma.forward(z_o)
        unclipped = f * c + i * g
        c_t = _clip(spec, unclipped)
        if spec.return_sequences and dy is not None:
            doutput = doutput + dy[:, t]

        (dh_t, dh), (dc_t, dc), (doutput_t, doutput) = (_split(valid, d) for d in (dh, dc, doutput))
        dh_t = dh_t + doutput_t
        dz = np.empty_like(z)
        dz_i, dz_f, dz_g, dz_o = _gates(dz)
        dz_o[...] = dh_t * tanh_c.forward(c_t) * sigma.derivative(z_o)
        dc_t = dc_t + dh_t * o * tanh_c.derivative(c_t)
        if peephole is not None:
            dc_t += _peep_backward(spec, peephole, dpeephole, "o", c_t, dz_o)
        if spec.cell_clip is not None:
            dc_t = np.where(np.abs(unclipped) < spec.cell_clip, dc_t, 0)
        dz_i[...] = dc_t * g * sigma.derivative(z_i)
        dz_f[...] = dc_t * c * sigma.derivative(z_f)
        dz_g[...] = dc_t * i * tanh.derivative(z_g)
        dc = dc + dc_t * f
        if peephole is not None:
            dc += _peep_backward(spec, peephole, dpeephole, "i", c, dz_i)
            dc += _peep_backward(spec, peephole, dpeephole, "f", c, dz_f)

        dx[:, spec.source_step(t)], dkernel_t, dbias_t = conv2d_backward(spec.input, x_t, saved.kernel, dz)
        dh_from_z, drecurrent_t, _ = conv2d_backward(spec.recurrent, h, saved.recurrent_kernel, dz)
        dh = dh + dh_from_z
        dkernel += dkernel_t
        drecurrent += drecurrent_t
        dbias += dbias_t
    return {"x": dx, "kernel": dkernel, "recurrent_kernel": drecurrent, "bias": dbias, "h": dh, "c": dc,
            "peephole": None if peephole is None else dpeephole}  # fmt: skip


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
        wins = (index >= 0) & ((indices < 0) | (pixel > y) | (np.isnan(pixel) & ~np.isnan(y)))
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
    return columns.reshape(-1, spec.KH * spec.KW * spec.C)


def _blocks(spec: ConvSpec, itemsize: int) -> Iterator[tuple[int, slice]]:
    """Yield samples and runs of their output rows whose windows fit in `COLUMN_BYTES`."""
    count = max(1, COLUMN_BYTES // (spec.WO * spec.KH * spec.KW * spec.C * itemsize))
    for b in range(spec.B):
        for start in range(0, spec.HO, count):
            yield b, slice(start, min(start + count, spec.HO))


def _frame(spec: ConvLSTMSpec, x: np.ndarray, mask: np.ndarray | None, t: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the frames (B, H, W, C) read by step t, zeros where it is masked, and where it is not (B, 1, 1, 1)."""
    source = spec.source_step(t)
    if mask is None:
        return x[:, source], None
    valid = mask[:, source, None, None, None]
    return np.where(valid, x[:, source], 0), valid


def _choose(valid: np.ndarray | None, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Return `new` where a step is valid (everywhere without a mask) and `old` where it is skipped."""
    return new if valid is None else np.where(valid, new, old)


def _split(valid: np.ndarray | None, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pull a gradient back through `_choose`: to the new and to the old."""
    zero = np.zeros((), gradient.dtype)
    return _choose(valid, gradient, zero), zero if valid is None else np.where(valid, zero, gradient)


def _gates(z: np.ndarray) -> list[np.ndarray]:
    """View the pre-activations of the gates i, f, g, o."""
    return np.split(z, len(GATES), axis=-1)


def _clip(spec: ConvLSTMSpec, c: np.ndarray) -> np.ndarray:
    """Limit a cell state to [-cell_clip, cell_clip]."""
    return c if spec.cell_clip is None else np.clip(c, -spec.cell_clip, spec.cell_clip)


def _peep(spec: ConvLSTMSpec, peephole: Arrays, gate: str, c: np.ndarray) -> np.ndarray:
    """Return what a gate sees of the cell: ``W_c ∘ c``, or ``W_c * c + b``."""
    if spec.peephole_conv is None:
        return peephole[gate] * c
    return conv2d(spec.peephole_conv, c, peephole[gate], peephole.get(f"bias_{gate}"))


def _peep_backward(
    spec: ConvLSTMSpec, peephole: Arrays, dpeephole: Arrays, gate: str, c: np.ndarray, dz: np.ndarray
) -> np.ndarray:
    """Pull dz back through `_peep`: add the weights' gradients to `dpeephole` and return dc."""
    if spec.peephole_conv is None:
        dpeephole[gate] += (dz * c).sum(tuple(range(4 - peephole[gate].ndim)))
        return dz * peephole[gate]
    dc, dweight, dbias = conv2d_backward(spec.peephole_conv, c, peephole[gate], dz)
    dpeephole[gate] += dweight
    if f"bias_{gate}" in dpeephole:
        dpeephole[f"bias_{gate}"] += dbias
    return dc


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

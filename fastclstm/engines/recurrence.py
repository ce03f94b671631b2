"""The recurrence of the ConvLSTM in plain NumPy, forward and backward, over any engine's convolutions.

The reference engine is this with its own convolutions; the cpu engine computes so what its fused kernels do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from fastclstm.spec import GATES, NORMALIZED_PARTS, ConvLSTMSpec, ConvSpec

Arrays = dict[str, np.ndarray]
Convolution = Callable[..., np.ndarray]
"""An engine's conv2d: ``(spec, x, kernel, bias, *, algorithm) -> y``."""

ConvolutionBackward = Callable[..., tuple[Any, np.ndarray, np.ndarray]]
"""An engine's conv2d_backward: ``(spec, x, kernel, dy, *, algorithm, wanted) -> (dx, dkernel, dbias)``."""


@dataclass(frozen=True)
class Saved:
    """What `backward` needs of the forward pass."""

    conv2d: Convolution
    """With the algorithm chosen."""
    x: np.ndarray
    kernel: np.ndarray
    recurrent_kernel: np.ndarray
    bias: np.ndarray | None
    peephole: Arrays | None
    mask: np.ndarray | None
    normalization: Arrays | None
    dropout: Arrays | None
    algorithm: str
    steps: list[tuple[np.ndarray, np.ndarray, np.ndarray | None, tuple[Normalized, ...]]] = field(default_factory=list)
    """Of each step the h and c it started from, its pre-activations (B, HO, WO, 4F), and how they were normalized;
    the pre-activations are None, and the normalized values empty, where they are to be computed again."""


@dataclass(frozen=True)
class Normalized:
    """Pre-activations brought to mean 0 and variance 1, and what that took."""

    values: np.ndarray
    """(B, HO, WO, groups, 4F / groups), or nothing where they are to be computed again."""
    scale: np.ndarray
    """One over the standard deviation."""
    axes: tuple[int, ...] | None
    """Those over which the mean and the variance were taken; None: they were given."""
    weight: Any
    """1, or of each sample 1 where it counts and 0 where it is masked (B, 1, 1, 1, 1)."""
    count: Any
    """Number of values that a mean was taken of."""
    mean: np.ndarray
    variance: np.ndarray


def forward(
    spec: ConvLSTMSpec,
    conv2d: Convolution,
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
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Saved | None]:
    """Run a ConvLSTM over x (B, T, H, W, C): output (B, T, HO, WO, F) or its last step, h, c, and what backward needs.

    The last h and c are copied to `out`, a pair of arrays, where there is one. `normalization` holds the weights of
    spec.normalization; `dropout` factors of the frames "x" (4, B, H, W, C) and of the hidden state "h"
    (4, B, HO, WO, F) before each gate's convolution. With save="states" backward computes the pre-activations again.

    Equation 3 of Shi et al., "Convolutional LSTM Network" (NeurIPS 2015)::

        i_t = σ(W_xi * x_t + W_hi * h_{t-1} + W_ci ∘ c_{t-1} + b_i)
        f_t = σ(W_xf * x_t + W_hf * h_{t-1} + W_cf ∘ c_{t-1} + b_f)
        c_t = f_t ∘ c_{t-1} + i_t ∘ tanh(W_xc * x_t + W_hc * h_{t-1} + b_c)
        o_t = σ(W_xo * x_t + W_ho * h_{t-1} + W_co ∘ c_t + b_o)
        h_t = o_t ∘ tanh(c_t)
    """
    h = np.zeros(spec.state_shape, x.dtype) if h is None else h.copy()
    c = np.zeros(spec.state_shape, x.dtype) if c is None else c.copy()
    output = np.zeros(spec.state_shape, x.dtype)
    sequence = np.empty(spec.output_shape, x.dtype) if spec.return_sequences else None
    conv2d = partial(conv2d, algorithm=algorithm)
    saved = Saved(conv2d, x, kernel, recurrent_kernel, bias, peephole, mask, normalization, dropout, algorithm)

    for t in range(spec.T):
        z, normalized, h_t, c_t, valid = _step(spec, saved, t, h, c)
        if save == "states":
            nothing = np.empty(0, x.dtype)
            saved.steps.append((h, c, None, tuple(replace(n, values=nothing) for n in normalized)))
        elif save:
            saved.steps.append((h, c, z, normalized))
        h, c, output = _choose(valid, h_t, h), _choose(valid, c_t, c), _choose(valid, h_t, output)
        if sequence is not None:
            sequence[:, t] = output
    if out is not None:
        np.copyto(out[0], h)
        np.copyto(out[1], c)
        h, c = out
    return output.copy() if sequence is None else sequence, h, c, saved if save else None


def _step(
    spec: ConvLSTMSpec, saved: Saved, t: int, h: np.ndarray, c: np.ndarray
) -> tuple[np.ndarray, tuple[Normalized, ...], np.ndarray, np.ndarray, np.ndarray | None]:
    """Take step t from h and c: z, how it was normalized, the new h and c, and where the step is valid."""
    sigma, tanh, tanh_c = spec.recurrent_activation, spec.activation, spec.output_activation
    conv2d, peephole, masks = saved.conv2d, saved.peephole, saved.dropout or {}
    x_t, valid = _frame(spec, saved.x, saved.mask, t)
    z_x = _convolve(spec.input, conv2d, x_t, saved.kernel, saved.bias, masks.get("x"))
    z_h = _convolve(spec.recurrent, conv2d, h, saved.recurrent_kernel, None, masks.get("h"))
    z, normalized = _normalize(spec, saved.normalization, z_x, z_h, saved.bias, valid)
    z_i, z_f, z_g, z_o = _gates(z)
    if peephole is not None:
        z_i += _peep(spec, conv2d, peephole, "i", c)
        z_f += _peep(spec, conv2d, peephole, "f", c)
    i, f, g = sigma.forward(z_i), sigma.forward(z_f), tanh.forward(z_g)
    c_t = _clip(spec, f * c + i * g)
    if peephole is not None:
        z_o += _peep(spec, conv2d, peephole, "o", c_t)
    o = sigma.forward(z_o)
    return z, normalized, o * tanh_c.forward(c_t), c_t, valid


def backward(
    spec: ConvLSTMSpec,
    conv2d_backward: ConvolutionBackward,
    saved: Saved,
    dy: np.ndarray | None,
    dh: np.ndarray | None,
    dc: np.ndarray | None,
    *,
    input_gradient: bool = True,
) -> dict[str, Any]:
    """Pull gradients of the output, the last h and the last c back through time.

    The lines of `forward` in reverse order, each by the chain rule: backpropagation through time with peepholes as
    in Gers, Schraudolph & Schmidhuber, "Learning Precise Timing with LSTM Recurrent Networks" (JMLR 2002), not
    truncated, with the convolutions of Shi et al. 2015. Where the cell was clipped nothing passes.

    Returns
    -------
    dict
        Gradients under "x", "kernel", "recurrent_kernel", "bias", of the initial states under "h" and "c", and under
        "peephole" and "normalization" a dict of the given weights' gradients, or None. "x" is None where nobody asks
        for it, `input_gradient` false.
    """
    sigma, tanh, tanh_c = spec.recurrent_activation, spec.activation, spec.output_activation
    x, peephole, conv2d_backward = saved.x, saved.peephole, partial(conv2d_backward, algorithm=saved.algorithm)
    zeros = np.zeros(spec.state_shape, x.dtype)
    dh, dc = (zeros if d is None else d for d in (dh, dc))
    doutput = zeros if spec.return_sequences or dy is None else dy
    dx = np.empty_like(x) if input_gradient else None
    dkernel, drecurrent = np.zeros_like(saved.kernel), np.zeros_like(saved.recurrent_kernel)
    dbias = np.zeros(4 * spec.F, x.dtype)
    dpeephole = {name: np.zeros_like(weight) for name, weight in (peephole or {}).items()}
    dnormalization = {name: np.zeros_like(weight) for name, weight in (saved.normalization or {}).items()}
    masks = saved.dropout or {}

    for t in reversed(range(spec.T)):
        x_t, valid = _frame(spec, x, saved.mask, t)
        h, c, z, normalized = saved.steps[t]
        if z is None:
            z, normalized, *_ = _step(spec, saved, t, h, c)
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
            dc_t += _peep_backward(spec, conv2d_backward, peephole, dpeephole, "o", c_t, dz_o)
        if spec.cell_clip is not None:
            dc_t = np.where(np.abs(unclipped) < spec.cell_clip, dc_t, 0)
        dz_i[...] = dc_t * g * sigma.derivative(z_i)
        dz_f[...] = dc_t * c * sigma.derivative(z_f)
        dz_g[...] = dc_t * i * tanh.derivative(z_g)
        dc = dc + dc_t * f
        if peephole is not None:
            dc += _peep_backward(spec, conv2d_backward, peephole, dpeephole, "i", c, dz_i)
            dc += _peep_backward(spec, conv2d_backward, peephole, dpeephole, "f", c, dz_f)

        dz_x, dz_h, dbias_t = _normalize_backward(spec, saved.normalization, dnormalization, normalized, dz)
        dx_t, dkernel_t = _convolve_backward(
            spec.input, conv2d_backward, x_t, saved.kernel, masks.get("x"), dz_x, input_gradient=input_gradient
        )
        if dx is not None:
            dx[:, spec.source_step(t)] = dx_t
        dh_from_z, drecurrent_t = _convolve_backward(
            spec.recurrent, conv2d_backward, h, saved.recurrent_kernel, masks.get("h"), dz_h
        )
        dh = dh + dh_from_z
        dkernel += dkernel_t
        drecurrent += drecurrent_t
        dbias += dbias_t
    return {"x": dx, "kernel": dkernel, "recurrent_kernel": drecurrent, "bias": dbias, "h": dh, "c": dc,
            "peephole": None if peephole is None else dpeephole,
            "normalization": None if saved.normalization is None else dnormalization}  # fmt: skip


def total(array: np.ndarray, axes: tuple[int, ...], *, keepdims: bool = False) -> np.ndarray:
    """Sum over axes in double precision, rounded once: float32 would lose digits over so many pixels."""
    precise = np.result_type(array.dtype, np.float64)
    return array.sum(axes, dtype=precise, keepdims=keepdims).astype(array.dtype, copy=False)


def _frame(spec: ConvLSTMSpec, x: np.ndarray, mask: np.ndarray | None, t: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the frames (B, H, W, C) read by step t, zeros where it is masked, and where it is not (B, 1, 1, 1)."""
    source = spec.source_step(t)
    if mask is None:
        return np.ascontiguousarray(x[:, source]), None
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


def _peep(spec: ConvLSTMSpec, conv2d: Convolution, peephole: Arrays, gate: str, c: np.ndarray) -> np.ndarray:
    """Return what a gate sees of the cell: ``W_c ∘ c``, or ``W_c * c + b``."""
    if spec.peephole_conv is None:
        return peephole[gate] * c
    return conv2d(spec.peephole_conv, c, peephole[gate], peephole.get(f"bias_{gate}"))


def _peep_backward(
    spec: ConvLSTMSpec,
    conv2d_backward: ConvolutionBackward,
    peephole: Arrays,
    dpeephole: Arrays,
    gate: str,
    c: np.ndarray,
    dz: np.ndarray,
) -> np.ndarray:
    """Pull dz back through `_peep`: add the weights' gradients to `dpeephole` and return dc."""
    if spec.peephole_conv is None:
        dpeephole[gate] += total(dz * c, tuple(range(4 - peephole[gate].ndim)))
        return dz * peephole[gate]
    dc, dweight, dbias = conv2d_backward(spec.peephole_conv, c, peephole[gate], np.ascontiguousarray(dz))
    dpeephole[gate] += dweight
    if f"bias_{gate}" in dpeephole:
        dpeephole[f"bias_{gate}"] += dbias
    return dc


def _convolve(
    spec: ConvSpec, conv2d: Convolution, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None,
    masks: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """Convolve frames x with a kernel (KH, KW, C, 4F); with masks (4, B, H, W, C) each gate has frames of its own."""
    if masks is None:
        return conv2d(spec, x, kernel, bias)
    one, parts = _one_gate(spec, kernel)
    biases = [None] * len(GATES) if bias is None else np.split(bias, len(GATES))
    gates = zip(masks, parts, biases, strict=True)
    return np.concatenate([conv2d(one, x * mask, part, b) for mask, part, b in gates], axis=-1)


def _convolve_backward(
    spec: ConvSpec, conv2d_backward: ConvolutionBackward, x: np.ndarray, kernel: np.ndarray, masks: np.ndarray | None,
    dz: np.ndarray, *, input_gradient: bool = True,
) -> tuple[np.ndarray | None, np.ndarray]:  # fmt: skip
    """Pull dz back through `_convolve`: dx and dkernel."""
    conv2d_backward = partial(conv2d_backward, wanted=("x", "kernel", "bias")[not input_gradient :])
    if masks is None:
        dx, dkernel, _ = conv2d_backward(spec, x, kernel, dz)
        return dx, dkernel
    one, parts = _one_gate(spec, kernel)
    gates = zip(masks, parts, map(np.ascontiguousarray, _gates(dz)), strict=True)
    dxs, dkernels, _ = zip(*(conv2d_backward(one, x * mask, part, dz_g) for mask, part, dz_g in gates), strict=True)
    dx = sum(mask * dx for mask, dx in zip(masks, dxs, strict=True)) if input_gradient else None
    return dx, np.concatenate(dkernels, axis=-1)


def _one_gate(spec: ConvSpec, kernel: np.ndarray) -> tuple[ConvSpec, list[np.ndarray]]:
    """Return the geometry of one gate's convolution, and the kernel of each."""
    return replace(spec, F=spec.F // len(GATES)), list(map(np.ascontiguousarray, _gates(kernel)))


def _normalize(
    spec: ConvLSTMSpec, weights: Arrays | None, z_x: np.ndarray, z_h: np.ndarray, bias: np.ndarray | None,
    valid: np.ndarray | None,
) -> tuple[np.ndarray, tuple[Normalized, ...]]:  # fmt: skip
    """Add the convolutions of x (with the bias) and of h, normalized together or each by itself.

    ``gamma (z - mean) / √(variance + ε) + beta``: "batch" over samples and pixels (Ioffe & Szegedy 2015), "layer" over
    pixels and channels (Ba, Kiros & Hinton 2016), "group" over pixels and a group of channels (Wu & He 2018).
    """
    if spec.normalization is None:
        return z_x + z_h, ()
    assert weights is not None
    if not spec.normalization.separate:
        normalized = _standardize(spec, weights, "", z_x + z_h, valid)
        return weights["gamma"] * normalized.values.reshape(z_x.shape) + weights["beta"], (normalized,)
    if bias is not None:  # it is not normalized
        z_x = z_x - bias
    both = _standardize(spec, weights, "_x", z_x, valid), _standardize(spec, weights, "_h", z_h, valid)
    z = sum(
        weights[f"gamma{part}"] * normalized.values.reshape(z_x.shape) + weights[f"beta{part}"]
        for part, normalized in zip(NORMALIZED_PARTS[spec.normalization.separate], both, strict=True)
    )
    return z if bias is None else z + bias, both


def _standardize(spec: ConvLSTMSpec, weights: Arrays, part: str, z: np.ndarray, valid: np.ndarray | None) -> Normalized:
    kind, F = spec.normalization.kind, spec.F
    groups = {"layer": 1, "group": spec.normalization.groups or len(GATES), "batch": 4 * F}[kind]
    z = z.reshape(*z.shape[:3], groups, 4 * F // groups)
    if f"mean{part}" in weights:
        mean, variance = weights[f"mean{part}"][:, None], weights[f"variance{part}"][:, None]
        axes: tuple[int, ...] | None = None
        weight: Any = 1
        count = 0
    else:
        axes = (0, 1, 2, 4) if kind == "batch" else (1, 2, 4)
        weight = valid[..., None].astype(z.dtype) if kind == "batch" and valid is not None else 1
        samples = (z.shape[0] if valid is None else int(valid.sum())) if kind == "batch" else 1
        count = samples * spec.HO * spec.WO * z.shape[-1]
        mean = total(weight * z, axes, keepdims=True) / max(count, 1)
        variance = total(weight * (z - mean) ** 2, axes, keepdims=True) / max(count, 1)
    scale = 1 / np.sqrt(variance + spec.normalization.epsilon)
    return Normalized((z - mean) * scale, scale, axes, weight, count, mean, variance)


def _normalize_backward(
    spec: ConvLSTMSpec, weights: Arrays | None, dweights: Arrays, normalized: tuple[Normalized, ...], dz: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pull dz back through `_normalize`: to the convolutions of x and of h, and to the bias."""
    if weights is None:
        return dz, dz, total(dz, (0, 1, 2))
    pulled = []
    for part, n in zip(NORMALIZED_PARTS[spec.normalization.separate], normalized, strict=True):
        gamma, values = weights[f"gamma{part}"], n.values.reshape(dz.shape)
        over = tuple(range(4 - gamma.ndim))
        dweights[f"gamma{part}"] += total(dz * values, over)
        dweights[f"beta{part}"] += total(dz, over)
        d = (dz * gamma).reshape(n.values.shape)
        if n.axes is not None:
            count = max(n.count, 1)
            along = total(d * n.values, n.axes, keepdims=True) / count
            d = n.weight * (d - total(d, n.axes, keepdims=True) / count - n.values * along)
        pulled.append(np.ascontiguousarray((d * n.scale).reshape(dz.shape)))
    return pulled[0], pulled[-1], total(dz if spec.normalization.separate else pulled[0], (0, 1, 2))

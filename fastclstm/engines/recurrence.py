"""The recurrence of the ConvLSTM in plain NumPy, forward and backward, over any engine's convolutions.

The reference engine is this with its own convolutions; the cpu engine computes so what its fused kernels do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm.spec import GATES, ConvLSTMSpec

Arrays = dict[str, np.ndarray]
Convolution = Callable[..., np.ndarray]
"""An engine's conv2d: ``(spec, x, kernel, bias) -> y``."""

ConvolutionBackward = Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]
"""An engine's conv2d_backward: ``(spec, x, kernel, dy) -> (dx, dkernel, dbias)``."""


@dataclass(frozen=True)
class Saved:
    """What `backward` needs of the forward pass."""

    x: np.ndarray
    kernel: np.ndarray
    recurrent_kernel: np.ndarray
    peephole: Arrays | None
    mask: np.ndarray | None
    steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    """Of each step the h and c it started from, and its pre-activations (B, HO, WO, 4F)."""


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
    save: bool = False,
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Saved | None]:
    """Run a ConvLSTM over x (B, T, H, W, C): output (B, T, HO, WO, F) or its last step, h, c, and what backward needs.

    The last h and c are copied to `out`, a pair of arrays, where there is one.

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
            z_i += _peep(spec, conv2d, peephole, "i", c)
            z_f += _peep(spec, conv2d, peephole, "f", c)
        i, f, g = sigma.forward(z_i), sigma.forward(z_f), tanh.forward(z_g)
        c_t = _clip(spec, f * c + i * g)
        if peephole is not None:
            z_o += _peep(spec, conv2d, peephole, "o", c_t)
        o = sigma.forward(z_o)
        h_t = o * tanh_c.forward(c_t)

        h, c, output = _choose(valid, h_t, h), _choose(valid, c_t, c), _choose(valid, h_t, output)
        if sequence is not None:
            sequence[:, t] = output
    if out is not None:
        np.copyto(out[0], h)
        np.copyto(out[1], c)
        h, c = out
    return output.copy() if sequence is None else sequence, h, c, saved


def backward(
    spec: ConvLSTMSpec,
    conv2d_backward: ConvolutionBackward,
    saved: Saved,
    dy: np.ndarray | None,
    dh: np.ndarray | None,
    dc: np.ndarray | None,
) -> dict[str, Any]:
    """Pull gradients of the output, the last h and the last c back through time.

    The lines of `forward` in reverse order, each by the chain rule: backpropagation through time with peepholes as
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

        dx[:, spec.source_step(t)], dkernel_t, dbias_t = conv2d_backward(spec.input, x_t, saved.kernel, dz)
        dh_from_z, drecurrent_t, _ = conv2d_backward(spec.recurrent, h, saved.recurrent_kernel, dz)
        dh = dh + dh_from_z
        dkernel += dkernel_t
        drecurrent += drecurrent_t
        dbias += dbias_t
    return {"x": dx, "kernel": dkernel, "recurrent_kernel": drecurrent, "bias": dbias, "h": dh, "c": dc,
            "peephole": None if peephole is None else dpeephole}  # fmt: skip


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
        dpeephole[gate] += (dz * c).sum(tuple(range(4 - peephole[gate].ndim)))
        return dz * peephole[gate]
    dc, dweight, dbias = conv2d_backward(spec.peephole_conv, c, peephole[gate], np.ascontiguousarray(dz))
    dpeephole[gate] += dweight
    if f"bias_{gate}" in dpeephole:
        dpeephole[f"bias_{gate}"] += dbias
    return dc

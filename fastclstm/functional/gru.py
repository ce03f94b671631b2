"""The gated recurrent unit over sequences of vectors, forward and backward, in plain NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastclstm.engines.recurrence import total
from fastclstm.nn.activations import Activation

Gradients = dict[str, np.ndarray]


def gru_vjp(
    x: np.ndarray,
    kernel: np.ndarray,
    recurrent_kernel: np.ndarray,
    bias: np.ndarray | None,
    h: np.ndarray,
    *,
    activation: Activation,
    recurrent_activation: Activation,
    reset_after: bool,
    mask: np.ndarray | None = None,
    dropout: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray | None, np.ndarray | None], Gradients]]:
    """Run a GRU over x (B, T, N): the hidden states (B, T, U), the last one and the function that pulls back.

    With gates in the order z, r, n, kernel (N, 3U), recurrent_kernel R (U, 3U), and bias (3U,) or, with `reset_after`,
    (2, 3U), of the input and of the hidden state (Cho et al., arXiv:1406.1078; Keras's and cuDNN's form)::

        z, r = σ(W x + R h + b)
        n    = tanh(W_n x + b_n + r ∘ (R_n h + c_n))    reset_after
        n    = tanh(W_n x + b_n + R_n (r ∘ h))          else
        h    = z ∘ h + (1 − z) ∘ n

    Where the mask (B, T) is False, h stays, and the output is that of the step before, zeros before the first valid
    one. `dropout` (B, U) multiplies the h that the kernel meets. The pullback takes (dy, dh of the last) and returns
    the gradients "x", "kernel", "recurrent_kernel", "h" and "bias".
    """
    (B, T, _), U = x.shape, len(recurrent_kernel)
    dtype = np.result_type(x, kernel, h)
    of_x, of_h = (None, None) if bias is None else (bias[0], bias[1]) if reset_after else (bias, None)
    zx = x @ kernel if of_x is None else x @ kernel + of_x
    output = np.zeros((B, T, U), dtype)
    seen = np.zeros((B, T), np.bool_) if mask is not None else None
    steps: list[Any] = []
    for t in range(T):
        before = h
        met = before if dropout is None else before * dropout
        if reset_after:
            zh = met @ recurrent_kernel if of_h is None else met @ recurrent_kernel + of_h
            gates, q = zx[:, t, : 2 * U] + zh[:, : 2 * U], zh[:, 2 * U :]
        else:
            gates, q = zx[:, t, : 2 * U] + met @ recurrent_kernel[:, : 2 * U], met
        z, r = np.split(recurrent_activation.forward(gates), 2, axis=-1)
        reset = r * q
        a = zx[:, t, 2 * U :] + (reset if reset_after else reset @ recurrent_kernel[:, 2 * U :])
        n = activation.forward(a)
        h = z * before + (1 - z) * n
        output[:, t] = h
        if mask is not None and seen is not None:
            valid = mask[:, t, np.newaxis]
            h = np.where(valid, h, before)
            seen[:, t] = mask[:, : t + 1].any(1)
            output[:, t] = np.where(seen[:, t, np.newaxis], h, 0)
        steps.append((before, met, gates, q, a, z, r, n))

    def pullback(dy: np.ndarray | None, dlast: np.ndarray | None) -> Gradients:
        dzx = np.zeros_like(zx)
        drecurrent, dbias_h = np.zeros(recurrent_kernel.shape, dtype), np.zeros(3 * U, dtype)
        dh = np.zeros((B, U), dtype) if dlast is None else dlast
        for t in reversed(range(T)):
            before, met, gates, q, a, z, r, n = steps[t]
            if dy is not None:
                dh = dh + (dy[:, t] if seen is None else np.where(seen[:, t, np.newaxis], dy[:, t], 0))
            kept = None
            if mask is not None:
                valid = mask[:, t, np.newaxis]
                dh, kept = np.where(valid, dh, 0), np.where(valid, 0, dh)
            da = dh * (1 - z) * activation.derivative(a)
            dreset = da if reset_after else da @ recurrent_kernel[:, 2 * U :].T
            slopes = recurrent_activation.derivative(gates)
            dgates = np.concatenate([dh * (before - n), dreset * q], axis=-1) * slopes
            dzx[:, t] = np.concatenate([dgates, da], axis=-1)
            if reset_after:
                dzh = np.concatenate([dgates, da * r], axis=-1)
                drecurrent += met.T @ dzh
                dbias_h += total(dzh, (0,))
                dmet = dzh @ recurrent_kernel.T
            else:
                drecurrent[:, : 2 * U] += met.T @ dgates
                drecurrent[:, 2 * U :] += (r * q).T @ da
                dmet = dgates @ recurrent_kernel[:, : 2 * U].T + dreset * r
            dh = dh * z + (dmet if dropout is None else dmet * dropout)
            if kept is not None:
                dh = dh + kept
        rows = dzx.reshape(B * T, 3 * U)
        gradients = {"x": dzx @ kernel.T, "kernel": x.reshape(B * T, x.shape[-1]).T @ rows, "h": dh,
                     "recurrent_kernel": drecurrent}  # fmt: skip
        if bias is not None:
            dbias = total(rows, (0,))
            gradients["bias"] = np.stack([dbias, dbias_h]) if reset_after else dbias
        return gradients

    return output, h, pullback

"""What the cells of `cells` do with pre-activations, in NumPy: a step, and the way back through it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastclstm.spec import CellSpec


class Updates:
    """What cells do with pre-activations, in NumPy: arrays (B, *grid, columns) of one step, results written in place.

    z is the convolution of x; z_h, None where it was added to z before, that of h.
    """

    sums: np.ndarray | None = None
    """Sum of the gradients over samples and pixels, (columns,), where it is gathered on the way: of `gru_back` z, r, n
    and n's of h; else as z."""

    def __init__(self, spec: CellSpec, dtype: Any = None):
        self.spec = spec

    def rnn(self, z: np.ndarray, z_h: np.ndarray | None, h_new: np.ndarray, y: np.ndarray | None) -> None:
        """Take a step; z becomes the pre-activations."""
        _sum(z, z_h)
        _store(self.spec.activation.forward(z), h_new, y)

    def rnn_back(self, z: np.ndarray, dh: np.ndarray, dy: np.ndarray | None, more: np.ndarray | None) -> None:
        """Make of pre-activations their gradients; that of the new h is dh + dy + more here, and in all that follow."""
        accumulate(dh, dy, more)
        z[...] = dh * self.spec.activation.derivative(z)

    def lstm(
        self, z: np.ndarray, z_h: np.ndarray | None, c: np.ndarray, c_new: np.ndarray, h_new: np.ndarray,
        y: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Take a step; z becomes the pre-activations, and c_new may be c."""
        _sum(z, z_h)
        i, f, g, o = self._lstm_gates(z)
        np.add(f * c, i * g, out=c_new)
        _store(o * self.spec.output_activation.forward(c_new), h_new, y)

    def lstm_back(
        self, z: np.ndarray, c: np.ndarray, dh: np.ndarray, dc: np.ndarray, dy: np.ndarray | None,
        more: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Make of pre-activations their gradients, and of dc that of the c before."""
        accumulate(dh, dy, more)
        spec = self.spec
        i, f, g, o = self._lstm_gates(z)
        c_new = f * c + i * g
        dc += dh * o * spec.output_activation.derivative(c_new)
        slopes = spec.recurrent_activation.derivative
        z_i, z_f, z_g, z_o = np.split(z, 4, -1)
        z_o[...] = dh * spec.output_activation.forward(c_new) * slopes(z_o)
        z_i[...] = dc * g * slopes(z_i)
        z_f[...] = dc * c * slopes(z_f)
        z_g[...] = dc * i * spec.activation.derivative(z_g)
        dc *= f

    def _lstm_gates(self, z: np.ndarray) -> tuple[np.ndarray, ...]:
        sigma, z_i, z_f, z_g, z_o = self.spec.recurrent_activation.forward, *np.split(z, 4, -1)
        return sigma(z_i), sigma(z_f), self.spec.activation.forward(z_g), sigma(z_o)

    def gru(
        self, z: np.ndarray, z_h: np.ndarray, h: np.ndarray, h_new: np.ndarray, y: np.ndarray | None
    ) -> None:  # fmt: skip
        """Take a step with reset_after; z and r of z become the pre-activations."""
        gates, n = self._parts(z)
        gates_h, q = self._parts(z_h)
        gates += gates_h
        update, reset = np.split(self.spec.recurrent_activation.forward(gates), 2, -1)
        new = self.spec.activation.forward(n + reset * q)
        _store(update * h + (1 - update) * new, h_new, y)

    def gru_back(
        self, z: np.ndarray, z_h: np.ndarray, h: np.ndarray, dh: np.ndarray, dy: np.ndarray | None,
        more: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Make of both convolutions their gradients, and of dh what the h before has of it directly."""
        accumulate(dh, dy, more)
        spec = self.spec
        gates, n = self._parts(z)
        gates_h, q = self._parts(z_h)
        update, reset = np.split(spec.recurrent_activation.forward(gates), 2, -1)
        a = n + reset * q
        da = dh * (1 - update) * spec.activation.derivative(a)
        gates[...] = np.concatenate([dh * (h - spec.activation.forward(a)), da * q], -1) * (
            spec.recurrent_activation.derivative(gates)
        )
        gates_h[...] = gates
        n[...] = da
        q[...] = da * reset
        dh *= update

    def reset(self, z: np.ndarray, z_h: np.ndarray | None, h: np.ndarray, met: np.ndarray) -> None:
        """Write r∘h, which n's convolution meets; z and r of z become the pre-activations."""
        gates, _ = self._parts(z)
        _sum(gates, z_h)
        met[...] = self.spec.recurrent_activation.forward(np.split(gates, 2, -1)[1]) * h

    def update(
        self, z: np.ndarray, z_n: np.ndarray | None, h: np.ndarray, h_new: np.ndarray, y: np.ndarray | None
    ) -> None:  # fmt: skip
        """Take a step after `reset`; n of z becomes the pre-activations."""
        gates, n = self._parts(z)
        _sum(n, z_n)
        update = self.spec.recurrent_activation.forward(gates[..., : self.spec.F])
        _store(update * h + (1 - update) * self.spec.activation.forward(n), h_new, y)

    def update_back(
        self, z: np.ndarray, h: np.ndarray, dh: np.ndarray, dn: np.ndarray, dy: np.ndarray | None,
        more: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Make of the pre-activations of z and n their gradients, n's in `dn` too; of dh what h has of it directly."""
        accumulate(dh, dy, more)
        spec = self.spec
        gates, n = self._parts(z)
        a = gates[..., : spec.F]
        update = spec.recurrent_activation.forward(a)
        a[...] = dh * (h - spec.activation.forward(n)) * spec.recurrent_activation.derivative(a)
        n[...] = dh * (1 - update) * spec.activation.derivative(n)
        dn[...] = n
        dh *= update

    def reset_back(self, z: np.ndarray, h: np.ndarray, dmet: np.ndarray, dgates: np.ndarray, dh: np.ndarray) -> None:
        """Make of r's pre-activation its gradient, write both gates' to `dgates`; add to dh what r∘h has of it."""
        gates, _ = self._parts(z)
        a = gates[..., self.spec.F :]
        dh += dmet * self.spec.recurrent_activation.forward(a)
        a[...] = dmet * h * self.spec.recurrent_activation.derivative(a)
        dgates[...] = gates

    def _parts(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """View the gates z and r, and n."""
        return z[..., : 2 * self.spec.F], z[..., 2 * self.spec.F :]


def _sum(z: np.ndarray, z_h: np.ndarray | None) -> None:
    if z_h is not None:
        z += z_h


def accumulate(dh: np.ndarray, *others: np.ndarray | None) -> None:
    """Add to dh what is there of the others."""
    for other in others:
        if other is not None:
            dh += other


def _store(h: np.ndarray, *targets: np.ndarray | None) -> None:
    for target in targets:
        if target is not None:
            target[...] = h

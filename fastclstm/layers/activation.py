"""Activations as layers, and the softmax, which is no elementwise function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.array_layer import ArrayLayer, Pullback
from fastclstm.nn import activations, is_number
from fastclstm.spec import Shape


def check_activation(op: str, spec: Any) -> None:
    """Raise ValueError or TypeError, naming `op`, unless `spec` is "softmax" or what `nn.activations.get` takes."""
    if isinstance(spec, str) and spec == "softmax":
        return
    try:
        activations.get(spec)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {error} (or 'softmax')") from None


def gpu_knows(spec: Any) -> bool:
    """Return whether `activate` computes `spec` on a GPU too."""
    return spec != "softmax" and activations.is_named(spec)


def activate(spec: Any, z: Any) -> tuple[np.ndarray, Pullback]:
    """Return the activation of z, softmax being over the last axis, and its pullback, which keeps z but not the output.

    What is returned is the caller's to write to; only "linear" returns z itself, which its pullback does not need.
    """
    if isinstance(spec, str) and spec == "softmax":
        return _softmax(z)
    activation = activations.get(spec)
    if activation.name == "linear":
        return z, lambda dy: dy
    if dispatch.on_gpu(z):
        return z.activate(activation.name), lambda dy: z.activate_backward(activation.name, dy)
    y = activation.forward(z)
    return y.copy() if np.may_share_memory(y, z) else y, lambda dy: dy * activation.derivative(z)


def leaky(above: Any, x: Any, slope: float) -> Any:
    """Return x where it is `above` zero, as told, else slope · x."""
    return x.leak(above, slope) if dispatch.on_gpu(x) else np.where(above, x, x.dtype.type(slope) * x)


def _softmax(z: np.ndarray) -> tuple[np.ndarray, Pullback]:
    """Return exp(z) / Σ exp(z) over the last axis, shifted so that nothing overflows, and its pullback."""
    y = np.exp(z - z.max(-1, keepdims=True, initial=-np.inf))
    y /= y.sum(-1, keepdims=True)
    kept = y.copy()
    return y, lambda dy: kept * (dy - (kept * dy).sum(-1, keepdims=True))


@dataclass(eq=False, repr=False)
class Activation(ArrayLayer):
    """An activation as a layer: ``layer(x)`` takes any array and returns one of its shape ("linear": x itself).

    Parameters
    ----------
    activation : str or pair of functions (forward, derivative)
        A name of `fastclstm.nn.activations`, or "softmax", over the last axis.

    Raises
    ------
    ValueError, TypeError
        Anything else.

    Examples
    --------
    >>> Activation("relu")([-1.0, 2.0])
    array([0., 2.])
    """

    activation: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation("Activation", self.activation)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return `input_shape`."""
        return tuple(input_shape)

    def _knows_gpu(self, training: bool) -> bool:
        return gpu_knows(self.activation)

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        return activate(self.activation, x)


@dataclass(eq=False, repr=False)
class Softmax(ArrayLayer):
    """``exp(x) / Σ exp(x)`` over the last axis: positive numbers that sum to one.

    Examples
    --------
    >>> Softmax()([[0.0, 0.0]])
    array([[0.5, 0.5]])
    """

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return `input_shape`."""
        if not input_shape:
            raise ValueError("Softmax: x must have an axis to sum over, got a number")
        return tuple(input_shape)

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        return activate("softmax", x)


@dataclass(eq=False, repr=False)
class LeakyReLU(ArrayLayer):
    """x where that is above zero, else ``negative_slope · x``, whose derivative is the slope at zero too.

    Parameters
    ----------
    negative_slope : float
        At least 0.

    Raises
    ------
    ValueError
        A slope that is no number or below 0.

    Examples
    --------
    >>> LeakyReLU(0.25)([-4.0, 2.0])
    array([-1.,  2.])
    """

    negative_slope: float = 0.3
    _: KW_ONLY

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.negative_slope) and self.negative_slope >= 0):
            raise ValueError(f"LeakyReLU: negative_slope must be a number >= 0, got {self.negative_slope!r}")

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return `input_shape`."""
        return tuple(input_shape)

    def _knows_gpu(self, training: bool) -> bool:
        return True

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        above, slope = x > 0, self.negative_slope
        y = leaky(above, x, slope) if x.dtype.type(slope) else np.maximum(x, 0)  # as 0 · Inf is NaN
        return y, lambda dy: leaky(above, dy, slope)

"""Dense and Flatten: from frames to classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm.layers.activation import activate, check_activation
from fastclstm.layers.array_layer import ArrayLayer, Pullback
from fastclstm.layers.base import Parameter, layer_dtype
from fastclstm.spec import Shape, flag, integers


@dataclass(eq=False, repr=False)
class Flatten(ArrayLayer):
    """All axes but the batch as one: (B, …) to (B, N), a view of x where x allows one.

    Examples
    --------
    >>> import numpy as np
    >>> Flatten()(np.zeros((2, 3, 4, 5))).shape
    (2, 60)
    """

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return (B, N) for an x of `input_shape` (B, …)."""
        if not input_shape:
            raise ValueError("Flatten: x must have a batch axis, got a number")
        return input_shape[0], math.prod(input_shape[1:])

    def _knows_gpu(self, training: bool) -> bool:
        return True

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        return x.reshape(self.output_shape(x.shape)), lambda dy: dy.reshape(x.shape)


@dataclass(eq=False, repr=False)
class Dense(ArrayLayer):
    """``activation(x @ kernel + bias)`` on the last axis: (…, in_features) to (…, out_features).

    Parameters
    ----------
    in_features, out_features : int
    activation : str or pair of functions (forward, derivative)
        A name of `fastclstm.nn.activations`, or "softmax".
    use_bias : bool
    kernel_initializer, bias_initializer : str or function
        As `fastclstm.nn.initializers.get` takes them.
    kernel_regularizer, bias_regularizer, kernel_constraint, bias_constraint : optional
        As `fastclstm.nn.regularizers.get` and `fastclstm.nn.constraints.get` take them.
    dtype : "float32" or "float64"
        Of parameters and results; inputs are converted to it.
    seed : int or numpy.random.Generator, optional
        The same seed gives the same parameters.

    Attributes
    ----------
    kernel : array (in_features, out_features)
    bias : array (out_features,) or None

    Raises
    ------
    ValueError, TypeError
        Options or shapes that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> Dense(3, 2, "softmax", seed=0)(np.zeros((1, 3)))
    array([[0.5, 0.5]], dtype=float32)
    """

    in_features: int
    out_features: int
    activation: Any = "linear"
    _: KW_ONLY
    use_bias: bool = True
    kernel_initializer: Any = "glorot_uniform"
    bias_initializer: Any = "zeros"
    kernel_regularizer: Any = None
    bias_regularizer: Any = None
    kernel_constraint: Any = None
    bias_constraint: Any = None
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None

    kernel = Parameter()
    bias = Parameter()

    def __post_init__(self) -> None:
        super().__post_init__()
        (self.in_features,) = integers("Dense", "in_features", self.in_features, 1, 1)
        (self.out_features,) = integers("Dense", "out_features", self.out_features, 1, 1)
        flag("Dense", "use_bias", self.use_bias)
        self.dtype = layer_dtype("Dense", self.dtype)
        check_activation("Dense", self.activation)
        rng, shape = np.random.default_rng(self.seed), (self.in_features, self.out_features)
        self._add_parameter("kernel", shape, self.kernel_initializer, rng, self.dtype,
                            regularizer=self.kernel_regularizer, constraint=self.kernel_constraint)  # fmt: skip
        if self.use_bias:
            self._add_parameter("bias", shape[1:], self.bias_initializer, rng, self.dtype,
                                regularizer=self.bias_regularizer, constraint=self.bias_constraint)  # fmt: skip

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return (…, out_features) for an x of `input_shape` (…, in_features)."""
        if not input_shape or input_shape[-1] != self.in_features:
            raise ValueError(
                f"Dense: x must be (…, {self.in_features}) since in_features is {self.in_features}, got shape "
                f"{tuple(input_shape)}; Flatten makes frames to rows"
            )
        return (*input_shape[:-1], self.out_features)

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        rows, kernel = x.reshape(math.prod(x.shape[:-1]), self.in_features), self.kernel
        z = rows @ kernel
        if self.use_bias:
            z += self.bias
        y, pull = activate(self.activation, z)

        def pullback(dy: np.ndarray) -> np.ndarray:
            dz = pull(dy.reshape(z.shape))
            bias = dz.sum(0, dtype=np.float64).astype(dz.dtype)  # in float32 many rows would lose digits
            self._keep_gradients({"kernel": rows.T @ dz, "bias": bias})
            return (dz @ kernel.T).reshape(x.shape)

        return y.reshape(self.output_shape(x.shape)), pullback

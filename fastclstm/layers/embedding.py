"""Vectors for numbers of words, stations or months."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.array_layer import ArrayLayer, Pullback
from fastclstm.layers.base import Parameter, layer_dtype
from fastclstm.spec import Shape, integers


@dataclass(eq=False, repr=False)
class Embedding(ArrayLayer):
    """A learnt vector for each integer: (…) to (…, output_dim).

    `backward` returns zeros, as integers have no gradient.

    Parameters
    ----------
    input_dim : int
        x holds integers from 0 up to, but not including, input_dim.
    output_dim : int
    embeddings_initializer : str or function
        As `fastclstm.nn.initializers.get` takes them.
    embeddings_regularizer, embeddings_constraint : optional
        As `fastclstm.nn.regularizers.get` and `fastclstm.nn.constraints.get` take them.
    dtype : "float32" or "float64"
        Of parameters and results.
    seed : int or numpy.random.Generator, optional

    Attributes
    ----------
    embeddings : array (input_dim, output_dim)

    Raises
    ------
    ValueError, TypeError
        Options that are none; an x that holds anything but such integers.

    Examples
    --------
    >>> layer = Embedding(3, 2)
    >>> layer.embeddings = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    >>> layer([[2, 0]])
    array([[[4., 5.],
            [0., 1.]]], dtype=float32)
    """

    input_dim: int
    output_dim: int
    _: KW_ONLY
    embeddings_initializer: Any = "random_uniform"
    embeddings_regularizer: Any = None
    embeddings_constraint: Any = None
    dtype: Any = "float32"
    seed: int | np.random.Generator | None = None

    embeddings = Parameter()

    def __post_init__(self) -> None:
        super().__post_init__()
        (self.input_dim,) = integers("Embedding", "input_dim", self.input_dim, 1, 1)
        (self.output_dim,) = integers("Embedding", "output_dim", self.output_dim, 1, 1)
        self.dtype = layer_dtype("Embedding", self.dtype)
        self._add_parameter("embeddings", (self.input_dim, self.output_dim), self.embeddings_initializer,
                            np.random.default_rng(self.seed), self.dtype, regularizer=self.embeddings_regularizer,
                            constraint=self.embeddings_constraint)  # fmt: skip

    def forward(self, x: Any, training: bool = False) -> Any:
        """Return the vector of each integer of x, as x's kind of array; `training` keeps what `backward` needs.

        Raises
        ------
        ValueError
            Values that are no integers from 0 up to input_dim.
        TypeError
            Anything but real arrays; one on a GPU.
        """
        if not dispatch.on_gpu(x):  # else it is refused
            numbers = dispatch.as_numpy("Embedding", "x", x)
            wrong = (numbers < 0) | (numbers >= self.input_dim) | (numbers != np.floor(numbers))
            if wrong.any():
                raise ValueError(f"Embedding: x must hold integers from 0 to {self.input_dim - 1}, as input_dim says, "
                                 f"got {numbers[wrong].flat[0]}")  # fmt: skip
            self._numbers = numbers.astype(np.int64)
        return super().forward(x, training)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return (…, output_dim) for an x of `input_shape` (…)."""
        return (*input_shape, self.output_dim)

    def _apply(self, x: np.ndarray, training: bool) -> tuple[np.ndarray, Pullback]:
        numbers = self._numbers  # which float32 might not hold

        def pullback(dy: np.ndarray) -> np.ndarray:
            gradient = np.zeros(self.embeddings.shape)  # in float64: a number may come often
            np.add.at(gradient, numbers.ravel(), dy.reshape(numbers.size, self.output_dim))
            self._keep_gradients({"embeddings": gradient.astype(dy.dtype)})
            return np.zeros(x.shape, dy.dtype)

        return self.embeddings[numbers], pullback

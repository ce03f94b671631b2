"""A layer of frames, applied to every time step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastclstm import dispatch
from fastclstm.layers.array_layer import Container, told_of
from fastclstm.layers.base import Layer
from fastclstm.spec import Shape, expect_shape


@dataclass(eq=False, repr=False)
class TimeDistributed(Container):
    """Applies a layer to every time step: ``layer(x)`` takes x (B, T, …) and returns (B, T, …).

    The inner layer sees the frames of all sequences as one batch (B·T, …); dropout is thus drawn for every frame.

    Parameters
    ----------
    layer : Layer
        Of one array in and one array out. Its parameters appear as ``layer.NAME``.

    Raises
    ------
    ValueError, TypeError
        No layer; an x without a time axis, or one whose frames do not fit the layer.

    Examples
    --------
    >>> import numpy as np
    >>> from fastclstm.layers import Dense
    >>> TimeDistributed(Dense(3, 2))(np.zeros((4, 5, 3))).shape
    (4, 5, 2)
    """

    layer: Layer

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layer, Layer):
            raise TypeError(f"TimeDistributed: layer must be a layer, got {type(self.layer).__name__}")
        self._sublayers = {"layer": self.layer}

    def forward(self, x: Any, training: bool = False) -> Any:
        """Return the layer's output for every time step of x (B, T, …), as x's kind of array.

        Raises
        ------
        ValueError
            A shape that does not fit.
        TypeError
            Anything but real arrays in the processor's memory.
        """
        restore, where = dispatch.restorer(x), f"TimeDistributed({type(self.layer).__name__})"
        array = dispatch.as_numpy("TimeDistributed", "x", x)
        self._check(array.shape)
        frames = array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])
        self._pullback = None
        with told_of(where):
            y = self.layer(frames, training=training)
        shape = (*array.shape[:2], *y.shape[1:])

        def pullback(dy: Any) -> Any:
            cotangent = dispatch.as_numpy("TimeDistributed", "dy", dy)
            expect_shape("TimeDistributed", "dy", cotangent.shape, shape, "the shape of the output")
            with told_of(where):
                dx = self.layer.backward(cotangent.reshape(y.shape))
            self._collect_gradients()
            return restore(dx.reshape(array.shape))

        if training:
            self._pullback = pullback
        return restore(y.reshape(shape))

    def backward(self, dy: Any) -> Any:
        """Return dx of the last call, which was a training call, given dy of its output's shape.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            dy has not the output's shape.
        """
        return self._recorded()(dy)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return the shape of the output for an x of `input_shape` (B, T, …)."""
        self._check(input_shape)
        with told_of(f"TimeDistributed({type(self.layer).__name__})"):
            shape = self.layer.output_shape((input_shape[0], *input_shape[2:]))
        return (*input_shape[:2], *shape[1:])

    def _check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless `shape` has a batch and a time axis."""
        if len(shape) < 2:
            raise ValueError(f"TimeDistributed: x must be (batch, time, …), got {len(shape)}D {tuple(shape)}")

"""A layer of frames, applied to every time step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.base import Layer, penalized
from fastclstm.layers.container import (
    Container,
    Walk,
    add_gradients,
    parts,
    recall,
    recorded,
    told_of,
    without_penalties,
)
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.layers.place import Place, place_of
from fastclstm.spec import Shape, expect_shape


@dataclass(eq=False, repr=False)
class TimeDistributed(Container):
    """Applies a layer to every time step: ``layer(x)`` takes x (B, T, …) and returns (B, T, …).

    The inner layer sees the frames of all sequences as one batch (B·T, …); dropout is thus drawn for every frame. Where
    batch normalization is within, a training call takes one step after the other instead, as Keras 3: each is
    normalized by its own mean and variance, and the moving ones come nearer to those of each in turn. (Keras 2 took the
    statistics of all steps together, as a BatchNormalization by itself does.) A ConvLSTM2D takes whole sequences, so
    for it x is (B, N, T, H, W, C): N sequences a sample.

    Parameters
    ----------
    layer : Layer
        Of one array in and one array out. Its parameters appear as ``layer.NAME``.

    Raises
    ------
    ValueError, TypeError
        No layer, or one that does not turn one array into one; an x without a time axis, or one whose frames do not
        fit the layer.

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
        name = type(self.layer).__name__
        if why := self.layer._unfit():
            raise ValueError(f"TimeDistributed: {name} {why}")
        if remedy := self.layer._several_outputs():
            raise ValueError(f"TimeDistributed: {name} returns more than one array; {remedy}")
        for part in parts(self.layer):
            if isinstance(part, ConvRecurrent) and part.time_major:
                raise ValueError(
                    f"TimeDistributed: the layer sees all steps as a batch, on its first axis; give its "
                    f"{type(part).__name__} time_major=False"
                )
        self._sublayers = {"layer": self.layer}

    def forward(self, x: Any, training: bool = False) -> Any:
        """Return the layer's output for every time step of x (B, T, …), as x's kind of array.

        A view of x where the layer's is one.

        Raises
        ------
        ValueError
            A shape that does not fit.
        TypeError
            Anything but real arrays; one on a GPU, where a layer does not compute there or is of another dtype.
        """
        place = place_of(self, x, refuses=False)
        array = place.read("x", x)
        with suppress(NotImplementedError):  # a layer of others may have no output_shape
            self.output_shape(array.shape)
        self._pullback = None
        if training and array.shape[1] and any(part._statistics and part.trainable for part in parts(self.layer)):
            return self._step_by_step(place, array)
        frames = array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])
        with told_of(self._where):
            y = self.layer(frames, training=training)
        shape = (*array.shape[:2], *y.shape[1:])

        def pullback(dy: Any) -> Any:
            cotangent = place.read("dy", dy)
            expect_shape("TimeDistributed", "dy", cotangent.shape, shape, "the shape of the output")
            with told_of(self._where):
                dx = self.layer.backward(cotangent.reshape(y.shape))
            self._collect_gradients()
            return place.restore(dx.reshape(array.shape))

        if training:
            self._pullback = pullback
        return place.restore(y.reshape(shape))

    def _step_by_step(self, place: Place, array: Any) -> Any:
        """Return the output of a training call for every time step in turn, as batch statistics are those of one."""
        layers = list(parts(self.layer))
        made: list[np.ndarray] = []
        records: list[list[tuple[Layer, Any]]] = []
        for step in range(array.shape[1]):
            with told_of(self._where):
                made.append(self.layer(dispatch.contiguous(array[:, step]), training=True))
            records.append(recorded(self.layer))
        y = np.stack(made, 1)

        def pullback(dy: Any) -> Any:
            cotangent = place.read("dy", dy)
            expect_shape("TimeDistributed", "dy", cotangent.shape, y.shape, "the shape of the output")
            dx, sums = np.empty(array.shape, y.dtype), dict[str, Any]()
            with without_penalties(layers), told_of(self._where):
                for step in reversed(range(len(records))):
                    recall(records[step])
                    dx[:, step] = self.layer.backward(dispatch.contiguous(cotangent[:, step]))
                    add_gradients(sums, "layer", self.layer)
            owners, kept = self._owners(), self.trainable_parameters if self.store_gradients else ()
            self._gradients = {name: penalized(*owners[name], sums[name]) for name in kept if name in sums}
            return place.restore(dx)

        self._pullback = pullback
        return place.restore(y)

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
        shape = tuple(input_shape)
        if len(shape) < 2:
            raise ValueError(f"TimeDistributed: x must be (batch, time, …), got {len(shape)}D {shape}")
        if isinstance(self.layer, ConvRecurrent) and len(shape) != self.layer._rank + 4:
            raise ValueError(
                f"TimeDistributed: {type(self.layer).__name__} takes whole sequences, so x must be "
                f"{self.layer._rank + 4}D (batch, sequences, time, …), got {len(shape)}D {shape}; by itself it takes "
                f"(batch, time, …)"
            )
        frames = (1 if None in shape[:2] else shape[0] * shape[1], *shape[2:])
        with told_of(self._where):
            if isinstance(self.layer, Container):
                made = self.layer._shape_within(frames, Walk(batched=True))
            else:
                made = self.layer.output_shape(frames)
        return (*shape[:2], *made[1:])

    @property
    def _where(self) -> str:
        return f"TimeDistributed({type(self.layer).__name__})"

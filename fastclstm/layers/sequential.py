"""Layers, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.array_layer import Container, told_of
from fastclstm.layers.base import Layer
from fastclstm.layers.convlstm2d import ConvLSTM2D
from fastclstm.layers.convlstm2d_cell import ConvLSTM2DCell
from fastclstm.layers.max_pooling3d import MaxPooling3D
from fastclstm.spec import Shape


@dataclass(eq=False, repr=False)
class Sequential(Container):
    """Layers one after the other: each takes what the one before returned.

    ``model[i]``, ``len(model)`` and iteration give the layers; their parameters appear as ``{index}.NAME``. An error
    in a layer carries a note that says which one it was.

    Parameters
    ----------
    layers : sequence of Layer
        All but the last return one array.

    Raises
    ------
    ValueError, TypeError
        No layers, or ones that cannot stand there.

    Examples
    --------
    >>> import numpy as np
    >>> from fastclstm.layers import ConvLSTM2D, Dense, Flatten
    >>> lstm = ConvLSTM2D(1, 4, 3, return_sequences=False, seed=0, engine="reference")
    >>> model = Sequential([lstm, Flatten(), Dense(256, 3, "softmax", seed=1)])
    >>> model(np.zeros((2, 5, 8, 8, 1))).shape
    (2, 3)
    >>> model.output_shape((2, 5, 8, 8, 1))
    (2, 3)
    """

    layers: Any

    def __post_init__(self) -> None:
        if isinstance(self.layers, Layer) or not isinstance(self.layers, Sequence):
            raise TypeError(f"Sequential: layers must be a list of layers, got {type(self.layers).__name__}")
        super().__post_init__()
        if not self.layers:
            raise ValueError("Sequential: layers is empty; give at least one layer")
        seen: dict[int, str] = {}
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, Layer):
                raise TypeError(f"Sequential: layer {index} must be a layer, got {type(layer).__name__}")
            where = _name(index, layer)
            if isinstance(layer, ConvLSTM2DCell):
                raise ValueError(f"Sequential: {where} takes one step at a time; use ConvLSTM2D")
            if index < len(self.layers) - 1 and (remedy := _single_output(layer)):
                raise ValueError(f"Sequential: {where} returns more than one array, which no layer takes; {remedy}")
            for part in _parts(layer):
                if id(part) in seen:
                    raise ValueError(f"Sequential: {where} shares a layer with {seen[id(part)]}, whose call it would "
                                     f"forget before backward; make two layers")  # fmt: skip
            seen |= {id(part): where for part in _parts(layer)}
        self._sublayers = {str(index): layer for index, layer in enumerate(self.layers)}

    def __getitem__(self, index: int) -> Layer:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def forward(self, x: Any, mask: Any = None, lengths: Any = None, training: bool = False) -> Any:
        """Return what the last layer makes of x.

        Parameters
        ----------
        x : array
            What the first layer takes.
        mask : array of bool (B, T), optional
        lengths : array of int (B,), optional
            Handed to every ConvLSTM2D; see there.
        training : bool
            Compute as training does, and keep what `backward` needs.

        Raises
        ------
        ValueError
            Shapes that do not fit the layers; a mask or lengths, but no ConvLSTM2D.
        TypeError
            Anything but real arrays in the processor's memory.
        """
        if (mask is not None or lengths is not None) and not any(map(_takes_mask, self.layers)):
            raise ValueError("Sequential: mask and lengths are for ConvLSTM2D layers, and there is none")
        restore = dispatch.restorer(x)
        self._pullback = None
        y = dispatch.as_numpy("Sequential", "x", x)
        for index, layer in enumerate(self.layers):
            with told_of(_name(index, layer)):
                if not _takes_mask(layer):
                    y = layer(y, training=training)
                    continue
                shape = y.shape
                y = layer(y, mask=mask, lengths=lengths, training=training)
                if _reverses(layer) and (mask is not None or lengths is not None):
                    mask, lengths = _reversed_mask(_time_axis(layer, shape), shape, mask, lengths), None
        if training:
            self._pullback = lambda *gradients: restore(self._pull(*gradients))
        return restore(y) if not isinstance(y, tuple) else _restored(restore, y)

    def backward(self, *gradients: Any) -> Any:
        """Return dx of the last call, which was a training call, given dy: what the last layer's `backward` takes.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            dy has not the output's shape.
        """
        return self._recorded()(*gradients)

    def output_shape(self, input_shape: Sequence[int]) -> Shape:
        """Return the shape of the output for an x of `input_shape`; raise ValueError where a layer does not fit."""
        return self._shapes(input_shape)[-1]

    def reset_state(self) -> None:
        """Forget what stateful layers keep from one call to the next."""
        for layer in self.layers:
            if hasattr(layer, "reset_state"):
                layer.reset_state()

    def summary(self, input_shape: Sequence[int] | None = None) -> str:
        """Return a table of the layers: output shapes, if `input_shape` is given, and numbers of parameters.

        Examples
        --------
        >>> from fastclstm.layers import Conv2D, GlobalAveragePooling
        >>> print(Sequential([Conv2D(1, 8, 3), GlobalAveragePooling()]).summary((2, 9, 9, 1)))
        #  layer                 output shape  parameters
        -  --------------------  ------------  ----------
        0  Conv2D                (2, 9, 9, 8)          80
        1  GlobalAveragePooling  (2, 8)                 0
        -  --------------------  ------------  ----------
        80 parameters, 80 trainable, 0.0 MB
        """
        shapes = [None] * len(self) if input_shape is None else self._shapes(input_shape)
        rows = [("#", "layer", "output shape", "parameters"), ("", "", "", "")]
        for index, (layer, shape) in enumerate(zip(self.layers, shapes, strict=True)):
            rows.append((str(index), type(layer).__name__, str(shape or ""), f"{layer.num_parameters:,}"))
        rows.append(("", "", "", ""))
        if input_shape is None:
            rows = [(index, layer, count) for index, layer, _, count in rows]  # type: ignore[misc]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(w) if column == len(widths) - 1 else cell.ljust(w)
                      for column, (cell, w) in enumerate(zip(row, widths, strict=True)))
            if row[1] else "  ".join("-" * w for w in widths)
            for row in rows
        ]  # fmt: skip
        trainable = sum(array.size for array in self.trainable_parameters.values())
        megabytes = sum(array.nbytes for array in self.parameters.values()) / 1e6
        return "\n".join([*lines, f"{self.num_parameters:,} parameters, {trainable:,} trainable, {megabytes:.1f} MB"])

    def _shapes(self, input_shape: Sequence[int]) -> list[Shape]:
        """Return the output shape of each layer."""
        if input_shape and input_shape[0] is None:  # any batch, as tables often say
            return [(None, *shape[1:]) for shape in self._shapes((1, *input_shape[1:]))]
        shapes, shape = [], tuple(input_shape)
        for index, layer in enumerate(self.layers):
            with told_of(_name(index, layer)):
                shape = layer.output_shape(shape)
            shapes.append(shape)
        return shapes

    def _pull(self, *gradients: Any) -> Any:
        for index, layer in reversed(list(enumerate(self.layers))):
            with told_of(_name(index, layer)):
                gradients = (layer.backward(*gradients),)
        self._collect_gradients()
        return gradients[0]


def _name(index: int, layer: Layer) -> str:
    return f"layer {index}, {type(layer).__name__}"


def _parts(layer: Layer) -> Iterator[Layer]:
    """Yield a layer and all within it."""
    yield layer
    for inner in layer._sublayers.values():
        yield from _parts(inner)


def _takes_mask(layer: Layer) -> bool:
    if isinstance(layer, Sequential):
        return any(map(_takes_mask, layer.layers))
    return isinstance(layer, ConvLSTM2D)


def _reverses(layer: Layer) -> bool:
    """Whether a layer that takes a mask returns the time steps last first."""
    if isinstance(layer, Sequential):
        return sum(map(_reverses, layer.layers)) % 2 == 1
    return isinstance(layer, ConvLSTM2D) and layer.go_backwards


def _time_axis(layer: Layer, shape: Shape) -> int:
    """Return which axis of a mask for an x of `shape` is that of the time steps."""
    lstm = next(part for part in _parts(layer) if isinstance(part, ConvLSTM2D))
    return 0 if lstm.time_major or len(shape) < 5 else 1  # without a batch axis x is 4D


def _reversed_mask(axis: int, shape: Shape, mask: Any, lengths: Any) -> np.ndarray:
    """Return a mask or lengths, whose time steps lie on `axis` of an x of `shape`, as the mask of its reversal."""
    if mask is None:
        valid = (
            np.arange(shape[axis]) < np.atleast_1d(dispatch.as_numpy("Sequential", "lengths", lengths))[:, np.newaxis]
        )
        mask = valid if axis == 1 else valid.T if len(shape) == 5 else valid[0]
    return np.flip(dispatch.as_numpy("Sequential", "mask", mask), axis)


def _single_output(layer: Layer) -> str | None:
    """Return what to change so that a layer returns one array; None where it does."""
    if isinstance(layer, Sequential):
        return _single_output(layer.layers[-1])
    if isinstance(layer, ConvLSTM2D) and layer.return_state:
        return "give it return_state=False"
    if isinstance(layer, ConvLSTM2D) and layer.bidirectional and layer.merge_mode is None:
        return "give it a merge_mode, such as 'concat'"
    if isinstance(layer, MaxPooling3D) and layer.return_indices:
        return "give it return_indices=False"
    return None


def _restored(restore: Any, outputs: Any) -> Any:
    """Return nested tuples and lists of arrays as the caller's kind of array."""
    if isinstance(outputs, tuple | list):
        return type(outputs)(_restored(restore, item) for item in outputs)
    return None if outputs is None else restore(outputs)

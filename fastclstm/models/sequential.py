"""Layers, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm.layers.base import Layer
from fastclstm.layers.container import Container, Walk, parts, told_of
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.layers.place import place_of
from fastclstm.layers.symbolic import tried
from fastclstm.models.graph import chain
from fastclstm.models.network import Network, restored
from fastclstm.models.summary import table
from fastclstm.spec import Shape
from fastclstm.training.batches import Batch


@dataclass(eq=False, repr=False)
class Sequential(Network):
    """Layers one after the other: each takes what the one before returned.

    Whether the layers fit x, and each other, is checked before anything is computed, as far as their `output_shape`
    tells. Where the first ConvLSTM2D gets a batch of sequences (B, T, H, W, C), all of them must; where it gets a
    single sequence (T, H, W, C), likewise; so frames (B, H, W, C) whose time axis was forgotten are one sequence of B
    steps. An error in a layer carries a note that says which one it was.

    ``model[i]``, ``len(model)`` and iteration give the layers; their parameters appear as ``{index}.NAME``.

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
            if why := layer._unfit():
                raise ValueError(f"Sequential: {where} {why}")
            self._check_outputs(index)
            for part in parts(layer):
                if id(part) in seen:
                    raise ValueError(f"Sequential: {where} shares a layer with {seen[id(part)]}, whose call it would "
                                     f"forget before backward; make two layers")  # fmt: skip
            seen |= {id(part): where for part in parts(layer)}
        self._graph = chain(self.layers)
        self._sublayers = self._graph.layers

    def __getitem__(self, index: int) -> Layer:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def forward(self, x: Any, mask: Any = None, lengths: Any = None, training: bool = False) -> Any:
        """Return what the last layer makes of x, in memory of its own.

        Parameters
        ----------
        x : array
            What the first layer takes.
        mask : array of bool (B, T), optional
            Handed to every ConvLSTM2D; see there. No layer before may change the number of steps.
        lengths : array of int (B,), optional
            Instead of a mask: the number of valid steps at the start of each sequence of x.
        training : bool
            Compute as training does, and keep what `backward` needs.

        Raises
        ------
        ValueError
            Shapes that do not fit the layers; a mask or lengths, but no ConvLSTM2D.
        TypeError
            Anything but real arrays; one on a GPU, where a layer does not compute there or is of another dtype.
        """
        place = place_of(self, x, refuses=False)
        array = place.read("x", x)
        steps = self._steps(place, mask, lengths, array.shape)
        walk, checked = Walk(mask=None if steps is None else steps.shape), 0

        def check(index: int, y: Any) -> None:
            nonlocal checked
            if index == checked:
                checked = self._check(index, y.shape, walk)

        self._pullback = None
        (start,) = self._graph.inputs
        y, calls = self._run(place, {start: array}, steps, training, check)

        def pullback(*dy: Any) -> Any:
            dx = self._pull(calls, {self._graph.outputs: dy}).get(start)
            return place.restore(np.zeros_like(array) if dx is None and self.input_gradient else dx)

        if training:
            self._pullback = pullback
        return restored(place.restore, y)

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
        """Return the shape of the output for an x of `input_shape`; raise ValueError where a layer does not fit.

        The batch may be None, and is None in the output's shape then.
        """
        return self._shapes(input_shape)[-1]

    def summary(self, input_shape: Sequence[int] | None = None) -> str:
        """Return a table of the layers: output shapes, if `input_shape` is given, and numbers of parameters.

        The batch of `input_shape` may be None.

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
        return table(self, self._sublayers, None if input_shape is None else self._shapes(input_shape))

    def _several_outputs(self) -> str | None:
        return self.layers[-1]._several_outputs()

    def _check_batch(self, op: str, batch: Batch) -> None:
        walk, shape = Walk(), batch["x"].shape
        self._check(0, shape, walk)
        if walk.batched is False:
            raise ValueError(f"{op}: x {shape} is one sequence, but samples are on the first axis; give x[np.newaxis]")

    def _shapes(self, input_shape: Sequence[int]) -> list[Shape]:
        """Return the output shape of each layer."""
        shape = tuple(input_shape)
        unknown = [axis for axis, n in enumerate(shape) if n is None]
        if not unknown:
            return self._known_shapes(shape)
        lstm = next((part for part in parts(self) if isinstance(part, ConvRecurrent)), None)
        batch = int(lstm is not None and lstm.time_major)
        if unknown != [batch]:
            raise ValueError(
                f"Sequential: of input_shape {shape} only the batch, axis {batch}, may be None; give the other sizes"
            )
        shapes: list[Shape] = tried(self._known_shapes, shape)
        return shapes

    def _known_shapes(self, shape: Shape) -> list[Shape]:
        """Return the output shape of each layer for an x of `shape`, without None."""
        walk, shapes = Walk(), [shape]
        for index in range(len(self)):
            shapes.append(self._told_shape(index, shapes[-1], walk))
        return shapes[1:]

    def _shape_within(self, shape: Shape, walk: Walk) -> Shape:
        for index in range(len(self)):
            shape = self._told_shape(index, shape, walk)
        return shape

    def _told_shape(self, index: int, shape: Shape, walk: Walk) -> Shape:
        """Return the shape that a layer makes of `shape`; raise ValueError where it does not fit."""
        layer = self.layers[index]
        self._check_outputs(index)  # as options may have changed
        with told_of(_name(index, layer)):
            if isinstance(layer, ConvRecurrent):
                walk.enter(layer, shape, f"layer {index}")
            return layer._shape_within(shape, walk) if isinstance(layer, Container) else layer.output_shape(shape)

    def _check_outputs(self, index: int) -> None:
        """Raise ValueError unless a layer returns one array or is the last."""
        layer = self.layers[index]
        if index < len(self) - 1 and (remedy := layer._several_outputs()):
            raise ValueError(
                f"Sequential: {_name(index, layer)} returns more than one array, which no layer takes; {remedy}"
            )

    def _check(self, start: int, shape: Shape, walk: Walk) -> int:
        """Raise ValueError where the layers from `start` on do not fit; return which is the first not checked.

        That is the one after a layer that has no `output_shape`.
        """
        for index in range(start, len(self)):
            try:
                shape = self._told_shape(index, shape, walk)
            except NotImplementedError:
                return index + 1
        return len(self)

    def _pull_step(self, index: int, dy: Any) -> tuple[Any, dict[str, Any]]:
        if index < len(self) - 1:
            return super()._pull_step(index, dy)
        return self.layers[index].backward(*dy), {}

    def _call_shapes(self, x: Any, **options: Any) -> Any:
        if remedy := self._several_outputs():
            raise ValueError(f"Sequential: in a graph its last layer returns one array; {remedy}")
        return self.output_shape(x)


def _name(index: int, layer: Layer) -> str:
    return f"layer {index}, {type(layer).__name__}"

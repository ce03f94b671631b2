"""Layers that hold other layers: how they are walked through, and what is known of the shapes on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastclstm.layers.base import Layer
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.layers.layout import Layout
from fastclstm.spec import Shape, expect_shape


@dataclass(eq=False, repr=False)
class Container(Layer):
    """A layer made of layers: freezing it freezes them."""

    def reset_state(self) -> None:
        """Forget what stateful layers within keep from one call to the next."""
        for layer in self._sublayers.values():
            for part in parts(layer):
                if hasattr(part, "reset_state"):
                    part.reset_state()

    def _knows_gpu(self, training: bool) -> bool:
        return all(layer._knows_gpu(training) for layer in self._sublayers.values())

    def _shape_within(self, shape: Shape, walk: Walk) -> Shape:
        """Return `output_shape` of `shape`; `walk` is what is known of the network so far."""
        return self.output_shape(shape)

    @property
    def trainable(self) -> bool:
        """False freezes the parameters of all layers within; their `trainable` is set with it."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = value
        for layer in getattr(self, "_sublayers", {}).values():  # none yet while the options are being read
            layer.trainable = value


def walk(layer: Layer, path: str = "") -> Iterator[tuple[str, Layer]]:
    """Yield a layer and all within it, each with its path."""
    yield path, layer
    for name, inner in layer._sublayers.items():
        yield from walk(inner, f"{path}.{name}" if path else name)


def told(path: str, layer: Layer) -> str:
    """Name a layer for an error, by its path and class."""
    return f"layer {path}, {type(layer).__name__}" if path else type(layer).__name__


def parts(layer: Layer) -> Iterator[Layer]:
    """Yield a layer and all within it."""
    return (part for _, part in walk(layer))


def add_gradients(sums: dict[str, Any], prefix: str, layer: Layer) -> None:
    """Add those that the layer's `backward` left to `sums`, under its prefix, of other calls of the same layer."""
    for name, gradient in layer._kept_gradients().items():
        full = f"{prefix}.{name}"
        sums[full] = sums[full] + gradient if full in sums else gradient


def recorded(layer: Layer) -> list[tuple[Layer, Any]]:
    """Return what the last call of a layer left in it, and in all within, for backward; see `recall`."""
    return [(part, part._pullback) for part in parts(layer)]


def recall(record: list[tuple[Layer, Any]]) -> None:
    """Let `backward` be of the call that `recorded` was asked after, of the many that there have been."""
    for part, pullback in record:
        part._pullback = pullback


@contextmanager
def without_penalties(layers: Sequence[Layer]) -> Iterator[None]:
    """Let `backward` keep the gradients of the outputs alone, as penalties count once and not with every call."""
    regularizers = [layer._regularizers for layer in layers]
    try:
        for layer in layers:
            layer._regularizers = {}
        yield
    finally:
        for layer, own in zip(layers, regularizers, strict=True):
            layer._regularizers = own


@contextmanager
def told_of(where: str) -> Iterator[None]:
    """Add to any error inside a note that says `where` it came up."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {where}")
        raise


@dataclass
class Walk:
    """What is known on the way through a network's shapes."""

    batched: bool | None = None
    """Whether sequences have a batch axis; None before the first recurrent layer of frames."""
    time_major: bool | None = None
    """That of all of them."""
    mask: Shape | None = None
    """Of the mask that each of them gets."""
    last_step: str = "the recurrent layer before"
    """Which layer has returned its last step alone."""

    def enter(self, layer: ConvRecurrent, shape: Shape, where: str) -> None:
        """Raise ValueError unless `shape` is one of sequences as all recurrent layers of the network get them."""
        if self.time_major not in (None, layer.time_major):
            raise ValueError(
                f"Sequential: {where} ({type(layer).__name__}) has time_major={layer.time_major}, but one before has "
                f"time_major={self.time_major}; give all the same"
            )
        self.time_major = layer.time_major
        if self.batched is None:
            self.batched = len(shape) != layer._rank + 2
        elif len(shape) != layer._rank + 2 + self.batched:
            layout = Layout("", layer.dtype, layer.data_format, layer.time_major, self.batched, rank=layer._rank)
            raise ValueError(
                f"Sequential: {where} ({type(layer).__name__}) takes ({layout.axes(True)}) but gets {len(shape)}D "
                f"{shape}; give {self.last_step} return_sequences=True"
            )
        if self.mask is not None:
            name = type(layer).__name__
            why = f"the steps that {where}, {name}, gets; no layer before it may change those of a mask or lengths"
            expect_shape("Sequential", "mask", self.mask, shape[: -layer._rank - 1], why)
        if not layer.return_sequences:
            self.last_step = where

"""The way through a network to its graph of ONNX: which layer is converted where, and what states go in and out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fastclstm.convert.onnx_builder import Builder, Value
from fastclstm.layers import Embedding, Layer
from fastclstm.layers.container import Container, told, told_of
from fastclstm.layers.symbolic import Known, is_shape, leaves, mapped, tried

Converter = Callable[..., Any]
"""Takes an `Export`, a layer, a value or several, and the call's options; returns values as a call returns arrays."""


class Export:
    """A network that is on its way to ONNX."""

    def __init__(self, table: Mapping[type, Converter], dtype: str | None, states: bool, ends: Collection[str]):
        self.g = Builder(ends=ends)
        self.dtype, self.wants_states = dtype, states
        self.next_states: dict[str, Value] = {}
        """What the states of each input of states are after the run."""
        self._table, self._path = table, ""

    def call(self, path: str, layer: Layer, x: Any, options: Mapping[str, Any] | None = None) -> Any:
        """Return what a layer makes of values; `path` is where it is within the one that is being converted.

        Raises
        ------
        NotImplementedError
            There is no converter.
        ValueError
            Shapes that do not fit, a call that trains.
        """
        with self.at(path):
            where = told(self._path, layer)
            if type(layer) not in self._table:
                raise NotImplementedError(f"to_onnx: {where} has no counterpart in ONNX here; leave it out, or put "
                                          f"known layers in its place")  # fmt: skip
            given = {name: value for name, value in (options or {}).items() if name != "training"}
            with told_of(where):
                if (options or {}).get("training"):
                    raise ValueError("to_onnx: the layer is called with training=True, but what is exported infers; "
                                     "build the graph without that")  # fmt: skip
                shapes = {name: mapped(_shape, value) for name, value in given.items()}
                made_shapes = tried(lambda known: layer._call_shapes(known, **shapes), mapped(_shape, x))
                if not isinstance(layer, Embedding | Container):
                    dtype = self._dtype(layer, x)
                    x = mapped(lambda value: self.g.cast(value, dtype), x)
                made = self._table[type(layer)](self, layer, x, **given)
            return _of_shapes(made, made_shapes)

    def _dtype(self, layer: Layer, x: Any) -> str:
        """Return what a layer computes x in."""
        wide = any(value.dtype == "float64" for value in leaves(x))
        return self.dtype or layer.options.get("dtype") or ("float64" if wide else "float32")

    def state(self, names: Sequence[str], shapes: Sequence[Known], dtype: str) -> list[Value | None]:
        """Return inputs for the states that a call of the layer starts from; None, zeros, where none are asked for."""
        if not self.wants_states:
            return [None] * len(names)
        made: list[Value | None] = []
        for name, shape in zip(names, shapes, strict=True):
            value = self.g.input(f"{self._path}.{name}" if self._path else name, dtype, shape)
            self.next_states[value.name] = value
            made.append(value)
        return made

    def keep_states(self, before: Sequence[Value | None], after: Sequence[Value]) -> None:
        """Keep the states after a call of those that are inputs."""
        for old, new in zip(before, after, strict=True):
            if old is not None and old.name in self.next_states:
                self.next_states[old.name] = new

    @contextmanager
    def inside(self, body: Builder) -> Iterator[None]:
        """Convert into the body of a loop."""
        outer, self.g = self.g, body
        try:
            yield
        finally:
            self.g = outer

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        """Convert what stands there within the layer that is being converted."""
        outer, self._path = self._path, ".".join(filter(None, (self._path, path)))
        try:
            yield
        finally:
            self._path = outer


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Value) else value


def _of_shapes(made: Any, shapes: Any) -> Any:
    """Return values in tuples and lists with what is known of their shapes."""
    if isinstance(made, Value):
        if not is_shape(shapes) or len(shapes) != made.rank:
            raise AssertionError(f"a value of {made.rank} axes was made for {shapes}")
        return replace(made, shape=tuple(shapes))
    if isinstance(made, Mapping):
        return {name: _of_shapes(value, shapes[name]) for name, value in made.items()}
    return type(made)(_of_shapes(value, shape) for value, shape in zip(made, shapes, strict=True))

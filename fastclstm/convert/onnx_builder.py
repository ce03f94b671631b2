"""Graphs of ONNX, node by node; ONNX itself is imported when a builder is made.

A layer of ours has its channels last, an operator of ONNX has them first. So a value knows in which order its tensor
has the axes: reordering them costs no node, operators that work element by element leave the order as it is, and a
Transpose is made where an operator needs another one, once for a tensor.

Sizes are numbers where they are known, else tensors of one int64 that are computed when the graph runs.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import count
from typing import Any

import numpy as np

from fastclstm.layers.symbolic import Known
from fastclstm.models.graph import free_name

OPSET = 21
"""Of 2024: the first whose GroupNormalization has one scale a channel. Gelu needs 20, Mish 18."""
IR_VERSION = 10
"""The one that came with that opset."""

LAST = 2**62
"""As the end of a slice: all that is left."""


@dataclass(frozen=True)
class Value:
    """A tensor of a graph, with its axes in an order of ours."""

    name: str
    dtype: str
    order: tuple[int, ...]
    """Our axis i is axis order[i] of the tensor."""
    shape: Known
    """Of our axes, as far as it is known."""

    @property
    def rank(self) -> int:
        """How many axes it has."""
        return len(self.order)


Size = int | Value
"""Number of items on an axis."""

_COUNTS: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.floordiv, "Max": max, "Min": min,
    "Mod": operator.mod,
}  # fmt: skip
"""Operators on sizes; no dividend is below 0."""


_NOTHING = {("Add", 0), ("Sub", 0), ("Mul", 1), ("Div", 1)}
"""What changes no size."""


class Builder:
    """A graph that is being built: the whole one, or the body of a loop in it."""

    def __init__(self, outer: Builder | None = None, ends: Collection[str] = ()):
        self.onnx: Any = import_module("onnx") if outer is None else outer.onnx
        self._numbers: Any = count() if outer is None else outer._numbers
        self._outer = outer
        self._ends: Collection[str] = ends if outer is None else outer._ends
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._nodes: list[Any] = []
        self._constants: dict[tuple[Any, ...], tuple[str, np.ndarray]] = {}
        self._transposed: dict[tuple[str, tuple[int, ...]], str] = {}
        self._lengths: dict[tuple[str, int], str] = {}

    # What goes in and out

    def input(self, name: str, dtype: str, axes: Sequence[int | str | None]) -> Value:
        """Return an input; its axes have a size, a name, or neither, and its name a number where another has it."""
        name = free_name(name, {given.name for given in self.inputs})
        self.inputs.append(self._info(name, dtype, axes))
        return _value(name, dtype, [n if isinstance(n, int) else None for n in axes])

    def output(self, name: str, value: Value, axes: Sequence[int | str | None] | None = None) -> None:
        """Make a value an output."""
        self._nodes.append(self.onnx.helper.make_node("Identity", [self.plain(value)], [name], name=name))
        self.outputs.append(self._info(name, value.dtype, axes or value.shape))

    def graph(self, name: str) -> Any:
        """Return what was built."""
        constants = [self.onnx.numpy_helper.from_array(array, name) for name, array in self._constants.values()]
        return self.onnx.helper.make_graph(self._nodes, name, self.inputs, self.outputs, constants)

    @property
    def size(self) -> int:
        """Bytes of the constants, which are all in the whole graph."""
        return sum(array.nbytes for _, array in self._constants.values())

    def new_name(self, kind: str) -> str:
        """Return a name that nothing in the whole graph has, nor any of `ends`."""
        while (name := f"/{kind}_{next(self._numbers)}") in self._ends:
            pass
        return name

    def _info(self, name: str, dtype: str, axes: Sequence[int | str | None]) -> Any:
        kind = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.onnx.helper.make_tensor_value_info(name, kind, list(axes))

    # Nodes

    def several(self, kind: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Add a node on named tensors ("" is one left out); return the names of its outputs."""
        name = self.new_name(kind)
        made = [name] if outputs == 1 else [f"{name}_{n}" for n in range(outputs)]
        self._nodes.append(self.onnx.helper.make_node(kind, list(inputs), made, name=name, **attributes))
        return made

    def node(
        self, kind: str, *inputs: Value | np.ndarray | None, dtype: str | None = None, rank: int | None = None,
        **attributes: Any,
    ) -> Value:  # fmt: skip
        """Add a node on values with their axes as ours, and weights; its output has the first one's dtype and rank.

        Weights are brought to that dtype; integers are not.
        """
        first = inputs[0]
        assert isinstance(first, Value)
        cast = [v.astype(first.dtype) if isinstance(v, np.ndarray) and v.dtype.kind == "f" else v for v in inputs]
        (name,) = self.several(kind, [self.plain(value) for value in cast], 1, **attributes)
        return _value(name, dtype or first.dtype, (None,) * (first.rank if rank is None else rank))

    def named(self, name: str, dtype: str, shape: Known) -> Value:
        """Return the tensor of that name, with its axes in our order."""
        return _value(name, dtype, shape)

    def elementwise(
        self, kind: str, *inputs: Value | np.ndarray | float, dtype: str | None = None, **attributes: Any
    ) -> Value:
        """Add a node that works element by element, in the order of axes of the first value of highest rank.

        Arrays and numbers broadcast against the last of our axes, and take the first value's dtype.
        """
        values = [value for value in inputs if isinstance(value, Value)]
        like = max(values, key=lambda value: value.rank)
        names = []
        for value in inputs:
            if isinstance(value, Value):
                names.append(self._in_order(value, like.order))
                continue
            array = np.asarray(value, values[0].dtype)
            if array.ndim and array.size > 1:
                wide = array.reshape((1,) * (like.rank - array.ndim) + array.shape)
                array = wide.transpose(np.argsort(like.order))
            names.append(self.constant(array.reshape(()) if array.size == 1 else array))
        (name,) = self.several(kind, names, 1, **attributes)
        known = [{n for n in sizes if n != 1} or {1} for sizes in zip(*(value.shape for value in values), strict=True)]
        shape = tuple(max(sizes - {None}, default=None) for sizes in known)  # others are stretched to it
        return Value(name, dtype or values[0].dtype, like.order, shape)

    def cast(self, value: Value, dtype: str) -> Value:
        """Return a value of that dtype."""
        if value.dtype == dtype:
            return value
        to = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.elementwise("Cast", value, dtype=dtype, to=to)

    def constant(self, array: Any) -> str:
        """Return the name of a tensor that holds an array; equal ones are one, within loops too."""
        if self._outer is not None:
            return self._outer.constant(array)
        array = np.array(array, order="C")
        key = array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest()
        if key not in self._constants:
            self._constants[key] = self.new_name("constant"), array
        return self._constants[key][0]

    def constant_value(self, array: np.ndarray) -> Value:
        """Return an array as a value."""
        return _value(self.constant(array), array.dtype.name, array.shape)

    # The order of the axes

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Return a value whose axis i is axis order[i] of the one given."""
        return replace(value, order=tuple(value.order[axis] for axis in order),
                       shape=tuple(value.shape[axis] for axis in order))  # fmt: skip

    def move(self, value: Value, source: int, target: int) -> Value:
        """Return a value with one axis at another place."""
        order = list(range(value.rank))
        order.insert(target % value.rank, order.pop(source))
        return self.transpose(value, order)

    def plain(self, value: Value | np.ndarray | None) -> str:
        """Return the name of a tensor with the axes in our order."""
        if value is None:
            return ""
        if not isinstance(value, Value):
            return self.constant(value)
        return self._in_order(value, tuple(range(value.rank)))

    def _in_order(self, value: Value, order: tuple[int, ...]) -> str:
        """Return the name of a tensor that has our axis i as its axis order[i]."""
        if value.order == order:
            return value.name
        perm = [0] * value.rank
        for ours, axis in enumerate(order):
            perm[axis] = value.order[ours]
        key = value.name, tuple(perm)
        if key not in self._transposed:
            (self._transposed[key],) = self.several("Transpose", [value.name], 1, perm=perm)
        return self._transposed[key]

    def own(self, value: Value) -> Value:
        """Return a value whose tensor has the axes in our order."""
        return _value(self.plain(value), value.dtype, value.shape)

    def reduce(self, kind: str, value: Value, axes: Sequence[int], *, keepdims: bool = True) -> Value:
        """Add a ReduceMean or the like over some of our axes."""
        over = sorted(value.order[axis] for axis in axes)
        (name,) = self.several(kind, [value.name, self.constant(over)], 1, keepdims=int(keepdims))
        ours = {axis % value.rank for axis in axes}
        if keepdims:
            shape = tuple(1 if axis in ours else n for axis, n in enumerate(value.shape))
            return Value(name, value.dtype, value.order, shape)
        left = [axis for axis in range(value.rank) if axis not in ours]
        rows = sorted(value.order[axis] for axis in left)
        order = tuple(rows.index(value.order[axis]) for axis in left)
        return Value(name, value.dtype, order, tuple(value.shape[axis] for axis in left))

    def slice(self, value: Value, parts: dict[int, tuple[int, int, int]]) -> Value:
        """Return (start, stop, step) of some of our axes."""
        starts, stops, steps = zip(*parts.values(), strict=True)
        names = map(self.constant, (starts, stops, [value.order[axis] for axis in parts], steps))
        (name,) = self.several("Slice", [value.name, *names], 1)
        known = tuple(None if axis in parts else n for axis, n in enumerate(value.shape))
        return Value(name, value.dtype, value.order, known)

    def concatenate(self, values: Sequence[Value], axis: int) -> Value:
        """Return values side by side on one of our axes."""
        first = values[0]
        names = [self._in_order(value, first.order) for value in values]
        (name,) = self.several("Concat", names, 1, axis=first.order[axis])
        return Value(name, first.dtype, first.order, (None,) * first.rank)

    def pad(self, value: Value, pairs: dict[int, tuple[Size, Size]], fill: float = 0.0) -> Value:
        """Return a value with `fill` before and after it on some of our axes."""
        if all(pair == (0, 0) for pair in pairs.values()):
            return value
        by_axis: dict[int, tuple[Size, Size]] = {value.order[axis]: pair for axis, pair in pairs.items()}
        amounts = [by_axis.get(axis, (0, 0))[end] for end in (0, 1) for axis in range(value.rank)]
        filler = self.constant(np.asarray(fill, value.dtype))
        (name,) = self.several("Pad", [value.name, self.sizes(amounts), filler], 1)
        return Value(name, value.dtype, value.order, (None,) * value.rank)

    def wrap(self, value: Value, pairs: dict[int, tuple[Size, Size]]) -> Value:
        """Return a value that goes on with its other end, before and after it, on some of our axes.

        Of what Gather takes, as OpenVINO knows no Pad of the mode "wrap".
        """
        for axis, (before, after) in pairs.items():
            front = [] if before == 0 else [self._around(value, axis, self.count("Sub", 0, before), 0)]
            back = [] if after == 0 else [self._around(value, axis, 0, after)]
            value = self.concatenate([*front, value, *back], axis) if front or back else value
        return value

    def _around(self, value: Value, axis: int, start: Size, stop: Size) -> Value:
        """Return the items from `start` up to `stop` of one of our axes, counted round and round."""
        index = self.node("Mod", self.range(start, stop), self.vector(self.length(value, axis)))
        (name,) = self.several("Gather", [value.name, index.name], 1, axis=value.order[axis])
        return Value(name, value.dtype, value.order, (None,) * value.rank)

    # Sizes and shapes

    def length(self, value: Value, axis: int) -> Size:
        """Return how many items one of our axes has."""
        known = value.shape[axis]
        if known is not None:
            return known
        place = value.order[axis]
        key = value.name, place
        if key not in self._lengths:
            (self._lengths[key],) = self.several("Shape", [value.name], 1, start=place, end=place + 1)
        return _value(self._lengths[key], "int64", (1,))

    def count(self, kind: str, a: Size, b: Size) -> Size:
        """Return what an operator makes of sizes."""
        if isinstance(a, int) and isinstance(b, int):
            return _COUNTS[kind](a, b)
        if (kind, b) in _NOTHING:
            return a
        return _value(self.several(kind, [self.sizes([a]), self.sizes([b])], 1)[0], "int64", (1,))

    def sizes(self, items: Sequence[Size]) -> str:
        """Return the name of a vector of sizes."""
        if all(isinstance(item, int) for item in items):
            return self.constant(np.array(items, np.int64))
        names = [item.name if isinstance(item, Value) else self.constant(np.array([item])) for item in items]
        return names[0] if len(names) == 1 else self.several("Concat", names, 1, axis=0)[0]

    def vector(self, size: Size) -> Value:
        """Return a size as a vector of one."""
        return size if isinstance(size, Value) else self.constant_value(np.array([size], np.int64))

    def range(self, start: Size, stop: Size) -> Value:
        """Return the integers from `start` up to `stop`."""
        if isinstance(start, int) and isinstance(stop, int):
            return self.constant_value(np.arange(start, stop))
        scalars = [self.several("Squeeze", [self.sizes([end])], 1)[0] for end in (start, stop)]
        one = self.constant(np.array(1))
        return _value(self.several("Range", [*scalars, one], 1)[0], "int64", (None,))

    def reshape(self, value: Value, sizes: Sequence[Size]) -> Value:
        """Return the same items in other axes; one size may be -1, what is left."""
        unknown = [axis for axis, size in enumerate(sizes) if isinstance(size, Value)]
        if len(unknown) == 1 and -1 not in sizes:
            sizes = [-1 if axis == unknown[0] else size for axis, size in enumerate(sizes)]
        (name,) = self.several("Reshape", [self.plain(value), self.sizes(sizes)], 1)
        return _value(name, value.dtype, [n if isinstance(n, int) and n != -1 else None for n in sizes])

    def fold(self, value: Value) -> Value:
        """Return (B, T, …) as (B·T, …), without a Transpose where these axes come first in the tensor."""
        if value.order[:2] != (0, 1):
            value = self.own(value)
        sizes = [-1, *(self.length(value, value.order.index(axis)) for axis in range(2, value.rank))]
        made = self.reshape(_value(value.name, value.dtype, (None,) * value.rank), sizes)
        return replace(made, order=(0, *(axis - 1 for axis in value.order[2:])), shape=(None, *value.shape[2:]))

    def unfold(self, value: Value, like: Value) -> Value:
        """Undo `fold`, with B and T as `like` has them."""
        if value.order[0] != 0:
            value = self.own(value)
        sizes = [self.length(value, value.order.index(axis)) for axis in range(1, value.rank)]
        lead = [self.length(like, 0), self.length(like, 1)]
        made = self.reshape(_value(value.name, value.dtype, (None,) * value.rank), [*lead, *sizes])
        return replace(made, order=(0, 1, *(axis + 1 for axis in value.order[1:])),
                       shape=(*like.shape[:2], *value.shape[1:]))  # fmt: skip

    def unsqueeze(self, value: Value, axes: Sequence[int]) -> Value:
        """Return a value with axes of 1 at these places."""
        shape = list(value.shape)
        for axis in axes:
            shape.insert(axis, 1)
        (name,) = self.several("Unsqueeze", [self.plain(value), self.constant(list(axes))], 1)
        return _value(name, value.dtype, shape)

    def squeeze(self, value: Value, axis: int) -> Value:
        """Return a value without one of our axes, which is of 1."""
        place, left = value.order[axis], [n for n in range(value.rank) if n != axis]
        (name,) = self.several("Squeeze", [value.name, self.constant([place])], 1)
        order = tuple(n - (n > place) for n in (value.order[axis] for axis in left))
        return Value(name, value.dtype, order, tuple(value.shape[axis] for axis in left))

    def full(self, sizes: Sequence[Size], dtype: str) -> Value:
        """Return zeros."""
        fill = self.onnx.numpy_helper.from_array(np.zeros(1, dtype))
        (name,) = self.several("ConstantOfShape", [self.sizes(sizes)], 1, value=fill)
        return _value(name, dtype, [n if isinstance(n, int) else None for n in sizes])

    def split(self, value: Value, parts: int, axis: int) -> list[Value]:
        """Return equal parts of one of our axes."""
        names = self.several("Split", [value.name], parts, axis=value.order[axis], num_outputs=parts)
        known = tuple(None if place == axis else n for place, n in enumerate(value.shape))
        return [Value(name, value.dtype, value.order, known) for name in names]

    def scan(
        self, body: Callable[[Builder, list[Value], list[Value]], tuple[list[Value], list[Value]]],
        states: Sequence[Value], sequences: Sequence[tuple[Value, bool]], backwards: Sequence[bool],
    ) -> tuple[list[Value], list[Value]]:  # fmt: skip
        """Run a body over the first axis of sequences; return the last states, and its outputs as sequences.

        `body` takes a builder, the states, and an item of each sequence, and returns the states after it and outputs.
        Sequences come with whether they are read from the end, and `backwards` says so of the writing of outputs. Of
        sequences that are known to be of one item no loop is made.
        """
        if sequences[0][0].shape[0] == 1:
            after, made = body(self, list(states), [self.squeeze(sequence, 0) for sequence, _ in sequences])
            return after, [self.unsqueeze(value, [0]) for value in made]
        inner = Builder(self)
        before = [inner.input(inner.new_name("state"), s.dtype, s.shape) for s in states]
        items = [inner.input(inner.new_name("item"), s.dtype, s.shape[1:]) for s, _ in sequences]
        after, made = body(inner, before, items)
        for value in (*after, *made):
            inner.output(inner.new_name("next"), value)
        directions = {"scan_input_directions": [int(b) for _, b in sequences]}
        if made:
            directions["scan_output_directions"] = [int(b) for b in backwards]
        names = self.several(
            "Scan", [self.plain(value) for value in (*states, *(s for s, _ in sequences))], len(after) + len(made),
            body=inner.graph(self.new_name("body")), num_scan_inputs=len(sequences), **directions,
        )  # fmt: skip
        last = [_value(name, s.dtype, s.shape) for name, s in zip(names, states, strict=False)]
        T, written = sequences[0][0].shape[0], zip(names[len(after) :], made, strict=True)
        return last, [_value(name, item.dtype, (T, *item.shape)) for name, item in written]


def _value(name: str, dtype: str, shape: Sequence[int | None]) -> Value:
    return Value(name, dtype, tuple(range(len(shape))), tuple(shape))

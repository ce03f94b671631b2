"""Symbols: what layers are called on to build the graph of a `Model`.

As in Keras's functional API, ``layer(symbol)`` computes nothing: it checks the shapes and returns symbols of what the
layer would return. So a graph is made of the calls of objects that hold their parameters, and a layer called twice is
shared; where JAX and its kin trace a function, nothing here runs with made-up values. Otherwise than in Keras, a symbol
has no arithmetic and no indexing: whatever computes is a layer, with its gradient derived by hand.

An axis of unknown size is None, the batch's above all. Layers know shapes as numbers, so such an axis is tried with two
sizes, and is unknown behind the layer where the two make a difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, NoReturn

import numpy as np

Known = tuple[int | None, ...]
"""A shape; None is an axis of unknown size."""

SIZES = 10080, 20160
"""Tried for an axis of unknown size: multiples of all that layers usually divide by."""


@dataclass(frozen=True, eq=False)
class Node:
    """One call of a layer on symbols."""

    layer: Any
    x: Any
    """The first argument: a symbol, or a tuple, list or dict of them."""
    options: Mapping[str, Any]
    """All others; symbols among them, too."""
    shapes: Any
    """Of what it returns, in tuples and lists."""
    number: int = field(default_factory=count().__next__)
    """Later calls have higher ones."""

    def symbols(self) -> Any:
        """Return symbols of what the call returns, in tuples and lists as there."""
        places = count()
        return mapped_shapes(lambda shape: Symbol(shape, self, next(places)), self.shapes)


@dataclass(frozen=True, eq=False, repr=False)
class Symbol:
    """Stands for an array of a graph: see `Input`, and call layers on it."""

    shape: Known
    node: Node | None = None
    """The call that returns it; None: it is an input."""
    path: int = 0
    """Which of the symbols that the node returns it is."""
    name: str | None = None
    """Of an input."""

    __array_ufunc__ = None  # so that NumPy's operators refuse it

    def __repr__(self) -> str:
        return f"<{self.source} {self.shape}>"

    @property
    def source(self) -> str:
        """What it comes from, for errors."""
        if self.node is not None:
            return f"output of {title(self.node.layer)}"
        return "Input" if self.name is None else f"Input {self.name!r}"

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{self!r} is a symbol, which has no values: only layers are called on it; build a Model of "
                        "it, and call that on arrays")  # fmt: skip

    def __iter__(self) -> NoReturn:
        raise TypeError(f"{self!r} is one symbol, not several; a layer with return_state=True returns several")

    def __bool__(self) -> NoReturn:
        raise TypeError(f"{self!r} is a symbol, which is neither true nor false; a graph has no branches")


def Input(
    shape: Sequence[int | None] | None = None, *, batch_size: int | None = None,
    batch_shape: Sequence[int | None] | None = None, name: str | None = None,
) -> Symbol:  # fmt: skip
    """Return the symbol of an input of a graph: the beginning of a `Model`.

    Parameters
    ----------
    shape : sequence of int or None
        Of one sample, without the batch axis, as in Keras; None is an axis of any size.
    batch_size : int, optional
        None: any.
    batch_shape : sequence of int or None, optional
        Instead of the two: the whole shape.
    name : str, optional
        Under which a model of several inputs takes it.

    Raises
    ------
    ValueError, TypeError
        No shape, or one that is none.

    Examples
    --------
    >>> Input((None, 64, 64, 1), name="frames")
    <Input 'frames' (None, None, 64, 64, 1)>
    """
    if (shape is None) == (batch_shape is None) or (batch_shape is not None and batch_size is not None):
        raise ValueError("Input: give shape, that of one sample, or batch_shape, with the batch axis")
    given = batch_shape if shape is None else shape
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"Input: shape must be a tuple of sizes, such as (None, 64, 64, 1), got {given!r}")
    whole = tuple(given) if shape is None else (batch_size, *given)
    if not whole:
        raise ValueError("Input: batch_shape is empty; an input has a batch axis at least")
    return Symbol(checked_shape("Input: shape", whole), name=checked_name("Input", name))


def checked_shape(what: str, shape: Sequence[Any]) -> Known:
    """Return a shape, its sizes Python's; raise ValueError where one is neither a number from 0 nor None."""
    for size in shape:
        if size is not None and (isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 0):
            raise ValueError(f"{what} {tuple(shape)} must have sizes >= 0, or None for any, got {size!r}")
    return tuple(None if size is None else int(size) for size in shape)


def checked_name(op: str, name: Any) -> str | None:
    """Return a name, or None; raise ValueError where parameters could not be named by it."""
    if name is not None and not (isinstance(name, str) and name and not set(name) & set("./")):
        raise ValueError(f"{op}: name must be a text without '.' and '/', got {name!r}")
    return name


def title(layer: Any) -> str:
    """Name a layer for an error, by its class and, where it has one, its name."""
    name = getattr(layer, "name", None)
    return type(layer).__name__ if name is None else f"{type(layer).__name__} {name!r}"


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return tuples, lists and dicts with `function` of whatever else is in them."""
    if isinstance(value, tuple | list):
        return type(value)(mapped(function, item) for item in value)
    if isinstance(value, Mapping):
        return {key: mapped(function, item) for key, item in value.items()}
    return function(value)


def leaves(value: Any) -> Iterator[Any]:
    """Yield what is in tuples, lists and dicts."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


def is_shape(value: Any) -> bool:
    """Whether `value` is one shape, and no tuple of several."""
    return isinstance(value, tuple) and all(n is None or isinstance(n, int | np.integer) for n in value)


def mapped_shapes(function: Callable[[Known], Any], value: Any) -> Any:
    """Return tuples, lists and dicts of shapes with `function` of each."""
    if value is None or is_shape(value):
        return None if value is None else function(value)
    if isinstance(value, Mapping):
        return {key: mapped_shapes(function, item) for key, item in value.items()}
    return type(value)(mapped_shapes(function, item) for item in value)


def has_symbols(*values: Any) -> bool:
    """Whether there is a symbol anywhere in tuples, lists and dicts."""
    return any(isinstance(leaf, Symbol) for leaf in leaves(values))


def call(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the symbols of what a layer returns that is called with these arguments; see `Symbol`."""
    op = title(layer)
    try:
        bound = inspect.signature(layer.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{op}: {error}") from None
    (_, x), *others = bound.arguments.items()
    options = {name: value for name, value in others if value is not None and (name, value) != ("training", False)}
    _check_arguments(layer, x, options)
    shapes = mapped(lambda leaf: leaf.shape, x)
    told = {name: mapped(_shape_or_value, value) for name, value in options.items() if name != "training"}
    try:
        if isinstance(x, Symbol) and (why := layer._unfit()):
            raise ValueError(f"{op} {why}")
        made = tried(lambda known: layer._call_shapes(known, **told), shapes)
    except NotImplementedError:
        raise TypeError(f"{op}: a graph needs output_shape, which {type(layer).__name__} has not; define it") from None
    except Exception as error:
        error.add_note(f"in {op}, called on {', '.join(map(repr, leaves(x)))}")
        raise
    return Node(layer, x, options, made).symbols()


def tried(shapes_of: Callable[[Any], Any], given: Any) -> Any:
    """Return `shapes_of(given)`, a function of shapes as numbers, where some of the axes `given` are unknown."""
    shapes: list[Known] = []
    mapped_shapes(shapes.append, given)
    if all(None not in shape for shape in shapes):
        return shapes_of(given)
    try:
        first, second = (shapes_of(mapped_shapes(partial(_filled, size), given)) for size in SIZES)
    except ValueError as error:
        met = _met(given, shapes)
        if met is not None:
            return tried(shapes_of, met)
        error.add_note(f"where a size is not known (None), {SIZES[0]} was tried")
        raise
    return where_equal(first, second)


def where_equal(a: Any, b: Any) -> Any:
    """Return shapes, in tuples, lists or dicts, with None where `a` and `b` differ."""
    if isinstance(a, Mapping):
        return {key: where_equal(item, b[key]) for key, item in a.items()}
    if isinstance(a, tuple | list):
        return type(a)(where_equal(i, j) for i, j in zip(a, b, strict=True))
    return a if a == b else None


def fits(shape: Sequence[int | None], expected: Sequence[int | None]) -> bool:
    """Whether two shapes may be the same, as far as they are known."""
    return len(shape) == len(expected) and all(
        n is None or m is None or n == m for n, m in zip(shape, expected, strict=True)
    )


def _check_arguments(layer: Any, x: Any, options: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError unless x is of symbols and the options are such as a graph can hold."""
    op = title(layer)
    if strange := [leaf for leaf in leaves(x) if not isinstance(leaf, Symbol)]:
        raise TypeError(f"{op}: it is called on symbols and on {_kind(strange[0])} at once; make that an Input too, or "
                        f"call the layer on arrays alone")  # fmt: skip
    for name, value in options.items():
        if has_symbols(value) and name not in layer._symbolic_options:
            raise TypeError(
                f"{op}: {name} cannot be a symbol; only the first argument, or a list of symbols there, can"
            )
        for leaf in leaves(value):
            if not (leaf is None or isinstance(leaf, Symbol | bool | int | float | str)):
                raise TypeError(f"{op}: {name} is {_kind(leaf)}, which a graph does not hold; make it an Input, and "
                                f"give its values when the model is called")  # fmt: skip


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}" + ("" if shape is None else f" of shape {tuple(shape)}")


def _shape_or_value(leaf: Any) -> Any:
    return leaf.shape if isinstance(leaf, Symbol) else leaf


def _filled(size: int, shape: Known) -> tuple[int, ...]:
    return tuple(size if n is None else n for n in shape)


def _met(given: Any, shapes: Sequence[Known]) -> Any:
    """Return shapes of one rank with what each does not know of an axis from the others; None where nothing comes."""
    if len({len(shape) for shape in shapes}) != 1:
        return None
    known = [{n for n in sizes if n not in (None, 1)} for sizes in zip(*shapes, strict=True)]
    agreed = [min(sizes) if len(sizes) == 1 else None for sizes in known]
    met = mapped_shapes(lambda s: tuple(m if n is None else n for n, m in zip(s, agreed, strict=True)), given)
    return None if met == given else met

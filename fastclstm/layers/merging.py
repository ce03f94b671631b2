"""Layers that make one array of several: side by side, or element by element."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.base import Layer
from fastclstm.layers.place import place_of
from fastclstm.spec import Shape, expect_shape

Merged = tuple[Any, Callable[[Any], list[Any]]]
"""One array of several, and what takes its gradient to theirs."""


@dataclass(eq=False, repr=False)
class Merging(Layer):
    """A layer of several arrays in and one out: ``layer([a, b])``; a subclass has `output_shape` and `_merge`.

    `backward` returns a list of gradients, one an array, in their order. An array may stand in the list twice.
    """

    _count: ClassVar[int | None] = None
    """How many arrays it takes, where it does not take any number of them."""

    def forward(self, arrays: Any, training: bool = False) -> Any:
        """Return one array of several, as the first one's kind of array.

        Parameters
        ----------
        arrays : list of array
            Any real dtype; computed in float64 where one is, in float32 where none. Not to change until `backward`.
        training : bool
            Keep what `backward` needs.

        Raises
        ------
        ValueError
            No list, or shapes that do not fit together.
        TypeError
            Anything but real arrays; some on a GPU and some not, or on one where the layer does not compute.
        """
        op = type(self).__name__
        self._check_count(arrays)
        place = place_of(self, arrays[0], training)
        read = [place.read(f"array {index}", array) for index, array in enumerate(arrays)]
        shape = self.output_shape([array.shape for array in read])
        dtype = dispatch.working_dtype(*read)
        y, pull = self._merge([dispatch.native(array, dtype) for array in read])
        self._pullback = None

        def pullback(dy: Any) -> list[Any]:
            cotangent = place.read("dy", dy, dtype)
            expect_shape(op, "dy", cotangent.shape, shape, "the shape of the output")
            return [place.restore(gradient) for gradient in pull(dispatch.native(cotangent, dtype))]

        if training:
            self._pullback = pullback
        return place.restore(y)

    def backward(self, dy: Any) -> list[Any]:
        """Return the gradient of each array of the last call, which was a training call, given dy of its output.

        Raises
        ------
        RuntimeError
            The last call was not a training call.
        ValueError
            dy has not the output's shape.
        """
        return self._recorded()(dy)

    def output_shape(self, input_shape: Any) -> Shape:
        """Return the shape of the output for a list of shapes; raise ValueError where these do not fit together."""
        raise NotImplementedError

    def _merge(self, arrays: Sequence[Any]) -> Merged:
        """Return the output for C-contiguous arrays of one dtype, and its pullback."""
        raise NotImplementedError

    def _unfit(self) -> str | None:
        return "takes a list of arrays, which no layer before it gives; use it in a graph (Model)"

    def _check_count(self, items: Any) -> None:
        op, count = type(self).__name__, self._count
        several = isinstance(items, list | tuple) and len(items) > 0
        if not several or (count is not None and len(items) != count):
            came = f"{len(items)} items" if isinstance(items, list | tuple) else type(items).__name__
            raise ValueError(f"{op}: takes a list of {'arrays' if count is None else f'{count} arrays'}, got {came}")


@dataclass(eq=False, repr=False)
class Concatenate(Merging):
    """Arrays side by side on one axis: (B, …, C1), (B, …, C2), … to (B, …, C1 + C2 + …).

    Parameters
    ----------
    axis : int
        Any but that of the batch: -1 the channels, -3 those of data_format="channels_first", 1 the time.

    Raises
    ------
    ValueError, TypeError
        An axis that is none; arrays whose other axes differ.

    Examples
    --------
    >>> import numpy as np
    >>> Concatenate()([np.zeros((1, 4, 4, 3)), np.ones((1, 4, 4, 2))]).shape
    (1, 4, 4, 5)
    """

    axis: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.axis = operator.index(self.axis)
        except TypeError:
            raise TypeError(f"Concatenate: axis must be an integer, got {self.axis!r}") from None
        if self.axis == 0:
            raise ValueError("Concatenate: axis must not be 0, that of the batch")

    def output_shape(self, input_shape: Any) -> Shape:
        """Return the shape of the output for a list of shapes; raise ValueError where these do not fit together."""
        self._check_count(input_shape)
        first, axis = tuple(input_shape[0]), self.axis
        if not -len(first) < axis < len(first):
            raise ValueError(f"Concatenate: axis {axis} is none of those after the batch of shape {first}")
        axis %= len(first)
        for index, shape in enumerate(input_shape):
            others = (*shape[:axis], *shape[axis + 1 :])
            if len(shape) != len(first) or others != (*first[:axis], *first[axis + 1 :]):
                raise ValueError(
                    f"Concatenate: all axes but {self.axis} must be those of the first array, {first}, but array "
                    f"{index} is {tuple(shape)}"
                )
        sizes = [shape[axis] for shape in input_shape]
        return (*first[:axis], None if None in sizes else sum(sizes), *first[axis + 1 :])

    def _knows_gpu(self, training: bool) -> bool:
        return True

    def _merge(self, arrays: Sequence[Any]) -> Merged:
        axis = self.axis % arrays[0].ndim
        places = np.cumsum([array.shape[axis] for array in arrays[:-1]]).tolist()
        return np.concatenate(arrays, axis=axis), lambda dy: [
            dispatch.contiguous(part) for part in np.split(dy, places, axis=axis)
        ]


@dataclass(eq=False, repr=False)
class _Elementwise(Merging):
    """Arrays of one shape, or of shapes that broadcast: axes of 1 are stretched, missing ones are behind the batch."""

    def output_shape(self, input_shape: Any) -> Shape:
        """Return the shape of the output for a list of shapes; raise ValueError where these do not fit together."""
        self._check_count(input_shape)
        rank = max(map(len, input_shape))
        result = []
        for sizes in zip(*(_widened(tuple(shape), rank) for shape in input_shape), strict=True):
            wide = {n for n in sizes if n != 1} or {1}
            known = wide - {None}
            if len(known) > 1:
                shapes = " and ".join(map(str, map(tuple, input_shape)))
                raise ValueError(
                    f"{type(self).__name__}: arrays of {shapes} do not go together; every axis must be the same or 1"
                )
            result.append((known or wide).pop())
        return tuple(result)

    def _merge(self, arrays: Sequence[Any]) -> Merged:
        rank = max(array.ndim for array in arrays)
        wide = [array.reshape(_widened(array.shape, rank)) for array in arrays]
        y, pull = self._combine(wide)

        def pullback(dy: Any) -> list[Any]:
            return [_summed(g, a.shape).reshape(*b.shape) for g, a, b in zip(pull(dy), wide, arrays, strict=True)]

        return y, pullback

    def _combine(self, arrays: Sequence[Any]) -> Merged:
        """Return the output for arrays of equal rank, and a pullback to gradients of the output's shape."""
        raise NotImplementedError


@dataclass(eq=False, repr=False)
class _OnGPU(_Elementwise):
    """Those that are computed on a GPU too, where all shapes are the same."""

    def _knows_gpu(self, training: bool) -> bool:
        return True


@dataclass(eq=False, repr=False)
class Add(_OnGPU):
    """The sum of arrays, of one shape or of shapes that broadcast against each other.

    Missing axes are those behind the batch's, as in Keras.

    Examples
    --------
    >>> import numpy as np
    >>> Add()([np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 1))])
    array([[3., 3.]])
    """

    def _combine(self, arrays: Sequence[Any]) -> Merged:
        return _total(arrays), lambda dy: [dy] * len(arrays)


@dataclass(eq=False, repr=False)
class Average(_OnGPU):
    """The mean of arrays, of shapes as in `Add`.

    Examples
    --------
    >>> import numpy as np
    >>> Average()([np.zeros((1, 2)), np.ones((1, 2))])
    array([[0.5, 0.5]])
    """

    def _combine(self, arrays: Sequence[Any]) -> Merged:
        share = arrays[0].dtype.type(1 / len(arrays))
        return _total(arrays) * share, lambda dy: [dy * share] * len(arrays)


@dataclass(eq=False, repr=False)
class Subtract(_OnGPU):
    """The first of two arrays less the second, of shapes as in `Add`.

    Examples
    --------
    >>> import numpy as np
    >>> Subtract()([np.ones((1, 2)), np.ones((1, 2))])
    array([[0., 0.]])
    """

    _count = 2

    def _combine(self, arrays: Sequence[Any]) -> Merged:
        a, b = arrays
        return a - b, lambda dy: [dy, dy * dy.dtype.type(-1)]


@dataclass(eq=False, repr=False)
class Multiply(_OnGPU):
    """The product of arrays, element by element, of shapes as in `Add`.

    Examples
    --------
    >>> import numpy as np
    >>> Multiply()([np.full((1, 2), 3.0), np.full((1, 2), 2.0)])
    array([[6., 6.]])
    """

    def _combine(self, arrays: Sequence[Any]) -> Merged:
        def product(factors: Sequence[Any], start: Any) -> Any:
            for factor in factors:
                start = start * factor
            return start

        def pullback(dy: Any) -> list[Any]:
            return [product([*arrays[:i], *arrays[i + 1 :]], dy) for i in range(len(arrays))]

        return product(arrays[1:], arrays[0] * arrays[0].dtype.type(1)), pullback


@dataclass(eq=False, repr=False)
class Maximum(_Elementwise):
    """The largest of arrays, element by element, of shapes as in `Add`.

    NaN wins; of equal values the first array takes the gradient.

    Examples
    --------
    >>> import numpy as np
    >>> Maximum()([np.array([[1.0, 4.0]]), np.array([[3.0, 2.0]])])
    array([[3., 4.]])
    """

    _sign: ClassVar[int] = 1

    def _combine(self, arrays: Sequence[Any]) -> Merged:
        wide = np.broadcast_arrays(*arrays)
        y, winner = wide[0].copy(), np.zeros(wide[0].shape, np.intp)
        for index, array in enumerate(wide[1:], 1):
            better = (array > y if self._sign > 0 else array < y) | (np.isnan(array) & ~np.isnan(y))
            y, winner = np.where(better, array, y), np.where(better, index, winner)
        zero = y.dtype.type(0)
        return y, lambda dy: [np.where(winner == index, dy, zero) for index in range(len(arrays))]


@dataclass(eq=False, repr=False)
class Minimum(Maximum):
    """The smallest of arrays, element by element, of shapes as in `Add`.

    NaN wins; of equal values the first array takes the gradient.

    Examples
    --------
    >>> import numpy as np
    >>> Minimum()([np.array([[1.0, 4.0]]), np.array([[3.0, 2.0]])])
    array([[1., 2.]])
    """

    _sign = -1


def _widened(shape: Shape, rank: int) -> Shape:
    """Return a shape with axes of 1 behind the batch, `rank` axes in all."""
    return (*shape[:1], *(1,) * (rank - len(shape)), *shape[1:])


def _total(arrays: Sequence[Any]) -> Any:
    first, *others = arrays
    y = first * first.dtype.type(1)  # in memory of its own
    for array in others:
        y = y + array
    return y


def _summed(gradient: Any, shape: Shape) -> Any:
    """Pull a gradient back through the broadcasting of an array of `shape`."""
    axes = tuple(i for i, (n, m) in enumerate(zip(gradient.shape, shape, strict=True)) if n != m)
    if not axes:
        return gradient
    if dispatch.on_gpu(gradient):
        raise TypeError(f"arrays of {shape} and {gradient.shape} are on a GPU, where gradients are not summed; give "
                        f"them one shape, or move them to the CPU")  # fmt: skip
    precise = np.result_type(gradient, np.float64)
    return gradient.sum(axes, dtype=precise, keepdims=True).astype(gradient.dtype)

"""Arrays on a device as NumPy sees its own: of any strides, with elementwise arithmetic (csrc/views.cu).

What layers do between the engine's operations (flips, transposes, masks, sums) is written once, for NumPy's arrays: a
`View` takes part in the same expressions by NumPy's protocols ``__array_ufunc__`` and ``__array_function__`` (NEP 13
and 18). Indexing and turning axes cost nothing; every ufunc is one launch, on the stream of its first array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from fastclstm.engines.cuda import packing, product
from fastclstm.engines.cuda.device import Device, DeviceArray, OnDevice
from fastclstm.spec import Shape

AXES = 5
"""That the kernel counts along."""

LARGEST_AXIS = 2**31 - 1
"""Of all axes but the first."""

PLANS_KEPT = 1024
"""Ways to count through arrays that are kept: those used last."""

OPERATIONS = ("copy", "add", "subtract", "multiply", "divide", "maximum", "where", "leak", "greater",
              "not_equal")  # fmt: skip
"""Names in the order of `Operation` in csrc/views.cu; all but "copy", "where" and "leak" are NumPy's ufuncs."""
_COMPARISONS = ("greater", "not_equal")
_UFUNCS = {getattr(np, name): name for name in OPERATIONS if name not in ("copy", "where", "leak")}

_C_TYPES = {"f4": "float", "f8": "double", "i8": "long long", "u1": "unsigned char"}


@dataclass(frozen=True, eq=False)
class View(OnDevice, NDArrayOperatorsMixin):
    """Elements of a device's memory, `strides` elements apart along the axes."""

    memory: DeviceArray
    """The first element is where it starts; its own shape does not matter."""
    shape: Shape
    strides: Shape

    @classmethod
    def of(cls, array: DeviceArray) -> View:
        """Return all of an array."""
        return cls(array, array.shape, c_strides(array.shape))

    @classmethod
    def empty(cls, like: View, shape: Shape, dtype: Any = None) -> View:
        """Return new memory on the device and the stream of `like`."""
        with like.device.on(like.stream):
            return cls.of(like.device.empty(shape, like.dtype if dtype is None else dtype))

    @property
    def dtype(self) -> np.dtype:
        """Type of the elements."""
        return self.memory.dtype

    @property
    def device(self) -> Device:
        """Where they are."""
        return self.memory.device

    @property
    def stream(self) -> int | None:
        """Handle of the stream on which they are computed."""
        return self.memory.stream

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def T(self) -> View:
        """The axes in reverse order."""
        return View(self.memory, self.shape[::-1], self.strides[::-1])

    def __len__(self) -> int:
        return self.shape[0]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device.dlpack_device

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("an array on a GPU does not become one of NumPy by itself")

    def contiguous(self) -> DeviceArray:
        """Return the elements in C order: where they are if they lie so, else a copy."""
        memory = self.memory if is_contiguous(self.shape, self.strides) else self.copy().memory
        return memory if memory.shape == self.shape else replace(memory, shape=self.shape)

    def in_order(self) -> View:
        """Return the array in C order: itself where it is."""
        return self if self.strides == c_strides(self.shape) else View.of(self.contiguous())

    def copy(self) -> View:
        """Return the elements in memory of their own, in C order."""
        return _launch("copy", View.empty(self, self.shape), self)

    def astype(self, dtype: Any) -> View:
        """Return the elements converted, in memory of their own."""
        return _launch("copy", View.empty(self, self.shape, dtype), self)

    def get(self) -> np.ndarray:
        """Return the elements as an array of NumPy; waits for the device."""
        return self.device.get(self.contiguous())

    def reshape(self, *shape: Any) -> View:
        """Return the elements in C order with other sizes; a copy where they do not lie in that order."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        return View.of(self.contiguous().reshape(*sizes))

    def transpose(self, *axes: int) -> View:
        """Return the axes in another order."""
        return View(self.memory, tuple(self.shape[n] for n in axes), tuple(self.strides[n] for n in axes))

    def swapaxes(self, a: int, b: int) -> View:
        """Return the array with two axes in each other's place."""
        order = list(range(self.ndim))
        order[a], order[b] = order[b], order[a]
        return self.transpose(*order)

    def squeeze(self, axis: int) -> View:
        """Return the array without an axis of one."""
        return self[(slice(None),) * (axis % self.ndim) + (0,)]

    def broadcast_to(self, shape: Shape) -> View:
        """Return the array repeated along axes of one, and along new ones before."""
        if shape == self.shape:
            return self
        new = len(shape) - self.ndim
        steps = (s if n != 1 else 0 for n, s in zip(self.shape, self.strides, strict=True))
        return View(self.memory, shape, (0,) * new + tuple(steps))

    def leak(self, kept: Any, slope: float) -> View:
        """Return the elements where they are kept, else times the slope."""
        return _launch("leak", None, self, slope, kept=kept)

    def activate(self, name: str) -> View:
        """Return an activation of `nn.activations` of every element."""
        return self._activated("activation", name)

    def activate_backward(self, name: str, dy: View) -> View:
        """Return dx of the gradient dy of `activate`."""
        return self._activated("activation_backward", name, dy)

    def _activated(self, kernel: str, name: str, *dy: View) -> View:
        y = View.empty(self, self.shape)
        with self.device.on(self.stream):
            launched = self.device.kernel("activation.cu", kernel, {"REAL": product.real(self.dtype)})
            arrays = [view.contiguous() for view in (self, *dy)]
            product.over(self.device, launched, self.size, *arrays, np.int32(packing.ACTIVATIONS.index(name)),
                         np.int64(self.size), y.memory)  # fmt: skip
        return y

    def __getitem__(self, index: Any) -> View:
        items = index if isinstance(index, tuple) else (index,)
        taken = sum(item is not None and item is not Ellipsis for item in items)
        if Ellipsis not in items:
            items = *items, Ellipsis
        offset, shape, strides, axis = 0, [], [], 0
        for item in items:
            if item is None:
                shape.append(1)
                strides.append(0)
            elif item is Ellipsis:
                rest = self.ndim - taken
                shape += self.shape[axis : axis + rest]
                strides += self.strides[axis : axis + rest]
                axis += rest
            elif isinstance(item, slice):
                start, stop, step = item.indices(self.shape[axis])
                count = len(range(start, stop, step))
                offset += start * self.strides[axis]
                shape.append(count)
                strides.append(step * self.strides[axis])
                axis += 1
            else:
                offset += range(self.shape[axis])[item] * self.strides[axis]
                axis += 1
        pointer = self.memory.pointer + (offset * self.itemsize if math.prod(shape) else 0)
        return View(replace(self.memory, pointer=pointer), tuple(shape), tuple(strides))

    def __setitem__(self, index: Any, value: Any) -> None:
        part = self[index]
        if not (isinstance(value, View) and _place(value) == _place(part)):  # it has been computed there: x[index] += y
            _launch("copy", part, value)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = (None,), **options: Any) -> Any:
        if method != "__call__" or options or ufunc not in _UFUNCS:
            return NotImplemented
        return _launch(_UFUNCS[ufunc], out[0], *inputs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function not in _FUNCTIONS:
            return NotImplemented
        return _FUNCTIONS[function](*args, **kwargs)


def plain(array: Any) -> Any:
    """Return a view as the array that the engine computes with; anything else as it is."""
    return array.contiguous() if isinstance(array, View) else array


@lru_cache(maxsize=1024)
def c_strides(shape: Shape) -> Shape:
    """Return the strides, in elements, of an array in C order without gaps."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def is_contiguous(shape: Shape, strides: Shape) -> bool:
    """Return whether elements lie in C order without gaps; the stride of an axis of 1 says nothing."""
    expected = c_strides(shape)
    return (
        strides == expected
        or 0 in shape
        or all(size == 1 or one == other for size, one, other in zip(shape, strides, expected, strict=True))
    )


def _launch(operation: str, out: View | None, *inputs: Any, kept: Any = None) -> View:
    """Compute an operation into `out`, or into new memory."""
    first = next(value for value in (*inputs, kept, out) if isinstance(value, View))
    dtypes = [value.dtype for value in inputs if isinstance(value, View) or np.ndim(value)]
    dtype = dtypes[0] if dtypes else np.result_type(*inputs) if out is None else out.dtype
    with first.device.on(first.stream):
        views, numbers = zip(*(_operand(first.device, value, dtype) for value in inputs), strict=True)
        mask = None if kept is None else _operand(first.device, kept, np.dtype(np.bool_))[0]
        views = (*views, *(None,) * (2 - len(views)), mask)
        if out is None:
            shape = np.broadcast_shapes(*(view.shape for view in views if view is not None))
            out = View.empty(first, shape, np.bool_ if operation in _COMPARISONS else dtype)
        _run(operation, out, views, (*numbers, 0)[:2], dtype)
    return out


def _run(operation: str, out: View, views: Sequence[View | None], numbers: Sequence[Any], dtype: np.dtype) -> None:
    """Launch an operation on (a, b, mask), or on the numbers that stand for a and b where these are None."""
    nothing = (0,) * out.ndim
    present = (view if view is None else view.broadcast_to(out.shape) for view in views)
    arrays = [out, *present]
    plan = _plan(out.shape, *(nothing if view is None else view.strides for view in arrays))
    device = out.device
    kernel = device.kernel("views.cu", "elementwise", {"REAL": _c_type(dtype), "RESULT": _c_type(out.dtype)})
    number = np.int32(OPERATIONS.index(operation))
    values: list[tuple[Any, ...]] = [(), *((_bytes(dtype).type(value),) for value in numbers), ()]
    for starts in plan.starts:
        arguments: list[Any] = []
        for view, start, strides, value in zip(arrays, starts, plan.strides, values, strict=True):
            arguments += [None if view is None else _from(view, start), *strides, *value]
        product.over(device, kernel, plan.count, number, np.int64(plan.count), *plan.sizes, *arguments)


@dataclass(frozen=True)
class _Plan:
    """How launches count through arrays of one shape."""

    count: int
    sizes: tuple[np.int32, ...]
    """Of all axes but the first."""
    strides: tuple[tuple[np.int64, ...], ...]
    starts: list[tuple[int, ...]]
    """Of each launch the element of each array that it starts from."""


@lru_cache(maxsize=PLANS_KEPT)
def _plan(shape: Shape, *strides: Shape) -> _Plan:
    """Return how to count along as few axes as arrays of these strides can be seen with."""
    axes: list[tuple[int, ...]] = []  # of each its size, then the strides
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        whole = axes and all(outer == inner * size for outer, inner in zip(axes[-1][1:], steps, strict=True))
        if whole and (len(axes) == 1 or axes[-1][0] * size <= LARGEST_AXIS):
            axes[-1] = axes[-1][0] * size, *steps
        else:
            axes.append((size, *steps))
    beyond, axes = axes[:-AXES], axes[-AXES:] + [(1, *(0,) * len(strides))] * (AXES - len(axes))
    starts = [
        tuple(sum(n * axis[1 + array] for n, axis in zip(place, beyond, strict=True)) for array in range(len(strides)))
        for place in np.ndindex(*(size for size, *_ in beyond))
    ]
    sizes, *joined = zip(*axes, strict=True)
    return _Plan(math.prod(sizes), product.int32(*sizes[1:]), tuple(tuple(map(np.int64, s)) for s in joined), starts)


def _operand(device: Device, value: Any, dtype: np.dtype) -> tuple[View | None, Any]:
    """Return an operand as a view, or None and a number."""
    if isinstance(value, View):
        if _bytes(value.dtype) != _bytes(dtype):
            raise TypeError(f"arrays of {dtype} and {value.dtype} on a GPU are not brought together; pass one dtype")
        return value, 0
    if np.ndim(value) == 0:
        return None, value
    return View.of(device.put(np.ascontiguousarray(value, dtype))), 0


def _place(view: View) -> tuple[Any, ...]:
    """Return what tells where the elements are."""
    return view.memory.pointer, view.dtype, view.shape, view.strides


def _bytes(dtype: np.dtype) -> np.dtype:
    """Return what kernels take for a dtype: bytes for booleans."""
    return np.dtype(np.uint8) if dtype == np.bool_ else dtype


def _c_type(dtype: np.dtype) -> str:
    return _C_TYPES[_bytes(dtype).str[1:]]


def _from(view: View, start: int) -> DeviceArray:
    """Return a kernel's argument: the memory from an element on."""
    memory = view.memory
    if not start and memory.dtype != np.bool_:
        return memory
    return replace(memory, pointer=memory.pointer + start * memory.dtype.itemsize, dtype=_bytes(memory.dtype))


# --- Functions of NumPy ---


def _where(condition: Any, x: Any, y: Any) -> View:
    return _launch("where", None, x, y, kept=condition)


def _moveaxis(array: View, source: int, destination: int) -> View:
    order = [axis for axis in range(array.ndim) if axis != source % array.ndim]
    order.insert(destination % array.ndim, source % array.ndim)
    return array.transpose(*order)


def _expand_dims(array: View, axis: int) -> View:
    return array[(slice(None),) * axis + (None,)]


def _flip(array: View, axis: int) -> View:
    return array[(slice(None),) * axis + (slice(None, None, -1),)]


def _concatenate(arrays: Sequence[View], axis: int = 0) -> View:
    first, axis = arrays[0], axis % arrays[0].ndim
    sizes = [array.shape[axis] for array in arrays]
    joined = View.empty(first, (*first.shape[:axis], sum(sizes), *first.shape[axis + 1 :]))
    for array, part in zip(arrays, _split(joined, np.cumsum(sizes[:-1]).tolist(), axis), strict=True):
        part[...] = array
    return joined


def _split(array: View, places: int | Sequence[int], axis: int = 0) -> list[View]:
    axis %= array.ndim
    if isinstance(places, int):
        size = array.shape[axis] // places
        places = [n * size for n in range(1, places)]
    starts, stops = [0, *places], [*places, array.shape[axis]]
    return [array[(slice(None),) * axis + (slice(a, b),)] for a, b in zip(starts, stops, strict=True)]


def _empty_like(array: View, dtype: Any = None, shape: Shape | None = None) -> View:
    return View.empty(array, array.shape if shape is None else shape, dtype)


def _zeros_like(array: View, dtype: Any = None, shape: Shape | None = None) -> View:
    with array.device.on(array.stream):
        return View.of(array.device.zeros(array.shape if shape is None else shape, dtype or array.dtype))


def _may_share_memory(a: Any, b: Any) -> bool:
    return isinstance(a, View) and isinstance(b, View) and a.memory.owner is b.memory.owner


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.where: _where,
    np.moveaxis: _moveaxis,
    np.expand_dims: _expand_dims,
    np.flip: _flip,
    np.concatenate: _concatenate,
    np.split: _split,
    np.empty_like: _empty_like,
    np.zeros_like: _zeros_like,
    np.may_share_memory: _may_share_memory,
    np.shape: lambda array: array.shape,
    np.ndim: lambda array: array.ndim,
}

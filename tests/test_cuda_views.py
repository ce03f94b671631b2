"""Views of device arrays answer NumPy's expressions with NumPy's numbers."""

import operator
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from cuda_emulator import EmulatedDevice, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclstm.engines.cuda import packing, product, views
from fastclstm.engines.cuda.device import DeviceArray
from fastclstm.engines.cuda.views import View
from fastclstm.nn import activations


@pytest.fixture(scope="module")
def put(cuda_device):
    return lambda array: View.of(cuda_device.put(array))


def normal(*shape, seed=0, dtype="f4"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def equal(view, expected):
    assert isinstance(view, View)
    for name in ("shape", "dtype", "ndim", "size", "itemsize"):
        assert getattr(view, name) == getattr(expected, name)
    np.testing.assert_array_equal(view.get(), expected)


@st.composite
def indices(draw, shape):
    """An index of an array: numbers, slices of any step, new axes, an ellipsis."""
    index = []
    for size in shape:
        kind = draw(st.sampled_from(["slice", "slice", "whole", "number" if size else "whole", "new"]))
        if kind == "slice":
            bound = st.none() | st.integers(-size - 1, size + 1)
            index.append(slice(draw(bound), draw(bound), draw(st.sampled_from([None, 1, 2, -1, -3]))))
        elif kind == "whole":
            index.append(slice(None))
        elif kind == "number":
            index.append(draw(st.integers(-size, size - 1)))
        else:
            index += [None, slice(None)]
    if draw(st.booleans()):
        at = draw(st.integers(0, len(index)))
        return (*index[:at], ..., *index[at + draw(st.integers(0, len(index) - at)) :])
    return tuple(index[: draw(st.integers(0, len(index)))])


shapes = st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple)


@settings(max_examples=60)
@given(data=st.data())
def test_indexing_and_turning_axes(put, data):
    shape = data.draw(shapes)
    x = normal(*shape)
    view = put(x)
    index = data.draw(indices(shape))
    expected, taken = x[index], view[index]
    assert taken.memory.owner is view.memory.owner
    equal(taken, np.asarray(expected))
    if expected.ndim > 1:
        a, b = data.draw(st.integers(-expected.ndim, expected.ndim - 1)), data.draw(st.integers(0, expected.ndim - 1))
        equal(taken.swapaxes(a, b), expected.swapaxes(a, b))
        equal(np.moveaxis(taken, a, b), np.moveaxis(expected, a, b))
        equal(np.flip(taken, b), np.flip(expected, b))
        equal(taken.T, expected.T)
        equal(taken.reshape(expected.size), expected.reshape(expected.size))
    equal(np.expand_dims(taken, expected.ndim), np.expand_dims(expected, expected.ndim))
    equal(np.expand_dims(taken, expected.ndim).squeeze(-1), expected)


@pytest.mark.parametrize("index", [3, -4, (0, 2), (0, 0, 0)])
def test_no_index_beyond_the_end(put, index):
    with pytest.raises(IndexError):
        put(normal(3, 2))[index]


@settings(max_examples=40)
@given(data=st.data())
def test_arithmetic_of_any_strides(put, data):
    """Two arrays that broadcast, one turned and flipped; and numbers."""
    shape = data.draw(shapes)
    other = tuple(data.draw(st.sampled_from([n, 1])) for n in shape)[data.draw(st.integers(0, len(shape))) :]
    dtype = data.draw(st.sampled_from(["f4", "f8"]))
    a, b = normal(*shape[::-1], dtype=dtype).T[::-1], normal(*other, seed=1, dtype=dtype)
    x, y = put(a.T[..., ::-1].copy()).T[::-1], put(b)
    number = a.dtype.type(0.3)
    for function in (np.add, np.subtract, np.multiply, np.divide, np.maximum, np.greater, np.not_equal):
        equal(function(x, y), function(a, b))
        equal(function(y, x), function(b, a))
        equal(function(number, x), function(number, a))
        equal(function(x, 2), function(a, 2))
    kept = a > 0
    equal(np.where(x > 0, x, number * x), np.where(kept, a, number * a))
    equal(x.leak(x > 0, 0.3), np.where(kept, a, number * a))
    equal(np.where(kept, x, number), np.where(kept, a, number))  # a mask of the processor's memory
    equal(np.where(x > 0, number, x.dtype.type(1)), np.where(kept, number, x.dtype.type(1)))


def test_operators(put):
    a, b = normal(3, 4), normal(4, seed=1)
    x, y = put(a), put(b)
    for function in (operator.add, operator.sub, operator.mul, operator.truediv, operator.gt, operator.ne):
        equal(function(x, y), function(a, b))
        equal(function(y, 2.0), function(b, 2.0))
    for function in (operator.add, operator.sub, operator.mul, operator.truediv):
        equal(function(2.0, y), function(2.0, b))


def test_maximum_keeps_nan(put):
    a = np.array([np.nan, 1, -1, np.inf], "f4")
    equal(np.maximum(put(a), 0), np.maximum(a, 0))
    equal(np.maximum(0, put(a)), np.maximum(0, a))


@pytest.mark.parametrize("dtype", ["f4", "f8", "i8", "?", "u1"])
def test_copies_of_every_dtype(put, dtype):
    x = (normal(3, 4, 2) * 3).astype(dtype)
    equal(put(x)[::-1].swapaxes(0, 2).copy(), x[::-1].swapaxes(0, 2))
    equal(put(x)[:, 1:3] != 0, x[:, 1:3] != 0)


def test_conversions(put):
    x = normal(3, 4, dtype="f8")
    equal(put(x)[::-1].astype(np.float32), x[::-1].astype(np.float32))
    equal(put(x > 0).astype(np.float64), (x > 0).astype(np.float64))


def test_more_axes_than_the_kernel_has(put):
    x = normal(2, 3, 2, 2, 3, 2, 2)
    turned = put(x).transpose(6, 4, 2, 0, 1, 3, 5)
    equal(turned.copy(), x.transpose(6, 4, 2, 0, 1, 3, 5))
    equal(turned + 1, x.transpose(6, 4, 2, 0, 1, 3, 5) + 1)


def test_axes_that_lie_together_are_counted_as_one():
    strides = views.c_strides((2, 3, 4, 5))
    for others, count, sizes, first in (
        ([strides], 120, (1, 1, 1, 1), (1, 0, 0, 0, 0)),
        ([(60, -20, 5, 1)], 120, (3, 20, 1, 1), (60, 20, 1, 0, 0)),
        ([(5, 0, 0, 1), strides], 120, (12, 5, 1, 1), (60, 5, 1, 0, 0)),
    ):
        plan = views._plan((2, 3, 4, 5), strides, *others)
        assert (plan.count, plan.sizes, plan.strides[0]) == (count, sizes, first)
        assert plan.starts == [(0,) * (1 + len(others))]


def test_assignment(put):
    a, b = normal(3, 4, 2), normal(3, 2, seed=1)
    x, y = put(a), put(b)
    x[:, -1] += y
    a[:, -1] += b
    x[1, ::2] = 0
    a[1, ::2] = 0
    x[2] = b[0]
    a[2] = b[0]
    x += y[:, np.newaxis]
    a += b[:, np.newaxis]
    equal(x, a)


@needs_compiler
def test_what_was_computed_in_place_is_not_assigned_again():
    device = EmulatedDevice()
    x = View.of(device.put(normal(3, 4, 2)))
    x[:, -1] += x[:, 0]
    assert len(device.launches) == 1
    for value in (x[1:3, ::-1], x[0], x[1, :1]):
        x[1:3, ...] = value
    assert len(device.launches) == 4


def test_joining_and_splitting(put):
    a = normal(2, 3, 6)
    x = put(a)
    for axis in (0, 1, -1):
        equal(np.concatenate([x, x[:, ::-1]], axis), np.concatenate([a, a[:, ::-1]], axis))
    for places in (2, [1, 4]):
        for part, expected in zip(np.split(x, places, axis=-1), np.split(a, places, axis=-1), strict=True):
            equal(part, expected)
            assert part.memory.owner is x.memory.owner


def test_what_is_like_a_view(put):
    x = put(normal(2, 3))
    equal(np.zeros_like(x), np.zeros((2, 3), "f4"))
    equal(np.zeros_like(x, shape=(4,)), np.zeros(4, "f4"))
    made = np.empty_like(x, shape=(5, 1))
    assert (made.shape, made.dtype, len(made)) == ((5, 1), np.float32, 5)
    assert np.may_share_memory(x, x[:, 1:])
    assert not np.may_share_memory(x, x.copy())
    assert not np.may_share_memory(x, np.ones(3))
    assert (np.shape(x), np.ndim(x)) == ((2, 3), 2)


def test_memory_in_order_is_not_copied(cuda_device, put):
    x = put(normal(4, 3, 2))
    for view in (x, x[1:3], x[2], x[:, np.newaxis], x.reshape(12, 2), x[1:2, ::-1][:, :1]):
        plain = view.contiguous()
        assert isinstance(plain, DeviceArray)
        assert plain.pointer == view.memory.pointer
        np.testing.assert_array_equal(cuda_device.get(plain), view.get())
    for view in (x[:, 1:], x[::-1], x.swapaxes(0, 1)):
        assert view.contiguous().pointer != view.memory.pointer
    assert views.plain(x).pointer == x.memory.pointer
    assert views.plain(None) is None


@pytest.mark.parametrize("name", packing.ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_activations(put, name, dtype):
    a, da = np.linspace(-8, 8, 300, dtype=dtype).reshape(3, 100), normal(100, 3, dtype=dtype).T
    activation = activations.get(name)
    tolerance = {"rtol": 8 * np.finfo(dtype).eps, "atol": 8 * np.finfo(dtype).eps}
    x = put(a)[::-1]  # of any strides
    np.testing.assert_allclose(x.activate(name).get(), activation.forward(a[::-1]), **tolerance)
    dx = x.activate_backward(name, put(da.T.copy()).T)
    assert (dx.shape, dx.dtype) == (a.shape, a.dtype)
    np.testing.assert_allclose(dx.get(), da * activation.derivative(a[::-1]), **tolerance)


def test_what_is_not_computed(put):
    x = put(normal(2, 3))
    with pytest.raises(TypeError, match="NotImplemented"):
        np.exp(x)
    with pytest.raises(TypeError, match="NotImplemented"):
        np.add.reduce(x)
    with pytest.raises(TypeError, match=r"no implementation found for 'numpy\.stack'"):
        np.stack([x, x])
    with pytest.raises(TypeError, match=r"^an array on a GPU does not become one of NumPy by itself$"):
        np.asarray(x)
    with pytest.raises(TypeError, match=r"^arrays of float32 and float64 on a GPU are not brought together; pass"):
        x + put(normal(2, 3, dtype="f8"))
    with pytest.raises(ValueError, match="broadcast"):
        x + put(normal(4))


def test_work_goes_to_the_stream_of_the_array(cuda_device, put, monkeypatch):
    entered, original = [], put(normal(2, 3))

    def on(stream):
        entered.append(stream)
        return nullcontext()

    monkeypatch.setattr(cuda_device, "on", on)
    x = replace(original, memory=replace(original.memory, stream=42))
    for work in (lambda: x + 1, x.copy, lambda: np.zeros_like(x), lambda: x.activate("relu")):
        entered.clear()
        work()
        assert entered
        assert entered[0] == 42


def test_indices_of_64_bits(cuda_device, put):
    """The first elements of an array of more than 2^31, which is said but not there."""
    a = normal(512)
    to, zeros = cuda_device.zeros((512,), np.float32), (np.int64(0),) * 5
    strides = tuple(map(np.int64, (256, 128, 64, 1, 0)))
    macros = {"REAL": "float", "RESULT": "float"}
    arguments = (np.int32(0), np.int64(2**31), *product.int32(2, 2, 64, 1), to, *strides, put(a).memory, *strides,
                 np.float32(0), None, *zeros, np.float32(0), None, *zeros)  # fmt: skip
    cuda_device.launch(cuda_device.kernel("views.cu", "elementwise", macros), (2,), (256,), 0, *arguments)
    np.testing.assert_array_equal(cuda_device.get(to), a)


def test_large_arrays_are_counted_in_64_bits(put, monkeypatch):
    """More than 2^31 elements: only what is asked of the kernel is looked at."""
    taken = []
    none = (0, 0)
    monkeypatch.setattr(product, "over", lambda device, kernel, count, *arguments: taken.append((count, arguments)))
    memory = put(normal(1)).memory
    for shape, sizes in (((70000, 40000), (1, 1, 1, 1)), ((3, 70000, 40000), (70000, 40000, 1, 1))):
        repeated = shape[0] == 3  # so that the axes do not lie together
        to = View(memory, shape, (0, 40000, 1) if repeated else (40000, 1))
        views._run("copy", to, [None, None, None], none, np.dtype("f4"))
        count, (_, told, *rest) = taken.pop()
        assert count == told == np.prod(shape, dtype=np.int64)
        assert tuple(rest[:4]) == sizes

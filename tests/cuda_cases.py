"""What the tests of the cuda engine's operations share: drawn geometry, comparison with the oracle in float64."""

from contextlib import contextmanager
from types import ModuleType

import numpy as np
from hypothesis import strategies as st

from fastclstm.engines.cuda import choice, product, weight_gradient
from fastclstm.engines.cuda.device import DeviceArray
from fastclstm.engines.cuda.dlpack import CUDA
from fastclstm.spec import ConvSpec


class Exchanged:
    """An array of a library with DLPack alone, on GPU `number`."""

    def __init__(self, values, number=0):
        self.values, self.number, self.streams = values, number, []

    def __dlpack_device__(self):
        return CUDA, self.number

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        return self.values.__dlpack__()

    def __array_namespace__(self):
        namespace = ModuleType("namespace")
        namespace.from_dlpack = lambda array: Exchanged(np.from_dlpack(array))
        return namespace


class Interfaced:
    """An array with __cuda_array_interface__ alone."""

    def __init__(self, values, **more):
        self.values = values
        self.__cuda_array_interface__ = {
            "shape": values.shape, "typestr": values.dtype.str, "data": (values.ctypes.data, False),
            "strides": None if values.flags.c_contiguous else values.strides, "version": 3, **more,
        }  # fmt: skip


sizes = st.sampled_from([1, 2, 3, 5, 8, 13])
channels = st.sampled_from([1, 2, 4, 8, 13, 20])

ROUNDING = {"tf32": 2.0**-11, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Largest relative error of an operand."""


@st.composite
def convolutions(draw):
    """Shapes of x and of a kernel with one filter, and options."""
    kernel = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    options = {"padding_mode": draw(st.sampled_from(["zeros", "circular"]))}
    if name := draw(st.sampled_from([None, "strides", "dilation"])):
        options[name] = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    frame = draw(st.integers(0, 3)), draw(sizes), draw(sizes), draw(channels)
    window = [(k - 1) * d + 1 for k, d in zip(kernel, options.get("dilation", (1, 1)), strict=True)]
    least = [max(0, k - n) for n, k in zip(frame[1:3], window, strict=True)]
    pads = st.tuples(*[st.tuples(st.integers(low, low + 2), st.integers(0, 2)) for low in least])
    options["padding"] = draw(st.just("same") | pads)
    ConvSpec.infer(frame, (*kernel, frame[-1], 1), **options)
    return frame, kernel, options


def cast(value, dtype):
    """Nested arguments with their floats in `dtype`."""
    if isinstance(value, dict):
        return {name: cast(item, dtype) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(cast(item, dtype) for item in value)
    return value.astype(dtype) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def put(device, value):
    """Nested arrays on a device."""
    if isinstance(value, dict):
        return {name: put(device, item) for name, item in value.items()}
    return device.put(value) if isinstance(value, np.ndarray) else value


def get(device, value):
    """Every array of nested results under a name of its own, from the device."""
    if isinstance(value, dict):
        return {f"{name} {inner}": array for name, item in value.items() for inner, array in get(device, item).items()}
    if isinstance(value, tuple | list):
        return get(device, dict(enumerate(value)))
    if value is None:
        return {}
    return {"": device.get(value) if isinstance(value, DeviceArray) else value}


def within(results, oracle, plain, dtype, times=4, roundings=16):
    """Errors are at most `times` that of NumPy's float32 run, and some roundings of the largest value."""
    assert results.keys() == oracle.keys()
    eps = np.finfo(dtype).eps
    for name, expected in oracle.items():
        assert results[name].dtype == dtype, name
        assert results[name].shape == expected.shape, name
        if expected.size:
            error = np.abs(plain[name] - expected).max() * (eps / np.finfo(np.float32).eps)
            bound = times * error + roundings * eps * max(1, np.abs(expected).max())
            np.testing.assert_allclose(results[name], expected, rtol=0, atol=bound, err_msg=name)


def near(results, oracle, rounding):
    """Errors are at most `rounding` of the largest value."""
    assert results.keys() == oracle.keys()
    for name, expected in oracle.items():
        if expected.size:
            bound = rounding * max(1, np.abs(expected).max())
            np.testing.assert_allclose(results[name], expected, rtol=0, atol=bound, err_msg=name)


@contextmanager
def tiling(monkeypatch, number):
    """Every product takes tiling `number` of its kind, gradients of kernels too as far as they have so many."""

    def of_gradient(*arguments):
        candidates = weight_gradient.gradient_tilings(*arguments[:2])
        return candidates[number % len(candidates)]

    with monkeypatch.context() as patch:
        patch.setattr(choice, "choose", lambda kind, dtype, *_, **__: product.tilings(kind, dtype.itemsize)[number])
        patch.setattr(choice, "choose_cut", lambda *arguments, **where: (choice.choose(*arguments, **where), 1))
        patch.setattr(weight_gradient, "gradient_tiling", of_gradient)
        yield

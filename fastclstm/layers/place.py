"""Where a layer computes, and the way of a call's arrays there and back."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.base import Layer


class Place:
    """Where the arrays of a layer's call are: in the processor's memory, as those of NumPy."""

    on_gpu = False

    def __init__(self, op: str, x: Any):
        self.op = op
        self._restore = dispatch.restorer(x)

    def read(self, name: str, value: Any, dtype: Any = None) -> Any:
        """Return a caller's array there; `dtype` is for a GPU."""
        return dispatch.as_numpy(self.op, name, value)

    def bring(self, array: Any) -> Any:
        """Return an array of an engine there."""
        return dispatch.to_numpy(array)

    def restore(self, array: Any) -> Any:
        """Return a result as the caller's kind of array; None stays None."""
        return None if array is None else self._restore(dispatch.to_numpy(array))


HOST = Place("array", None)
"""The processor's memory, where nothing is read from a caller."""


class GPUPlace(Place):
    """A GPU, that of x or, of NumPy's, the current one: arrays are `engines.cuda.views.View`."""

    on_gpu = True

    def __init__(self, op: str, x: Any):
        from fastclstm.engines.cuda import arrays, devices

        super().__init__(op, x)
        self._reader = arrays.Reader(op, x) if dispatch.on_gpu(x) else None
        self._device = devices.current() if self._reader is None else self._reader.device

    def read(self, name: str, value: Any, dtype: Any = None) -> Any:
        """Return a caller's array there, of `dtype` unless that is None: NumPy's are converted, others must be."""
        if self._reader is not None and dispatch.on_gpu(value):
            array = self._reader(name, dispatch.exportable(self.op, name, value))
        elif dispatch.of_engine(value):
            array = value
        else:
            array = dispatch.as_numpy(self.op, name, value)
            computed = dispatch.working_dtype(array) if dtype is None else np.dtype(dtype)
            return self.bring(dispatch.native(array, computed))
        if dtype is not None and array.dtype != dtype:
            raise TypeError(f"{self.op}: {name} is a CUDA array of {array.dtype} but the layer is {dtype}; convert it "
                            f"before, or make the layer with dtype='{array.dtype}'")  # fmt: skip
        return self.bring(array)

    def bring(self, array: Any) -> Any:
        """Return an array of an engine there."""
        if isinstance(array, np.ndarray):
            with self._device.on(None if self._reader is None else self._reader.stream):
                array = self._device.put(array)
        return None if array is None else dispatch.to_view(array)

    def restore(self, array: Any) -> Any:
        """Return a result as the caller's kind of array; for a stream unknown to us it is done."""
        if array is None or self._reader is None:
            return super().restore(array)
        if self._reader.stream is None:
            self._device.finish()
        return self._restore(array)


def place_of(layer: Layer, x: Any, training: bool = False, *, refuses: bool = True) -> Place:
    """Return where a layer computes that is called with x: on x's GPU; of NumPy's on the current one, as `engine` says.

    The latter where it knows how to: then x is put there once, and results are got back once.

    Raises TypeError where x is on a GPU and the engine is another, or the layer `refuses` what it does not know itself.
    """
    op, engine = type(layer).__name__, getattr(layer, "engine", None)
    if not dispatch.on_gpu(x):
        return GPUPlace(op, x) if engine == "cuda" and layer._knows_gpu(training) else Place(op, x)
    dispatch.check_gpu_engine(op, engine)
    if refuses and not layer._knows_gpu(training):
        refuse(layer)
    return GPUPlace(op, x)


def refuse(layer: Layer) -> NoReturn:
    """Raise TypeError as x is on a GPU."""
    name = type(layer).__name__
    raise TypeError(f"{name}: x is on a GPU, where this layer does not compute; move x to the CPU")

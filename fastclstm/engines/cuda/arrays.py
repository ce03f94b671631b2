"""Arrays of other libraries in a GPU's memory: read and handed out where they are, in the order of their streams.

By DLPack, or by __cuda_array_interface__ (version 3), which is a dict.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from fastclstm.engines.cuda import devices, dlpack
from fastclstm.engines.cuda.device import Device, DeviceArray
from fastclstm.engines.cuda.views import View, is_contiguous
from fastclstm.spec import Shape

NATIVE = (DeviceArray, View)
"""The engine's own arrays."""

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_BYTES = (np.dtype(np.bool_), np.dtype(np.uint8))


class Reader:
    """Reads the arrays of one call for the GPU that `x` is on; those of NumPy stay what they are."""

    def __init__(self, op: str, x: Any):
        self._op = op
        self._ordinal = _ordinal(x)
        self._device = devices.holding(self._ordinal)
        self.stream = _stream(x, self._ordinal)
        """Handle of the caller's stream; None: unknown."""

    @property
    def device(self) -> Device:
        """The GPU."""
        return self._device

    def __call__(self, name: str, value: Any) -> Any:
        """Return the GPU array `value` as it is in memory, its values ordered before what the stream gets from now on.

        A `View` stays one, of any strides.

        Raises TypeError or ValueError for one on another GPU, of another dtype or not C-contiguous.
        """
        op = self._op
        if type(value) is DeviceArray and value.device is self._device and value.stream == self.stream:
            _check_dtype(op, name, value.dtype)
            return value
        ordinal = _ordinal(value)
        if ordinal != self._ordinal:
            raise ValueError(f"{op}: {name} is on GPU {ordinal} but x on GPU {self._ordinal}; put both on one GPU")
        array: Any
        if isinstance(value, NATIVE):
            self._device.order(self._working_stream(), value.stream)
            array, strides = value, None
        else:
            try:
                array, strides = self._exchanged(value) if hasattr(value, "__dlpack__") else self._interfaced(value)
            except (BufferError, RuntimeError, AttributeError, dlpack.UnknownDtypeError) as error:
                raise TypeError(f"{op}: {name} cannot be read as a CUDA array: {error}") from error
        _check_dtype(op, name, array.dtype)
        if strides is not None and not is_contiguous(array.shape, strides):
            raise ValueError(
                f"{op}: {name} is a CUDA array {array.shape} that is not C-contiguous (strides {strides}); pass a "
                f"contiguous copy: {name}.contiguous() of torch, cupy.ascontiguousarray({name})"
            )
        return array

    def _exchanged(self, value: Any) -> tuple[DeviceArray, Shape | None]:
        """Read by DLPack: the array, and its strides in elements."""
        exported = value.__dlpack__(stream=self._working_stream())
        content = dlpack.read(exported)
        return self._array(content.pointer, content.shape, content.dtype, exported), content.strides

    def _interfaced(self, value: Any) -> tuple[DeviceArray, Shape | None]:
        """Read by __cuda_array_interface__: the array, and its strides in elements."""
        interface = value.__cuda_array_interface__
        if interface.get("mask") is not None:
            raise dlpack.UnknownDtypeError("it has a mask, which would be lost")
        dtype = np.dtype(interface["typestr"])
        strides = interface.get("strides")
        self._device.order(self._working_stream(), interface.get("stream"))
        array = self._array(interface["data"][0] or 0, tuple(interface["shape"]), dtype, value)
        return array, None if strides is None else tuple(s // dtype.itemsize for s in strides)

    def _array(self, pointer: int, shape: Shape, dtype: np.dtype, owner: Any) -> DeviceArray:
        return DeviceArray(pointer, shape, dtype, owner, self._device, self.stream)

    def _working_stream(self) -> int | None:
        """Handle of the stream that is going to read; None where the device has no streams."""
        return self._device.stream_handle() if self.stream is None else self.stream


def _ordinal(value: Any) -> int:
    """Return the number of the GPU that holds `value`."""
    if isinstance(value, NATIVE):
        return value.device.dlpack_device[1]
    if hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[1])
    return devices.ordinal_of(int(value.__cuda_array_interface__["data"][0] or 0))


def _stream(value: Any, ordinal: int) -> int | None:
    """Return the handle of the stream on which the owner of `value` works now; None: unknown."""
    if isinstance(value, NATIVE):
        return value.stream
    library = type(value).__module__.partition(".")[0]
    if library == "torch":
        return int(sys.modules["torch"].cuda.current_stream(ordinal).cuda_stream) or 1
    if library == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr) or 1
    interface = {} if hasattr(value, "__dlpack__") else value.__cuda_array_interface__
    return interface.get("stream")


def _check_dtype(op: str, name: str, dtype: np.dtype) -> None:
    if name == "mask":
        if dtype not in _BYTES:
            raise TypeError(f"{op}: mask is a CUDA array of {dtype} but must be one of bool or uint8")
    elif dtype not in _FLOATS:
        raise TypeError(f"{op}: {name} is a CUDA array of {dtype} but must be one of float32 or float64, "
                        "which are not converted on the GPU; convert it before")  # fmt: skip

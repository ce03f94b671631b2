"""Arrays of other libraries in a GPU's memory: read and handed out where they are, in the order of their streams.

DLPack (https://dmlc.github.io/dlpack/latest/) is a C struct in a capsule, here by ctypes; __cuda_array_interface__
(version 3) is a dict.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

from fastclstm.engines.cuda.device import Device, DeviceArray, Shape, holding, ordinal_of
from fastclstm.engines.cuda.views import View, is_contiguous

_NAME = b"dltensor"
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}
"""Codes of dtypes in DLPack by NumPy's kinds."""
_NAMES = {0: "int", 1: "uint", 2: "float", 3: "handle", 4: "bfloat", 5: "complex", 6: "bool"}
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_BYTES = (np.dtype(np.bool_), np.dtype(np.uint8))


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_python = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", _python)
)
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))
# In a capsule's destructor it must not be counted again: its bare address.
_pointer_at = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))
_is_valid_at = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _python))

_exported: dict[int, tuple[Any, ...]] = {}
"""What each exported struct needs to live, by its address."""


@_Deleter
def _delete(address: int, exported: dict[int, Any] = _exported) -> None:
    exported.pop(address, None)


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _destroy(capsule: int) -> None:
    """Free what nobody has taken out of a capsule; the name of one that was read is another."""
    if _is_valid_at(capsule, _NAME):
        _exported.pop(_pointer_at(capsule, _NAME), None)


_python.Py_IncRef(ctypes.py_object(_delete))  # readers call it when the interpreter ends, too


def capsule(array: DeviceArray) -> Any:
    """Return `array` in a DLPack capsule, which keeps it alive."""
    kind, ordinal = array.device.dlpack_device
    shape = (ctypes.c_int64 * array.ndim)(*array.shape)
    tensor = _Tensor(
        array.pointer or None, kind, ordinal, array.ndim, _KINDS[array.dtype.kind], 8 * array.dtype.itemsize, 1, shape
    )
    managed = _Managed(tensor, None, _delete)
    address = ctypes.addressof(managed)
    _exported[address] = managed, shape, array
    return _new(address, _NAME, ctypes.cast(_destroy, ctypes.c_void_p))


class Reader:
    """Reads the arrays of one call for the GPU that `x` is on; those of NumPy stay what they are."""

    def __init__(self, op: str, x: Any):
        self._op = op
        self._ordinal = _ordinal(x)
        self._device = holding(self._ordinal)
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
        ordinal = _ordinal(value)
        if ordinal != self._ordinal:
            raise ValueError(f"{op}: {name} is on GPU {ordinal} but x on GPU {self._ordinal}; put both on one GPU")
        array: Any
        if isinstance(value, DeviceArray | View):
            self._device.order(self._working_stream(), value.stream)
            array, strides = value, None
        else:
            try:
                array, strides = self._exchanged(value) if hasattr(value, "__dlpack__") else self._interfaced(value)
            except (BufferError, RuntimeError, AttributeError, _UnknownDtypeError) as error:
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
        tensor = _Managed.from_address(_pointer(exported, _NAME)).tensor
        shape = tuple(tensor.shape[: tensor.ndim])
        strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
        kinds = {code: kind for kind, code in _KINDS.items()}
        if tensor.code not in kinds or tensor.lanes != 1 or tensor.bits % 8:
            raise _UnknownDtypeError(f"it has dtype {_NAMES.get(tensor.code, '?')}{tensor.bits}; convert it to float32")
        dtype = np.dtype(f"{kinds[tensor.code]}{tensor.bits // 8}")
        return self._array((tensor.data or 0) + tensor.byte_offset, shape, dtype, exported), strides

    def _interfaced(self, value: Any) -> tuple[DeviceArray, Shape | None]:
        """Read by __cuda_array_interface__: the array, and its strides in elements."""
        interface = value.__cuda_array_interface__
        if interface.get("mask") is not None:
            raise _UnknownDtypeError("it has a mask, which would be lost")
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


class _UnknownDtypeError(Exception):
    """An array that NumPy has no dtype for."""


def _ordinal(value: Any) -> int:
    """Return the number of the GPU that holds `value`."""
    if hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[1])
    return ordinal_of(int(value.__cuda_array_interface__["data"][0] or 0))


def _stream(value: Any, ordinal: int) -> int | None:
    """Return the handle of the stream on which the owner of `value` works now; None: unknown."""
    library = type(value).__module__.partition(".")[0]
    if isinstance(value, DeviceArray | View):
        return value.stream
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

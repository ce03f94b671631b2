"""DLPack (https://dmlc.github.io/dlpack/latest/): a C struct in a capsule, here by ctypes, written and read."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastclstm.spec import Shape

CUDA, CUDA_MANAGED = 2, 13
"""Types of devices whose memory kernels read: kDLCUDA and kDLCUDAManaged."""

_NAME = b"dltensor"
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}
"""Codes of dtypes in DLPack by NumPy's kinds."""
_NAMES = {0: "int", 1: "uint", 2: "float", 3: "handle", 4: "bfloat", 5: "complex", 6: "bool"}


class UnknownDtypeError(Exception):
    """An array that NumPy has no dtype for."""


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


def capsule(pointer: int, shape: Shape, dtype: np.dtype, device: tuple[int, int], owner: Any) -> Any:
    """Return a C-contiguous array on a device (type, number) in a capsule, which keeps `owner` alive."""
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    kind, ordinal = device
    tensor = _Tensor(pointer or None, kind, ordinal, len(shape), _KINDS[dtype.kind], 8 * dtype.itemsize, 1, sizes)
    managed = _Managed(tensor, None, _delete)
    address = ctypes.addressof(managed)
    _exported[address] = managed, sizes, owner
    return _new(address, _NAME, ctypes.cast(_destroy, ctypes.c_void_p))


@dataclass(frozen=True)
class Content:
    """What a capsule tells of its array."""

    pointer: int
    shape: Shape
    strides: Shape | None
    """In elements; None: C-contiguous."""
    dtype: np.dtype


def read(exported: Any) -> Content:
    """Return what a capsule holds, which stays the owner; raise UnknownDtypeError where NumPy has no such dtype."""
    tensor = _Managed.from_address(_pointer(exported, _NAME)).tensor
    kinds = {code: kind for kind, code in _KINDS.items()}
    if tensor.code not in kinds or tensor.lanes != 1 or tensor.bits % 8:
        raise UnknownDtypeError(f"it has dtype {_NAMES.get(tensor.code, '?')}{tensor.bits}; convert it to float32")
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    dtype = np.dtype(f"{kinds[tensor.code]}{tensor.bits // 8}")
    return Content((tensor.data or 0) + tensor.byte_offset, tuple(tensor.shape[: tensor.ndim]), strides, dtype)

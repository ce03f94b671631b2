"""Engines and arrays: which module computes, and how arrays of any library come in and go out."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

ENGINES = {"cpu": "fastclstm.engines.cpu", "reference": "fastclstm.engines.reference"}
"""Name of each engine and its module. An engine is a module with the six functions of `OPERATIONS`."""

OPERATIONS = ("conv2d", "conv2d_backward", "convlstm2d", "convlstm2d_backward", "max_pool3d", "max_pool3d_backward")
DEFAULT_ENGINE = "cpu"

_DLPACK_CPU_DEVICES = (1, 3)  # kDLCPU and kDLCUDAHost: memory the processor can read


def get_engine(name: str | None = None) -> ModuleType:
    """Return the engine's module; None is the default engine.

    Raises ValueError for an unknown name and ImportError, saying what to install, for one that cannot be imported.
    """
    check_engine(name)
    name = DEFAULT_ENGINE if name is None else name
    try:
        return importlib.import_module(ENGINES[name])
    except ImportError as error:
        raise ImportError(
            f"engine {name!r} cannot be used: {error}; install numba, or pass engine='reference'"
        ) from error


def check_engine(name: str | None) -> None:
    """Raise ValueError unless `name` is None or that of an engine; nothing is imported."""
    if name == "cuda":
        raise ValueError(f"engine 'cuda' is not part of this version of fastclstm; it has {_names()}")
    if name is not None and not (isinstance(name, str) and name in ENGINES):
        raise ValueError(f"unknown engine {name!r}; this version of fastclstm has {_names()}")


def _names() -> str:
    return " and ".join(map(repr, ENGINES))


def check_algorithm(op: str, engine: ModuleType, algorithm: str) -> None:
    """Raise ValueError unless `engine` knows `algorithm`."""
    known = ("auto", *engine.ALGORITHMS)
    if algorithm not in known:
        raise ValueError(f"{op}: algorithm must be one of {', '.join(map(repr, known))} "
                         f"on engine {engine.__name__.rpartition('.')[2]!r}, got {algorithm!r}")  # fmt: skip


def as_numpy(op: str, name: str, value: Any) -> np.ndarray:
    """Return `value` (NumPy, DLPack, ``__array__`` or nested sequences) as a NumPy array, without a copy if possible.

    Raises TypeError for anything that is not a real numeric array in the processor's memory.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{op}: {name} is a masked array, whose mask would be lost; pass {name}.filled(value)")
    if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__"):
        device = value.__dlpack_device__()[0]
        if int(device) not in _DLPACK_CPU_DEVICES:
            raise TypeError(
                f"{op}: {name} lives on DLPack device {device}, not in the processor's memory; move it to the CPU"
            )
        try:
            value = np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError) as error:
            raise TypeError(f"{op}: {name} cannot be read as a NumPy array: {error}") from error
    try:
        array = np.asarray(value)
    except ValueError as error:  # ragged nested sequences
        raise TypeError(f"{op}: {name} is not a rectangular array: {error}") from error
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{op}: {name} has dtype {array.dtype} but must hold real numbers (float32 or float64)")
    return array


def working_dtype(*arrays: np.ndarray | None) -> np.dtype:
    """Return float64 where any array is float64 or wider, else float32 (also for integers, booleans and float16)."""
    wide = any(array is not None and array.dtype.kind == "f" and array.dtype.itemsize > 4 for array in arrays)
    return np.dtype(np.float64 if wide else np.float32)


def native(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return `array` as a C-contiguous, aligned array of the native `dtype`: itself where it already is one."""
    if array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned:
        return array
    return np.require(array, dtype, ["C", "A"])


def restorer(like: Any) -> Callable[[np.ndarray], Any]:
    """Return the function that turns a NumPy result into the kind of array that `like` is."""
    if isinstance(like, np.ndarray) or not hasattr(like, "__dlpack__"):
        return lambda array: array
    if hasattr(like, "__array_namespace__"):
        return like.__array_namespace__().from_dlpack
    return sys.modules[type(like).__module__.partition(".")[0]].from_dlpack

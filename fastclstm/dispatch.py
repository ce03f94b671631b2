"""Engines and arrays: which module computes, and how arrays of any library come in and go out."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from fastclstm.engines import forks, lending
from fastclstm.spec import refuse_masked

ENGINES = {
    "cpu": "fastclstm.engines.cpu",
    "cuda": "fastclstm.engines.cuda",
    "reference": "fastclstm.engines.reference",
}
"""Name of each engine and its module. An engine is a module with the functions of `OPERATIONS`."""

OPERATIONS = ("conv2d", "conv2d_backward", "convlstm2d", "convlstm2d_backward", "max_pool3d", "max_pool3d_backward",
              "recurrent", "recurrent_backward")  # fmt: skip
DEFAULT_ENGINE = "cpu"

_DLPACK_CPU_DEVICES = (1, 3)  # kDLCPU and kDLCUDAHost: memory the processor can read
_DLPACK_GPU_DEVICES = (2, 13)  # kDLCUDA and kDLCUDAManaged


def get_engine(name: str | None = None) -> ModuleType:
    """Return the engine's module; None is the default engine.

    Raises ValueError for an unknown name and ImportError, saying what to install, for one that cannot be imported. That
    the engine "cuda" has no GPU is told when it is to compute.
    """
    check_engine(name)
    name = DEFAULT_ENGINE if name is None else name
    loaded = sys.modules.get(ENGINES[name])
    if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):  # by another thread
        return loaded
    try:
        with forks.importing:
            return importlib.import_module(ENGINES[name])
    except ImportError as error:
        raise ImportError(
            f"engine {name!r} cannot be used: {error}; install numba, or pass engine='reference'"
        ) from error


def check_engine(name: str | None) -> None:
    """Raise ValueError unless `name` is None or that of an engine; nothing is imported."""
    if name is not None and not (isinstance(name, str) and name in ENGINES):
        raise ValueError(f"unknown engine {name!r}; this version of fastclstm has {_names()}")


def _names() -> str:
    *names, last = map(repr, ENGINES)
    return f"{', '.join(names)} and {last}"


def algorithms(engine: str | None) -> tuple[str, ...]:
    """Return the algorithms that a layer of that engine may be made with."""
    known = get_engine(engine).ALGORITHMS if engine == "cuda" else ("direct", "winograd")
    return ("auto", *known)


def check_algorithm(op: str, engine: ModuleType, algorithm: str) -> None:
    """Raise ValueError unless `engine` knows `algorithm`."""
    known = ("auto", *engine.ALGORITHMS)
    if algorithm not in known:
        raise ValueError(f"{op}: algorithm must be one of {', '.join(map(repr, known))} "
                         f"on engine {engine.__name__.rpartition('.')[2]!r}, got {algorithm!r}")  # fmt: skip


def choose(op: str, name: str | None, x: Any) -> tuple[ModuleType, Callable[[str, Any], Any]]:
    """Return the engine for x, the named one or that of x's device, and ``read(name, value)`` for a call's arrays.

    `read` returns NumPy arrays or, of arrays on the GPU that x is on, `engines.cuda.device.DeviceArray`.

    Raises
    ------
    TypeError
        Arrays on a GPU for an engine that is not on one, or beside an x that is not.
    ValueError
        An unknown engine, arrays on two GPUs.
    """
    if not on_gpu(x):
        return get_engine(name), lambda key, value: as_numpy(op, key, value)
    check_gpu_engine(op, name)
    from fastclstm.engines.cuda import arrays

    reader = arrays.Reader(op, x)

    def read(key: str, value: Any) -> Any:
        if isinstance(value, arrays.NATIVE):
            return reader(key, value)
        return reader(key, exportable(op, key, value)) if on_gpu(value) else as_numpy(op, key, value)

    return get_engine("cuda"), read


def check_gpu_engine(op: str, name: str | None) -> None:
    """Raise TypeError where an engine is named that does not take arrays on a GPU."""
    check_engine(name)
    if name not in (None, "cuda"):
        raise TypeError(f"{op}: x is on a GPU, where engine {name!r} does not compute; pass engine='cuda' (or none), "
                        "or move x to the CPU")  # fmt: skip


def to_numpy(array: Any) -> Any:
    """Return an array of the engine "cuda" as one of NumPy; anything else as it is."""
    return to_view(array).get() if of_engine(array) else array


def to_view(array: Any) -> Any:
    """Return an array of the engine "cuda" as one that NumPy's functions take; NumPy's as it is."""
    if isinstance(array, np.ndarray):
        return array
    from fastclstm.engines.cuda.views import View

    return array if isinstance(array, View) else View.of(array)


def on_gpu(value: Any) -> bool:
    """Return whether `value` is an array on a GPU: by DLPack, by __cuda_array_interface__ or of the engine cuda.

    Raises TypeError under torch.compile.
    """
    if isinstance(value, np.ndarray):
        return False
    _refuse_tracing()
    if of_engine(value):
        return True
    if hasattr(value, "__dlpack_device__"):
        try:
            return int(value.__dlpack_device__()[0]) in _DLPACK_GPU_DEVICES
        except (RuntimeError, ValueError):  # a tensor without values, as reading it tells
            return False
    return hasattr(value, "__cuda_array_interface__")


def _refuse_tracing() -> None:
    """Raise TypeError where torch.compile or torch.jit traces the call.

    With fullgraph=False torch.compile breaks the graph and calls again: that call is not traced, and nothing in this
    package from then on.
    """
    compiler = getattr(sys.modules.get("torch"), "compiler", None)
    if compiler is not None and compiler.is_compiling():
        raise TypeError("fastclstm computes outside of PyTorch, where torch.compile cannot follow; call it from a "
                        "function under torch.compiler.disable, and leave fullgraph=False")  # fmt: skip
    if compiler is not None and sys.modules["torch"].jit.is_tracing():
        raise TypeError("fastclstm computes outside of PyTorch: torch.jit.trace, and ONNX exports by it, would keep "
                        "the output of this one call for every input; trace the parts before and after it")  # fmt: skip
    if (rules := sys.modules.get("torch._dynamo.trace_rules")) is not None:
        _leave_untraced(rules)


@cache
def _leave_untraced(rules: ModuleType) -> None:
    """Tell torch.compile to call this package, and what compiles its kernels, and to trace nothing in them.

    Only the adapters, and the checks of shapes that they call, are for it to trace: they compute by an operator.
    """
    rooms = {room.name for room in pkgutil.iter_modules([os.path.dirname(__file__)])} - {"adapters", "spec"}
    for name in (*(f"{__package__}.{room}" for room in sorted(rooms)), "numba", "llvmlite"):
        rules.add(name)


def _is(value: Any, module: str, name: str) -> bool:
    """Return whether `value` is of a class of a module that somebody else has imported."""
    return isinstance(value, getattr(sys.modules.get(module), name, ()))


def exportable(op: str, name: str, value: Any) -> Any:
    """Return an array of another library with all its values in memory: DLPack knows no sign that is to come.

    Raises TypeError for a tensor whose gradient would be cut off, and for what stands for an array that is to come.
    """
    if _is(value, "jax.core", "Tracer"):
        raise TypeError(f"{op}: {name} is traced by JAX (jit, grad, vmap) and has no values yet; call fastclstm by "
                        "jax.pure_callback, for gradients in a jax.custom_vjp")  # fmt: skip
    if not _is(value, "torch", "Tensor"):
        return value
    if value.is_meta or _is(value, "torch._subclasses.fake_tensor", "FakeTensor"):
        raise TypeError(f"{op}: {name} is a tensor without values (meta or FakeTensor); call fastclstm with real ones, "
                        "where torch traces or exports from a function under torch.compiler.disable")  # fmt: skip
    if _is_transformed(value):
        raise TypeError(f"{op}: {name} is transformed by torch.func (vmap, jvp, functionalize) or has a forward-mode "
                        "tangent, which fastclstm would lose; for gradients wrap convlstm2d_vjp or its like in a "
                        "torch.autograd.Function, for batches call it on all of them at once")  # fmt: skip
    if value.requires_grad:
        if sys.modules["torch"].is_grad_enabled():
            raise TypeError(f"{op}: {name} requires grad, but fastclstm is no part of PyTorch's graph; to train, use "
                            "fastclstm.adapters.torch or wrap convlstm2d_vjp or its like in a torch.autograd.Function; "
                            f"for inference alone, call it under torch.no_grad() or pass {name}.detach()")  # fmt: skip
        value = value.detach()
    return value.resolve_conj().resolve_neg()


def _is_transformed(tensor: Any) -> bool:
    """Return whether a tensor stands for others, or carries a tangent: its memory is not its values, or not all."""
    torch = sys.modules["torch"]
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor)
    forward = sys.modules.get("torch.autograd.forward_ad")
    if wrapped or forward is None or forward._current_level < 0:
        return bool(wrapped)
    return forward.unpack_dual(tensor).tangent is not None


def of_engine(value: Any) -> bool:
    """Return whether `value` is an array of the engine "cuda" itself."""
    made = sys.modules.get("fastclstm.engines.cuda.device")
    return made is not None and isinstance(value, made.OnDevice)


def as_numpy(op: str, name: str, value: Any) -> np.ndarray:
    """Return `value` (NumPy, DLPack, ``__array__`` or nested sequences) as a NumPy array, without a copy if possible.

    Raises TypeError for anything that is not a real numeric array in the processor's memory.
    """
    refuse_masked(op, name, value)
    if getattr(value, "__dask_graph__", lambda: None)() is not None:
        raise TypeError(f"{op}: {name} is held by Dask and would be computed whole; pass {name}.compute(), or keep it "
                        "lazy with fastclstm.adapters.xarray.apply")  # fmt: skip
    if on_gpu(value) and not hasattr(value, "__dlpack__"):
        raise TypeError(f"{op}: {name} lives on a GPU, not in the processor's memory; move it to the CPU")
    if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__"):
        value = _exported(op, name, exportable(op, name, value))
    try:
        array = np.asarray(value)
    except ValueError as error:  # ragged nested sequences
        raise TypeError(f"{op}: {name} is not a rectangular array: {error}") from error
    if _is_short(array.dtype):
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{op}: {name} has dtype {array.dtype} but must hold real numbers (float32 or float64)")
    return array


def _exported(op: str, name: str, value: Any) -> Any:
    """Return an array of a library with DLPack as NumPy reads it."""
    dtype = getattr(value, "dtype", None)
    try:
        device = int(value.__dlpack_device__()[0])
        if device in _DLPACK_CPU_DEVICES:
            if _is_short(dtype):
                return value
            narrow = str(dtype).startswith(("torch.bfloat16", "torch.float8"))  # which NumPy has not
            return np.from_dlpack(value.float() if narrow else value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{op}: {name} cannot be read as a NumPy array: {error}") from error
    raise TypeError(f"{op}: {name} lives on DLPack device {device}, not in the processor's memory; move it to the CPU")


def _is_short(dtype: Any) -> bool:
    """Return whether a dtype is one of ml_dtypes that float32 holds: bfloat16 above all, of which DLPack knows none."""
    return isinstance(dtype, np.dtype) and dtype.isbuiltin == 2 and np.can_cast(dtype, np.float32)


def working_dtype(*arrays: np.ndarray | None) -> np.dtype:
    """Return float64 where any array is float64 or wider, else float32 (also for integers, booleans, float16)."""
    return working_dtype_of([array.dtype for array in arrays if array is not None])


def working_dtype_of(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Return it for arrays of these dtypes."""
    wide = any(dtype.kind == "f" and dtype.itemsize > 4 for dtype in dtypes)
    return np.dtype(np.float64 if wide else np.float32)


def native(array: Any, dtype: np.dtype) -> Any:
    """Return `array` as a C-contiguous, aligned array of the native `dtype`: itself where it already is one.

    An array on a GPU must be of it already.
    """
    if not isinstance(array, np.ndarray):  # of what has been read: on a GPU
        if array.dtype != dtype:
            raise TypeError(f"arrays of {array.dtype} and {dtype} on a GPU are not brought together; pass one dtype")
        return contiguous(array)
    if array.dtype == dtype and array.flags.aligned and dtype.isnative:
        return contiguous(array)
    return np.require(array, dtype, ["C", "A"])


def contiguous(array: Any) -> Any:
    """Return `array` in C order: itself where it is."""
    if isinstance(array, np.ndarray):
        if array.flags.c_contiguous:
            return array
        made = lending.lend(array.shape, array.dtype)
        copy = getattr(sys.modules.get("fastclstm.engines.cpu"), "copy", _copy)  # without loading that engine
        copy(array, made)
        return made
    return array.in_order() if of_engine(array) else array


def _copy(origin: np.ndarray, target: np.ndarray) -> None:
    np.copyto(target, origin)


def scaled(array: Any, factor: float) -> Any:
    """Return an array times a number, as its kind of array."""
    return restorer(array)(to_view(array) * factor) if of_engine(array) else array * factor


def restorer(like: Any) -> Callable[[Any], Any]:
    """Return the function that turns a result of an engine into the kind of array that `like` is."""
    if isinstance(like, np.ndarray) or _is(like, "fastclstm.engines.cuda.views", "View"):
        return lambda array: array
    if of_engine(like):
        return sys.modules["fastclstm.engines.cuda.views"].plain
    exported = _exporter(like)
    if not on_gpu(like):
        return exported
    from fastclstm.engines.cuda.views import plain

    return lambda array: exported(plain(array))


def _exporter(like: Any) -> Callable[[Any], Any]:
    if not hasattr(like, "__dlpack__") or type(like).__module__.startswith(__package__):
        return lambda array: array
    if hasattr(like, "__array_namespace__"):
        return like.__array_namespace__().from_dlpack
    library = "torch" if _is(like, "torch", "Tensor") else type(like).__module__.partition(".")[0]
    return sys.modules[library].from_dlpack

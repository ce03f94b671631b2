"""Kernels: functions of a job and a worker, compiled for what a call needs.

A kernel is compiled once for each type of scalars and each variant: numbers that it knows when it is compiled (of
Winograd the sizes m and k, say), so that nothing is compiled that a call does not run. One machine code serves one
thread and many: it is a C function of a job, which tells addresses and shapes of the arrays, and of the worker that
runs it; it is called directly, or by each thread of the parallel region of `kernels.team`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic
from numba.np import numpy_support
from numba.np.arrayobj import populate_array

from fastclstm.engines.cpu.compilation import KernelCompiler, digest, inline, kept
from fastclstm.engines.cpu.kernels.team import HEADER, begin, leave
from fastclstm.engines.notices import notice


class Table(NamedTuple):
    """C-contiguous arrays as a kernel gets them, described once for many calls."""

    kinds: tuple[int, ...]
    """The number of the dtype and the dimensions of each."""
    place: tuple[int, ...]
    """The address and the shape of each."""
    arrays: tuple[np.ndarray, ...]


def table(*arrays: np.ndarray) -> Table:
    """Describe arrays."""
    kinds = tuple(number for array in arrays for number in (array.dtype.num, array.ndim))
    return Table(kinds, tuple(n for array in arrays for n in (array.ctypes.data, *array.shape)), arrays)


PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)


class Kernel:
    """A function of (*variant, job, worker, *arrays), compiled for each variant and kinds of arrays when first run."""

    def __init__(self, py_func: Any, name: str):
        self.name = name
        self._function = inline(py_func)
        self._compiled: dict[Any, tuple[int, Any]] = {}

    def function(self, variant: tuple[int, ...], tables: Sequence[Table]) -> tuple[int, Any]:
        """Address of the machine code for some arrays, and the same as something to call with a job and a worker."""
        key = (variant, *[table.kinds for table in tables])
        try:
            return self._compiled[key]
        except KeyError:
            arrays = [array for table in tables for array in table.arrays]
            with global_compiler_lock:  # Python threads that want the same kernel have it compiled once
                if key not in self._compiled:
                    self._compiled[key] = self._compile(variant, arrays)
                return self._compiled[key]

    def _compile(self, variant: tuple[int, ...], arrays: Sequence[np.ndarray]) -> tuple[int, Any]:
        if numba.config.DISABLE_JIT:
            raise RuntimeError("fastclstm: NUMBA_DISABLE_JIT=1 leaves no kernels: unset it, or use engine='reference'")
        kinds = [types.Array(numpy_support.from_dtype(array.dtype), array.ndim, "C") for array in arrays]
        entry = _entry(self._function, _arguments(variant, kinds))
        told = repr((variant, [(array.dtype.descr, array.ndim) for array in arrays]))
        entry.__qualname__ = f"{self.name}.{digest(told)}"  # no two kernels of a process may have one name
        dispatcher = kept(entry, self.name, told, no_cpython_wrapper=True, pipeline_class=KernelCompiler)
        with notice.compiling():
            dispatcher.compile((types.int64, types.int64))
        (result,) = dispatcher.overloads.values()
        address = result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)
        return address, PROTOTYPE(address)


def kernel(py_func: Any, name: str | None = None) -> Kernel:
    """Decorate a kernel; the name is for its file."""
    return Kernel(py_func, name or f"{py_func.__module__.rpartition('.')[2]}.{py_func.__name__}")


def _entry(function: Any, arguments: Any) -> Any:
    def entry(job, worker):
        begin(job, worker)
        function(*arguments(job, worker))
        leave(job, worker)

    return entry


def _arguments(variant: tuple[int, ...], kinds: Sequence[types.Array]) -> Any:
    """Return an intrinsic that makes a kernel's arguments of a job: its numbers, the job, the worker, the arrays."""
    result = types.Tuple([*map(types.literal, variant), types.int64, types.int64, *kinds])

    @intrinsic
    def arguments(typingctx, job, worker):
        def codegen(context, builder, sig, args):
            word = ir.IntType(64)
            base = builder.inttoptr(args[0], word.as_pointer())
            values, at = [], HEADER
            for number in variant:
                values.append(word(number))
            for kind in kinds:
                address, *shape = (builder.load(builder.gep(base, [word(n)])) for n in range(at, at + 1 + kind.ndim))
                itemsize = context.get_abi_sizeof(context.get_data_type(kind.dtype))
                strides = [word(itemsize)]
                for length in shape[:0:-1]:
                    strides.insert(0, builder.mul(strides[0], length))
                array = context.make_array(kind)(context, builder)
                data = builder.inttoptr(address, context.get_data_type(kind.dtype).as_pointer())
                populate_array(array, data=data, shape=shape, strides=strides, itemsize=word(itemsize), meminfo=None)
                values.append(array._getvalue())
                at += 1 + kind.ndim
            values[len(variant) : len(variant)] = args
            return context.make_tuple(builder, result, values)

        return result(types.int64, types.int64), codegen

    return arguments

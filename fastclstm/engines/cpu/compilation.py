"""How Numba compiles, and where the machine code is kept between runs.

The functions that kernels are made of are linked into them as they were written, and optimized and turned into machine
code only there: Numba would do both for each of them, and again for whatever calls it, which is most of the time.

Numba's own disk cache notices an edit of the file that holds a kernel, but not of the files with the intrinsics it
calls; its index loses entries where two processes write at once; and a damaged file or a full disk is an error. Here
one file of `disk_cache` holds one kernel for one signature and processor.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import NullCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, CompileResult
from numba.core.serialize import dumps

from fastclstm.engines import disk_cache
from fastclstm.nn import activations


def _sources() -> list[Path]:
    """Files that kernels are made of: the engine's, and the table whose constants it compiles in."""
    return [*sorted(Path(__file__).parent.rglob("*.py")), Path(activations.__file__)]


@cache
def source_digest() -> str:
    """Digest of every source file that kernels are made of, and of their compilers' versions."""
    versions = (sys.implementation.cache_tag, numba.__version__, llvmlite.__version__, numba.config.BOUNDSCHECK)
    return disk_cache.digest_of(versions, _sources())


@cache
def cache_folder() -> Path | None:
    """Folder of the compiled kernels; None if there is none."""
    return disk_cache.folder("kernels", source_digest())


class _KernelCache(NullCache):
    """Numba's cache interface for one kernel: a file a signature and processor."""

    def __init__(self, name: str, variant: str, folder: Path):
        self._name, self._variant, self._folder = name, variant, folder

    @property
    def cache_path(self) -> str:
        return str(self._folder)

    def _path(self, sig: Any, codegen: Any) -> Path:
        key = hashlib.sha256(repr((self._variant, sig, codegen.magic_tuple())).encode()).hexdigest()[:32]
        return self._folder / f"{self._name}-{key}.pickle"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        content = disk_cache.read(self._path(sig, target_context.codegen()))
        if content is None:
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(content))

    def save_overload(self, sig: Any, cres: Any) -> None:
        if cres.library.has_dynamic_globals:  # addresses of this process
            return
        disk_cache.write(self._path(sig, cres.codegen), dumps(cres._reduce()))


def kept(py_func: Any = None, variant: str = "", **options: Any) -> Any:
    """Decorate a function: compiled by Numba without the GIL, its machine code kept on disk between runs."""

    def decorate(py_func: Any) -> Any:
        dispatcher = numba.njit(nogil=True, error_model="numpy", **options)(py_func)
        folder = cache_folder()
        if folder is not None:
            name = f"{py_func.__module__.rpartition('.')[2]}.{py_func.__qualname__.rpartition('.')[2]}"
            dispatcher._cache = _KernelCache(name, variant, folder)
        return dispatcher

    return decorate if py_func is None else decorate(py_func)


# ------------------------------------------------------------------------------- what kernels are made of


class _InlinedLibrary(JITCodeLibrary):
    """Code that only ever becomes part of a kernel's: neither optimized nor made machine code by itself."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> Any:
        return _NoEnvironments


class _NoEnvironments:
    @staticmethod
    def set_env(name: str, environment: Any) -> None:
        pass


class _InlinedCompiler(Compiler):
    def compile_extra(self, func: Any) -> Any:
        self.state.library = _InlinedLibrary(self.state.targetctx.codegen(), func.__qualname__)
        return super().compile_extra(func)


inline = numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True,
                    pipeline_class=_InlinedCompiler)  # fmt: skip
"""Decorate a function that kernels call: compiled into them, never kept by itself."""

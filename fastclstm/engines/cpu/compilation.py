"""How kernels are compiled and where the machine code is kept between runs.

Numba's own disk cache notices an edit of the file that holds a kernel, but not of the files with the intrinsics it
calls. Here the key is a digest of every source of the engine: any edit leaves the old code behind. Writers write to
a temporary file and rename it, so concurrent processes are safe; where no folder can be written, code is compiled
again in each process.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from platformdirs import user_cache_path

CACHE_VARIABLE = "FASTCLSTM_CACHE_DIR"


@cache
def source_digest() -> str:
    """Digest of every source file of the engine."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def cache_folder() -> Path | None:
    """Folder of the compiled kernels: $FASTCLSTM_CACHE_DIR or the user's cache folder; None if it cannot be written."""
    chosen = os.environ.get(CACHE_VARIABLE)
    folder = (Path(chosen) if chosen else user_cache_path("fastclstm")) / f"kernels-{source_digest()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    return folder


class _Locator(_CacheLocator):
    def __init__(self, py_func: Any):
        self._line = py_func.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> str:
        return source_digest()

    def get_disambiguator(self) -> str:
        return str(self._line)

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator | None:
        return cls(py_func) if cache_folder() else None


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = (_Locator,)


class _KernelCache(FunctionCache):
    _impl_class = _CacheImpl


def kernel(**options: Any) -> Any:
    """Decorate a kernel: compiled by Numba without the GIL, kept on disk (driver functions only) between runs."""

    def decorate(py_func: Any) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(py_func)
        if cache_folder() is not None:
            dispatcher._cache = _KernelCache(py_func)
        return dispatcher

    return decorate


inline = numba.njit(nogil=True)
"""Decorate a function that kernels call: compiled into them, never kept by itself."""

"""How kernels are compiled and where the machine code is kept between runs.

Numba's own disk cache notices an edit of the file that holds a kernel, but not of the files with the intrinsics it
calls; its index loses entries where two processes write at once; and a damaged file or a full disk is an error. Here
one file holds one kernel for one signature and processor, in a folder named by a digest of every source that kernels
are made of. Writers rename a finished file into place. What cannot be read is compiled again, what cannot be written
is left.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import llvmlite
import numba
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from platformdirs import user_cache_path

from fastclstm.nn import activations

CACHE_VARIABLE = "FASTCLSTM_CACHE_DIR"
_FOLDERS_KEPT = 4
"""Folders of other versions that a new one leaves: those used last."""


def _sources() -> list[Path]:
    """Files that kernels are made of: the engine's, and the table whose constants it compiles in."""
    return [*sorted(Path(__file__).parent.glob("*.py")), Path(activations.__file__)]


@cache
def source_digest() -> str:
    """Digest of every source file that kernels are made of, and of their compilers' versions."""
    versions = (sys.implementation.cache_tag, numba.__version__, llvmlite.__version__, numba.config.BOUNDSCHECK)
    digest = hashlib.sha256(repr(versions).encode())
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def cache_folder() -> Path | None:
    """Folder of the compiled kernels, below $FASTCLSTM_CACHE_DIR or the user's cache folder; None if there is none.

    It may be read-only: then what is there is used.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    parent = Path(chosen).expanduser().absolute() if chosen else user_cache_path("fastclstm")
    if not parent.is_absolute():  # a user without a home
        return None
    folder = parent / f"kernels-{source_digest()}"
    try:
        is_new = not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        if is_new:
            _prune(parent, folder)
        os.utime(folder)  # the time of its last use
    except OSError:
        return folder if folder.is_dir() else None
    return folder


def _prune(parent: Path, new: Path) -> None:
    """Remove the folders of older versions but a few; processes that still run them have loaded their code."""
    others = [folder for folder in parent.glob("kernels-*") if folder != new]
    for folder in sorted(others, key=lambda folder: folder.stat().st_mtime, reverse=True)[_FOLDERS_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)


class _KernelCache(NullCache):
    """Numba's cache interface for one kernel: a file a signature and processor, its digest before its content."""

    def __init__(self, py_func: Any, folder: Path):
        self._name = f"{py_func.__module__.rpartition('.')[2]}.{py_func.__qualname__}"
        self._folder = folder

    @property
    def cache_path(self) -> str:
        return str(self._folder)

    def _path(self, sig: Any, codegen: Any) -> Path:
        key = hashlib.sha256(repr((sig, codegen.magic_tuple())).encode()).hexdigest()[:32]
        return self._folder / f"{self._name}-{key}.pickle"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        try:
            content = self._path(sig, target_context.codegen()).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(content[32:]))

    def save_overload(self, sig: Any, cres: Any) -> None:
        if cres.library.has_dynamic_globals:  # addresses of this process
            return
        content = dumps(cres._reduce())
        unfinished = self._folder / f"{uuid4().hex}.unfinished"
        try:
            unfinished.write_bytes(hashlib.sha256(content).digest() + content)
            unfinished.replace(self._path(sig, cres.codegen))
        except OSError:
            with suppress(OSError):
                unfinished.unlink()


def kernel(**options: Any) -> Any:
    """Decorate a kernel: compiled by Numba without the GIL, kept on disk (driver functions only) between runs."""

    def decorate(py_func: Any) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(py_func)
        folder = cache_folder()
        if folder is not None:
            dispatcher._cache = _KernelCache(py_func, folder)
        return dispatcher

    return decorate


inline = numba.njit(nogil=True)
"""Decorate a function that kernels call: compiled into them, never kept by itself."""

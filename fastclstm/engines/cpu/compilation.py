"""How Numba compiles, and where the machine code is kept between runs.

The functions that kernels are made of are linked into them after LLVM's passes on single functions (without which the
code gets slower), and are optimized as a whole and turned into machine code only there: Numba would do both for each,
and again for whatever calls it, which is most of the time.

Numba's own disk cache notices an edit of the file that holds a kernel, but not of the files with the intrinsics it
calls; its index loses entries where two processes write at once; and a damaged file or a full disk is an error. Here
one file of `disk_cache` holds one kernel for one signature and processor.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite.binding import Linkage, ffi
from numba.core.caching import NullCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.core.serialize import dumps

from fastclstm.engines import disk_cache, forks
from fastclstm.nn import activations

forks.hold(global_compiler_lock.acquire, global_compiler_lock.release)
forks.hold(ffi.lib._lock.__enter__, ffi.lib._lock.__exit__)


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


def digest(*values: Any) -> str:
    """Return a short name for some values."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:24]


def processor(codegen: Any = None) -> str:
    """Name of the processor that is compiled for, as names of files tell it."""
    if codegen is None:
        codegen = cpu_target.target_context.codegen()
    _, name, _ = codegen.magic_tuple()
    return f"{re.sub('[^0-9a-z]', '', name.lower())}.{digest(codegen.magic_tuple())[:8]}"


def kernels_on_disk() -> tuple[int, int]:
    """Count the kernels that the cache folder holds for this processor, and for others."""
    folder = cache_folder()
    names = [] if folder is None else [path.stem for path in folder.glob("*.pickle")]
    ours = sum(name.endswith(processor()) for name in names)
    return ours, len(names) - ours


@cache
def _warn_of_other_processor(folder: Path) -> None:
    """Say it once: machines of several kinds that share a folder, or an image built on another kind."""
    warnings.warn(
        f"the kernels in {folder} were compiled for another type of processor than this one ({processor()}); they are "
        f"compiled again and kept beside them. `python -m fastclstm warmup` does it beforehand",
        RuntimeWarning, stacklevel=2,
    )  # fmt: skip


class _KernelCache(NullCache):
    """Numba's cache interface for one kernel: a file a signature and processor."""

    def __init__(self, name: str, variant: str, folder: Path):
        self._name, self._variant, self._folder = name, variant, folder

    @property
    def cache_path(self) -> str:
        return str(self._folder)

    def _path(self, sig: Any, codegen: Any) -> Path:
        return self._folder / f"{self._name}-{digest(self._variant, sig)}-{processor(codegen)}.pickle"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        path = self._path(sig, target_context.codegen())
        content = disk_cache.read(path)
        if content is not None:
            return CompileResult._rebuild(target_context, *pickle.loads(content))
        others = self._folder.glob(f"{self._name}-{digest(self._variant, sig)}-*.pickle")
        if (other := next(others, None)) is not None and other != path:
            _warn_of_other_processor(self._folder)
        return None

    def save_overload(self, sig: Any, cres: Any) -> None:
        if cres.library.has_dynamic_globals:  # addresses of this process
            return
        disk_cache.write(self._path(sig, cres.codegen), dumps(cres._reduce()))


def kept(py_func: Any, name: str, variant: str = "", **options: Any) -> Any:
    """Have Numba compile a function, without the GIL, and keep its machine code on disk between runs."""
    dispatcher = numba.njit(nogil=True, error_model="numpy", **options)(py_func)
    folder = cache_folder()
    if folder is not None:
        dispatcher._cache = _KernelCache(name, variant, folder)
    return dispatcher


# ------------------------------------------------------------------------------- what kernels are made of


class _AlignedLibrary(JITCodeLibrary):
    """Code whose functions align their stack to whole vectors: spilt ones that cross cache lines cost up to a third."""

    def add_ir_module(self, ir_module: Any) -> None:
        for function in ir_module.functions:
            if not function.is_declaration:
                function.attributes.add("nounwind")  # llvmlite writes attributes where there is one in its set
                function.attributes.alignstack = 64
        super().add_ir_module(ir_module)


class _InlinedLibrary(_AlignedLibrary):
    """Code that only ever becomes part of a kernel's: not optimized as a whole by itself, nor made machine code."""

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


class _KernelLibrary(_AlignedLibrary):
    """A kernel's code: optimized once, where Numba has a pass before for reference counts, of which there are none.

    The functions it is made of are its own: their names count up in a process, so that kernels compiled in several have
    different functions of the same name, of which a process that loads both would call only one.
    """

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == Linkage.linkonce_odr:
                function.linkage = Linkage.private  # which LLVM's linker cannot find, as it does internal ones
        passes, options = self._codegen._module_pass_manager()
        passes.run(self._final_module, options)


def _compiler(library_class: type[JITCodeLibrary]) -> type[Compiler]:
    """Return Numba's compiler, with another kind of library."""

    class _Compiler(Compiler):
        def compile_extra(self, func: Any) -> Any:
            self.state.library = library_class(self.state.targetctx.codegen(), func.__qualname__)
            self.state.library.enable_object_caching()
            return super().compile_extra(func)

    return _Compiler


inline = numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True,
                    pipeline_class=_compiler(_InlinedLibrary))  # fmt: skip
"""Decorate a function that kernels call: compiled into them, never kept by itself."""

KernelCompiler = _compiler(_KernelLibrary)
"""What compiles kernels."""

"""csrc/ to machine code: NVRTC, by cuda.core, and a disk cache. Nothing here needs a GPU or a driver."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fastclstm.engines import disk_cache

OPTIONS = {"std": "c++17"}
"""What NVRTC is told beside macros and architecture: fields of cuda.core's ProgramOptions."""
MISSING = "engine 'cuda' needs cuda-core with NVRTC ({}); pip install 'fastclstm[cuda]'"
OLDEST = 1
"""The oldest version of cuda-core that has all that is used."""
Macros = Mapping[str, int | str]


def cuda_core() -> ModuleType:
    """Return the module cuda.core; raise ImportError, saying what to install, where it is missing."""
    try:
        import cuda.core
    except ImportError as error:
        raise ImportError(MISSING.format(error)) from error
    version = str(getattr(cuda.core, "__version__", "0"))
    if int(version.partition(".")[0]) < OLDEST:
        raise ImportError(MISSING.format(f"version {OLDEST} or newer, not {version}"))
    return cuda.core


@cache
def nvrtc() -> tuple[tuple[int, int], tuple[int, ...]]:
    """Return NVRTC's version and the architectures that it compiles for: (13, 0), (75, 80, …)."""
    cuda_core()
    try:
        from cuda.bindings import nvrtc as bindings

        (status, *version), (_, architectures) = bindings.nvrtcVersion(), bindings.nvrtcGetSupportedArchs()
    except (ImportError, RuntimeError, OSError) as error:  # the bindings are there, the library is not
        raise ImportError(MISSING.format(error)) from error
    if int(status):
        raise ImportError(MISSING.format(status))
    return (int(version[0]), int(version[1])), tuple(int(a) for a in architectures)


@cache
def source_folder() -> Path:
    """Folder of the CUDA sources: in the installed package, or beside it in a clone."""
    package = Path(__file__).parents[2]
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"engine 'cuda' finds no csrc in {package} or beside it; install fastclstm again")


def _sources() -> list[Path]:
    return sorted(path for path in source_folder().iterdir() if path.suffix in (".cu", ".cuh"))


@cache
def source_digest() -> str:
    """Digest of every CUDA source, and of what compiles it."""
    return disk_cache.digest_of((nvrtc()[0], OPTIONS), _sources())


@cache
def cache_folder() -> Path | None:
    """Folder of the compiled files; None if there is none."""
    return disk_cache.folder("cuda", source_digest())


def target(architecture: int) -> str:
    """Name what to compile for on a GPU of `architecture`: "sm_80"; of 90 "sm_90a", with what only those have.

    Raises ImportError where NVRTC knows neither it nor an older one whose code it runs.
    """
    (major, minor), known = nvrtc()
    fitting = [a for a in known if a // 10 == architecture // 10 and a <= architecture]
    if not fitting:
        older, newer = "an older one, pip install 'cuda-core[cu12]'", "a newer one, pip install -U 'cuda-core[cu13]'"
        remedy = older if architecture < min(known) else newer
        raise ImportError(
            f"engine 'cuda': NVRTC {major}.{minor} compiles for sm_{min(known)} to sm_{max(known)}, not for this GPU's "
            f"sm_{architecture}; install {remedy}, or pass engine='cpu'"
        )
    return "sm_90a" if max(fitting) == 90 else f"sm_{max(fitting)}"


def compile_source(source: str, macros: Macros, architecture: str) -> bytes:
    """Return the machine code (cubin) of csrc/`source` for an architecture like "sm_80", from the cache if it is there.

    Raises
    ------
    ImportError
        The extra "cuda" is not installed.
    RuntimeError
        NVRTC refuses; its log is the message.
    """
    path = _cached(source, macros, architecture)
    if path is not None and (code := disk_cache.read(path)) is not None:
        return code
    code = _compile(source, macros, architecture)
    if path is not None:
        disk_cache.write(path, code)
    return code


def _compile(source: str, macros: Macros, architecture: str) -> bytes:
    core: Any = cuda_core()
    file = source_folder() / source
    options = core.ProgramOptions(
        name=file.name,
        arch=architecture,
        define_macro=[(name, str(value)) for name, value in macros.items()] or None,
        include_path=str(file.parent),
        **OPTIONS,
    )
    try:
        return bytes(core.Program(file.read_text(encoding="utf-8"), "c++", options).compile("cubin").code)
    except Exception as error:  # NVRTCError, a plain Exception
        with_macros = " ".join(f"-D{name}={value}" for name, value in macros.items())
        raise RuntimeError(f"csrc/{source} {with_macros} does not compile for {architecture}: {error}") from error


def _cached(source: str, macros: Macros, architecture: str) -> Path | None:
    """Where the machine code is kept; None: nowhere."""
    folder = cache_folder()
    key = repr((source, sorted((name, str(value)) for name, value in macros.items()), architecture))
    name = f"{Path(source).stem}-{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
    return None if folder is None else folder / name

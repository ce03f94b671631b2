"""What this machine and this installation offer."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import typer

import fastclstm
from fastclstm import dispatch
from fastclstm.commands.options import SETTINGS, tell
from fastclstm.engines import disk_cache
from fastclstm.engines.cuda import compilation, devices, gpu

app = typer.Typer(**SETTINGS)

_NO_CACHE = f"none: no home, or no folder that can be written; kernels compile anew; set {disk_cache.CACHE_VARIABLE}"


@app.command("info")
def command() -> None:
    """Tell what this machine and installation offer."""
    for name, value in facts():
        tell(value, f"{name:<16}")


def facts() -> Iterator[tuple[str, str]]:
    """Yield names and values, one a line of the report."""
    yield "fastclstm", f"{fastclstm.__version__} in {Path(fastclstm.__file__).parent}"
    yield "python", f"{platform.python_version()} on {platform.platform(terse=True)}"
    yield "numpy", np.__version__
    yield from _cpu()
    yield "engines", ", ".join(f"{name} ({_verdict(name)})" for name in dispatch.ENGINES)
    yield "cuda", _cuda()


def _cpu() -> Iterator[tuple[str, str]]:
    """Yield what the cpu engine finds, or why there is none."""
    try:
        import numba

        from fastclstm.engines.cpu import compilation as cpu_compilation
        from fastclstm.engines.cpu import threads
        from fastclstm.engines.cpu.kernels import simd
    except ImportError as error:
        yield "numba", f"cannot be used: {error}"
        return
    yield "numba", numba.__version__
    yield "processor", f"{processor_name()}, {threads.available_processors()} usable here"
    yield "vectors", f"{simd.lanes(4)} float32 or {simd.lanes(8)} float64, {32 * simd.lanes(4)} bits"
    yield "threads", f"{threads.get_num_threads()}, layer {threads.threading_layer()}"
    folder = cpu_compilation.cache_folder()
    ours, others = cpu_compilation.kernels_on_disk()
    beside = f", {others} for other processors" if others else ""
    yield "kernel cache", _NO_CACHE if folder is None else f"{folder}: {ours} kernels for this processor{beside}"


def _cuda() -> str:
    """Return the GPU that the cuda engine computes on, or which of extra, driver and GPU is missing."""
    try:
        found = gpu.current()
        (major, minor), _ = compilation.nvrtc()
    except ImportError as error:
        return f"no: {error}; {_nvidia_driver()}"
    return f"{found}, NVRTC {major}.{minor}; kernels kept in {compilation.cache_folder() or 'no folder'}"


def _verdict(engine: str) -> str:
    try:
        dispatch.get_engine(engine)
    except ImportError as error:
        return str(error)
    if engine == "cuda" and devices.missing() is not None:
        return "not here"
    return "default" if engine == dispatch.DEFAULT_ENGINE else "ready"


def processor_name() -> str:
    """Return the processor's name as Linux tells it, elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _nvidia_driver() -> str:
    try:
        version = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0].partition(":")[2]
    except (OSError, IndexError):
        return "no kernel module of NVIDIA's is loaded"
    return f"the NVIDIA driver is there ({' '.join(version.split())})"

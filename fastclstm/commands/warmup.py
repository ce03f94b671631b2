"""All kernels compiled beforehand."""

from __future__ import annotations

import os
import time
from typing import Annotated

import typer

from fastclstm.commands.options import SETTINGS
from fastclstm.engines import disk_cache
from fastclstm.io.progress import progress_bar
from fastclstm.spec import choice

app = typer.Typer(**SETTINGS)


@app.command("warmup")
def command(dtype: Annotated[str, typer.Option(help="float32, float64 or both.")] = "both") -> None:
    """Compile the kernels of the cpu engine for all later processes."""
    from fastclstm.engines.cpu import compilation, warmup

    choice("warmup", "dtype", dtype, (*warmup.DTYPES, "both"))
    folder = compilation.cache_folder()
    if folder is None or not os.access(folder, os.W_OK):
        raise OSError(f"warmup: kernels cannot be kept in {folder or 'any folder'}; "
                      f"set {disk_cache.CACHE_VARIABLE} to a folder that can be written")  # fmt: skip
    start, steps = time.perf_counter(), list(warmup.steps(*warmup.DTYPES if dtype == "both" else (dtype,)))
    with progress_bar(steps, unit=" kernel") as progress:
        for name, compile_kernel in progress:
            progress.set_description_str(name)
            compile_kernel()
    print(f"{len(steps)} kernels in {time.perf_counter() - start:.1f} s, kept in {folder}")

"""Kernels compiled beforehand."""

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
def command(
    dtype: Annotated[str, typer.Option(help="float32, float64 or both.")] = "float32",
    forward_only: Annotated[bool, typer.Option("--forward-only", help="What inference needs, not training.")] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes side by side.  [default: one a processor]", show_default=False)
    ] = None,
) -> None:
    """Compile the kernels of the cpu engine for all later processes."""
    from fastclstm.engines.cpu import compilation, threads, warmup

    choice("warmup", "dtype", dtype, (*warmup.DTYPES, "both"))
    folder = compilation.cache_folder()
    if folder is None or not os.access(folder, os.W_OK):
        raise OSError(f"warmup: kernels cannot be kept in {folder or 'any folder'}; "
                      f"set {disk_cache.CACHE_VARIABLE} to a folder that can be written")  # fmt: skip
    dtypes = warmup.DTYPES if dtype == "both" else (dtype,)
    start, count = time.perf_counter(), sum(1 for _ in warmup.steps(*dtypes, forward_only=forward_only))
    compiled = warmup.compile_all(
        *dtypes, forward_only=forward_only, processes=processes or threads.available_processors()
    )
    with progress_bar(compiled, total=count, unit=" kernel", quiet=False) as progress:
        for name in progress:
            progress.set_description_str(name)
    ours, _ = compilation.kernels_on_disk()
    print(f"{ours} kernels in {time.perf_counter() - start:.1f} s, kept in {folder}")

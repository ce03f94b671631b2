"""The benchmark suite of the source repository."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import typer

import fastclstm
from fastclstm.commands.options import SETTINGS

NARROW = ("--no-header", "--benchmark-columns=median,iqr", "--benchmark-name=short")
"""A table for 80 columns; what comes later on the command line counts."""

app = typer.Typer(**SETTINGS)


@app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def command(context: typer.Context) -> None:
    """Run the benchmark suite and print its table.

    Further arguments go to pytest. The suite is part of the source repository, not of the installed package.
    """
    roots = (Path.cwd(), Path(fastclstm.__file__).parents[1])
    root = next((root for root in roots if (root / "bench").is_dir() and (root / "fastclstm").is_dir()), None)
    if root is None:
        raise FileNotFoundError("the benchmark suite is not here: call this in a clone of the source repository")
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("pytest_benchmark") is None:
        raise ImportError("bench: pytest or pytest-benchmark is not installed; pip install 'fastclstm[bench]'")
    arguments = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", *NARROW, *context.args]
    raise typer.Exit(subprocess.run(arguments, cwd=root, check=False).returncode)

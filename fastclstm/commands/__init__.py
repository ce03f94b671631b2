"""The command line: ``python -m fastclstm info | demo | run | train | warmup | bench``.

Each command imports what it needs when it runs, so that help is quick.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import fastclstm

USER_ERROR = 2
INTERRUPTED = 130


class _Commands(TyperGroup):
    """The commands. What a user can put right ends in one line on stderr and exit code 2, never in a traceback."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if os.environ.get("FASTCLSTM_TRACEBACK") or not (message := _explanation(error)):
                raise
            print(f"fastclstm: error: {' '.join(message.split())}", file=sys.stderr)
            code = USER_ERROR
        sys.exit(code if isinstance(code, int) else 0)


def _explanation(error: Exception) -> str:
    """Return what to tell the user, or nothing where the error is a bug of ours."""
    if hasattr(error, "format_message"):  # a usage error, whose class differs between versions of typer
        return f"{error.format_message().rstrip('.')}; try --help"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"out of memory: {error}; take a smaller batch, or fewer steps at once"
    return str(error) if isinstance(error, ValueError | TypeError | ImportError | OSError) else ""


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="fastclstm: ConvLSTM from plain NumPy, fast on many cores.",
    epilog="Set FASTCLSTM_TRACEBACK=1 to see where an error comes from.",
)

Engine = Annotated[str | None, typer.Option(help="cpu (default), cuda or reference.", show_default=False)]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the cpu engine.", show_default=False)]


@app.callback(invoke_without_command=True)
def _common(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(fastclstm.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("info")
def info_command() -> None:
    """Tell what this machine and installation offer."""
    from fastclstm.commands.info import facts

    for name, value in facts():
        print(f"{name:<16}{value}")


@app.command("demo")
def demo_command(
    batch: Annotated[int, typer.Option(min=1, help="Films at once.")] = 4,
    steps: Annotated[int, typer.Option(min=2, help="Frames of each film.")] = 10,
    filters: Annotated[int, typer.Option(min=1, help="Hidden channels.")] = 32,
    engine: Annotated[str, typer.Option(help="cpu, cuda, reference or both: cpu and reference.")] = "both",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of the films and the weights.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw frames and hidden maps: .png or .gif.", show_default=False)
    ] = None,
) -> None:
    """Check and time the layers on a film of digits.

    Handwritten digits glide and bounce over frames of 64×64 pixels and run through ConvLSTM2D and MaxPooling3D, on the
    reference engine (plain NumPy) and on the cpu engine, compared with the reference in float64.
    """
    from fastclstm.commands import demo

    _set_threads(threads)
    demo.run(batch, steps, filters, engine, seed, plot)


@app.command("run")
def run_command(
    source: Annotated[Path, typer.Argument(metavar="INPUT.npy", help="(T, H, W[, C]) or (B, T, H, W, C).")],
    weights: Annotated[Path, typer.Option(metavar="W.safetensors", help="What ConvLSTM2D.save wrote.")],
    out: Annotated[Path, typer.Option(metavar="OUT.npy", help="Where the hidden sequence goes.")],
    chunk: Annotated[int, typer.Option(min=1, help="Time steps in memory at once.")] = 16,
    state_in: Annotated[
        Path | None, typer.Option(metavar="S.npz", help="States to start from (h0, c0, h1, …).", show_default=False)
    ] = None,
    state_out: Annotated[
        Path | None, typer.Option(metavar="S.npz", help="Where the last states go.", show_default=False)
    ] = None,
    engine: Engine = None,
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
) -> None:
    """Run a saved layer over a file of sequences.

    However long they are, only --chunk steps are in memory. The output file appears complete or not at all.
    """
    from fastclstm.commands.run import run_file

    _set_threads(threads)
    shape = run_file(
        source, weights, out, chunk=chunk, state_source=state_in, state_target=state_out, engine=engine, quiet=quiet
    )
    if not quiet:
        print(f"{out}: {shape}")


@app.command("train")
def train_command(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Films (N, T, H, W[, C]): .npy, or .npz with x, or x and y.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")] = Path("fastclstm-train"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the films.  [default: 10]")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Train so long instead.", show_default=False)] = None,
    steps_in: Annotated[int, typer.Option(min=2, help="Frames that the network is given.")] = 10,
    steps_out: Annotated[int, typer.Option(min=1, help="Frames to forecast in the end, one from the other.")] = 10,
    filters: Annotated[int, typer.Option(min=1, help="Hidden channels.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Films a step.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of films, weights and order.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Forget the training that DIR holds.")] = False,
    engine: Engine = None,
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a network to foretell the next frame, and compare it with what needs no training.

    On films of moving digits, or on your own. What needs no training is to repeat the last frame, or to shift it by
    what lies between the last two. Interrupted, the same command goes on where it was.
    """
    from fastclstm.commands import train

    if epochs is not None and minutes is not None:
        raise typer.BadParameter("give --epochs or --minutes, not both")
    _set_threads(threads)
    train.run(
        data, out, epochs=epochs or train.EPOCHS, minutes=minutes, steps_in=steps_in, steps_out=steps_out,
        filters=filters, batch=batch, seed=seed, restart=restart, engine=engine, quiet=quiet,
    )  # fmt: skip


@app.command("warmup")
def warmup_command(dtype: Annotated[str, typer.Option(help="float32, float64 or both.")] = "both") -> None:
    """Compile all kernels of the cpu engine now and keep them on disk, where later processes find them."""
    import time

    from tqdm import tqdm

    from fastclstm.engines import disk_cache
    from fastclstm.engines.cpu import compilation, warmup
    from fastclstm.spec import choice

    choice("warmup", "dtype", dtype, (*warmup.DTYPES, "both"))
    folder = compilation.cache_folder()
    if folder is None or not os.access(folder, os.W_OK):
        raise OSError(f"warmup: kernels cannot be kept in {folder or 'any folder'}; "
                      f"set {disk_cache.CACHE_VARIABLE} to a folder that can be written")  # fmt: skip
    start, steps = time.perf_counter(), list(warmup.steps(*warmup.DTYPES if dtype == "both" else (dtype,)))
    with tqdm(steps, unit="kernel", disable=None) as progress:
        for name, compile_kernel in progress:
            progress.set_description(name)
            compile_kernel()
    print(f"{len(steps)} kernels in {time.perf_counter() - start:.1f} s, kept in {folder}")


@app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench_command(context: typer.Context) -> None:
    """Run the benchmark suite and print its table.

    Further arguments go to pytest. The suite is part of the source repository, not of the installed package.
    """
    import subprocess
    from importlib.util import find_spec

    roots = (Path.cwd(), Path(fastclstm.__file__).parents[1])
    root = next((root for root in roots if (root / "bench").is_dir() and (root / "fastclstm").is_dir()), None)
    if root is None:
        raise FileNotFoundError("the benchmark suite is not here: call this in a clone of the source repository")
    if find_spec("pytest") is None or find_spec("pytest_benchmark") is None:
        raise ImportError("bench: pytest or pytest-benchmark is not installed; pip install 'fastclstm[bench]'")
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", *context.args]
    raise typer.Exit(subprocess.run(command, cwd=root, check=False).returncode)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        fastclstm.set_num_threads(threads)


def main() -> None:
    """Run the command line. An end from outside (SIGTERM) cleans up like Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app(prog_name="fastclstm")

"""The command line: ``python -m fastclstm COMMAND``, a module here for each command.

A module is imported when its command runs or tells its options; the list of commands needs none of them.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import fastclstm
from fastclstm.commands.options import SETTINGS
from fastclstm.engines.notices import notice

COMMANDS = {
    "info": "Tell what this machine and installation offer.",
    "demo": "Check and time the layers on a film of digits.",
    "run": "Run a saved layer or network over a file of sequences or samples.",
    "forecast": "Make the frames that follow, by a saved network.",
    "train": "Train a network to foretell the next frame of films.",
    "verify": "Score the forecasts of a saved network against observations.",
    "radar": "Write a synthetic radar archive, to try the others on.",
    "warmup": "Compile the kernels of the cpu engine for all later processes.",
    "bench": "Run the benchmark suite and print its table.",
}
"""Name of each command, which is that of its module, and the first line of its help."""

USER_ERROR = 2
INTERRUPTED = 130


class _Commands(TyperGroup):
    """The commands. What a user can put right ends in one line on stderr and exit code 2, never in a traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        return typer.main.get_command(importlib.import_module(f"fastclstm.commands.{cmd_name}").app)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if os.environ.get("FASTCLSTM_TRACEBACK") or not (message := _explanation(error)):
                raise
            try:
                sys.stderr.write(f"fastclstm: error: {' '.join(message.split())}\n")
                sys.stderr.flush()
            except (AttributeError, OSError, ValueError):  # it is missing or closed
                sys.stderr = None  # else Python tries again at its end, and ends with a code of its own
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
    context_settings={"help_option_names": ["-h", "--help"]},
    help="fastclstm: ConvLSTM from plain NumPy, fast on many cores.",
    epilog="Set FASTCLSTM_TRACEBACK=1 to see where an error comes from.",
    **SETTINGS,
)


@app.callback(invoke_without_command=True)
def _common(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(fastclstm.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Run the command line. An end from outside (SIGTERM) cleans up like Ctrl-C.

    What the encoding of the output has no sign for is a question mark there, not the end of the work.
    """
    notice.in_logs = True
    with suppress(AttributeError, ValueError):  # stdout is missing, closed, or somebody's own
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app(prog_name="fastclstm")

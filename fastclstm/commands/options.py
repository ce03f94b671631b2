"""What commands share: settings of the command line's library, and options."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fastclstm
from fastclstm.engines.notices import is_terminal

if TYPE_CHECKING:
    from fastclstm.layers import Layer

SETTINGS: dict[str, Any] = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}

Engine = Annotated[str | None, typer.Option(help="cpu (default), cuda or reference.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the cpu engine.", show_default=False)]
Theme = Annotated[str, typer.Option(help="Of pictures: light or dark.")]
Weights = Annotated[Path, typer.Option(metavar="W.safetensors", help="What save wrote, of a layer or a network.")]


def check_theme(op: str, theme: str) -> None:
    """Raise ValueError where no pictures have that theme; without importing what draws them."""
    from fastclstm.spec import choice

    choice(op, "--theme", theme, ("light", "dark"))


def tell(text: str, label: str = "") -> None:
    """Print a line after its label; on a terminal in as many lines as it needs, broken between words."""
    if is_terminal(sys.stdout):
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, initial_indent=label, subsequent_indent=" " * len(label),
                             break_long_words=False, break_on_hyphens=False)  # fmt: skip
        print(text)
    else:
        print(f"{label}{text}")


def set_threads(threads: int | None) -> None:
    """Set the number of threads, where the user gave one."""
    if threads is not None:
        fastclstm.set_num_threads(threads)


def use_engine(network: Layer, engine: str | None) -> None:
    """Let all layers of a network compute with `engine`, where one is given."""
    from fastclstm import dispatch
    from fastclstm.layers.container import parts

    dispatch.check_engine(engine)
    for part in parts(network):
        if engine is not None and hasattr(part, "engine"):
            part.engine = engine

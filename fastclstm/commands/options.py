"""What commands share: settings of the command line's library, and options."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import fastclstm

SETTINGS: dict[str, Any] = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}

Engine = Annotated[str | None, typer.Option(help="cpu (default), cuda or reference.", show_default=False)]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the cpu engine.", show_default=False)]


def set_threads(threads: int | None) -> None:
    """Set the number of threads, where the user gave one."""
    if threads is not None:
        fastclstm.set_num_threads(threads)

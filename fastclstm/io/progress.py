"""How far a long computation is, told on a terminal."""

from __future__ import annotations

import sys
from typing import Any


def progress_bar(*args: Any, quiet: bool | None = None, **options: Any) -> Any:
    """Return tqdm's bar on stderr: never shown if `quiet` is True, on a terminal alone if it is None.

    Where stderr is missing or closed, as in services and windowed programs, there is no bar and no error.
    """
    from tqdm import tqdm

    stream = sys.stderr
    shown = not quiet and stream is not None and not stream.closed and (quiet is False or stream.isatty())
    return tqdm(*args, disable=not shown, **options)


def say(text: str) -> None:
    """Print a line above the bar, if there is one."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        print(text)

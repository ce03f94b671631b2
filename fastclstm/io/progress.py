"""How far a long computation is, told on a terminal."""

from __future__ import annotations

import sys
from typing import Any


def progress_bar(*args: Any, quiet: bool | None = None, **options: Any) -> Any:
    """Return tqdm's bar on stderr: never shown if `quiet` is True, on a terminal alone if it is None.

    Where stderr is missing or closed, as in services and windowed programs, there is no bar and no error.
    """
    from tqdm import tqdm

    shown = not quiet and _is_open(sys.stderr) and (quiet is False or sys.stderr.isatty())
    return tqdm(*args, disable=not shown, **options)


def _is_open(stream: Any) -> bool:
    """Whether a stream can be asked whether it is a terminal: somebody's own may have little more than `write`."""
    try:
        stream.isatty()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def say(text: str) -> None:
    """Print a line above the bar, if there is one."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        print(text)

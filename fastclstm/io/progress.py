"""How far a long computation is, told on a terminal by a bar, in a log by a line now and then."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from fastclstm.engines.notices import is_terminal

LOG_SECONDS = 30.0
"""Between two lines of a log, and before the first one: what takes no longer leaves none."""

_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
_LINE = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt}{unit}s, {elapsed} gone, {remaining} to go{postfix}"
_ENDLESS_LINE = "{desc}: {n_fmt}{unit}s, {elapsed} gone{postfix}"


def progress_bar(*args: Any, quiet: bool | None = None, **options: Any) -> Any:
    """Return tqdm's bar on stderr: never shown if `quiet` is True, on a terminal alone if it is None.

    If `quiet` is False, what is not a terminal gets lines, each with its end, not one that is written over and over.
    Where stderr is missing or closed, as in services and windowed programs, there is no bar and no error.
    """
    from tqdm import tqdm

    terminal = is_terminal(sys.stderr)
    there = not quiet and terminal is not None
    endless = options.get("total") is None
    if there and terminal:
        return tqdm(*args, dynamic_ncols=True, bar_format=None if endless else _BAR, **options)
    if not there or quiet is None:
        return tqdm(*args, disable=True, **options)
    bar = tqdm(*args, file=_Lines(sys.stderr), bar_format=_ENDLESS_LINE if endless else _LINE, mininterval=LOG_SECONDS,
               delay=LOG_SECONDS, miniters=1, **options)  # fmt: skip
    bar.set_description_str = partial(bar.set_description_str, refresh=False)  # which waits for the next line
    return bar


class _Lines:
    """A log: of what tqdm writes over its last line, each becomes a line of its own."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip().removeprefix(": "):
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def say(text: str) -> None:
    """Print a line above the bar, if there is one."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        print(text)

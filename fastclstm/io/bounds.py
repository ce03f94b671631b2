"""What a file may cost: what would take far more memory than its size promises is refused before it is built."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Iterable
from itertools import chain
from typing import Any

TIMES = 10
"""How many times its size a file may cost."""
FREE = 16 << 20
"""Bytes that any file may cost besides."""
DEEPEST = 100
"""How deep lists and objects of a JSON text may lie in each other."""


class Refused(ValueError):
    """A file, which the message names, is not read for what it is or would cost; it need not be damaged."""


class Bounds:
    """What reading the file `path` may cost.

    Parameters
    ----------
    path : path
    remedy : str
        What to do where it costs more, as errors say.

    Raises
    ------
    OSError
        The file is missing, is no regular file or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], remedy: str = "write it anew without compression if you trust it"):
        self.name, self._remedy = os.fsdecode(path), remedy
        status = os.stat(self.name)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # to open a pipe is to wait
            raise OSError(f"cannot read {self.name}: it is not a regular file; copy it into one")
        with open(self.name, "rb"):  # a folder or a forbidden file gives the system's own error
            pass
        self.size = status.st_size
        self.most = TIMES * self.size + FREE
        self.spent = 0

    def check(self, what: str, cost: int) -> None:
        """Raise `Refused` where `cost` bytes for `what`, beside what is spent, are too many."""
        if self.spent + cost > self.most:
            raise Refused(
                f"{self.name} is refused: with {what} it takes {self.spent + cost:,} bytes of memory, but a file of "
                f"{self.size:,} bytes may take {self.most:,}; {self._remedy}"
            )

    def spend(self, what: str, cost: int) -> None:
        """Count `cost` bytes that are kept; raise `Refused` where they are too many."""
        self.check(what, cost)
        self.spent += cost

    def member(self, archive: zipfile.ZipFile, what: str) -> bytes:
        """Return a file of an archive, which costs what the archive says it has.

        Raises
        ------
        KeyError
            There is no such file.
        ValueError
            It is packed in an unusual way, or not as long as the archive says.
        """
        info = archive.getinfo(what)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{what} is compressed by method {info.compress_type}, neither stored nor deflated")
        self.spend(what, info.file_size)
        with archive.open(info) as file:
            content = file.read(info.file_size)  # without the size it would unpack all, whatever the archive says
        if len(content) != info.file_size:
            raise ValueError(f"{what} has {len(content):,} bytes, not {info.file_size:,}")
        return content

    def json(self, what: str, text: str | bytes) -> Any:
        """Return what a JSON text says.

        Raises
        ------
        ValueError
            It is none.
        Refused
            Lists and objects lie too deep in each other, or are too many.
        """
        text = text if isinstance(text, str) else text.decode()
        self.check(what, 64 * (text.count(",") + text.count("[")) + 256 * text.count("{"))
        try:
            content = json.loads(text)
            deepest = _depth(content)
        except RecursionError:
            deepest = len(text)
        if deepest > DEEPEST:
            raise Refused(f"{self.name} is refused: lists and objects of {what} lie more than {DEEPEST} deep in each "
                          f"other")  # fmt: skip
        return content


def _depth(content: Any) -> int:
    """Return how deep lists and objects lie in each other, as far as it matters."""
    depth, level = 0, [content]
    while depth <= DEEPEST and (level := [node for node in level if isinstance(node, dict | list)]):
        level = list(chain.from_iterable(node.values() if isinstance(node, dict) else node for node in level))
        depth += 1
    return depth


def shown(names: Iterable[Any], most: int = 6) -> str:
    """Return names for an error's message: the first `most`, and how many more there are.

    Examples
    --------
    >>> shown("abcdefgh", most=2)
    'a, b and 6 more'
    >>> shown([])
    'none'
    """
    listed = [str(name) for name in names]
    first = ", ".join(name if len(name) <= 60 else f"{name[:57]}…" for name in listed[:most])
    return (f"{first} and {len(listed) - most:,} more" if len(listed) > most else first) or "none"

"""Word that kernels are being compiled, when somebody waits for it.

Compilers of other libraries say nothing (Numba, torch.compile, Triton) or log each program when asked to (JAX). Here a
first call may take ten times as long as all the others, so a person at a terminal is told, once, after a silence. A
program's log belongs to the program: a library writes nothing there unasked. The commands ask.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SILENT_SECONDS = 2.0
"""Compiling for longer than that, a process says so."""


def is_terminal(stream: Any) -> bool | None:
    """Return whether a stream is a terminal, or None for one that is missing, closed, or has little more than write."""
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):
        return None


class Notice:
    """Says once on stderr that kernels are being compiled, when that has taken some time.

    Attributes
    ----------
    in_logs : bool
        Whether also where stderr is no terminal.
    """

    def __init__(self) -> None:
        self.in_logs = False
        self._seconds, self._said = 0.0, False

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Count the time inside."""
        timer = threading.Timer(max(0.0, SILENT_SECONDS - self._seconds), self._say)
        timer.daemon = True
        start = time.perf_counter()
        if not self._said and (self.in_logs or is_terminal(sys.stderr)):
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._seconds += time.perf_counter() - start

    def _say(self) -> None:
        self._said = True
        with suppress(AttributeError, OSError, ValueError):  # a terminal that is gone is no reason to stop
            print("fastclstm: compiling kernels for this processor; later runs find them on disk.\n"
                  "`python -m fastclstm warmup` does it beforehand.", file=sys.stderr, flush=True)  # fmt: skip


notice = Notice()

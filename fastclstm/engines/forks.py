"""Locks that a process holds while it forks.

Only the thread that forks goes on in the child. What another thread had locked there, nobody would ever release: who
imports an engine or compiles a kernel must be through before. Locks are taken in the order in which threads nest them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

importing = threading.RLock()
"""Held while an engine is imported."""

_locks: list[tuple[Callable[[], object], Callable[[], object]]] = [(importing.acquire, importing.release)]


def hold(acquire: Callable[[], object], release: Callable[[], object]) -> None:
    """Hold another lock, taken after those before."""
    _locks.append((acquire, release))


def _acquire() -> None:
    for acquire, _ in _locks:
        acquire()


def _release() -> None:
    for _, release in reversed(_locks):
        release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_release)

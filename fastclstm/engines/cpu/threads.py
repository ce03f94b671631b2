"""How many threads compute, and when one must do it all.

The count is the package's own: Numba's and other libraries' settings are left as they are. It comes from
set_num_threads, else $FASTCLSTM_NUM_THREADS, else the processors this process may use (affinity and, on Linux, the
control group's quota).
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba

VARIABLE = "FASTCLSTM_NUM_THREADS"
_SAFE_LAYERS = ("tbb", "omp")
"""Threading layers that two Python threads may enter at once."""

_chosen: int | None = None
_forked = False
_team_at_work = threading.Lock()


def _after_fork() -> None:
    global _forked
    _forked = True  # the parent's worker threads are not here, and some layers kill a child that asks for them


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def set_num_threads(count: int | None) -> None:
    """Set how many threads fastclstm's cpu engine uses; None returns to the default.

    Parameters
    ----------
    count : int or None
        At least 1. More than the machine has processors is allowed up to Numba's own limit, which is used then.

    Raises
    ------
    ValueError, TypeError
        `count` is not a positive integer.
    """
    global _chosen
    if count is None:
        _chosen = None
        return
    try:
        number = operator.index(count)
    except TypeError:
        raise TypeError(f"set_num_threads: count must be a positive integer or None, got {count!r}") from None
    if number < 1:
        raise ValueError(f"set_num_threads: count must be a positive integer or None, got {count!r}")
    _chosen = number


def get_num_threads() -> int:
    """Return how many threads fastclstm's cpu engine uses where the work is large enough."""
    wanted = _chosen if _chosen is not None else _from_environment() or available_processors()
    return min(wanted, numba.config.NUMBA_NUM_THREADS)


def _from_environment() -> int | None:
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"the environment variable {VARIABLE} must be a positive integer, got {text!r}")
    return int(text)


def available_processors() -> int:
    """Count the processors this process may use: its affinity, limited by the control group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _control_group_quota()
    return count if quota is None else max(1, min(count, round(quota)))


_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_CONTROL_GROUPS = Path("/proc/self/cgroup")


@cache
def _control_group_quota() -> float | None:
    """Processors granted by this process's control groups (version 2, else 1), None where there is no limit."""
    try:
        entries = [line.split(":", 2) for line in _OWN_CONTROL_GROUPS.read_text().splitlines()]
    except OSError:
        return None
    quotas = []
    for _, controllers, path in entries:
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be the one outside, where the group's own files are at the top.
        top = _CONTROL_GROUPS / "cpu" if controllers else _CONTROL_GROUPS
        group = top / path.lstrip("/")
        quotas += [_quota(folder, controllers) for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path, controllers: str) -> float | None:
    """Processors granted by the group in `folder`: of version 2, or 1 where it names `controllers`."""
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
    try:
        quota, period = " ".join((folder / name).read_text() for name in names).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such files, or "max"
        return None


def usable_threads() -> int:
    """Return how many threads a call from here and now may use: 1 where starting others would be unsafe."""
    count = get_num_threads()
    if count == 1 or _forked or _team_at_work.locked():  # the last: other Python threads keep the processors busy
        return 1
    if threading.current_thread() is not threading.main_thread() and threading_layer() not in _SAFE_LAYERS:
        return 1
    return count


def threading_layer() -> str:
    """Return the name of Numba's threading layer, starting it if need be."""
    numba.get_num_threads()  # starts it
    return numba.threading_layer()


@contextmanager
def team(count: int) -> Iterator[None]:
    """Let Numba's parallel regions in this thread use `count` threads, and put its setting back."""
    before = numba.get_num_threads()
    first = _team_at_work.acquire(blocking=False)
    try:
        if count != before:
            numba.set_num_threads(count)
        yield
    finally:
        if count != before:
            numba.set_num_threads(before)
        if first:
            _team_at_work.release()


def run(kernels: tuple[Any, Any], count: int, *arguments: Any) -> None:
    """Call the first of two kernels, the serial one, or with a `count` above 1 the parallel one by a team."""
    serial, parallel = kernels
    if count == 1:
        serial(*arguments)
    else:
        with team(count):
            parallel(*arguments)

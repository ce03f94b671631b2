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
from pathlib import Path
from typing import Any

import numba

VARIABLE = "FASTCLSTM_NUM_THREADS"
_SAFE_LAYERS = ("tbb", "omp")
"""Threading layers that two Python threads may enter at once."""

_chosen: int | None = None
_forked = False
_lock = threading.Lock()


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
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"the environment variable {VARIABLE} must be a positive integer, got {text!r}")
    return int(text)


def available_processors() -> int:
    """Count the processors this process may use: its affinity, limited by the control group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _control_group_quota()
    return count if quota is None else max(1, min(count, round(quota)))


def _control_group_quota() -> float | None:
    """Processors granted by the control group (version 2, then 1), None where there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(quota) / int(period)


def usable_threads() -> int:
    """Return how many threads a call from here and now may use: 1 where starting others would be unsafe."""
    count = get_num_threads()
    if count == 1 or _forked:
        return 1
    if threading.current_thread() is not threading.main_thread() and threading_layer() not in _SAFE_LAYERS:
        return 1
    return count


def threading_layer() -> str:
    """Return the name of Numba's threading layer, starting it if need be."""
    try:
        return numba.threading_layer()
    except ValueError:  # not started yet
        with _lock:
            numba.np.ufunc.parallel._launch_threads()
        return numba.threading_layer()


@contextmanager
def team(count: int) -> Iterator[Any]:
    """Let Numba's parallel regions in this thread use `count` threads, and put its setting back."""
    before = numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        yield
    finally:
        numba.set_num_threads(before)

"""How many threads compute, and when one must do it all.

The count is the package's own: Numba's and other libraries' settings are left as they are. It comes from
set_num_threads, else $FASTCLSTM_NUM_THREADS, else $OMP_NUM_THREADS, else the processors this process may use (affinity
and, on Linux, the control group's quota).
"""

from __future__ import annotations

import operator
import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numba
import numpy as np

from fastclstm.engines.cpu.kernels.entry import Kernel, Table, table
from fastclstm.engines.cpu.kernels.team import BUSY, HEADER, WORKERS, run_team

VARIABLE = "FASTCLSTM_NUM_THREADS"
GENERAL_VARIABLE = "OMP_NUM_THREADS"
"""What programs that run many processes, such as Dask's workers, set for all libraries."""
_SAFE_LAYERS = ("tbb", "omp")
"""Threading layers that two Python threads may enter at once."""

_HEADER = [0] * HEADER
_LOSS = 0.2
"""Share of a call's time that its own thread may be without a processor before teams are given up for a while."""
_GAIN = 1.2
"""But not where the team together had a processor for so many times the call's time: alone no thread could."""
_PATIENCE = 20.0, 640.0
"""How many times as long as what was lost, at least and at most: twice the last after a loss, less after each gain."""
_SLICE = 0.005
"""Seconds lost that count, at most: about those that a neighbour has the processor; a long call loses many times so."""

_chosen: int | None = None
_forked = False
_at_work: dict[int, None] = {}
"""Python threads that are in `run`."""
_CREDIT = 0.02
"""Seconds of gain that pay for losses, at most: who has gained so far is asked again after one at once."""
_alone_until = 0.0
_patience, _ = _PATIENCE
_gained = 0.0
"""Seconds of processor time that teams have brought since the last loss that they did not pay for, above `_GAIN`."""


def _after_fork() -> None:
    global _forked
    _forked = True  # the parent's worker threads are not here, and some layers kill a child that asks for them
    _at_work.clear()


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
    if _forked:
        return 1
    wanted = _chosen if _chosen is not None else _from_environment() or available_processors()
    return min(wanted, numba.config.NUMBA_NUM_THREADS)


def _from_environment() -> int | None:
    text = os.environ.get(VARIABLE)
    if text is not None:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"the environment variable {VARIABLE} must be a positive integer, got {text!r}")
        return int(text)
    general = os.environ.get(GENERAL_VARIABLE, "").partition(",")[0].strip()
    return int(general) if general.isdecimal() and int(general) > 0 else None


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
    """Return how many threads a call from here and now may use: 1 where starting others would be unsafe or unwise."""
    count = get_num_threads()
    if count == 1:
        return 1
    others = len(_at_work.keys() - {threading.get_ident()})  # Python threads that compute too share the processors
    if count // (1 + others) < 2 or time.perf_counter() < _alone_until:
        return 1
    if not _can_start(count):  # before the layer is asked for anything: some start their threads then
        return 1
    if threading.current_thread() is not threading.main_thread() and threading_layer() not in _SAFE_LAYERS:
        return 1
    return count // (1 + others)


def threading_layer() -> str:
    """Return the name of Numba's threading layer, starting it if need be."""
    numba.get_num_threads()  # starts it
    return numba.threading_layer()


@cache
def _can_start(count: int) -> bool:
    """Whether so many threads can be created here: where not, some threading layers end the process, others hang."""
    release = threading.Event()
    started = [threading.Thread(target=release.wait, daemon=True) for _ in range(count)]
    try:
        for thread in started:
            thread.start()
    except RuntimeError:
        return False
    finally:
        release.set()
    return True


def run(kernel: Kernel, team: int, variant: tuple[int, ...], *arguments: np.ndarray | Table) -> None:
    """Run a kernel on some arrays by up to `team` threads."""
    tables = [argument if isinstance(argument, Table) else table(argument) for argument in arguments]
    address, function = kernel.function(variant, tables)
    start(address, function, job_of(tables), team)


def job_of(tables: Sequence[Table]) -> array[int]:
    """Return a job: counters of zeros, then where the arrays are."""
    return array("q", [*_HEADER, *chain.from_iterable([table.place for table in tables])])


def start(address: int, function: Callable[[int, int], Any], job: array[int], team: int) -> None:
    """Run a kernel, by its address and as something to call, on a job by up to `team` threads.

    Where others keep the processors busy, threads of a team wait for each other's turns: then the caller's thread is
    without a processor for a good part of the call, asleep or not, while the others hardly work more than it could
    alone; and it computes alone for a while, many times as long as it lost, so that asking a team again costs little;
    and more the more often that is in vain. A loss that is less than what teams have gained before is a moment's.
    """
    global _alone_until, _gained, _patience
    job[WORKERS] = team
    place, _ = job.buffer_info()
    me = threading.get_ident()
    nested = me in _at_work
    _at_work[me] = None
    try:
        if team == 1:
            function(place, 0)
            return
        begun, used = time.perf_counter(), time.thread_time()
        run_team(address, place, team)
        now = time.perf_counter()
        lost = now - begun - (time.thread_time() - used)
        gain = 1e-9 * job[BUSY] - _GAIN * (now - begun)
        least, most = _PATIENCE
        if lost <= _LOSS * (now - begun) or gain >= 0:
            _gained = min(_CREDIT, _gained + max(0.0, gain))
            _patience = max(least, 0.9 * _patience)
        elif lost <= _gained:
            _gained -= lost
        else:
            _alone_until, _gained = now + _patience * min(lost, _SLICE), 0.0
            _patience = min(most, 2 * _patience)
    finally:
        if not nested:
            _at_work.pop(me, None)

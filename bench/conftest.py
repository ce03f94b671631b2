"""What every benchmark shares: the options, the check against the oracle, and the figures that go with a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from bench import cases, cells, peers
from fastclstm.commands.info import processor_name


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the choices of this suite."""
    group = parser.getgroup("fastclstm benchmarks")
    group.addoption("--cases", nargs="+", choices=cases.CASES, help="the cases to time (default: all)")
    group.addoption("--threads", nargs="+", type=int, help="the thread counts (default: 1 and one a core)")
    group.addoption("--peers", nargs="+", help="the implementations to time; one that cannot run is then a failure")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Draw the grid of one operation: cases × threads × implementations."""
    op = metafunc.module.OP
    option = metafunc.config.getoption
    implementations = [name for name, entry in peers.IMPLEMENTATIONS[op].items() if not entry.own_process]
    wanted = option("--cases") or cases.CASES
    metafunc.parametrize("case", [case for case in cases.CASES.values() if case.op == op and case.name in wanted],
                         ids=lambda case: case.name)  # fmt: skip
    metafunc.parametrize("threads", option("--threads") or sorted({1, os.cpu_count() or 1}))
    metafunc.parametrize("name", [name for name in implementations if name in (option("--peers") or implementations)])


@lru_cache
def fma_peak(threads: int) -> float:
    """Return the machine's float32 FMA peak in GFLOP/s, measured once a session."""
    from fastclstm.engines.cpu.peak import fma_peak_gflops

    return fma_peak_gflops(threads)


@lru_cache
def bandwidth(threads: int) -> float:
    """Return the machine's memory bandwidth in GB/s, measured once a session."""
    from fastclstm.engines.cpu.peak import bandwidth_gbs

    return bandwidth_gbs(threads)


@pytest.fixture
def check_and_time(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[cases.Case, str, int], None]:
    """Return the function that prepares an implementation, checks it against the oracle and times it."""

    def check_and_time(case: cases.Case, name: str, threads: int) -> None:
        try:
            prepared = peers.IMPLEMENTATIONS[case.op][name].prepare(case, threads)
        except cells.Unavailable as reason:
            (pytest.fail if request.config.getoption("--peers") else pytest.skip)(f"{name}: {reason}")
        worst = peers.error(prepared, cases.oracle(case.name))
        benchmark.group = f"{case.name}: {case.title}"
        benchmark(prepared.run)
        info = {"implementation": name, "threads": threads, "max_error": worst, "processor": processor_name(),
                "versions": peers.versions()}  # fmt: skip
        if benchmark.stats:
            rate = case.work / benchmark.stats.stats.median
            share = rate / (fma_peak if case.op == "convlstm2d" else bandwidth)(threads)
            info |= {case.unit: round(rate, 1), "share_of_peak": round(share, 3)}
        benchmark.extra_info.update(info)

    return check_and_time

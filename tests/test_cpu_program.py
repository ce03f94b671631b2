"""Several kernels one after the other in one parallel region."""

import threading

import numpy as np
import pytest

from fastclstm.engines.cpu import threads
from fastclstm.engines.cpu.kernels.entry import kernel, table
from fastclstm.engines.cpu.kernels.program import program
from fastclstm.engines.cpu.kernels.team import BEGUN, LEFT, NESTED, WORKERS, claim, look
from fastclstm.engines.cpu.program import Pace, Program

STEPS, WIDTH = 40, 60


@kernel
def add_neighbours(job, worker, source, target):
    """Each element the sum of two that others wrote in the step before."""
    n = claim(job)
    while n < len(source):
        for _ in range(50_000 if n == len(source) - 1 else 0):  # the last one is late
            look(job)
        target[n] = source[n - 1] + source[(n + 1) % len(source)]
        n = claim(job)


def lines():
    """What a program is to fill, line by line, and with what."""
    given = np.zeros((STEPS + 1, WIDTH))
    given[0] = np.random.default_rng(0).standard_normal(WIDTH)
    expected = given.copy()
    for t in range(STEPS):
        expected[t + 1] = np.roll(expected[t], 1) + np.roll(expected[t], -1)
    return given, expected


@pytest.mark.parametrize("team", [1, 2, 5])
def test_a_kernel_sees_all_of_the_one_before(monkeypatch, team):
    monkeypatch.setattr(threads, "usable_threads", lambda: team)
    given, expected = lines()
    several = Program(STEPS // 2)
    several.add(add_neighbours, (), given[:-1:2], given[1::2])
    several.add(add_neighbours, (), given[1::2], given[2::2])
    several.run(team, Pace(1, 1))
    np.testing.assert_array_equal(given, expected)


def test_kernels_of_some_steps_only():
    given, expected = lines()
    few = Program(STEPS)
    few.add(add_neighbours, (), given[:-1], given[1:], where=slice(0, 3))
    few.run(1, Pace(1, 1))
    np.testing.assert_array_equal(given[:4], expected[:4])
    assert not given[4:].any()


def test_workers_that_come_one_after_the_other():
    """As some threading layers run them: the first does it all, and who comes later finds nothing to do."""
    given, expected = lines()
    jobs, entries = [], []
    for t in range(STEPS):
        tables = (table(given[t]), table(given[t + 1]))
        address, _ = add_neighbours.function((), tables)
        job = threads.job_of(tables)
        job[WORKERS], job[NESTED] = 2, 1
        jobs.append(job)
        entries.append((address, job.buffer_info()[0]))
    listed = table(np.array(entries))
    _, run = program.function((), (listed,))
    whole = threads.job_of((listed,))
    whole[WORKERS] = 2
    for worker in range(2):
        run(whole.buffer_info()[0], worker)
        np.testing.assert_array_equal(given, expected)
    assert [job[BEGUN] for job in jobs] == [2] * STEPS


def test_nobody_goes_on_before_those_that_are_at_it():
    """One worker has begun, as its job says, and has not left."""
    given, expected = lines()
    tables = (table(given[0]), table(given[1]))
    _, run = add_neighbours.function((), tables)
    job = threads.job_of(tables)
    job[WORKERS], job[NESTED], job[BEGUN] = 2, 1, 1
    other = threading.Thread(target=run, args=(job.buffer_info()[0], 1), daemon=True)
    other.start()
    other.join(0.2)
    assert other.is_alive()
    np.testing.assert_array_equal(given[1], expected[1])
    job[LEFT] += 1
    other.join(20)
    assert not other.is_alive()


def test_pace():
    """So many steps that Python is heard, more where they are quick, and never none."""
    pace = Pace(10**12, 100)
    assert pace.steps == 1
    pace.took(1e-6, 1)
    assert pace.steps == 4
    pace.took(10.0, 4)
    assert pace.steps == 1
    assert Pace(1, 7).steps == 7

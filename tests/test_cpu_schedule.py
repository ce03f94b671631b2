"""Sharing out the work: every piece has one worker, whatever their number."""

import numba
import numpy as np
import pytest

from fastclstm.engines.cpu.compilation import inline
from fastclstm.engines.cpu.kernels import schedule


@inline
def _done(flows, worker, counts):
    first, last = schedule.share(flows[0], worker)
    for n in range(first, last):
        unit, t, task = schedule.place(flows[0], n)
        counts[unit, t, task] += 1 + 1000 * worker


@numba.njit
def pieces(flows, counts):
    """Count in counts[unit, t, task] how often a piece between two waits is done, plus 1000 times the worker."""
    for worker in range(flows[0].workers):
        _done(flows, worker, counts)


def shared_out(workers, units, T, tasks, by_unit):
    record = np.zeros(1, schedule.FLOW)
    record["workers"], record["units"], record["T"], record["tasks"] = workers, units, T, tasks
    record["length"], record["grain"] = (T, T * tasks) if by_unit else (1, 1)
    counts = np.zeros((units, T if by_unit else 1, tasks), np.int64)
    pieces(record, counts)
    return counts


@pytest.mark.parametrize("by_unit", [True, False])
def test_every_piece_is_done_once(by_unit):
    for workers in (1, 2, 3, 7, 64):
        for units in (1, 2, 5, 64, 100):
            for tasks in (1, 3, 10):
                counts = shared_out(workers, units, 3, tasks, by_unit)
                np.testing.assert_array_equal(counts % 1000, 1)
                assert (counts // 1000).max() < workers


def test_a_unit_stays_with_its_worker():
    counts = shared_out(workers=3, units=7, T=4, tasks=5, by_unit=True)
    worker = counts // 1000
    np.testing.assert_array_equal(worker, worker[:, :1, :1] + np.zeros_like(worker))
    assert np.bincount(worker[:, 0, 0]).tolist() == [2, 2, 3]


def test_tasks_of_a_step_are_shared_evenly():
    for T in (1, 5):
        counts = shared_out(workers=4, units=2, T=T, tasks=7, by_unit=False)
        assert sorted(np.bincount((counts // 1000).ravel())) == [3, 3, 4, 4]


def test_steps_come_in_order_within_a_unit():
    """Each step needs the one before: a worker's pieces of a unit are ordered by step."""

    @numba.njit
    def order(flows, worker, steps):
        first, last = schedule.share(flows[0], worker)
        for n in range(first, last):
            unit, t, _ = schedule.place(flows[0], n)
            steps[n - first] = unit * 1000 + t
        return last - first

    record = np.zeros(1, schedule.FLOW)
    record["workers"], record["units"], record["T"], record["tasks"], record["length"] = 2, 4, 6, 3, 6
    record["grain"] = 6 * 3
    steps = np.zeros(100, np.int64)
    for worker in range(2):
        count = order(record, worker, steps)
        assert count == 2 * 6 * 3
        assert (np.diff(steps[:count]) >= 0).all()


def test_slots_of_arrays_with_and_without_time():
    a = np.zeros((2, 5, 3, 4, 7), np.float32)
    assert schedule.slots(a) == (a.ctypes.data, a.strides[0], a.strides[1], 5)
    assert schedule.slots(a, backwards=True) == (a[:, 4:].ctypes.data, a.strides[0], -a.strides[1], 5)
    assert schedule.slots(a[0]) == (a.ctypes.data, a.strides[1], 0, 1)
    assert schedule.slots(None) == schedule.NOTHING

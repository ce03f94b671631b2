"""How many threads there are, and that computing survives forks, other Python threads and every threading layer.

What could kill or hang a process runs in one of its own.
"""

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest

import fastclstm
from fastclstm import functional
from fastclstm.engines.cpu import threads
from fastclstm.engines.cpu.kernels.entry import kernel
from fastclstm.engines.cpu.kernels.team import BUSY, add, go_elsewhere, processor, wait

ROOT = Path(__file__).parents[1]

COMMON = """
import os, sys, threading
import numpy as np
import numba
import fastclstm
from fastclstm import functional
from fastclstm.engines.cpu import threads

rng = np.random.default_rng(0)
x = rng.standard_normal((2, 2, 24, 24, 3)).astype("f4")
kernel, recurrent = (rng.standard_normal((3, 3, c, 64)).astype("f4") for c in (3, 16))

def compute(algorithm="direct"):
    return functional.convlstm2d(x, kernel, recurrent, engine="cpu", algorithm=algorithm)

def alone(algorithm="direct"):
    before = threads._chosen
    fastclstm.set_num_threads(1)
    try:
        return compute(algorithm)
    finally:
        fastclstm.set_num_threads(before)

teams = []  # of every parallel run
original = threads.run_team
def run_team(address, job, workers):
    teams.append(workers)
    original(address, job, workers)
threads.run_team = run_team
threads._LOSS = np.inf  # however busy the machine is
"""


def in_process(code, **environment):
    """Run code after COMMON in a process of its own, with four of Numba's threads; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", COMMON + textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env=os.environ | {"NUMBA_NUM_THREADS": "4", "FASTCLSTM_NUM_THREADS": "4"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Each test starts from the default and leaves it behind."""
    monkeypatch.delenv(threads.GENERAL_VARIABLE, raising=False)
    monkeypatch.setattr(threads, "_alone_until", 0.0)
    monkeypatch.setattr(threads, "_patience", 20.0)
    monkeypatch.setattr(threads, "_gained", 0.0)
    monkeypatch.setattr(threads, "_chosen", None)
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 8)


# How many.


def test_setting_wins_over_variable_and_variable_over_machine(monkeypatch):
    monkeypatch.setattr(threads, "available_processors", lambda: 5)
    assert fastclstm.get_num_threads() == 5
    monkeypatch.setenv(threads.VARIABLE, "3")
    assert fastclstm.get_num_threads() == 3
    fastclstm.set_num_threads(2)
    assert fastclstm.get_num_threads() == 2
    fastclstm.set_num_threads(np.int64(4))
    assert fastclstm.get_num_threads() == 4
    fastclstm.set_num_threads(None)
    assert fastclstm.get_num_threads() == 3


def test_no_more_than_numba_has(monkeypatch):
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 2)
    fastclstm.set_num_threads(1000)
    assert fastclstm.get_num_threads() == 2


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), ("2", TypeError)])
def test_wrong_count_is_an_error_and_changes_nothing(count, error):
    fastclstm.set_num_threads(2)
    with pytest.raises(error, match=f"count must be a positive integer or None, got {count!r}"):
        fastclstm.set_num_threads(count)
    assert fastclstm.get_num_threads() == 2


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "1.5", "²"])
def test_wrong_variable_is_an_error_that_names_it(monkeypatch, text):
    monkeypatch.setenv(threads.VARIABLE, text)
    with pytest.raises(ValueError, match=f"{threads.VARIABLE} must be a positive integer, got {text!r}"):
        fastclstm.get_num_threads()
    fastclstm.set_num_threads(1)  # then nobody asks the variable
    assert fastclstm.get_num_threads() == 1


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V2 = "0::{}\n"
V1 = "4:memory:/m\n1:cpu,cpuacct:{}\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        (V2.format("/"), {"cpu.max": "max 100000\n"}, None),
        (V2.format("/"), {"cpu.max": "150000 100000\n"}, 1.5),
        (V2.format("/"), {}, None),
        (V2.format("/"), {"cpu.max": ""}, None),
        (V2.format("/"), {"cpu.max": "100000 0\n"}, None),
        (V2.format("/a/b"), {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        (V2.format("/a/b"), {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "200000 100000\n"}, 0.5),
        (V2.format("/outside/of/here"), {"cpu.max": "300000 100000\n"}, 3),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        (V1.format("/a"), {"cpu/a/cpu.cfs_quota_us": "100000\n", "cpu/a/cpu.cfs_period_us": "50000\n"}, 2),
        (V1.format("/a"), {"cpu/a/cpu.cfs_quota_us": "100000\n"}, None),
    ],
)
def test_quota_of_the_control_group(monkeypatch, tmp_path, own, files, quota):
    write(tmp_path, {"self": own} | {f"groups/{name}": text for name, text in files.items()})
    monkeypatch.setattr(threads, "_OWN_CONTROL_GROUPS", tmp_path / "self")
    monkeypatch.setattr(threads, "_CONTROL_GROUPS", tmp_path / "groups")
    assert threads._control_group_quota.__wrapped__() == quota


def test_no_control_groups_is_no_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "_OWN_CONTROL_GROUPS", tmp_path / "missing")
    assert threads._control_group_quota.__wrapped__() is None


@pytest.mark.parametrize(("quota", "count"), [(None, 6), (0.2, 1), (1.4, 1), (2.6, 3), (64.0, 6)])
def test_processors_are_limited_by_the_quota(monkeypatch, quota, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(threads, "_control_group_quota", lambda: quota)
    assert threads.available_processors() == count


@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), ("3,2", 3), (" 2 ", 2), ("", 5), ("0", 5), ("-1", 5), ("many", 5)]
)
def test_the_variable_of_all_libraries_is_honoured_but_is_no_error(monkeypatch, text, count):
    monkeypatch.setattr(threads, "available_processors", lambda: 5)
    monkeypatch.setenv(threads.GENERAL_VARIABLE, text)
    assert fastclstm.get_num_threads() == count
    monkeypatch.setenv(threads.VARIABLE, "4")
    assert fastclstm.get_num_threads() == 4


# When one thread must do it all.


def usable_off_the_main_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(threads.usable_threads).result()


@pytest.mark.parametrize(("layer", "count"), [("omp", 4), ("tbb", 4), ("workqueue", 1)])
def test_unsafe_layer_serves_only_the_main_thread(monkeypatch, layer, count):
    monkeypatch.setattr(threads, "threading_layer", lambda: layer)
    fastclstm.set_num_threads(4)
    assert threads.usable_threads() == 4
    assert usable_off_the_main_thread() == count


def test_python_threads_that_compute_share_the_processors(monkeypatch):
    monkeypatch.setattr(threads, "threading_layer", lambda: "omp")
    fastclstm.set_num_threads(4)
    for others, count in ((0, 4), (1, 2), (2, 1), (5, 1)):
        monkeypatch.setattr(threads, "_at_work", dict.fromkeys(range(-others, 0)))
        assert threads.usable_threads() == usable_off_the_main_thread() == count
    monkeypatch.setattr(threads, "_at_work", {threading.get_ident(): None})  # a call within a call of the same thread
    assert threads.usable_threads() == 4


def test_nobody_is_at_work_after_an_error(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(threads, "run_team", fail)
    with pytest.raises(ZeroDivisionError):
        threads.run(_nothing, 2, (), np.zeros(1))
    assert threads._at_work == {}


@kernel
def _nothing(job, worker, values):
    pass


def test_alone_where_threads_cannot_be_created(monkeypatch):
    """As under a container's limit on processes."""

    def fail(*_):
        raise RuntimeError("can't start new thread")

    threads._can_start.cache_clear()
    monkeypatch.setattr(threads, "threading_layer", fail)  # some start their threads when they are asked
    fastclstm.set_num_threads(4)
    with ThreadPoolExecutor(1) as pool:
        usable = pool.submit(lambda: monkeypatch.setattr(threading.Thread, "start", fail) or threads.usable_threads())
    try:
        assert threads.usable_threads() == usable.result() == 1
    finally:
        threads._can_start.cache_clear()


def test_a_team_that_waited_in_vain_is_not_asked_again_for_a_while(monkeypatch):
    """Its threads had no processors: the caller's was without one for most of the call."""
    now = used = 1000.0

    def sleepy(address, place, workers):
        nonlocal now, used
        now, used = now + 0.010, used + busy

    monkeypatch.setattr(threads.time, "perf_counter", lambda: now)
    monkeypatch.setattr(threads.time, "thread_time", lambda: used)
    monkeypatch.setattr(threads, "run_team", sleepy)
    fastclstm.set_num_threads(2)
    busy = 0.009
    threads.run(_nothing, 2, (), np.zeros(1))
    assert threads.usable_threads() == 2
    busy = 0.005
    threads.run(_nothing, 2, (), np.zeros(1))
    assert threads.usable_threads() == 1
    now += 20 * 0.005 - 0.001
    assert threads.usable_threads() == 1
    now += 0.002
    assert threads.usable_threads() == 2
    threads.run(_nothing, 2, (), np.zeros(1))
    now += 40 * 0.005 - 0.001
    assert threads.usable_threads() == 1
    now, busy = now + 0.002, 0.010
    for _ in range(100):  # a team that gains
        threads.run(_nothing, 2, (), np.zeros(1))
        assert threads.usable_threads() == 2
    assert threads._patience == 20


def test_a_team_that_has_gained_is_asked_again_after_a_loss(monkeypatch):
    """What it has brought pays for that; but not for loss after loss."""
    now = used = 1000.0

    def team(address, place, workers):
        nonlocal now, used
        now, used = now + 0.004, used + own
        ctypes.cast(place, ctypes.POINTER(ctypes.c_int64))[BUSY] = int(both * 1e9)

    monkeypatch.setattr(threads.time, "perf_counter", lambda: now)
    monkeypatch.setattr(threads.time, "thread_time", lambda: used)
    monkeypatch.setattr(threads, "run_team", team)
    fastclstm.set_num_threads(2)
    own, both = 0.004, 0.008
    for _ in range(100):
        threads.run(_nothing, 2, (), np.zeros(1))
    own, both = 0.001, 0.002
    for _ in range(6):  # 3 ms each
        threads.run(_nothing, 2, (), np.zeros(1))
        assert threads.usable_threads() == 2
    threads.run(_nothing, 2, (), np.zeros(1))
    assert threads.usable_threads() == 1
    now += 20 * 0.003 + 0.001
    threads.run(_nothing, 2, (), np.zeros(1))  # nothing is left of what it had gained
    assert threads.usable_threads() == 1


@kernel
def _wait_for_the_last(job, worker, counters, turns):
    """The second worker counts turns, and the first waits until it has."""
    if worker == 0:
        wait(counters[0], 1)
    else:
        for _ in range(turns[0]):
            turns[1] = add(counters[1], 1)
        add(counters[0], 1)


@pytest.mark.skipif(os.name != "posix", reason="no sleep here")
def test_who_waits_sleeps(monkeypatch):
    """The processor that a worker waits on is somebody else's: it takes a small part of the time waited."""
    monkeypatch.setattr(threads, "_LOSS", np.inf)
    counters = np.zeros(16, np.int64)
    turns = np.array([10_000_000, 0])
    addresses = np.array([counters.ctypes.data, counters.ctypes.data + 64])
    threads.run(_wait_for_the_last, 2, (), addresses, np.array([1, 0]))  # compiled
    counters[:] = 0
    start, used = time.perf_counter(), time.thread_time()
    threads.run(_wait_for_the_last, 2, (), addresses, turns)
    seconds = time.perf_counter() - start
    assert turns[1] == turns[0] - 1
    assert time.thread_time() - used < 0.5 * seconds


@kernel
def _move(job, worker, seen):
    """See where this thread is, before and after it is to be elsewhere."""
    seen[0] = processor()
    go_elsewhere(processor())
    seen[1] = processor()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no processors to choose from here")
def test_a_worker_leaves_the_processor_of_its_caller():
    """And may be where it might before; where there is no other it stays."""
    mine, seen = os.sched_getaffinity(0), np.zeros(2, np.int64)
    threads.run(_move, 1, (), seen)
    assert os.sched_getaffinity(0) == mine
    assert {*(seen - 1)} <= mine
    assert len(mine) == 1 or seen[0] != seen[1]
    try:
        os.sched_setaffinity(0, {min(mine)})
        threads.run(_move, 1, (), seen)
        assert os.sched_getaffinity(0) == {min(mine)}
        assert seen.tolist() == [min(mine) + 1] * 2
    finally:
        os.sched_setaffinity(0, mine)


# In processes of their own.


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_bits_do_not_depend_on_the_thread_count(layer):
    printed = in_process("""
        for algorithm in ("direct", "winograd"):
            expected = alone(algorithm)
            for count in (2, 3, 4):
                fastclstm.set_num_threads(count)
                np.testing.assert_array_equal(compute(algorithm), expected)
        print(teams, threads.threading_layer(), numba.get_num_threads())
    """, NUMBA_THREADING_LAYER=layer)  # fmt: skip
    assert printed.strip() == f"[2, 3, 4, 2, 3, 4] {layer} 4"


@pytest.mark.parametrize("limit", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "3"}, {"OMP_DYNAMIC": "true"}])
def test_a_layer_with_fewer_threads_than_workers(limit):
    """Several workers of a team take turns on one thread: the first must not wait for those that come after it."""
    printed = in_process("""
        expected = alone()
        for _ in range(3):
            np.testing.assert_array_equal(compute(), expected)
        print(teams)
    """, NUMBA_THREADING_LAYER="omp", **limit)  # fmt: skip
    assert printed.strip() == "[4, 4, 4]"


def test_settings_of_numba_are_left_alone():
    printed = in_process("""
        numba.set_num_threads(2)
        compute()
        print(teams, numba.get_num_threads(), os.environ.get("OMP_NUM_THREADS"), os.environ["NUMBA_NUM_THREADS"])
    """)
    assert printed.split("\n")[0] == f"[4] 2 {os.environ.get('OMP_NUM_THREADS')} 4"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_use_after_fork(layer):
    printed = in_process("""
        expected = compute()
        child = os.fork()
        if child == 0:
            teams.clear()
            same = np.array_equal(compute(), expected) and np.array_equal(compute("winograd"), alone("winograd"))
            os._exit(0 if same and not teams and threads.usable_threads() == fastclstm.get_num_threads() == 1 else 3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        np.testing.assert_array_equal(compute(), expected)
        print(teams)
    """, NUMBA_THREADING_LAYER=layer)  # fmt: skip
    assert printed.split("\n")[:2] == ["0", "[4, 4]"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_a_team_works():
    """A child born while another Python thread runs kernels computes, and the parent goes on."""
    in_process("""
        expected, stop = compute(), threading.Event()

        def work():
            while not stop.is_set():
                np.testing.assert_array_equal(compute(), expected)

        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(0 if np.array_equal(compute(), expected) else 3)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        thread.join()
        np.testing.assert_array_equal(compute(), expected)
    """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_another_thread_compiles(tmp_path):
    """The child must not wait for a compiler that only its parent has."""
    in_process("""
        import signal, time
        from numba.core.compiler_lock import global_compiler_lock

        thread = threading.Thread(target=compute)
        thread.start()
        while global_compiler_lock._lock.acquire(blocking=False):  # nobody compiles yet
            global_compiler_lock._lock.release()
            time.sleep(0.001)
        child = os.fork()
        if child == 0:
            signal.alarm(100)
            functional.max_pool3d(x, 2)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        thread.join()
    """, FASTCLSTM_CACHE_DIR=str(tmp_path))  # fmt: skip


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_pool_of_processes(method, tmp_path):
    """As data loaders and joblib use one."""
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    script = tmp_path / "pool.py"
    script.write_text(
        COMMON
        + textwrap.dedent(f"""
        def work(n):
            return compute().sum(dtype="f8"), threads.usable_threads()

        if __name__ == "__main__":
            import multiprocessing
            expected = work(0)[0]
            with multiprocessing.get_context("{method}").Pool(2) as pool:
                results = pool.map(work, range(4))
            assert [total for total, _ in results] == [expected] * 4
            print({{count for _, count in results}})
    """)
    )
    environment = {"NUMBA_NUM_THREADS": "4", "FASTCLSTM_NUM_THREADS": "4", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200,
                          env=os.environ | environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("{1}" if method == "fork" else "{4}")


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_many_python_threads(layer):
    """Each gets the same bits; with the layer that two threads must not enter, only the main one has a team."""
    printed = in_process("""
        from concurrent.futures import ThreadPoolExecutor

        expected = {name: alone(name) for name in ("direct", "winograd")}
        start = threading.Barrier(5)

        def work(n):
            start.wait()
            for name in ("direct", "winograd") * 3:
                np.testing.assert_array_equal(compute(name), expected[name])
            return n

        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(work, n) for n in range(4)]
            work(4)
            assert [future.result() for future in futures] == [0, 1, 2, 3]
        teams.clear()
        compute()
        assert teams == [4]
        print(threads.threading_layer())
    """, NUMBA_THREADING_LAYER=layer)  # fmt: skip
    assert printed.strip() == layer


INTERRUPTIBLE = """
    import _thread, signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs begin with Ctrl-C ignored
    from fastclstm.engines.cpu import launch
"""


def test_interrupt_during_a_run_leaves_everything_in_order():
    """Wherever it comes: after any of the instructions around a parallel run."""
    in_process(
        INTERRUPTIBLE
        + """
    expected, interrupted = compute(), 0
    before = numba.get_num_threads()

    def watch(frame, event, argument):
        global countdown
        if "engines/cpu" in frame.f_code.co_filename and frame.f_code.co_name in ("run", "borrow", "give_back"):
            countdown -= 1
            if countdown == 0:
                raise KeyboardInterrupt
        return watch

    for first in range(1, 200):
        countdown = first
        sys.settrace(watch)
        try:
            compute()
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        teams.clear()
        np.testing.assert_array_equal(compute(), expected)
        assert teams == [4] and numba.get_num_threads() == before, (first, teams)
    assert interrupted > 20, interrupted
    """
    )


def test_interrupt_is_heard_between_the_pieces_of_a_long_sequence():
    in_process(
        INTERRUPTIBLE
        + """
    x = np.concatenate([x] * 400, axis=1)
    launch.PIECE_FLOPS = 1
    launch.PIECE_SECONDS = 0.01
    pieces, run = [], threads.run

    def counted(*arguments):
        run(*arguments)
        pieces.append(arguments)
        if len(pieces) == 3:
            _thread.interrupt_main()

    threads.run = counted
    try:
        compute()
    except KeyboardInterrupt:
        assert len(pieces) == 3
    else:
        sys.exit("no KeyboardInterrupt")
    """
    )


@pytest.mark.skipif(not hasattr(__import__("signal"), "setitimer"), reason="no such timer here")
def test_a_call_in_a_signal_handler_spoils_nothing():
    in_process(
        INTERRUPTIBLE
        + """
    from fastclstm import ConvLSTM2DCell

    cells = [ConvLSTM2DCell(3, 16, 3, algorithm="winograd", seed=n) for n in range(2)]
    frame = np.ascontiguousarray(x[:, 0])

    def chain(cell, steps=30):
        h, c = np.zeros((2, 2, 24, 24, 16), np.float32)
        for _ in range(steps):
            spare = np.empty_like(h)
            h, c = cell.step(frame, h, c, out=(spare, c))
        return h, c

    expected, calls = [chain(cell, 30 if cell is cells[0] else 2) for cell in cells], 0

    def handler(*_):
        global calls
        calls += 1
        for a, b in zip(chain(cells[1], 2), expected[1]):
            np.testing.assert_array_equal(a, b)
        signal.setitimer(signal.ITIMER_REAL, 0.002)  # again, once it is through: on a busy machine it takes longer

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.002)
    for _ in range(40):
        for a, b in zip(chain(cells[0]), expected[0]):
            np.testing.assert_array_equal(a, b)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert calls > 3
    """
    )


def test_python_threads_here_get_the_same_bits():
    rng = np.random.default_rng(1)
    x, kernel = rng.standard_normal((3, 20, 20, 8)).astype("f4"), rng.standard_normal((3, 3, 8, 32)).astype("f4")
    expected = functional.conv2d(x, kernel, engine="cpu")
    start = threading.Barrier(3)

    def work(_):
        start.wait()
        return [functional.conv2d(x, kernel, engine="cpu") for _ in range(5)]

    with ThreadPoolExecutor(3) as pool:
        for results in pool.map(work, range(3)):
            for result in results:
                np.testing.assert_array_equal(result, expected)

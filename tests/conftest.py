"""Settings of the test run: the same Hypothesis examples every time, no deadline; what is slow; Keras; the GPU."""

import gc
import os
import re
from functools import cache

os.environ.setdefault("NUMBA_NUM_THREADS", "8")  # before Numba comes: teams larger than the machine are tested too

import cuda_emulator
import pytest
from hypothesis import settings

from fastclstm.engines.cpu import plans, tiles
from fastclstm.engines.cuda import devices
from fastclstm.engines.cuda.product import WARPGROUPS

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# Compiling makes many objects that stay; to look for garbage among them again and again took a twelfth of the time.
gc.set_threshold(100_000)

COLD = ("test_cpu_compilation.py", "test_cpu_warmup.py")
"""Tests that compile kernels anew, in processes of their own."""


def pytest_addoption(parser):
    parser.addoption("--engine", action="append", default=[], choices=["cuda"],
                     help="an engine that must be there: without its GPU its tests fail")  # fmt: skip
    parser.addoption("--all", action="store_true", help="the slow tests too, which pytest alone leaves out")


def leaves_out(config):
    """Whether slow tests are left out: where all tests are asked for, and not by --all or -m."""
    everything = config.args_source in (config.ArgsSource.TESTPATHS, config.ArgsSource.INVOCATION_DIR)
    return everything and not config.option.all and not config.option.markexpr


def pytest_report_header(config):
    if leaves_out(config):
        return "slow tests are left out (deselected); pytest --all runs them, as .ci/run does"
    return None


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    """Mark what is slow by its nature, and what asks for a package; leave out what is slow."""
    for item in items:
        if is_emulated(item) or "nvrtc" in item.fixturenames or item.path.name in COLD:
            item.add_marker("slow")
        if asks_for_packages(item):
            item.add_marker("extra")
    if leaves_out(config):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def asks_for_packages(item):
    """Whether a test, a fixture of it, or its whole file is skipped where a package is missing."""
    if file_asks_for_packages(item.path):
        return True
    fixtures = (fixture for named in item._fixtureinfo.name2fixturedefs.values() for fixture in named)
    functions = [item.function, *(fixture.func for fixture in fixtures)]
    return any("importorskip" in f.__code__.co_names for f in functions if hasattr(f, "__code__"))


@cache
def file_asks_for_packages(path):
    return re.search(r"^\S.*importorskip\(", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def is_emulated(item):
    """Whether the processor plays a GPU in a test."""
    if cuda_emulator.needs_compiler.mark in item.iter_markers("skipif"):
        return True
    return devices.missing() is not None and (
        is_on_cuda(item) or {"cuda_device", "new_device"} & set(item.fixturenames)
    )


def is_on_cuda(item):
    return getattr(getattr(item, "callspec", None), "params", {}).get("engine") == "cuda"


@pytest.fixture(scope="session", autouse=True)
def kernels_of_all_workers(tmp_path_factory):
    """What one process of pytest-xdist has compiled for the emulator the others load."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    shared = tmp_path_factory.getbasetemp().parent / "emulator"
    shared.mkdir(exist_ok=True)
    own, cuda_emulator.folder = cuda_emulator.folder, lambda: shared
    yield
    cuda_emulator.folder = own


@pytest.fixture
def only_young_garbage():
    """What was there before is nothing to the test's gc.collect(): compilers keep so much that each took seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def take(monkeypatch):
    """Function that leaves the cpu engine some of Winograd's tiles, or none."""

    def take(*some):
        monkeypatch.setattr(tiles, "choices", lambda *sizes: some)
        plans.choose_ways.cache_clear()

    yield take
    plans.choose_ways.cache_clear()


@pytest.fixture
def directly(take):
    """Let "auto" of the cpu engine convolve directly: each of Winograd's tiles takes seconds to compile."""
    take()


@pytest.fixture(scope="session")
def real_gpu(request):
    """The GPU of this machine, or None; with --engine=cuda it must be there."""
    missing = devices.missing()
    if missing is not None and "cuda" in request.config.getoption("--engine"):
        pytest.fail(missing)
    return devices.current() if missing is None else None


@pytest.fixture(scope="session")
def new_device(real_gpu):
    """Function that returns a small device of an architecture, of which so many blocks run at once.

    It is made of the GPU there is, else what runs its kernels on the processor. The test is skipped where the GPU is
    older, or there is no C++ compiler for the processor. New memory holds NaN.
    """

    def make(architecture=80, resident=0):
        if real_gpu is None:
            import cuda_emulator

            if cuda_emulator.compiler() is None:
                pytest.skip("there is no GPU, and no C++ compiler for the emulator")
            return cuda_emulator.EmulatedDevice(architecture, resident)
        from poisoned_gpu import PoisonedGPU

        if architecture > real_gpu.architecture or (architecture == WARPGROUPS and real_gpu.architecture != WARPGROUPS):
            pytest.skip(f"the GPU is sm_{real_gpu.architecture}, not sm_{architecture}")
        return PoisonedGPU(real_gpu, architecture=architecture, multiprocessors=4, resident=resident)

    return make


@pytest.fixture(scope="session")
def cuda_device(real_gpu, new_device):
    """The GPU there is, its new memory full of NaN, else what runs its kernels on the processor."""
    if real_gpu is None:
        return new_device()
    from poisoned_gpu import PoisonedGPU

    return PoisonedGPU(real_gpu)


@pytest.fixture(autouse=True)
def on_cuda_device(request):
    """Tests of the engine "cuda" compute on that device."""
    if not is_on_cuda(request.node):
        yield
        return
    with devices.using(request.getfixturevalue("cuda_device")):
        yield


@pytest.fixture(scope="session")
def keras():
    """Keras on PyTorch; the test is skipped where either is missing."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    pytest.importorskip("torch")
    module = pytest.importorskip("keras")
    if module.backend.backend() != "torch":
        pytest.skip("Keras runs on another backend; set KERAS_BACKEND=torch")
    return module


@pytest.fixture
def seeded_keras(keras):
    """Keras that draws the same weights each time, and what reads its files."""
    pytest.importorskip("h5py")
    keras.utils.set_random_seed(0)


@pytest.fixture
def double(keras):
    """Keras whose models are in float64."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield keras
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def any_size(request, monkeypatch):
    """Accelerated modules call our kernels however little there is to compute, but in tests of small calls."""
    from fastclstm.adapters import torch_swapped

    if "small" not in request.node.name:
        monkeypatch.setattr(torch_swapped, "SMALL", {})


@pytest.fixture
def calls(monkeypatch):
    """How often an operator of PyTorch's was called."""
    from fastclstm.adapters import torch_ops

    count = []
    call = torch_ops.Operator.__call__
    monkeypatch.setattr(torch_ops.Operator, "__call__", lambda *args, **o: count.append(1) or call(*args, **o))
    return count

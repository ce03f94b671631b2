"""Settings of the test run: the same Hypothesis examples every time, no deadline on a busy machine; Keras; the GPU."""

import os

os.environ.setdefault(
    "NUMBA_NUM_THREADS", "8"
)  # before Numba is imported: teams larger than the machine are tested too

import pytest
from hypothesis import settings

from fastclstm.engines.cuda import devices
from fastclstm.engines.cuda.device import Device

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--engine", action="append", default=[], choices=["cuda"],
                     help="an engine that must be there: without its GPU its tests fail")  # fmt: skip


@pytest.fixture(scope="session")
def cuda_device(request):
    """The GPU, else what runs its kernels on the processor; the test is skipped without a C++ compiler for that."""
    missing = devices.missing()
    if missing is None:
        return devices.current()
    if "cuda" in request.config.getoption("--engine"):
        pytest.fail(missing)
    import cuda_emulator

    if cuda_emulator.compiler() is None:
        pytest.skip(f"{missing}; and there is no C++ compiler for the emulator")
    return type("Emulated", (cuda_emulator.EmulatedDevice, Device), {})()


@pytest.fixture(autouse=True)
def on_cuda_device(request):
    """Tests of the engine "cuda" compute on that device."""
    if getattr(getattr(request.node, "callspec", None), "params", {}).get("engine") != "cuda":
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

"""Settings of the test run: the same Hypothesis examples every time, no deadline on a busy machine; Keras; the GPU."""

import os

import pytest
from hypothesis import settings

from fastclstm.engines.cuda import devices
from fastclstm.engines.cuda.product import WARPGROUPS

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--engine", action="append", default=[], choices=["cuda"],
                     help="an engine that must be there: without its GPU its tests fail")  # fmt: skip


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

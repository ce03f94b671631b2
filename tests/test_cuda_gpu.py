"""The cuda engine on the GPU of this machine; without one these tests wait."""

import shutil
from functools import partial

import numpy as np
import pytest
from poisoned_gpu import PoisonedGPU

from fastclstm import functional
from fastclstm.engines.cuda import compilation, devices, persistent, recorded
from fastclstm.engines.cuda.product import TENSOR_CORES

SOURCE = """
#include "common.cuh"

KERNEL(128)
add(float* y, const float* x, int n, float times)
{
    resolve(y, x);
    float* kept = (float*)shared_memory();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    kept[threadIdx.x] = i < n && x ? x[i] : 1;
    __syncthreads();
    if (i < n) y[i] += times * kept[threadIdx.x];
}
"""


@pytest.fixture
def make(real_gpu):
    """Function that makes a device of the GPU of this machine; the test is skipped without one."""
    if real_gpu is None:
        pytest.skip(devices.missing())
    return partial(PoisonedGPU, real_gpu)


@pytest.fixture
def real(make):
    """The GPU of this machine, and engine "cuda" on it."""
    with devices.using(make()) as device:
        yield device


@pytest.fixture
def add(real, monkeypatch, tmp_path):
    """Function that launches y += times x, with as much shared memory as there is."""
    for name in ("common.cuh", "memory.cu"):
        shutil.copy(compilation.source_folder() / name, tmp_path)
    (tmp_path / "add.cu").write_text(SOURCE)
    monkeypatch.setattr(compilation, "source_folder", lambda: tmp_path)
    monkeypatch.setattr(compilation, "cache_folder", lambda: None)

    def launch(y, x, times):
        device = y.device
        kernel = device.kernel("add.cu", "add", {"TEST": 1})
        device.launch(
            kernel, (-(-y.size // 128),), (128,), device.shared_bytes, y, x, np.int32(y.size), np.float32(times)
        )

    return launch


def test_a_gpu_computes(real, add):
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    for stream in (None, 1, 2):
        with real.on(stream):
            y = real.zeros((1000,), np.float32)
            add(y, real.put(x), 2)
            add(y, None, 3)
            np.testing.assert_array_equal(real.get(y), 2 * x + 3)


def test_a_gpu_sends_graphs(real, add):
    def compute(times, x):
        y, part = x.device.zeros(x.shape, np.float32), x.device.zeros(x.shape, np.float32)
        for n in range(times):
            add(part, x, n)
            add(y, part, 1)
        return y

    x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    factors = {3: 0 + 1 + 3, 4: 0 + 1 + 3 + 6}
    for n in range(20):  # the same again, other addresses, another form, another stream
        with real.on((None, 1, 2)[n % 3]):
            times = 3 + n % 2
            y = recorded.call(real, ("add", times), (real.put(x + n),), partial(compute, times))
            np.testing.assert_allclose(real.get(y), factors[times] * (x + n), rtol=1e-6)


def test_a_gpu_keeps_the_order_of_its_memory(real, add):
    """What is let go is handed out again only behind the work that uses it."""
    total = real.zeros((1 << 20,), np.float32)

    def compute(n, total):
        part = total.device.zeros(total.shape, np.float32)
        add(part, None, n)
        add(total, part, 1)

    for n in range(200):
        if n % 2:
            recorded.call(real, ("fill", n % 20), (total,), partial(compute, n % 20))
        else:
            compute(n % 20, total)
    np.testing.assert_array_equal(real.get(total), np.full(total.shape, 10 * 190, np.float32))


@pytest.mark.parametrize("algorithm", ["simt", "float32", "tf32", "bfloat16", "float16"])
def test_a_gpu_runs_all_steps_in_one_launch(make, algorithm, monkeypatch):
    """With the bits of a launch a step, again and again: what a barrier does not order shows at times only.

    As an older GPU would: where there is wgmma, it is launched step by step.
    """
    device = make(architecture=min(make().architecture, TENSOR_CORES))
    if algorithm != "simt" and device.architecture < TENSOR_CORES:
        pytest.skip("no tensor cores for it")
    recordings, run = [], persistent.run
    monkeypatch.setattr(persistent, "run", lambda *arguments: recordings.append(run(*arguments)))
    rng = np.random.default_rng(3)
    for B, H, W, C, F in ((1, 4, 4, 1, 1), (1, 64, 64, 1, 64), (3, 33, 47, 5, 3), (2, 32, 32, 16, 32)):
        x, *weights = (
            rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(np.prod(shape[:-1])))
            for shape in ((B, 30, H, W, C), (3, 3, C, 4 * F), (3, 3, F, 4 * F))
        )
        x = x / x.std()
        call = partial(functional.convlstm2d, x, *weights, engine="cuda", algorithm=algorithm)
        recordings.clear()
        with devices.using(device):
            with persistent.forbidden():
                expected = call()
            assert not recordings
            for _ in range(50):
                np.testing.assert_array_equal(call(), expected)
        assert len(recordings) == 1


@pytest.mark.torch
def test_a_gpu_shares_arrays_with_torch(real):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    rng = np.random.default_rng(2)
    shapes = {"x": (2, 5, 9, 7, 3), "kernel": (3, 3, 3, 16), "recurrent_kernel": (3, 3, 4, 16)}
    given = {name: rng.standard_normal(shape).astype(np.float32) / 3 for name, shape in shapes.items()}
    expected, pull = functional.convlstm2d_vjp(**given, engine="reference")
    dy = rng.standard_normal(expected.shape).astype(np.float32)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        for _ in range(20):
            with torch.cuda.stream(stream):
                late = {name: torch.from_numpy(array).cuda(non_blocking=True) * 3 / 3 for name, array in given.items()}
                y, pullback = functional.convlstm2d_vjp(**late)
                gradients = pullback(torch.from_numpy(dy).cuda() * 1)
                doubled = y * 2
            assert y.is_cuda
            torch.cuda.current_stream().wait_stream(stream)
            np.testing.assert_allclose(doubled.cpu().numpy() / 2, expected, atol=1e-5)
            for name, value in pull(dy).items():
                np.testing.assert_allclose(gradients[name].cpu().numpy(), value, atol=1e-4)

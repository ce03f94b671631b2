"""The emulator notices what goes wrong on a GPU."""

import numpy as np
import pytest
from cuda_emulator import EmulatedDevice, needs_compiler

pytestmark = needs_compiler

SOURCE = """
#include "common.cuh"

KERNEL(64)
turned(const float* from, float* to, int barrier)
{
    float* shared = (float*)shared_memory();
    shared[threadIdx.x] = from[threadIdx.x];
    if (barrier) __syncthreads();
    to[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

KERNEL(64)
warp_sum(const int* from, int* to)
{
    int sum = from[threadIdx.x];
    for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffff, sum, bits);
    to[threadIdx.x] = sum;
}

KERNEL(64)
beyond(float* to, int at) { to[at] = 1; }

KERNEL(64)
beyond_shared(int at) { shared_memory()[at] = 1; }

KERNEL(64)
fetch(const float* from, float* to, int at) { to[0] = from[at]; }

KERNEL(64)
divergent(float* to)
{
    if (threadIdx.x == 5)
        __syncthreads();
    else
        __syncwarp();
    to[threadIdx.x] = 1;
}

KERNEL(64)
vector(const float* from, float* to, int at)
{
    float four[4];
    load4(four, from + at);
    to[0] = four[3];
}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "small.cu"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def device():
    return EmulatedDevice()


def launch(device, source, name, *arguments, block=(64,), shared_bytes=0):
    device.launch(device.kernel(source, name, {}), (1,), block, shared_bytes, *arguments)


def test_barriers(device, source):
    x, y = np.arange(64, dtype=np.float32), device.empty((64,), np.float32)
    launch(device, source, "turned", device.put(x), y, np.int32(1), shared_bytes=256)
    np.testing.assert_array_equal(device.get(y), x[::-1])
    launch(device, source, "turned", device.put(x), y, np.int32(0), shared_bytes=256)
    assert np.isnan(device.get(y)).any()  # shared memory starts as NaN


def test_warps(device, source):
    x, y = np.arange(64, dtype=np.int32), device.empty((64,), np.int32)
    launch(device, source, "warp_sum", device.put(x), y)
    np.testing.assert_array_equal(device.get(y), np.repeat(x.reshape(2, 32).sum(1), 32))


@pytest.mark.parametrize("at", [-1, 16])
def test_writes_beyond_an_array(device, source, at):
    with pytest.raises(AssertionError, match="beyond: a write beyond an array of 64 bytes"):
        launch(device, source, "beyond", device.empty((16,), np.float32), np.int32(at))


def test_writes_beyond_shared_memory(device, source):
    with pytest.raises(AssertionError, match="a write beyond the 64 bytes of shared memory"):
        launch(device, source, "beyond_shared", np.int32(70), shared_bytes=64)


def test_reads_of_what_nobody_wrote_are_nan(device, source):
    x, y = device.zeros((4,), np.float32), device.empty((1,), np.float32)
    for array, at in ((x, 4), (x, -1), (device.empty((4,), np.float32), 0)):
        launch(device, source, "fetch", array, y, np.int32(at))
        assert np.isnan(device.get(y))
    launch(device, source, "fetch", x, y, np.int32(3))
    assert device.get(y) == 0


def test_misaligned_vectors(device, source):
    x, y = device.put(np.arange(8, dtype=np.float32)), device.empty((1,), np.float32)
    launch(device, source, "vector", x, y, np.int32(4))
    assert device.get(y) == 7
    with pytest.raises(AssertionError, match="vector: a misaligned access in thread"):
        launch(device, source, "vector", x, y, np.int32(1))
    launch(device, source, "vector", x, y, np.int32(4))  # it still works after an error


def test_barrier_that_not_all_threads_reach(device, source):
    with pytest.raises(AssertionError, match="a barrier is not reached by every thread"):
        launch(device, source, "divergent", device.empty((64,), np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "takes 2 arguments, not 0"),
        ((None, np.float32(1)), "argument 1 is a number|argument 1 is float32"),
        ((None, np.int64(1)), "argument 1 is int64, not int32"),
        ((None, 1), "argument 1 is a int"),
        ((np.int32(1), np.int32(1)), "argument 0 is a pointer"),
        ((np.zeros(4, np.float64), np.int32(1)), "argument 0 is float64, not float32"),
        ((None, None), "argument 1 is a number"),
    ],
)
def test_wrong_arguments(device, source, arguments, message):
    arguments = [device.put(a) if isinstance(a, np.ndarray) else a for a in arguments]
    with pytest.raises(AssertionError, match=message):
        launch(device, source, "beyond", *arguments)


def test_arrays_of_another_device(device, source):
    with pytest.raises(AssertionError, match="is on another device"):
        launch(device, source, "beyond", EmulatedDevice().empty((4,), np.float32), np.int32(0))


def test_too_much_shared_memory_and_empty_grids(device, source):
    kernel = device.kernel(source, "beyond_shared", {})
    with pytest.raises(AssertionError, match="bytes of shared memory"):
        device.launch(kernel, (1,), (64,), device.shared_bytes + 1, np.int32(0))
    with pytest.raises(AssertionError, match="empty grid"):
        device.launch(kernel, (0,), (64,), 64, np.int32(0))


def test_copies_come_and_go(device):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    array = device.put(x)
    x[:] = 0
    copy = device.get(array)
    np.testing.assert_array_equal(copy, [[0, 1, 2], [3, 4, 5]])
    copy[:] = 0
    np.testing.assert_array_equal(device.get(array), [[0, 1, 2], [3, 4, 5]])
    assert not device.get(device.zeros((3, 2), np.float64)).any()
    assert np.isnan(device.get(device.empty((3, 2), np.float64))).all()

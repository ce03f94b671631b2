"""The emulator notices what goes wrong on a GPU."""

import numpy as np
import pytest
from cuda_emulator import EmulatedDevice, needs_compiler

pytestmark = needs_compiler

SOURCE = """
#include "tensor_cores.cuh"

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

KERNEL(32)
matrices(const unsigned short* from, int* to, int transposed)
{
    unsigned short* shared = (unsigned short*)shared_memory();
    for (int n = threadIdx.x; n < 256; n += 32) shared[n] = from[n];
    __syncthreads();
    unsigned words[4];
    if (transposed)
        ldmatrix_transposed(words, shared + threadIdx.x * 8);
    else
        ldmatrix(words, shared + threadIdx.x * 8);
    for (int i = 0; i < 4; i++) to[i * 32 + threadIdx.x] = words[i];
}

// Block n takes what block n + 1 has written, by way of the read-only cache (1), late (2); waiting for others or not.
KERNEL(64)
exchange(const float* from, float* between, float* to, int* arrived, int by, int waits)
{
    int n = blockIdx.x * 64 + threadIdx.x, next = (blockIdx.x + 1) % gridDim.x * 64 + threadIdx.x;
    between[n] = from[n];
    __syncthreads();
    if (!threadIdx.x) {
        ++*arrived;
        if (waits) emulated_wait_for(arrived, gridDim.x + waits - 1);
    }
    __syncthreads();
    to[n] = load(between + next, by == 2);
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


def test_matrices(device, source):
    """Lane 4r + n gets elements 2n and 2n + 1 of row r of each 8x8 matrix, or of column r."""
    x, y = np.arange(256, dtype=np.uint16).reshape(4, 8, 8), device.empty((128,), np.int32)
    for transposed in (0, 1):
        launch(device, source, "matrices", device.put(x), y, np.int32(transposed), block=(32,), shared_bytes=512)
        found = device.get(y).view(np.uint16).reshape(4, 8, 8)
        np.testing.assert_array_equal(found, x.transpose(0, 2, 1) if transposed else x)


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


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_blocks_that_wait_for_each_other(source, blocks):
    device = EmulatedDevice(resident=7)
    kernel, x = device.kernel(source, "exchange", {}), np.arange(64.0 * blocks, dtype=np.float32)

    def run(by, waits, cooperative=True):
        y, between, count = (device.zeros((size,), dtype) for size, dtype in
                             ((x.size, np.float32), (x.size, np.float32), (1, np.int32)))  # fmt: skip
        device.launch(kernel, (blocks,), (64,), 0, device.put(x), between, y, count, np.int32(by), np.int32(waits),
                      cooperative=cooperative)  # fmt: skip
        return device.get(y)

    np.testing.assert_array_equal(run(2, 1), np.roll(x, -64))
    if blocks > 1:
        assert any((run(2, 0) != np.roll(x, -64)).any() for _ in range(9))
        with pytest.raises(AssertionError, match="a barrier is not reached by every thread"):  # one runs after another
            run(2, 1, cooperative=False)
    with pytest.raises(AssertionError, match="a barrier is not reached by every thread and block"):
        run(2, 2)
    with pytest.raises(AssertionError, match="argument 1 is written and read through the read-only cache"):
        run(1, 1)
    np.testing.assert_array_equal(run(2, 1), np.roll(x, -64))  # it still works after an error


def test_more_blocks_than_run_at_once(device, source):
    with pytest.raises(AssertionError, match="are not resident"):
        device.launch(device.kernel(source, "beyond", {}), (1,), (64,), 0, None, np.int32(0), cooperative=True)


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

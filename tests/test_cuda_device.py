"""The device that the cuda engine computes on: which one, what is missing, and in what order a GPU gets its work.

A GPU is played by a fake of cuda.core and of the driver that writes down what it is asked for, and whose memory is the
processor's.
"""

import ctypes
import gc
import re
import sys
import threading
import weakref
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from bench import gpu as bench_gpu
from fastclstm import functional
from fastclstm.commands import info
from fastclstm.engines.cuda import compilation, devices, gpu, persistent, recorded
from fastclstm.engines.cuda.device import DeviceArray, Launch

NO_DEVICE, MISMATCH = 100, 803


class Driver:
    """cuda.bindings.driver: its functions return (status, values …)."""

    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN="shared bytes")
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="dynamic bytes")
    CUpointer_attribute = SimpleNamespace(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL="ordinal")

    def __init__(self, log):
        self.log, self.status, self.gpus, self.context, self.version = log, 0, 2, None, 13020
        self.streams, self.capturing = {}, set()

    def cuInit(self, flags):
        if isinstance(self.status, Exception):
            raise self.status
        return (self.status,)

    def cuDeviceGetCount(self):
        return 0, self.gpus

    def cuDriverGetVersion(self):
        return 0, self.version

    def cuCtxGetDevice(self):
        return (201, None) if self.context is None else (0, self.context)

    def cuCtxGetCurrent(self):
        return 0, self.context

    def cuCtxSetCurrent(self, context):
        self.context = context
        return (0,)

    def cuDeviceGetAttribute(self, attribute, ordinal):
        assert attribute == "shared bytes"
        return 0, 232_448

    def cuPointerGetAttribute(self, attribute, pointer):
        assert attribute == "ordinal"
        return 0, 1

    def cuStreamIsCapturing(self, stream):
        return 0, stream in self.capturing

    def cuStreamGetId(self, stream):
        assert stream not in self.capturing, "this would break the capture"
        return 0, self.streams.get(stream, stream + 100)

    def cuKernelSetAttribute(self, attribute, value, kernel, ordinal):
        assert attribute == "dynamic bytes"
        self.log.append(("opt in", kernel, value, ordinal))
        return (0,)

    def cuMemsetD8Async(self, pointer, value, size, stream):
        ctypes.memset(pointer, value, size)
        return self._enqueued("memset", stream)

    def cuMemcpyHtoDAsync(self, to, source, size, stream):
        ctypes.memmove(to, source, size)
        return self._enqueued("put", stream)

    def cuMemcpyDtoHAsync(self, to, source, size, stream):
        ctypes.memmove(to, source, size)
        return self._enqueued("get", stream)

    def _enqueued(self, what, stream):
        assert self.context is not None, "no GPU is current"
        self.log.append((what, int(stream)))
        return (0,)


def core_of(driver, log, capability=(9, 0)):
    """cuda.core, as far as it is used."""
    core = ModuleType("cuda.core")

    class Stream:
        def __init__(self, handle):
            self.handle = handle

        @staticmethod
        def from_handle(handle):
            return Stream(handle)

        def wait(self, other):
            log.append(("wait", self.handle, other.handle))

        def sync(self):
            log.append(("sync", self.handle))

        def create_graph_builder(self):
            assert self.handle == 1001, "not the stream for captures"
            return Builder()

    class Buffer:
        def __init__(self, size):
            self.memory = ctypes.create_string_buffer(size)
            self.handle = ctypes.addressof(self.memory)

    class Graph:
        def __init__(self, launches):
            self.launches = launches

        def launch(self, stream):
            log.append(("graph", stream.handle, self.launches))

    class Builder:
        def __init__(self):
            self.launches, self.state = [], "new"

        def begin_building(self, mode):
            assert (self.state, mode) == ("new", "relaxed")
            self.state = "building"

        def end_building(self):
            assert self.state == "building"
            self.state = "built"

        def complete(self):
            assert self.state == "built"
            log.append(("instantiate",))
            return Graph(self.launches)

        def close(self):
            if self.state == "building":
                log.append(("closed",))
            self.state = "closed"

    class Device:
        def __init__(self, ordinal):
            self.ordinal = ordinal
            self.name, self.compute_capability = f"Fake {ordinal}", capability
            self.properties = SimpleNamespace(multiprocessor_count=132, cooperative_launch=True)
            self.memory_resource = SimpleNamespace(allocate=self.allocate)

        def set_current(self):
            driver.context = self.ordinal

        def create_stream(self):
            assert driver.context == self.ordinal
            self.streams = getattr(self, "streams", 0) + 1
            return Stream(999 + 100 * self.ordinal + self.streams)

        def allocate(self, size, *, stream):
            assert driver.context == self.ordinal
            log.append(("allocate", size, stream.handle))
            return Buffer(size)

    class ObjectCode:
        def __init__(self, code):
            self.code = code

        @staticmethod
        def from_cubin(code, *, name=""):
            return ObjectCode(code)

        def get_kernel(self, name):
            return SimpleKernel((self.code, name))

    class SimpleKernel:
        def __init__(self, handle):
            self.handle = handle
            self.occupancy = SimpleNamespace(max_active_blocks_per_multiprocessor=self.most_blocks)

        def most_blocks(self, threads, shared_bytes):
            assert driver.context is not None
            log.append(("occupancy", self.handle, threads, shared_bytes))
            return min(2048 // threads, 232_448 // shared_bytes)

    class LaunchConfig:
        def __init__(self, *, grid, block, shmem_size, is_cooperative):
            assert not is_cooperative or driver.context is not None
            self.values = grid, block, shmem_size
            self.is_cooperative = is_cooperative

    def launch(stream, config, kernel, *arguments):
        entry = kernel.handle, *config.values, arguments
        if isinstance(stream, Builder):
            assert stream.state == "building"
            stream.launches.append(entry)
        else:
            assert driver.context is not None
            kind = "cooperative launch" if config.is_cooperative else "launch"
            log.append((kind, stream.handle, *entry))

    core.__version__ = "1.2.2"
    core.Stream, core.Device, core.ObjectCode, core.LaunchConfig, core.launch = (
        Stream,
        Device,
        ObjectCode,
        LaunchConfig,
        launch,
    )
    core.LEGACY_DEFAULT_STREAM, core.PER_THREAD_DEFAULT_STREAM = Stream(1), Stream(2)
    return core


@pytest.fixture
def log():
    return []


@pytest.fixture
def driver(monkeypatch, log):
    """A machine with two GPUs of sm_90."""
    fake = Driver(log)
    bindings, cuda = ModuleType("cuda.bindings"), ModuleType("cuda")
    bindings.driver, cuda.bindings, cuda.core = fake, bindings, core_of(fake, log)
    for name, module in {"cuda": cuda, "cuda.bindings": bindings, "cuda.core": cuda.core}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake)
    monkeypatch.setattr(compilation, "compile_source", lambda *arguments: repr(arguments).encode())
    monkeypatch.setattr(compilation, "nvrtc", lambda: ((13, 0), (75, 80, 90)))
    for cached in (gpu._driver, gpu.at):
        cached.cache_clear()
    yield fake
    for cached in (gpu._driver, gpu.at):
        cached.cache_clear()


@pytest.fixture
def card(driver):
    return devices.current()


# --- Which device ---


def test_the_first_gpu_unless_the_process_has_chosen(driver):
    assert devices.current().dlpack_device == (2, 0)
    driver.context = 1
    assert devices.current().dlpack_device == (2, 1)
    assert devices.current() is gpu.at(1)
    assert driver.context == 1


def test_what_a_gpu_is(card):
    assert (card.architecture, card.multiprocessors, card.shared_bytes) == (90, 132, 232_448)
    assert card.itself is card
    assert str(card) == "Fake 0, sm_90, 132 multiprocessors, driver for CUDA 13.2"


def test_using_another(driver):
    other = SimpleNamespace(dlpack_device=(1, 0))
    with devices.using(other):
        assert devices.current() is other
        assert devices.holding(1) is other
        assert devices.ordinal_of(123) == 0
        with devices.using(gpu.at(1)):
            assert devices.current() is gpu.at(1)
            assert devices.holding(0) is gpu.at(0)  # an array's own GPU, whatever is in use
    assert devices.current() is gpu.at(0)
    assert devices.ordinal_of(123) == 1
    assert devices.ordinal_of(0) == 0  # an empty array's memory


# --- What is missing ---


def test_without_the_extra(monkeypatch):
    gpu._driver.cache_clear()
    for name in ("cuda", "cuda.core", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    message = r"^engine 'cuda' needs cuda-core with NVRTC \(.*\); pip install 'fastclstm\[cuda\]'$"
    with pytest.raises(ImportError, match=message):
        devices.current()
    assert devices.missing().endswith("pip install 'fastclstm[cuda]'")


def test_with_an_extra_that_is_too_old(driver):
    sys.modules["cuda.core"].__version__ = "0.7.0"
    with pytest.raises(ImportError, match=r"with NVRTC \(version 1 or newer, not 0\.7\.0\); pip install"):
        devices.current()


@pytest.mark.parametrize("error", [RuntimeError("Failed to dlopen libcuda.so.1"), OSError("libcuda.so.1: none")])
def test_without_a_driver(driver, error):
    driver.status = error
    message = f"^engine 'cuda' finds no NVIDIA driver \\({error}\\); install it, or pass engine='cpu'$"
    with pytest.raises(ImportError, match=message):
        devices.current()


@pytest.mark.parametrize(("status", "gpus"), [(NO_DEVICE, 0), (0, 0)])
def test_without_a_gpu(driver, status, gpus):
    driver.status, driver.gpus = status, gpus
    with pytest.raises(ImportError, match=r"^engine 'cuda' finds an NVIDIA driver but no GPU \(see nvidia-smi and "
                                      r"CUDA_VISIBLE_DEVICES\); pass engine='cpu'$"):  # fmt: skip
        devices.current()


def test_with_a_driver_that_does_not_start(driver):
    driver.status = MISMATCH
    with pytest.raises(ImportError, match=r"^engine 'cuda': the NVIDIA driver does not start \(803\); see nvidia-smi$"):
        devices.current()


def test_with_an_old_gpu(driver, log):
    sys.modules["cuda.core"].Device = core_of(driver, log, (6, 1)).Device
    message = r"^engine 'cuda' needs a GPU of sm_70 \(Volta\) or newer, but Fake 0 is sm_61; pass engine='cpu'$"
    with pytest.raises(ImportError, match=message):
        devices.current()
    assert "sm_61" in devices.missing()


def test_with_a_driver_that_is_older_than_nvrtc(driver):
    driver.version = 12040
    message = (r"^engine 'cuda': the driver is for CUDA 12\.4, older than NVRTC 13; update it, or pip install "
               r"'cuda-core\[cu12\]'$")  # fmt: skip
    with pytest.raises(ImportError, match=message):
        devices.current()


def test_nothing_is_missing(card):
    assert devices.missing() is None


def test_a_call_that_fails(card, driver, monkeypatch):
    monkeypatch.setattr(driver, "cuMemcpyHtoDAsync", lambda *arguments: (700,))
    with pytest.raises(RuntimeError, match=r"^engine 'cuda': the driver reports 700$"):
        card.put(np.ones(3))


def told():
    """What `python -m fastclstm info` says of the GPU and of the engines."""
    facts = dict(info.facts())
    return facts["cuda"], facts["engines"]


def test_info_shows_the_gpu(card):
    cuda, engines = told()
    assert cuda.startswith("Fake 0, sm_90, 132 multiprocessors, driver for CUDA 13.2, NVRTC 13.0; kernels kept in ")
    assert "cuda (ready)" in engines


def test_info_says_what_is_missing(driver):
    driver.status = RuntimeError("Failed to dlopen libcuda.so.1")
    assert told()[0].startswith("no: engine 'cuda' finds no NVIDIA driver (")
    driver.status = NO_DEVICE
    assert told()[0].startswith("no: engine 'cuda' finds an NVIDIA driver but no GPU")
    assert "cuda (not here)" in told()[1]
    sys.modules["cuda.core"].__version__ = "0.7.0"
    assert re.match(r"no: engine 'cuda' needs .*; pip install 'fastclstm\[cuda\]'; .*NVIDIA", told()[0])


# --- Memory ---


def test_there_and_back(card, log):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    there = card.put(x.T)
    assert (there.shape, there.dtype, there.stream, there.device) == ((3, 2), np.float32, 1000, card)
    np.testing.assert_array_equal(card.get(there), x.T)
    assert log == [("allocate", 24, 1000), ("put", 1000), ("get", 1000), ("sync", 1000)]


def test_zeros(card):
    array = card.zeros((2, 5), np.int64)
    np.testing.assert_array_equal(card.get(array), np.zeros((2, 5), np.int64))
    assert (array.ndim, array.size, array.nbytes) == (2, 10, 80)


def test_no_memory_for_no_elements(card, log):
    for array in (card.empty((0, 3), "f4"), card.zeros((0, 3), "f4"), card.put(np.ones((0, 3)))):
        assert (array.pointer, array.shape) == (0, (0, 3))
        assert card.get(array).shape == (0, 3)
    assert log == []


def test_reshape(card):
    array = card.put(np.arange(6.0))
    same = array.reshape(2, 3)
    assert (same.pointer, same.owner, same.shape) == (array.pointer, array.owner, (2, 3))
    with pytest.raises(ValueError, match=r"^a device array \(6,\) cannot be seen as \(4,\)$"):
        array.reshape(4)


def test_the_gpu_is_current_only_inside(card, driver):
    driver.context = 1
    card.put(np.ones(3))  # checks that some GPU is current, and memory that it is this one
    assert driver.context == 1
    with card.on(None):
        assert driver.context == 0
    assert driver.context == 1


# --- Streams ---


class OfCaller:
    def __cuda_stream__(self):
        return 0, 77


@pytest.mark.parametrize(("stream", "handle"), [(None, 1000), (0, 1), (1, 1), (2, 2), (42, 42), (OfCaller(), 77)])
def test_work_goes_to_the_stream_that_is_wanted(card, log, stream, handle):
    with card.on(stream):
        assert card.stream_handle() == handle
        array = card.zeros((4,), "f4")
        card.finish()
    assert array.stream == handle
    assert log == [("allocate", 16, handle), ("memset", handle), ("sync", handle)]


def test_no_stream_means_that_of_the_outside(card):
    with card.on(42), card.on(None):
        assert card.stream_handle() == 42
    assert card.stream_handle() == 1000


def test_threads_have_streams_of_their_own(card):
    seen = []
    with card.on(42):
        thread = threading.Thread(target=lambda: seen.append(card.stream_handle()))
        thread.start()
        thread.join()
    assert seen == [1000]


def test_order(card, log):
    card.order(42, after=43)
    card.order(42, after=42)
    card.order(None, after=42)
    card.order(42, after=None)
    card.order(1, after=2)
    assert log == [("wait", 42, 43), ("wait", 1, 2)]


def test_getting_waits_for_the_stream_of_the_array(card, log):
    with card.on(42):
        array = card.zeros((1,), "f4")
    log.clear()
    card.get(array)
    assert log == [("wait", 1000, 42), ("get", 1000), ("sync", 1000)]


# --- Kernels ---


def test_a_kernel_is_compiled_once_for_this_gpu(card):
    kernel = card.kernel("conv.cu", "conv2d", {"B": 1, "A": 2})
    assert kernel.handle == (b"('conv.cu', {'B': 1, 'A': 2}, 'sm_90a')", "conv2d")
    assert card.kernel("conv.cu", "conv2d", {"A": 2, "B": 1}) is kernel
    assert card.kernel("conv.cu", "conv2d", {"A": 3, "B": 1}) is not kernel
    assert card.kernel("conv.cu", "other", {"A": 2, "B": 1}).handle[1] == "other"


def test_launch(card, log):
    kernel, x = card.kernel("a.cu", "a", {}), card.put(np.ones(3))
    log.clear()
    card.launch(kernel, (np.int64(3), 2, 1), (128, 1, 1), 0, x, None, np.int32(5), np.float32(0.5))
    assert log == [("launch", 1000, kernel.handle, (3, 2, 1), (128, 1, 1), 0, (x.pointer, 0, 5, 0.5))]
    assert [type(value) for value in log[0][-1]] == [int, int, np.int32, np.float32]


@pytest.mark.parametrize("argument", [5, 0.5, np.ones(3), "x"])
def test_arguments_have_types(card, argument):
    with pytest.raises(TypeError, match=r"^a kernel's argument must be a device array, None or a NumPy scalar, got "):
        card.launch(card.kernel("a.cu", "a", {}), (1,), (1,), 0, argument)


def test_much_shared_memory_is_asked_for_once(card, log):
    kernel = card.kernel("a.cu", "a", {})
    for size in (49_152, 100_000, 60_000, 200_000):
        card.launch(kernel, (1,), (1,), size)
    assert [entry[2:] for entry in log if entry[0] == "opt in"] == [(100_000, 0), (200_000, 0)]
    assert [entry[-2] for entry in log if entry[0] == "launch"] == [49_152, 100_000, 60_000, 200_000]


def test_resident_blocks(card, log):
    kernel = card.kernel("a.cu", "a", {})
    for _ in range(2):
        assert card.resident_blocks(kernel, 128, 60_000) == 132 * 3
    assert card.resident_blocks(kernel, 1024, 1000) == 132 * 2
    assert [entry[0] for entry in log] == ["opt in", "occupancy", "occupancy"]  # asked once, and after the opt-in
    card._device.properties.cooperative_launch = False
    assert card.resident_blocks(card.kernel("a.cu", "b", {}), 128, 60_000) == 0


def test_cooperative_launch(card, log):
    kernel = card.kernel("a.cu", "a", {})
    card.launch(kernel, (3,), (128,), 60_000, np.int32(5), cooperative=True)
    assert log == [("opt in", kernel.handle, 60_000, 0),
                   ("cooperative launch", 1000, kernel.handle, (3,), (128,), 60_000, (5,))]  # fmt: skip


# --- Graphs ---


def launches(card, arrays, kernels="ab"):
    return [
        Launch(card.kernel("a.cu", name, {}), (np.int64(number + 1),), (32,), 0, (array, np.int32(number)))
        for number, (array, name) in enumerate(zip(arrays, kernels, strict=False))
    ]


def names(log):
    return [entry[0] for entry in log if entry[0] != "allocate"]


def test_launches_are_sent_as_one(card, log):
    x, y = card.empty((3,), "f4"), card.empty((3,), "f4")
    graph = card.graph(launches(card, (x, y)))
    for stream in (None, 42):
        with card.on(stream):
            card.send(graph)
    assert names(log) == ["instantiate", "graph", "graph"]
    assert [entry[1] for entry in log[-2:]] == [1000, 42]
    assert [(handle[1], grid, block, *values) for handle, grid, block, _, values in log[-1][2]] == [
        ("a", (1,), (32,), x.pointer, 0), ("b", (2,), (32,), y.pointer, 1)
    ]  # fmt: skip


def test_a_launch_that_fails_leaves_no_capture_behind(card, log):
    x = card.empty((3,), "f4")
    with pytest.raises(TypeError):
        card.graph([*launches(card, (x,)), Launch(card.kernel("a.cu", "a", {}), (1,), (1,), 0, ("no argument",))])
    card.send(card.graph(launches(card, (x,))))
    assert names(log) == ["closed", "instantiate", "graph"]


def test_a_prepared_launch_takes_more_numbers(card, log):
    x = card.empty((3,), "f4")
    start = card.prepared(Launch(card.kernel("a.cu", "a", {}), (4,), (32,), 8, (x, np.int32(5))))
    log.clear()
    for stream, numbers in ((None, [7, 1 << 40]), (42, [8, 9])):
        with card.on(stream):
            start(numbers)
    assert [(stream, arguments) for _, stream, *_, arguments in log] == [
        (1000, (x.pointer, 5, 7, 1 << 40)),
        (42, (x.pointer, 5, 8, 9)),
    ]


def test_scratch_is_one_piece_of_memory(card, log):
    addresses, _ = card.scratch([100, 256, 4])
    assert [address - addresses[0] for address in addresses] == [0, 256, 512]
    assert log == [("allocate", 768, 1000)]
    assert card.scratch([])[0] == []


def test_streams_are_told_apart_for_good(card, driver):
    assert card.stream_key() is None
    keys = []
    for stream in (42, 43, 2):
        with card.on(stream):
            keys.append(card.stream_key())
            assert card.stream_key() == keys[-1]

    def another():
        with card.on(2):  # each thread has its own under this handle
            keys.append(card.stream_key())

    thread = threading.Thread(target=another)
    thread.start()
    thread.join()
    driver.streams[42] = 7  # destroyed, and its handle is that of a new one
    with card.on(42):
        keys.append(card.stream_key())
    assert len(set(keys)) == 5


def test_a_stream_that_is_captured_is_refused_before_anything_else_is_done(card, driver, log):
    driver.capturing.add(42)
    x = DeviceArray(64, (1, 2, 4, 4, 1), np.dtype("f4"), None, card, 42)
    weights, h = [np.ones((3, 3, c, 8), np.float32) for c in (1, 2)], np.ones((1, 4, 4, 2), np.float32)
    for call in (
        lambda: functional.convlstm2d(x, *weights),
        lambda: functional.convlstm2d(x, *weights, initial_state=(h, h)),
        lambda: functional.max_pool3d(x, 2),
    ):
        with pytest.raises(RuntimeError, match=r"^engine 'cuda': the stream is being captured into a CUDA graph"):
            call()
        assert log == []


# --- Recorded calls ---


def recurrent(card, T=3):
    """An x of the caller on stream 42, and weights of his."""
    arrays = [np.ones(shape, np.float32) for shape in ((1, T, 4, 4, 1), (3, 3, 1, 8), (3, 3, 2, 8))]
    with card.on(42):
        return [card.put(array) for array in arrays]


@persistent.forbidden()
def test_a_repeated_call_is_one_table_and_one_graph(card, log):
    for T in (3, 30):
        x, kernel, recurrent_kernel = recurrent(card, T)
        functional.convlstm2d(x, kernel, recurrent_kernel)
        kernel = recurrent(card)[1]
        log.clear()
        y = functional.convlstm2d(x, kernel, recurrent_kernel)
        table, graph = (entry for entry in log if entry[0] in ("launch", "graph"))
        assert names(log) == ["launch", "graph"]
        assert table[1] == graph[1] == 42
        assert table[2][1] == "write_table"
        assert {x.pointer, kernel.pointer, recurrent_kernel.pointer, y.pointer} < set(table[-1])
        assert len(graph[2]) == T + 2
        assert not {x.pointer, kernel.pointer, y.pointer} & {v for launch in graph[2] for v in launch[-1]}
        assert [entry[0] for entry in log].count("allocate") == 4  # the results and what is between


def test_a_plan_is_of_one_stream(card, log):
    x, *weights = recurrent(card)
    tables = {}
    for _ in range(2):
        for stream in (42, 43):
            functional.convlstm2d(replace(x, stream=stream), *weights)
            table, graph = (entry for entry in log[-2:])
            assert (table[1], graph[1]) == (stream, stream)
            tables.setdefault(stream, table[-1][0])
            assert tables[stream] == table[-1][0]
    assert len(set(tables.values())) == 2
    assert names(log).count("instantiate") == 2


def test_weights_of_numpy_are_brought_and_packed_once(card, log):
    x, *_ = recurrent(card)
    weights = [np.ones(shape, np.float32) for shape in ((3, 3, 1, 8), (3, 3, 2, 8), (8,))]
    log.clear()
    functional.convlstm2d(x, *weights)
    first = names(log)
    log.clear()
    functional.convlstm2d(x, *weights)
    assert names(log) == ["launch", "graph"]
    log.clear()
    functional.convlstm2d(replace(x, stream=43), *weights)  # which does not wait for stream 42
    assert names(log) == [name for name in first if name != "occupancy"]
    weights[1][0, 0, 0, 0] = 5
    log.clear()
    functional.convlstm2d(x, *weights)
    packs = [entry for entry in log if entry[0] == "launch" and entry[2][1] == "pack"]
    assert len(packs) == 2
    assert names(log).count("instantiate") == 0


@pytest.mark.usefixtures("only_young_garbage")
def test_plans_that_are_let_go_give_their_memory_back(card, monkeypatch):
    monkeypatch.setattr(recorded, "_plans", {})
    monkeypatch.setattr(recorded, "MOST_PLANS", 2)
    held = []
    for T in (1, 2, 3):
        functional.convlstm2d(*recurrent(card, T))
        held.append(weakref.ref(next(reversed(recorded._plans.values()))._table[0].owner))
    gc.collect()
    assert [memory() is None for memory in held] == [True, False, False]
    functional.convlstm2d(*recurrent(card, 2))  # used again: 3 is the one that goes
    functional.convlstm2d(*recurrent(card, 4))
    gc.collect()
    assert [memory() is None for memory in held] == [True, False, True]
    monkeypatch.setattr(recorded, "MOST_BYTES", 1)
    functional.convlstm2d(*recurrent(card, 5))
    gc.collect()
    assert held[1]() is None
    assert len(recorded._plans) == 1


# --- The benchmark ---


def test_the_benchmark_says_what_is_missing(driver):
    driver.status = NO_DEVICE
    with pytest.raises(SystemExit, match=r"^bench.gpu: engine 'cuda' finds an NVIDIA driver but no GPU"):
        bench_gpu.main([])


def test_the_benchmark_keeps_all_memory_of_a_graph(card, log):
    arrays, keep = recurrent(card), []
    log.clear()
    with bench_gpu._held(card, keep):
        functional.convlstm2d(*arrays)
    taken = [entry[0] for entry in log].count("allocate")
    assert 4 < taken == len([owner for _, owner in keep if owner is not None])
    functional.convlstm2d(*arrays)
    assert [entry[0] for entry in log].count("allocate") > taken == len([owner for _, owner in keep if owner])


# --- The fake is true to the library ---


def test_cuda_core_has_what_is_used():
    core = pytest.importorskip("cuda.core", reason="the extra 'cuda' is not installed", exc_type=ImportError)
    driver = pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    config = core.LaunchConfig(grid=(3, 2, 1), block=(128, 1, 1), shmem_size=9, is_cooperative=False)
    assert (config.shmem_size, config.is_cooperative) == (9, False)
    assert hasattr(core.Kernel, "occupancy")
    assert [int(stream.handle) for stream in (core.LEGACY_DEFAULT_STREAM, core.PER_THREAD_DEFAULT_STREAM)] == [1, 2]
    for name in ("create_graph_builder", "from_handle", "handle", "sync", "wait"):
        assert hasattr(core.Stream, name)
    for name in ("compute_capability", "create_stream", "memory_resource", "name", "properties",
                 "set_current"):  # fmt: skip
        assert hasattr(core.Device, name)
    for name in ("begin_building", "end_building", "complete", "close"):
        assert hasattr(core.graph.GraphBuilder, name)
    assert hasattr(core.graph.Graph, "launch")
    assert hasattr(core.ObjectCode, "from_cubin")
    assert hasattr(core.Kernel, "handle")
    for name in vars(Driver):
        if name.startswith("cu") and callable(vars(Driver)[name]):
            assert callable(getattr(driver, name))
        elif name.startswith("CU"):
            assert all(hasattr(getattr(driver, name), attribute) for attribute in vars(vars(Driver)[name]))

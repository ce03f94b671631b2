"""A GPU as `device.Device`, over cuda.core: memory, copies, kernels, launches, graphs, streams."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from fastclstm.engines.cuda import compilation
from fastclstm.engines.cuda.device import DeviceArray, Launch
from fastclstm.engines.cuda.dlpack import CUDA
from fastclstm.spec import Shape

OLDEST = 70
"""The oldest architecture whose cards the kernels are written for."""
STATIC_SHARED_BYTES = 48 << 10
"""Dynamic shared memory that a kernel gets without asking."""
ALIGNMENT = 256
"""Bytes that pieces of scratch memory start at a multiple of."""
LEGACY_DEFAULT_STREAM, PER_THREAD_DEFAULT_STREAM = 1, 2
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_NOTHING = nullcontext()


@cache
def _driver() -> Any:
    """Return the driver's functions, the driver being there and having a GPU; raise ImportError."""
    compilation.cuda_core()
    from cuda.bindings import driver

    try:
        (status,) = driver.cuInit(0)
    except (RuntimeError, OSError) as error:  # the library is not there
        raise ImportError(
            f"engine 'cuda' finds no NVIDIA driver ({error}); install it, or pass engine='cpu'"
        ) from error
    if int(status) == _NO_DEVICE or (not int(status) and driver.cuDeviceGetCount()[1] == 0):
        raise ImportError("engine 'cuda' finds an NVIDIA driver but no GPU (see nvidia-smi and CUDA_VISIBLE_DEVICES); "
                          "pass engine='cpu'")  # fmt: skip
    if int(status):
        raise ImportError(f"engine 'cuda': the NVIDIA driver does not start ({status!r}); see nvidia-smi")
    return driver


def _checked(result: tuple[Any, ...]) -> Any:
    """Return the value of a driver's call; raise RuntimeError where it failed."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"engine 'cuda': the driver reports {status!r}")
    return values[0] if values else None


def current() -> GPU:
    """Return the GPU of the thread's CUDA context (that of torch or cupy, say), else the first."""
    driver = _driver()
    status, ordinal = driver.cuCtxGetDevice()
    return at(0 if int(status) else int(ordinal))


@cache
def at(ordinal: int) -> GPU:
    """Return GPU number `ordinal`; raise ImportError where it is older than sm_70."""
    _driver()
    return GPU(ordinal)


def ordinal_of(pointer: int) -> int:
    """Return the number of the GPU that holds the memory at `pointer`; of no memory, that of the current one."""
    if not pointer:
        return current().dlpack_device[1]
    driver = _driver()
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(_checked(driver.cuPointerGetAttribute(attribute, pointer)))


class _Stream(NamedTuple):
    """A stream of cuda.core, and its handle."""

    itself: Any
    handle: int


class _Work(threading.local):
    """What a thread does on a GPU: the streams it has entered."""

    def __init__(self) -> None:
        self.streams: list[_Stream] = []
        self.token = object()
        """What tells it from every other thread."""


class _AsCurrent:
    """Make a GPU the thread's current one inside. A class costs a third of what a generator does."""

    __slots__ = ("_before", "_device", "_driver")

    def __init__(self, driver: Any, device: Any):
        self._driver, self._device = driver, device

    def __enter__(self) -> None:
        self._before = _checked(self._driver.cuCtxGetCurrent())
        self._device.set_current()

    def __exit__(self, *_: object) -> None:
        self._driver.cuCtxSetCurrent(self._before)


class _Working:
    """Let work of a thread go to a stream inside."""

    __slots__ = ("_context", "_find", "_work")

    def __init__(self, work: _Work, context: AbstractContextManager[None], find: Callable[[], _Stream]):
        self._work, self._context, self._find = work, context, find

    def __enter__(self) -> None:
        self._context.__enter__()
        try:
            self._work.streams.append(self._find())
        except BaseException:
            self._context.__exit__(None, None, None)
            raise

    def __exit__(self, *_: object) -> None:
        self._work.streams.pop()
        self._context.__exit__(None, None, None)


class GPU:
    """One GPU."""

    def __init__(self, ordinal: int):
        self._core: Any = compilation.cuda_core()
        self._driver = _driver()
        self._device = self._core.Device(ordinal)
        major, minor = self._device.compute_capability
        self.architecture = 10 * int(major) + int(minor)
        if self.architecture < OLDEST:
            raise ImportError(f"engine 'cuda' needs a GPU of sm_{OLDEST} (Volta) or newer, but {self._device.name} is "
                              f"sm_{self.architecture}; pass engine='cpu'")  # fmt: skip
        version = int(_checked(self._driver.cuDriverGetVersion()))
        self.cuda = f"{version // 1000}.{version % 1000 // 10}"
        """Version of CUDA that the driver is for: 13.0."""
        newest, _ = compilation.nvrtc()
        if version // 1000 < newest[0]:
            raise ImportError(
                f"engine 'cuda': the driver is for CUDA {self.cuda}, older than NVRTC {newest[0]}; update it, or "
                f"pip install 'cuda-core[cu{version // 1000}]'"
            )
        self.name = str(self._device.name)
        self.dlpack_device = (CUDA, ordinal)
        self.multiprocessors = int(self._device.properties.multiprocessor_count)
        attribute = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        self.shared_bytes = int(_checked(self._driver.cuDeviceGetAttribute(attribute, ordinal)))
        self._work = _Work()
        self._kernels: dict[Any, Any] = {}
        self._opted: dict[Any, int] = {}
        self._resident: dict[Any, int] = {}
        self._lock = threading.Lock()
        with self._context():
            own, self._capture_stream = (self._device.create_stream() for _ in range(2))
        self._own_stream = _Stream(own, int(own.handle))
        named = self._core.LEGACY_DEFAULT_STREAM, self._core.PER_THREAD_DEFAULT_STREAM
        self._known_streams = {0: _Stream(named[0], LEGACY_DEFAULT_STREAM), self._own_stream.handle: self._own_stream}
        for handle, stream in zip((LEGACY_DEFAULT_STREAM, PER_THREAD_DEFAULT_STREAM), named, strict=True):
            self._known_streams[handle] = _Stream(stream, handle)

    def __str__(self) -> str:
        return (f"{self.name}, sm_{self.architecture}, {self.multiprocessors} multiprocessors, "
                f"driver for CUDA {self.cuda}")  # fmt: skip

    # --- Streams ---

    def on(self, stream: Any) -> AbstractContextManager[None]:
        """Work inside goes to `stream`, a handle or an object with __cuda_stream__; None: to that of the outside."""
        find = self._current if stream is None else partial(self._stream, stream)
        return _Working(self._work, self._context(), find)

    def order(self, stream: int | None, after: int | None) -> None:
        """Let work that `stream` gets from now on wait for what `after` has got."""
        if stream is not None and after is not None and stream != after:
            with self._context():
                self._stream(stream).itself.wait(self._stream(after).itself)

    def stream_handle(self) -> int:
        """Handle of the stream that work goes to."""
        return self._current().handle

    @property
    def itself(self) -> GPU:
        """The GPU that computes."""
        return self

    def stream_key(self) -> Any:
        """Return what tells the stream that work goes to from all there will ever be, as a handle does not.

        RuntimeError: the stream is being captured into somebody's CUDA graph, where no call of ours can go.
        """
        stream = self._current()
        if stream is self._own_stream:
            return None
        handle = stream.handle
        status, capturing = self._driver.cuStreamIsCapturing(handle)
        if int(status) or int(capturing):  # or a stream that the legacy default one waits for is
            raise RuntimeError("engine 'cuda': the stream is being captured into a CUDA graph, which no call of this "
                               "engine can be part of; call it before or after")  # fmt: skip
        number = int(_checked(self._driver.cuStreamGetId(handle)))
        return (number, self._work.token) if handle == PER_THREAD_DEFAULT_STREAM else number

    def finish(self) -> None:
        """Wait until the stream's work is done."""
        with self._context():
            self.stream.sync()

    @property
    def stream(self) -> Any:
        """The stream that work goes to: of the innermost `on`, else the GPU's own one."""
        return self._current().itself

    def _current(self) -> _Stream:
        return self._work.streams[-1] if self._work.streams else self._own_stream

    def _stream(self, stream: Any) -> _Stream:
        if not isinstance(stream, int):
            _, stream = stream.__cuda_stream__()
        return self._known_streams.get(stream) or _Stream(self._core.Stream.from_handle(stream), stream)

    def _context(self) -> AbstractContextManager[None]:
        """Make this GPU the thread's current one inside; within `on` it is."""
        return _NOTHING if self._work.streams else _AsCurrent(self._driver, self._device)

    # --- Memory ---

    def empty(self, shape: Shape, dtype: Any) -> DeviceArray:
        """Memory with whatever was there; it is given back in the order of the stream."""
        dtype, shape = np.dtype(dtype), tuple(map(int, shape))
        pointer, owner = self._allocate(math.prod(shape) * dtype.itemsize)
        return DeviceArray(pointer, shape, dtype, owner, self, self._current().handle)

    def _allocate(self, size: int) -> tuple[int, Any]:
        """Return the address of `size` bytes, and what keeps them."""
        if not size:
            return 0, None
        with self._context():
            buffer = self._device.memory_resource.allocate(size, stream=self._current().itself)
        return int(buffer.handle), buffer

    def zeros(self, shape: Shape, dtype: Any) -> DeviceArray:
        """Memory of zeros."""
        array = self.empty(shape, dtype)
        if array.size:
            with self._context():
                _checked(self._driver.cuMemsetD8Async(array.pointer, 0, array.nbytes, self.stream_handle()))
        return array

    def scratch(self, sizes: Sequence[int]) -> tuple[list[int], Any]:
        """Addresses of memory for each number of bytes, and what keeps it alive: one piece of the pool."""
        starts, total = _layout(tuple(sizes))
        first, whole = self._allocate(total)
        return [first + start for start in starts], whole

    def put(self, array: np.ndarray) -> DeviceArray:
        """Copy `array` to the device. Pageable memory has been read on return, pinned memory may not have been."""
        array = np.ascontiguousarray(array)
        copy = self.empty(array.shape, array.dtype)
        if array.size:
            with self._context():
                _checked(self._driver.cuMemcpyHtoDAsync(copy.pointer, array.ctypes.data, array.nbytes,
                                                        self.stream_handle()))  # fmt: skip
        return copy

    def get(self, array: DeviceArray) -> np.ndarray:
        """Copy `array` to the processor's memory; waits for the device."""
        copy = np.empty(array.shape, array.dtype)
        if array.size:
            stream, handle = self._current()
            with self._context():
                self.order(handle, array.stream)
                _checked(self._driver.cuMemcpyDtoHAsync(copy.ctypes.data, array.pointer, array.nbytes, handle))
                stream.sync()
        return copy

    # --- Kernels ---

    def kernel(self, source: str, name: str, macros: Mapping[str, int | str]) -> Any:
        """Return the extern "C" kernel `name` of csrc/`source`, compiled with the macros; compiled once."""
        key = source, name, tuple(sorted(macros.items()))
        if key not in self._kernels:
            code = compilation.compile_source(source, macros, compilation.target(self.architecture))
            with self._context():
                self._kernels[key] = self._core.ObjectCode.from_cubin(code, name=source).get_kernel(name)
        return self._kernels[key]

    def resident_blocks(self, kernel: Any, threads: int, shared_bytes: int) -> int:
        """Blocks of a kernel that run at once on the whole device; 0: none that could wait for each other."""
        key = kernel, threads, shared_bytes
        if key not in self._resident:
            with self._context():
                self._opt_in(kernel, shared_bytes)
                each = kernel.occupancy.max_active_blocks_per_multiprocessor(threads, shared_bytes)
            self._resident[key] = int(each) * self.multiprocessors if self._device.properties.cooperative_launch else 0
        return self._resident[key]

    def launch(
        self, kernel: Any, grid: Shape, block: Shape, shared_bytes: int, *arguments: Any, cooperative: bool = False
    ) -> None:
        """Start a kernel on the device's stream. Arguments are DeviceArrays, None (a null pointer) or NumPy scalars.

        The blocks of a cooperative launch, no more than `resident_blocks`, all run at once.
        """
        with self._context():
            self._start(Launch(kernel, grid, block, shared_bytes, arguments, cooperative), self.stream)

    def prepared(self, launch: Launch) -> Callable[[Sequence[int]], None]:
        """Return what starts a launch with more arguments: numbers of 64 bits. It costs a tenth of `launch`."""
        with self._context():
            config, arguments = self._ready(launch)

        def start(numbers: Sequence[int]) -> None:
            with self._context():
                self._call(self.stream, config, launch.kernel, *arguments, *numbers)

        return start

    def _start(self, launch: Launch, stream: Any) -> None:
        config, arguments = self._ready(launch)
        self._call(stream, config, launch.kernel, *arguments)

    def _ready(self, launch: Launch) -> tuple[Any, list[Any]]:
        """Return a launch's configuration and arguments as cuda.core has them."""
        self._opt_in(launch.kernel, launch.shared_bytes)
        grid, block = (tuple(map(int, sizes)) for sizes in (launch.grid, launch.block))
        config = self._core.LaunchConfig(
            grid=grid, block=block, shmem_size=int(launch.shared_bytes), is_cooperative=launch.cooperative
        )
        return config, list(map(_argument, launch.arguments))

    def _call(self, stream: Any, config: Any, kernel: Any, *arguments: Any) -> None:
        try:
            self._core.launch(stream, config, kernel, *arguments)
        except Exception as error:  # CUDAError, a plain Exception
            raise RuntimeError(f"engine 'cuda': the launch of a kernel failed: {error}") from error

    def _opt_in(self, kernel: Any, shared_bytes: int) -> None:
        """Allow a kernel so much dynamic shared memory."""
        if shared_bytes > self._opted.get(kernel, STATIC_SHARED_BYTES):
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(self._driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, self.dlpack_device[1]))
            self._opted[kernel] = shared_bytes

    # --- Graphs ---

    def graph(self, launches: Sequence[Launch]) -> Any:
        """Return launches as one thing that `send` starts: they are captured on a stream of their own."""
        with self._lock, self._context():
            builder = self._capture_stream.create_graph_builder()
            try:
                builder.begin_building("relaxed")
                for launch in launches:
                    self._start(launch, builder)
                builder.end_building()
                return builder.complete()
            finally:
                builder.close()

    def send(self, graph: Any) -> None:
        """Start the launches of a graph on the device's stream."""
        with self._context():
            graph.launch(self.stream)


@lru_cache(maxsize=256)
def _layout(sizes: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Return where pieces of so many bytes start in one, and the bytes of that."""
    ends = tuple(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
    return (0, *ends)[: len(ends)], ends[-1] if ends else 0


def _argument(value: Any) -> Any:
    """Return a kernel's argument as cuda.core passes it on: an int as a pointer, a NumPy scalar by its type."""
    if isinstance(value, np.generic):
        return value
    if value is None:
        return 0
    if isinstance(value, DeviceArray):
        return value.pointer
    raise TypeError(f"a kernel's argument must be a device array, None or a NumPy scalar, got {value!r}")

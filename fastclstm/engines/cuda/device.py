"""What the cuda engine asks of a device: memory, kernels, launches. The host code above it knows nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from fastclstm.engines.cuda import dlpack
from fastclstm.spec import Shape


class OnDevice:
    """An array of the engine in a device's memory."""

    def in_order(self) -> Any:
        """Return the array in C order: itself where it is."""
        return self


@dataclass(frozen=True, eq=False)
class DeviceArray(OnDevice):
    """A C-contiguous array in a device's memory; `owner` keeps the memory alive.

    Any library reads it without a copy: by DLPack, ``torch.from_dlpack(array)`` say, or by __cuda_array_interface__.
    """

    pointer: int
    shape: Shape
    dtype: np.dtype
    owner: Any
    device: Device
    stream: int | None = None
    """Handle of the stream on which it is computed; None where there are no streams."""

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * self.dtype.itemsize

    def reshape(self, *shape: int) -> DeviceArray:
        """Return the same memory with other sizes."""
        if math.prod(shape) != self.size:
            raise ValueError(f"a device array {self.shape} cannot be seen as {shape}")
        return replace(self, shape=shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.pointer, False), "strides": None,
                "stream": self.stream, "version": 3}  # fmt: skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device.dlpack_device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Export the array; the reader's `stream` (None: the legacy default one, -1: none) waits for its values."""
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError(f"a device array on {self.__dlpack_device__()} is exported where it is, without a copy")
        if stream != -1:
            self.device.order(1 if stream is None else stream, self.stream)
        return dlpack.capsule(self.pointer, self.shape, self.dtype, self.device.dlpack_device, self)


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is started with: see `Device.launch`."""

    kernel: Any
    grid: Shape
    block: Shape
    shared_bytes: int
    arguments: tuple[Any, ...]
    cooperative: bool = False


class Device(Protocol):
    """A GPU, or what stands in for one in tests."""

    architecture: int
    """Compute capability as 10 · major + minor: 70, 80, 90."""
    multiprocessors: int
    shared_bytes: int
    """Dynamic shared memory that one block may ask for."""
    dlpack_device: tuple[int, int] = (1, 0)
    """Type and number in DLPack: (2, n) for a GPU; (1, 0), the processor's memory, for what stands in for one."""

    @property
    def itself(self) -> Device:
        """What computes: this device, or that for which it only writes down what to do."""
        return self

    def empty(self, shape: Shape, dtype: Any) -> DeviceArray:
        """Memory with whatever was there."""

    def zeros(self, shape: Shape, dtype: Any) -> DeviceArray:
        """Memory of zeros."""

    def put(self, array: np.ndarray) -> DeviceArray:
        """Copy `array` to the device."""

    def get(self, array: DeviceArray) -> np.ndarray:
        """Copy `array` to the processor's memory; waits for the device."""

    def kernel(self, source: str, name: str, macros: Mapping[str, int | str]) -> Any:
        """Return the extern "C" kernel `name` of csrc/`source`, compiled with the macros; compiled once."""

    def resident_blocks(self, kernel: Any, threads: int, shared_bytes: int) -> int:
        """Blocks of a kernel that run at once on the whole device; 0: none that could wait for each other."""
        return 0

    def launch(
        self, kernel: Any, grid: Shape, block: Shape, shared_bytes: int, *arguments: Any, cooperative: bool = False
    ) -> None:
        """Start a kernel on the device's stream. Arguments are DeviceArrays, None (a null pointer) or NumPy scalars.

        The blocks of a cooperative launch, no more than `resident_blocks`, all run at once.
        """

    def prepared(self, launch: Launch) -> Callable[[Sequence[int]], None]:
        """Return what starts a launch with more arguments: numbers of 64 bits."""
        return lambda numbers: self.launch(launch.kernel, launch.grid, launch.block, launch.shared_bytes,
                                           *launch.arguments, *np.array(numbers, np.int64))  # fmt: skip

    def scratch(self, sizes: Sequence[int]) -> tuple[list[int], Any]:
        """Addresses of memory for each number of bytes, and what keeps it alive."""
        arrays = [self.empty((size,), np.uint8) for size in sizes]
        return [array.pointer for array in arrays], arrays

    def graph(self, launches: Sequence[Launch]) -> Any:
        """Return launches as one thing that `send` starts as often as is wanted."""
        return launches

    def send(self, graph: Any) -> None:
        """Start the launches of a graph on the device's stream."""
        for launch in graph:
            self.launch(launch.kernel, launch.grid, launch.block, launch.shared_bytes, *launch.arguments,
                        cooperative=launch.cooperative)  # fmt: skip

    def stream_key(self) -> Any:
        """Return what tells the stream that work goes to from all there will ever be; RuntimeError: it is captured."""
        return None

    def on(self, stream: Any) -> AbstractContextManager[None]:
        """Work inside goes to `stream`, a handle or an object with __cuda_stream__; None: to that of the outside."""
        return nullcontext()

    def stream_handle(self) -> int | None:
        """Handle of the stream that work goes to; None where there are no streams."""
        return None

    def order(self, stream: int | None, after: int | None) -> None:
        """Let work that `stream` gets from now on wait for what `after` has got."""

    def finish(self) -> None:
        """Wait until the stream's work is done."""

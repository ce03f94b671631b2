"""Which device computes: the GPU of an array or of the process, or what stands in for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastclstm.engines.cuda import dlpack, gpu
from fastclstm.engines.cuda.device import Device

_devices: list[Device] = []


@contextmanager
def using(device: Device) -> Iterator[Device]:
    """Compute on `device` inside: how tests run the engine without a GPU."""
    _devices.append(device)
    try:
        yield device
    finally:
        _devices.pop()


def current() -> Device:
    """Return the device of the innermost `using`, else the process's current GPU (the first one unless it chose).

    Raises
    ------
    ImportError
        The extra "cuda" is not installed, there is no NVIDIA driver, no GPU, or the GPU is older than sm_70.
    """
    return _devices[-1] if _devices else gpu.current()


def holding(ordinal: int) -> Device:
    """Return GPU number `ordinal`, or what stands in for it or for all of them. Raises as `current`."""
    if _devices and (_is_no_gpu(_devices[-1]) or _devices[-1].dlpack_device[1] == ordinal):
        return _devices[-1]
    return gpu.at(ordinal)


def ordinal_of(pointer: int) -> int:
    """Return the number of the GPU that holds the memory at `pointer`. Raises as `current`."""
    if _devices and _is_no_gpu(_devices[-1]):
        return _devices[-1].dlpack_device[1]
    return gpu.ordinal_of(pointer)


def _is_no_gpu(device: Device) -> bool:
    return device.dlpack_device[0] not in (dlpack.CUDA, dlpack.CUDA_MANAGED)


def missing() -> str | None:
    """Say what `current` lacks; None: nothing."""
    try:
        current()
    except ImportError as error:
        return str(error)
    return None

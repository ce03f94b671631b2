"""Recorded calls: what a computation launches is written down once, and sent as one graph with other arrays each time.

While it is recorded a computation runs over a `_Recorder` in place of its device, and its arrays stand for others: an
address of theirs is a number of the array and an offset. The kernels find the true address in a table in the device's
memory, which a launch before the graph writes (csrc/memory.cu). So a graph never changes, and what a call costs the
processor does not grow with what it launches.

A plan holds a table and constants. It is of one stream, whose order keeps a call from writing the table before the one
before has read it; results and what is between them are allocated call by call, from the stream's pool. What is let go
while a computation is recorded makes room for what comes later.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from threading import Lock
from typing import Any

import numpy as np

from fastclstm.engines.cuda.device import Device, DeviceArray, Launch
from fastclstm.spec import Shape

IN_TABLE = 1 << 62
"""The bit of an address that says that it stands for another, as in csrc/common.cuh."""
OFFSET_BITS = 44
"""Bits of such an address, as a computation sees it while it is recorded, that count bytes; those above the array."""
ALIGNMENT = 16
"""What addresses of arrays are taken modulo where a computation depends on them."""
MOST_ARRAYS = (16, 32, 64)
"""Arrays that a table is written for: variants of the kernel."""
MOST_PLANS = 64
"""Plans that are kept for the next call, those used last, and …"""
MOST_BYTES = 64 << 20
"""… the bytes on devices that all of them may hold."""

_plans: dict[Any, _Plan] = {}
_clock = count()
_lock = Lock()


def call(device: Device, key: Any, arrays: Sequence[DeviceArray | None], compute: Callable[..., Any]) -> Any:
    """Return ``compute(*arrays)``, nested tuples and dicts of new arrays, by the launches that it made the first time.

    Of what it launches the key, a hashable thing, tells all but the arrays' values, which of them are there and where
    they lie. `compute` takes its device from its arrays, and returns what it has allocated there. A call within another
    is a part of that one.
    """
    if isinstance(device, _Recorder):
        return compute(*arrays)
    form = device, device.stream_key(), key, *[None if a is None else a.pointer % ALIGNMENT for a in arrays]
    plan = _plans.get(form)
    if plan is None:
        plan = _Plan(device, arrays, compute)
        with _lock:
            while _plans and (len(_plans) >= MOST_PLANS or plan.nbytes + _held_bytes() > MOST_BYTES):
                del _plans[min(_plans, key=lambda form: _plans[form].used)]
            _plans[form] = plan
    plan.used = next(_clock)
    return plan.run(arrays)


def _held_bytes() -> int:
    return sum(plan.nbytes for plan in _plans.values())


@dataclass(frozen=True)
class _Part:
    """A part of one of the arrays that others stand for while a computation is recorded."""

    number: int
    offset: int
    """In bytes."""
    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Owner:
    """What lives as long as an array that stands for another is of use to somebody."""


class _Recorder:
    """A device that computes nothing: it writes down launches and gives out arrays that stand for those to come."""

    def __init__(self, device: Device):
        self._device = device
        self._owners: list[weakref.ref[_Owner]] = []
        self.arrays: list[_Part] = []
        self.lives: list[tuple[int, int | None]] = []
        """Of each array how many launches there were when it came and when it was let go; None: it was not."""
        self.launches: list[Launch] = []
        self.constants: dict[Any, DeviceArray] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def stand_in(self, shape: Shape, dtype: Any, offset: int = 0) -> DeviceArray:
        """Return an array that stands for one to come, `offset` bytes beyond a multiple of the alignment."""
        number, owner = len(self.arrays), _Owner()
        part = _Part(number, 0, tuple(map(int, shape)), np.dtype(dtype))
        self.arrays.append(part)
        self.lives.append((len(self.launches), None))

        def end(_: Any) -> None:
            self.lives[number] = self.lives[number][0], len(self.launches)

        self._owners.append(weakref.ref(owner, end))
        device: Any = self
        return DeviceArray(IN_TABLE | number << OFFSET_BITS | offset, part.shape, part.dtype, owner, device)

    def empty(self, shape: Shape, dtype: Any) -> DeviceArray:
        return self.stand_in(shape, dtype) if math.prod(shape) else self._device.empty(shape, dtype)

    def zeros(self, shape: Shape, dtype: Any) -> DeviceArray:
        array = self.empty(shape, dtype)
        if array.size:
            kernel = self._device.kernel("memory.cu", "zero", {"ARRAYS": MOST_ARRAYS[0]})
            in_bytes = replace(array, shape=(array.nbytes,), dtype=np.dtype(np.uint8))
            self.launch(kernel, (-(-array.nbytes // (16 * 256)),), (256,), 0, in_bytes, np.int64(array.nbytes))
        return array

    def put(self, array: np.ndarray) -> DeviceArray:
        """Return a constant of the plan."""
        key = array.shape, array.dtype, array.tobytes()
        if key not in self.constants:
            self.constants[key] = self._device.put(array)
        return self.constants[key]

    def launch(
        self, kernel: Any, grid: Shape, block: Shape, shared_bytes: int, *arguments: Any, cooperative: bool = False
    ) -> None:
        values = tuple(replace(a, owner=None) if isinstance(a, DeviceArray) and _stands_in(a) else a for a in arguments)
        self.launches.append(Launch(kernel, grid, block, shared_bytes, values, cooperative))


class _Plan:
    """The launches of a computation, and how its arrays come into them."""

    def __init__(self, device: Device, arrays: Sequence[DeviceArray | None], compute: Callable[..., Any]):
        recorder = _Recorder(device)
        given = [None if a is None else recorder.stand_in(a.shape, a.dtype, a.pointer % ALIGNMENT) for a in arrays]
        first = len(recorder.arrays)
        found = compute(*given)
        made = recorder.arrays[first:]
        returned = {_part(array).number for array in _leaves(found) if _stands_in(array)}
        self._device = device
        self._results = [array for array in made if array.number in returned]
        order = *range(first), *(array.number for array in self._results)
        place = {number: n for n, number in enumerate(order)}
        self._scratch, blocks = _shared_memory([a for a in made if a.number not in returned], recorder.lives)
        place |= {number: len(order) + block for number, block in blocks.items()}
        count = len(order) + len(self._scratch)
        assert count <= MOST_ARRAYS[-1], f"{count} arrays in one call"

        def as_found(array: DeviceArray) -> Any:
            if not _stands_in(array):
                return array
            part = _part(array)
            return place[part.number] if part in self._results else replace(part, number=place[part.number])

        self._found = _mapped(as_found, found)
        """Of results that are whole arrays their place among those of a call, of others the part, of that place."""

        constants = list(recorder.constants.values())
        used = [a for launch in recorder.launches for a in launch.arguments if isinstance(a, DeviceArray)]
        parts = {array.pointer: _part(array) for array in used if _stands_in(array)}
        others = [array for array in used if not _stands_in(array) and array.size]
        assert all(array in constants for array in others), "an array that the call was not given"
        entries = {address: n for n, address in enumerate(parts)}
        table = device.empty((len(parts),), np.int64)

        def in_table(argument: Any) -> Any:
            if not isinstance(argument, DeviceArray) or not _stands_in(argument):
                return argument
            entry = table.pointer + 8 * entries[argument.pointer]
            return replace(argument, pointer=IN_TABLE | entry, owner=table.owner, device=device)

        self.graph = device.graph(
            [replace(launch, arguments=tuple(map(in_table, launch.arguments))) for launch in recorder.launches]
        )
        places = np.array([place[part.number] for part in parts.values()], np.int32)
        offsets = np.array([part.offset for part in parts.values()], np.int64)
        self._table = table, device.put(places), device.put(offsets)
        self._constants = constants
        self.nbytes = sum(array.nbytes for array in (*self._table, *constants))
        self._most = next(most for most in MOST_ARRAYS if count <= most)
        kernel = device.kernel("memory.cu", "write_table", {"ARRAYS": self._most})
        blocks_of_table, arguments = -(-len(parts) // 256), (*self._table, np.int32(len(parts)))
        self._write = device.prepared(Launch(kernel, (blocks_of_table,), (256,), 8 * self._most, arguments))
        self._lock = Lock()
        self.used = 0
        """When, on the plans' clock."""

    def run(self, arrays: Sequence[DeviceArray | None]) -> Any:
        """Send the launches with `arrays` and new results."""
        device = self._device
        results = [device.empty(part.shape, part.dtype) for part in self._results]
        scratch, owner = device.scratch(self._scratch)
        given = [array for array in arrays if array is not None]
        addresses = [a.pointer - a.pointer % ALIGNMENT for a in given] + [a.pointer for a in results] + scratch
        unused = [0] * (self._most - len(addresses))
        with self._lock:
            self._write(addresses + unused)
            device.send(self.graph)
        del owner  # not before: what is let go may be handed out again
        every = given + results

        def filled(found: Any) -> Any:
            if isinstance(found, _Part):
                address = addresses[found.number] + found.offset
                return replace(every[found.number], pointer=address, shape=found.shape, dtype=found.dtype)
            return every[found] if isinstance(found, int) else found

        return _mapped(filled, self._found)


def _shared_memory(
    arrays: list[_Part], lives: list[tuple[int, int | None]]
) -> tuple[list[int], dict[int, int]]:  # fmt: skip
    """Return how many bytes blocks have, and each array's block: that of one that was let go before it came."""
    sizes: list[int] = []
    ends: list[float] = []
    blocks = {}
    for array in arrays:
        came, gone = lives[array.number]
        free = [n for n, end in enumerate(ends) if end <= came]
        large = [n for n in free if sizes[n] >= array.nbytes]
        if not free:
            sizes.append(0)
            ends.append(0)
        n = min(large, key=sizes.__getitem__) if large else max(free, key=sizes.__getitem__, default=len(sizes) - 1)
        sizes[n], ends[n] = max(sizes[n], array.nbytes), math.inf if gone is None else gone
        blocks[array.number] = n
    return sizes, blocks


def _stands_in(array: DeviceArray) -> bool:
    return bool(array.pointer & IN_TABLE)


def _part(array: DeviceArray) -> _Part:
    """Return what an array stands for."""
    address = array.pointer ^ IN_TABLE
    return _Part(address >> OFFSET_BITS, address & (1 << OFFSET_BITS) - 1, array.shape, array.dtype)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return nested tuples and dicts with a function of every leaf."""
    if isinstance(value, tuple):
        return tuple([None if item is None else _mapped(function, item) for item in value])
    if isinstance(value, dict):
        return {name: _mapped(function, item) for name, item in value.items()}
    return None if value is None else function(value)


def _leaves(value: Any) -> Iterator[DeviceArray]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value

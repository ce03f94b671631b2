"""A Device that runs csrc/ on the processor, compiled by g++: what the cuda engine is tested on without a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import shutil
import subprocess
import tempfile
import threading
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fastclstm.engines.cuda.device import Device, DeviceArray
from fastclstm.engines.cuda.recorded import IN_TABLE

HEADER = Path(__file__).with_name("cuda_emulator.h")
SOURCES = Path(__file__).parents[2] / "csrc"
GUARD = 256
"""Bytes before and after each array; they read as NaN, and must not change."""

_running, _compiling = threading.Lock(), threading.Lock()

KINDS = {"f": np.float32, "d": np.float64, "i": np.int32, "l": np.int64, "H": np.uint16, "B": np.uint8}


def compiler():
    """Path of a C++ compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++")


needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (g++ or clang++) to emulate csrc/ with")


@cache
def _own_folder():
    return tempfile.TemporaryDirectory(prefix="fastclstm-emulator-")


def folder():
    """Folder of compiled kernels: tests/conftest.py puts in its place one that several processes of a run share."""
    return Path(_own_folder().name)


class Memory:
    """Bytes between guards, all of them 0xff at first; guards are looked at before it is given back."""

    def __init__(self, size):
        self.size = size
        self.bytes = np.full(size + 2 * GUARD + 64, 0xFF, np.uint8)
        first = self.bytes.ctypes.data + GUARD
        self.pointer = first + -first % 64
        self._start = self.pointer - self.bytes.ctypes.data

    @property
    def content(self):
        return self.bytes[self._start : self._start + self.size]

    @property
    def intact(self):
        return bool((self.bytes[: self._start] == 0xFF).all() and (self.bytes[self._start + self.size :] == 0xFF).all())


class Region(ctypes.Structure):
    """Region of the header."""

    _fields_ = (("bytes", ctypes.c_void_p), ("size", ctypes.c_size_t), ("marks", ctypes.c_void_p))


class Watched:
    """What a cooperative launch does with an argument: a byte that it reads by the read-only cache must not change."""

    def __init__(self, number, memory):
        self.number, self._content = number, memory.content
        self._before, self._marks = self._content.copy(), np.zeros(memory.size + GUARD, np.uint8)
        self.region = Region(memory.pointer, memory.size, self._marks.ctypes.data)

    @property
    def coherent(self):
        return not (self._marks[: self._content.size].astype(bool) & (self._content != self._before)).any()


class Kernel:
    """An extern "C" kernel of a library: its code, and what it takes."""

    def __init__(self, library, name):
        self.name = name
        self.run = getattr(library, f"emulate_{name}")
        self.run.restype = ctypes.c_char_p
        signature = getattr(library, f"signature_{name}")
        signature.restype = ctypes.c_char_p
        text = signature().decode()
        self.parameters = []  # (is a pointer, dtype)
        for before, kind in zip(" " + text, text, strict=False):
            if kind != "p":
                self.parameters.append((before == "p", np.dtype(KINDS[kind])))


class EmulatedDevice(Device):
    """Memory of its own and csrc/ compiled for the processor; wrong arguments, writes and barriers raise."""

    multiprocessors = 4

    def __init__(self, architecture=80, resident=0):
        self.architecture, self.resident = architecture, resident
        self.shared_bytes = (227 if architecture == 90 else 99) << 10
        self.launches = []
        """(kernel, grid, block) of what was launched."""
        self.graphs = []
        """How many launches each graph held."""
        self._memories = weakref.WeakSet()
        self._kernels = {}
        self._seeds = itertools.count(1)

    def empty(self, shape, dtype):
        dtype = np.dtype(dtype)
        memory = Memory(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        with _running:
            self._memories.add(memory)
        return DeviceArray(memory.pointer, tuple(shape), dtype, memory, self)

    def zeros(self, shape, dtype):
        array = self.empty(shape, dtype)
        array.owner.content[:] = 0
        return array

    def put(self, array):
        copy = self.empty(array.shape, array.dtype)
        copy.owner.content[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return copy

    def get(self, array):
        offset = array.pointer - array.owner.pointer
        size = int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize
        assert 0 <= offset <= offset + size <= array.owner.size
        return array.owner.content[offset : offset + size].copy().view(array.dtype).reshape(array.shape)

    def kernel(self, source, name, macros):
        key = source, name, tuple(sorted(macros.items()))
        with _compiling:
            if key not in self._kernels:
                self._kernels[key] = Kernel(_library(source, key[2]), name)
        return self._kernels[key]

    def resident_blocks(self, kernel, threads, shared_bytes):
        return self.resident

    def launch(self, kernel, grid, block, shared_bytes, *arguments, cooperative=False):
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        assert min(grid) > 0, f"{kernel.name}: empty grid {grid}"
        assert max(grid[1:]) < 65536, f"{kernel.name}: grid {grid} is too large"
        assert not cooperative or np.prod(grid) <= self.resident, f"{kernel.name}: {grid} blocks are not resident"
        assert shared_bytes <= self.shared_bytes, f"{kernel.name}: {shared_bytes} bytes of shared memory"
        assert len(arguments) == len(kernel.parameters), (
            f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(arguments)}"
        )
        values = []
        for n, (argument, (is_pointer, dtype)) in enumerate(zip(arguments, kernel.parameters, strict=True)):
            what = f"{kernel.name}: argument {n}"
            if argument is None or isinstance(argument, DeviceArray):
                assert is_pointer, f"{what} is a number"
                assert argument is None or argument.dtype == dtype, f"{what} is {argument.dtype}, not {dtype}"
                assert argument is None or argument.device is self, f"{what} is on another device"
                values.append(np.uint64(0 if argument is None else argument.pointer))
            else:
                assert not is_pointer, f"{what} is a pointer"
                assert isinstance(argument, np.generic), f"{what} is a {type(argument).__name__}"
                assert argument.dtype == dtype, f"{what} is {argument.dtype}, not {dtype}"
                values.append(argument)
        kept = [np.array(value) for value in values]
        pointers = (ctypes.c_void_p * len(kept))(*[value.ctypes.data for value in kept])
        triple = ctypes.c_uint * 3
        seed = ctypes.c_uint64(next(self._seeds))
        watched = [Watched(n, self.memory_of(a)) for n, a in enumerate(arguments)
                   if cooperative and isinstance(a, DeviceArray)]  # fmt: skip
        regions = (Region * len(watched))(*[one.region for one in watched])
        with _running:
            error = kernel.run(pointers, triple(*grid), triple(*block), ctypes.c_int(shared_bytes), seed,
                               ctypes.c_int(cooperative), regions, ctypes.c_int(len(watched)))  # fmt: skip
            broken = [memory.size for memory in self._memories if not memory.intact]
        assert error is None, f"{kernel.name}: {error.decode()}"
        for one in watched:
            assert one.coherent, f"{kernel.name}: argument {one.number} is written and read through the read-only cache"
        assert not broken, f"{kernel.name}: a write beyond an array of {broken[0]} bytes"
        self.launches.append((kernel.name, grid, block))

    def memory_of(self, array):
        """The memory of an argument; that of a recorded call tells where its address stands."""
        address = array.pointer
        if address & IN_TABLE:
            address = ctypes.c_int64.from_address(address ^ IN_TABLE).value
        return next(m for m in list(self._memories) if m.pointer <= address <= m.pointer + m.size)

    def graph(self, launches):
        self.graphs.append(len(launches))
        return launches


@cache
def _library(source, macros):
    """Compile csrc/`source` for the processor and load it."""
    digest = hashlib.sha256(repr((source, macros)).encode()).hexdigest()[:16]
    path = folder() / f"{Path(source).stem}-{digest}.so"
    if not path.exists():
        _compile(source, macros, path)
    return ctypes.CDLL(str(path))


def _compile(source, macros, path):
    main, made = (path.with_suffix(f".{os.getpid()}{suffix}") for suffix in (".cpp", ".so"))
    text = f'#include "{SOURCES / source}"\n'
    for name in _kernel_names(source):
        text += f"EMULATE({name})\n"
    main.write_text(text)
    command = [compiler(), "-std=c++17", "-O1", "-march=native", "-fPIC", "-shared", "-fno-strict-aliasing",
               "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-DFASTCLSTM_EMULATOR", f"-I{SOURCES}",
               "-include", str(HEADER), *[f"-D{name}={value}" for name, value in macros],
               str(main), "-o", str(made)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    made.replace(path)  # another process may have made it meanwhile, or load it


def _kernel_names(source):
    """Names of the kernels of a source: they follow KERNEL(...) on a line of their own."""
    lines = (SOURCES / source).read_text().splitlines()
    return dict.fromkeys(
        name.partition("(")[0] for line, name in itertools.pairwise(lines) if line.startswith("KERNEL(")
    )

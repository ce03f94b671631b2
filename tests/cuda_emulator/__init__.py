"""A Device that runs csrc/ on the processor, compiled by g++: what the cuda engine is tested on without a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fastclstm.engines.cuda.device import Device, DeviceArray

HEADER = Path(__file__).with_name("cuda_emulator.h")
SOURCES = Path(__file__).parents[2] / "csrc"
GUARD = 256
"""Bytes before and after each array; they read as NaN, and must not change."""

KINDS = {"f": np.float32, "d": np.float64, "i": np.int32, "l": np.int64, "H": np.uint16, "B": np.uint8}


def compiler():
    """Path of a C++ compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++")


needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (g++ or clang++) to emulate csrc/ with")


@cache
def _folder():
    return tempfile.TemporaryDirectory(prefix="fastclstm-emulator-")


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
    shared_bytes = 99 << 10

    def __init__(self, architecture=80):
        self.architecture = architecture
        self.launches = []
        """(kernel, grid, block) of what was launched."""
        self.graphs = []
        """Key of each graph, and how many launches it held."""
        self._kernels = {}
        self._seeds = itertools.count(1)

    def empty(self, shape, dtype):
        dtype = np.dtype(dtype)
        memory = Memory(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
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
        if key not in self._kernels:
            self._kernels[key] = Kernel(_library(source, key[2]), name)
        return self._kernels[key]

    def launch(self, kernel, grid, block, shared_bytes, *arguments):
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        assert min(grid) > 0, f"{kernel.name}: empty grid {grid}"
        assert max(grid[1:]) < 65536, f"{kernel.name}: grid {grid} is too large"
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
        error = kernel.run(pointers, triple(*grid), triple(*block), ctypes.c_int(shared_bytes), seed)
        assert error is None, f"{kernel.name}: {error.decode()}"
        for n, argument in enumerate(arguments):
            if isinstance(argument, DeviceArray):
                intact = getattr(argument.owner, "intact", True)  # another library's memory has no guards
                assert intact, f"{kernel.name}: a write beyond argument {n} {argument.shape}"
        self.launches.append((kernel.name, grid, block))

    @contextmanager
    def graph(self, key):
        before = len(self.launches)
        yield
        self.graphs.append((key, len(self.launches) - before))


@cache
def _library(source, macros):
    """Compile csrc/`source` for the processor and load it."""
    digest = hashlib.sha256(repr((source, macros)).encode()).hexdigest()[:16]
    path = Path(_folder().name) / f"{Path(source).stem}-{digest}.so"
    main = path.with_suffix(".cpp")
    text = f'#include "{SOURCES / source}"\n'
    for name in _kernel_names(source):
        text += f"EMULATE({name})\n"
    main.write_text(text)
    command = [compiler(), "-std=c++17", "-O1", "-march=native", "-fPIC", "-shared", "-fno-strict-aliasing",
               "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-DFASTCLSTM_EMULATOR", f"-I{SOURCES}",
               "-include", str(HEADER), *[f"-D{name}={value}" for name, value in macros],
               str(main), "-o", str(path)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(path))


def _kernel_names(source):
    """Names of the kernels of a source: they follow KERNEL(...) on a line of their own."""
    lines = (SOURCES / source).read_text().splitlines()
    return dict.fromkeys(
        name.partition("(")[0] for line, name in itertools.pairwise(lines) if line.startswith("KERNEL(")
    )

"""A driver that computes nothing (libcuda.cpp), under which the real cuda.core runs, and a check of every launch."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastclstm.engines.cuda import gpu

SOURCE = Path(__file__).with_name("libcuda.cpp")
LIBRARY = "libcuda.so.1"


def build(folder):
    """Compile the driver into a folder; a process with it in LD_LIBRARY_PATH finds no other."""
    command = [shutil.which("g++"), "-std=c++17", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(folder / LIBRARY)]
    subprocess.run([*command, "-ldl"], check=True)


def run(folder, code, **variables):
    """Run Python over the driver in `folder`, compiled kernels being kept there; return what it prints."""
    paths = [*sys.path, str(Path(__file__).parents[1])]
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "FASTCLSTM_CACHE_DIR": str(folder / "cache"),
                                "PYTHONPATH": os.pathsep.join(paths)} | variables  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


class Checked:
    """Compares the arguments of every launch with the parameters of its compiled kernel."""

    def __init__(self):
        self.launches, self.wrong, self.macros = Counter(), [], Counter()
        self._kernel, self._start, self._prepared = gpu.GPU.kernel, gpu.GPU._start, gpu.GPU.prepared
        self._names = {}
        self._driver = ctypes.CDLL(LIBRARY)
        self._driver.stub_faults.restype = ctypes.c_char_p
        checked = self

        def kernel(device, source, name, macros):
            kernel = checked._kernel(device, source, name, macros)
            checked._names[kernel] = source, name, tuple(macros)
            return kernel

        def start(device, launch, stream):
            checked._compare(launch)
            return checked._start(device, launch, stream)

        def prepared(device, launch):
            start = checked._prepared(device, launch)

            def compared(numbers):
                assert all(type(number) is int for number in numbers)
                checked._compare(replace(launch, arguments=(*launch.arguments, *np.array(numbers, np.int64))))
                start(numbers)

            return compared

        gpu.GPU.kernel, gpu.GPU._start, gpu.GPU.prepared = kernel, start, prepared

    def _compare(self, launch):
        expected = [parameter.size for parameter in launch.kernel.arguments_info]
        found = [a.dtype.itemsize if isinstance(a, np.generic) else 8 for a in launch.arguments]
        *name, macros = self._names[launch.kernel]
        self.launches[tuple(name)] += 1
        self.macros.update(macros)
        if found != expected:
            self.wrong.append(f"{name}: arguments of {found} bytes for parameters of {expected}")

    @property
    def faults(self):
        """What the driver would have let pass, or refused, for a reason that is the caller's."""
        return self._driver.stub_faults().decode().splitlines()

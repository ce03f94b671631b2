"""After the warm-up no call compiles anything."""

import importlib
import os
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import fastclstm
from fastclstm import functional
from fastclstm.engines.cpu import compilation, kernels, warmup
from fastclstm.engines.cpu.kernels.entry import Kernel
from fastclstm.engines.cpu.kernels.team import run_team

MODULES = [
    importlib.import_module(f"{kernels.__name__}.{info.name}") for info in pkgutil.iter_modules(kernels.__path__)
]


def compiled():
    """What each kernel has been compiled for."""
    known = {
        f"{module.__name__}.{name}": set(value._compiled)
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, Kernel)
    }
    return known | {"team": set(map(str, run_team.signatures))}


@pytest.fixture
def two_threads():
    fastclstm.set_num_threads(2)
    yield
    fastclstm.set_num_threads(None)


def calls(dtype, gradients=True):
    """Calls of all kinds: small and large ones, arrays that may not be written, every option that reaches a kernel."""

    def train(operation, *arguments, **options):
        if gradients:
            y, pullback = getattr(functional, f"{operation}_vjp")(*arguments, **options)
            pullback(draw(*y.shape, writeable=writeable))
        else:
            getattr(functional, operation)(*arguments, **options)

    rng = np.random.default_rng(0)

    def draw(*shape, writeable=True):
        array = rng.standard_normal(shape).astype(dtype)
        array.setflags(write=writeable)
        return array

    options = ({}, {"mask": np.ones((2, 1), bool)}, {"go_backwards": True}, {"cell_clip": 1.0}, {"activation": "relu"},
               {"algorithm": "winograd"}, {"strides": 2}, {"padding_mode": "circular"},
               {"peephole": {gate: draw(16) for gate in "ifo"}})  # fmt: skip
    for writeable in (True, False):
        for size in (4, 32):
            frames = draw(2, 1, size, size, 8, writeable=writeable)
            for algorithm in ("direct", "winograd"):
                train("conv2d", frames[:, 0], draw(3, 3, 8, 32, writeable=writeable), algorithm=algorithm)
            for option in options:
                kernels = draw(3, 3, 8, 64, writeable=writeable), draw(3, 3, 16, 64), draw(64, writeable=writeable)
                functional.convlstm2d(frames, *kernels, **option)
                train("convlstm2d", frames, *kernels, **option)
            for gates, operation in ((3, "convgru2d"), (1, "convrnn2d")):
                train(operation, frames, draw(3, 3, 8, 16 * gates, writeable=writeable), draw(3, 3, 16, 16 * gates))
        for channels in (1, 64):
            volume = draw(2, 8, 32, 32, channels, writeable=writeable)
            functional.max_pool3d(volume)
            train("max_pool3d", volume)


def test_calls_compile_nothing_more(two_threads):
    """Of one type; the other takes the same steps, and a minute of compiling."""
    dtype = "float32"
    steps = list(warmup.steps(dtype))
    assert len({name for name, _ in steps}) == len(steps)
    for _, compile_kernel in steps:
        compile_kernel()
    before = compiled()
    assert all(before.values()), before
    calls(dtype)
    assert compiled() == before


def test_for_inference_less_is_compiled():
    names = [name for name, _ in warmup.steps("float32", forward_only=True)]
    assert set(names) < {name for name, _ in warmup.steps("float32")}
    assert not any("gradient" in name or "training" in name for name in names)


def test_after_the_warm_up_for_inference_calls_without_gradients_compile_nothing_more():
    """In a process of its own, as this one has compiled whatever other tests needed."""
    code = """
        import fastclstm, test_cpu_warmup as tests
        from fastclstm.engines.cpu import warmup
        fastclstm.set_num_threads(2)
        for _, compile_kernel in warmup.steps("float32", forward_only=True):
            compile_kernel()
        before = tests.compiled()
        tests.calls("float32", gradients=False)
        assert tests.compiled() == before
    """
    folders = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ | {"PYTHONPATH": folders}, check=True)


def test_processes_side_by_side_do_every_step(tmp_path, monkeypatch):
    """The kernels are on disk by now, so that this takes no time."""
    done = list(warmup.compile_all("float32", forward_only=True, processes=2))
    assert done == [name for name, _ in warmup.steps("float32", forward_only=True)]
    ours, _ = compilation.kernels_on_disk()
    assert compilation.cache_folder() is None or ours >= len(done)

"""After the warm-up no call compiles anything."""

import importlib
import pkgutil

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

import fastclstm
from fastclstm import functional
from fastclstm.engines import cpu
from fastclstm.engines.cpu import compilation, warmup

MODULES = [importlib.import_module(info.name) for info in pkgutil.iter_modules(cpu.__path__, f"{cpu.__name__}.")]


def signatures():
    """What each kernel has been compiled for; the measurement of the machine's peak is no part of an operation."""
    return {
        f"{module.__name__}.{name}": set(map(str, value.signatures))
        for module in MODULES
        if not module.__name__.endswith(".peak")
        for name, value in vars(module).items()
        if isinstance(value, Dispatcher)
        and value.py_func.__module__ == module.__name__
        and isinstance(value._cache, compilation._KernelCache)
    }


@pytest.fixture
def two_threads():
    fastclstm.set_num_threads(2)
    yield
    fastclstm.set_num_threads(None)


def calls(dtype):
    """Calls of all kinds: small and large ones, arrays that may not be written, every option that reaches a kernel."""
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
                _, pullback = functional.conv2d_vjp(
                    frames[:, 0], draw(3, 3, 8, 32, writeable=writeable), algorithm=algorithm
                )
                pullback(draw(2, size, size, 32, writeable=writeable))
            for option in options:
                kernels = draw(3, 3, 8, 64, writeable=writeable), draw(3, 3, 16, 64), draw(64, writeable=writeable)
                functional.convlstm2d(frames, *kernels, **option)
                y, pullback = functional.convlstm2d_vjp(frames, *kernels, **option)
                pullback(draw(*y.shape, writeable=writeable))
        for channels in (1, 64):
            volume = draw(2, 8, 32, 32, channels, writeable=writeable)
            functional.max_pool3d(volume)
            y, pullback = functional.max_pool3d_vjp(volume)
            pullback(draw(*y.shape, writeable=writeable))


@pytest.mark.parametrize("dtype", warmup.DTYPES)
def test_calls_compile_nothing_more(dtype, two_threads):
    steps = list(warmup.steps(dtype))
    assert len({name for name, _ in steps}) == len(steps) == len(signatures())
    for _, compile_kernel in steps:
        compile_kernel()
    before = signatures()
    assert all(any(dtype in signature for signature in known) for known in before.values()), before
    calls(dtype)
    assert signatures() == before

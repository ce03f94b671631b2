"""Every implementation of every operation, built from the same weights, each respecting a thread count.

An implementation takes a case and a number of threads and returns a `Prepared`: a function to time, which works on data
already in the layout that the implementation likes best, and the conversion of its result to a channels-last NumPy
array, which is not timed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fastclstm
from bench import cells
from bench.cases import Case, ConvLSTMCase, PoolCase
from bench.cells import Unavailable
from fastclstm import functional
from fastclstm.engines.remembered import immutable

TOLERANCE = 2e-5
"""Largest absolute error against the float64 oracle that an implementation may show before it is timed."""

_DISTRIBUTIONS = (
    "fastclstm", "numpy", "numba", "llvmlite", "torch", "onnx", "onnxruntime", "openvino", "ncnn", "keras",
    "jax", "jaxlib",
)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A function to time and the conversion of its result to (B, T, H, W, F)."""

    run: Callable[[], Any]
    channels_last: Callable[[Any], np.ndarray] = np.asarray


@dataclass(frozen=True)
class Implementation:
    """How to build one implementation: the modules and environment that it needs, and its `Prepared`."""

    modules: tuple[str, ...]
    build: Callable[[Any, int], Prepared]
    environment: Mapping[str, str] = field(default_factory=dict)
    own_process: bool = False
    """Whether it may only be loaded in a process that runs nothing else."""

    def load(self) -> None:
        """Import what it needs; raise Unavailable where that is missing or the process is set up for another."""
        for name, value in self.environment.items():
            if os.environ.setdefault(name, value) != value:
                raise Unavailable(f"needs {name}={value} in a process of its own, and this one has {os.environ[name]}")
        for name in self.modules:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise Unavailable(f"{name} cannot be imported: {error}") from error

    def prepare(self, case: Case, threads: int) -> Prepared:
        """Load it and make it ready to run `case` on `threads` threads."""
        self.load()
        return self.build(case, threads)


def error(prepared: Prepared, expected: np.ndarray) -> float:
    """Run once and return the largest absolute error; raise AssertionError above `TOLERANCE`."""
    result = prepared.channels_last(prepared.run())
    if result.shape != expected.shape or result.dtype != np.float32:
        raise AssertionError(f"got {result.dtype} {result.shape}, expected float32 {expected.shape}")
    worst = float(max(np.max(np.abs(got - want)) for got, want in zip(result, expected, strict=True)))
    if not worst <= TOLERANCE:
        raise AssertionError(f"largest error {worst:.1e} is above {TOLERANCE:.0e}")
    return worst


def versions() -> dict[str, str]:
    """Return the version of every installed package that takes part, and Python's."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# fastclstm -----------------------------------------------------------------------------------------------------------


WEIGHTS = ("kernel", "recurrent_kernel", "bias", "peephole", "normalization_weights")


def _fastclstm(case: Case, threads: int, **options: Any) -> Prepared:
    import threadpoolctl

    if options["engine"] == "cpu":
        fastclstm.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads, user_api="blas")  # the reference engine's matrix products
    arrays = case.arrays()
    if isinstance(case, PoolCase):
        return Prepared(
            partial(functional.max_pool3d, **arrays, pool_size=case.pool_size, strides=case.stride, **options)
        )
    weights = {name: _held(value) for name, value in arrays.items() if name in WEIGHTS}
    return Prepared(partial(functional.convlstm2d, **(arrays | weights), **case.options, **options))


def _held(weights: Any) -> Any:
    """Return weights in memory that nobody can write to, as our layers hold them."""
    if isinstance(weights, dict):
        return {name: _held(array) for name, array in weights.items()}
    return immutable(weights)


# PyTorch --------------------------------------------------------------------------------------------------------------


def _torch(case: Case, threads: int, *, channels_last: bool, split: bool = False, compiled: bool = False) -> Prepared:
    import torch

    torch.set_num_threads(threads)
    x = torch.from_numpy(case.arrays()["x"])
    if isinstance(case, PoolCase):
        x = x.permute(0, 4, 1, 2, 3)  # channels last in memory
        x = x if channels_last else x.contiguous()
        function = partial(torch.nn.functional.max_pool3d, kernel_size=case.pool_size, stride=case.stride)
    else:
        x = x if channels_last else x.permute(0, 1, 4, 2, 3).contiguous()
        function = cells.torch_module(case, split, channels_last)
        function = torch.compile(function, dynamic=False) if compiled else function

    def run() -> Any:
        with torch.inference_mode():
            return function(x)

    def to_numpy(result: Any) -> np.ndarray:
        if isinstance(case, PoolCase):
            return result.permute(0, 2, 3, 4, 1).numpy()
        return (result if channels_last else result.permute(0, 1, 3, 4, 2)).numpy()

    return Prepared(run, to_numpy)


def _from_channels_first(result: np.ndarray) -> np.ndarray:
    return result.transpose(0, 1, 3, 4, 2)


def _onnxruntime(case: ConvLSTMCase, threads: int) -> Prepared:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "convlstm.onnx"
        x = cells.save_onnx(case, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return Prepared(lambda: session.run(None, feed)[0], _from_channels_first)


def _openvino(case: ConvLSTMCase, threads: int) -> Prepared:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # where the processor has bfloat16, it would be used
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "convlstm.onnx"
        x = cells.save_onnx(case, path)
        request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return Prepared(lambda: request.infer({0: x}, share_inputs=True, share_outputs=True)[0], _from_channels_first)


def _ncnn(case: ConvLSTMCase, threads: int, split: bool) -> Prepared:
    return Prepared(*cells.ncnn_convlstm(case, threads, split))


# Keras ---------------------------------------------------------------------------------------------------------------


def _keras(case: ConvLSTMCase, threads: int) -> Prepared:
    import keras

    arrays = case.arrays()
    layer = keras.layers.ConvLSTM2D(case.F, case.K, padding="same", return_sequences=True)
    layer.build(arrays["x"].shape)
    layer.set_weights([arrays[name] for name in ("kernel", "recurrent_kernel", "bias")])
    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(threads)
        x = torch.from_numpy(arrays["x"])

        def run_torch() -> Any:
            with torch.inference_mode():
                return layer(x)

        return Prepared(run_torch, lambda result: result.numpy())

    import jax

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if available != threads:  # XLA takes every CPU that it sees when it starts
        raise Unavailable(f"a running XLA cannot be held to {threads} of {available} CPUs; use bench.compare")
    weights = [variable.value for variable in layer.trainable_variables]
    state = [variable.value for variable in layer.non_trainable_variables]
    function = jax.jit(lambda x: layer.stateless_call(weights, state, x)[0])
    x = jax.device_put(arrays["x"])
    return Prepared(lambda: jax.block_until_ready(function(x)))


AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe",
}
"""The environment in which Numba compiles for a processor with AVX2 and nothing newer."""

PYTORCH_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""The environment in which PyTorch and its libraries use nothing newer either; ncnn and ONNX Runtime know no such."""


def _fastclstm_avx2(case: Case, threads: int) -> Prepared:
    from fastclstm.engines.cpu.kernels import simd

    if simd.VECTOR_BYTES != 32 or platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable("this process does not compile for AVX2")
    return _fastclstm(case, threads, engine="cpu")


IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {
    "convlstm2d": {
        "fastclstm": Implementation(("fastclstm.engines.cpu",), partial(_fastclstm, engine="cpu")),
        "fastclstm-direct": Implementation(
            ("fastclstm.engines.cpu",), partial(_fastclstm, engine="cpu", algorithm="direct")
        ),
        "fastclstm-avx2": Implementation(("fastclstm.engines.cpu",), _fastclstm_avx2, AVX2, own_process=True),
        "numpy": Implementation((), partial(_fastclstm, engine="reference")),
        "torch": Implementation(("torch",), partial(_torch, channels_last=False)),
        "torch-channels-last": Implementation(("torch",), partial(_torch, channels_last=True)),
        "torch-split": Implementation(("torch",), partial(_torch, channels_last=False, split=True)),
        "torch-split-channels-last": Implementation(("torch",), partial(_torch, channels_last=True, split=True)),
        "torch-compile": Implementation(("torch",), partial(_torch, channels_last=False, compiled=True)),
        "torch-compile-channels-last": Implementation(("torch",), partial(_torch, channels_last=True, compiled=True)),
        "onnxruntime": Implementation(("onnx", "onnxruntime"), _onnxruntime),
        "openvino": Implementation(("onnx", "openvino"), _openvino),
        "ncnn": Implementation(("ncnn",), partial(_ncnn, split=False)),
        "ncnn-split": Implementation(("ncnn",), partial(_ncnn, split=True)),
        "keras-jax": Implementation(("jax", "keras"), _keras, {"KERAS_BACKEND": "jax"}),
        "keras-torch": Implementation(("torch", "keras"), _keras, {"KERAS_BACKEND": "torch"}),
    },
    "max_pool3d": {
        "fastclstm": Implementation(("fastclstm.engines.cpu",), partial(_fastclstm, engine="cpu")),
        "numpy": Implementation((), partial(_fastclstm, engine="reference")),
        "torch": Implementation(("torch",), partial(_torch, channels_last=False)),
        "torch-channels-last": Implementation(("torch",), partial(_torch, channels_last=True)),
    },
}
"""Every implementation of each operation, by name; names that start with fastclstm are ours."""

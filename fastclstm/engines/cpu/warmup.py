"""Compile every kernel before it is needed, so that its machine code waits on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from fastclstm.engines.cpu.conv2d import conv2d, conv2d_backward
from fastclstm.engines.cpu.convlstm2d import convlstm2d, convlstm2d_backward
from fastclstm.engines.cpu.kernels import col2im, direct, gates_backward, kernel_transform, weight_gradient, winograd
from fastclstm.engines.cpu.kernels.max_pool3d import INDICES, SCATTER, SHARE, VALUES, max_pool3d, max_pool3d_backward
from fastclstm.nn import activations
from fastclstm.spec import ConvLSTMSpec, ConvSpec, PoolSpec

DTYPES = ("float32", "float64")


def steps(*dtypes: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What there is to do: the name of a kernel, and a function that compiles it or finds it on disk."""
    for dtype in dtypes:
        for name, (serial, parallel), run in _operations(dtype):
            yield f"{name}, {dtype}", run
            yield f"{name}, {dtype}, parallel", partial(_compile_alike, serial, parallel)


def _operations(dtype: str) -> Iterator[tuple[str, tuple[Any, Any], Callable[[], Any]]]:
    """Name of each operation, its kernels, and a call so small that the serial one does it."""
    image, kernel = np.ones((1, 3, 3, 1), dtype), np.ones((3, 3, 1, 1), dtype)
    convolution = ConvSpec.infer(image.shape, kernel.shape)
    for algorithm, module in (("direct", direct), ("winograd", winograd)):
        call = partial(conv2d, convolution, image, kernel, None, algorithm=algorithm)
        kernels = module.run_serial, module.run_parallel
        yield f"{algorithm} convolution", kernels, partial(_both, call, partial(_train, dtype, algorithm))
    call = partial(conv2d, convolution, image, kernel, None, algorithm="winograd")
    yield "transform of kernels", kernel_transform.KERNELS, call
    strided = ConvSpec.infer(image.shape, kernel.shape, strides=2)
    pull_back = partial(conv2d_backward, strided, image, kernel, np.ones((1, 2, 2, 1), dtype))
    yield "gradient of strided convolution", col2im.KERNELS, pull_back
    yield "direct gradient of kernels", weight_gradient.DIRECT, pull_back
    yield "gradient of gates", gates_backward.KERNELS, partial(_train, dtype, "winograd")
    yield "winograd gradient of kernels", weight_gradient.WINOGRAD, partial(_train, dtype, "winograd")
    yield "gradient of transformed kernels", kernel_transform.BACK_KERNELS, partial(_train, dtype, "winograd")
    volume, indices = np.ones((1, 1, 1, 1, 1), dtype), np.zeros((1, 1, 1, 1, 1), np.int64)
    pool = PoolSpec.infer(volume.shape, 1)
    yield "pooling", VALUES, partial(max_pool3d, pool, volume, False)
    yield "pooling with indices", INDICES, partial(max_pool3d, pool, volume, True)
    yield "gradient of pooling", SHARE, partial(max_pool3d_backward, pool, indices, volume)
    overlapping = PoolSpec.infer(volume.shape, 2, 1, padding="same")
    yield "gradient of overlapping pooling", SCATTER, partial(max_pool3d_backward, overlapping, indices, volume)


def _both(*calls: Callable[[], Any]) -> None:
    for call in calls:
        call()


def _train(dtype: str, algorithm: str) -> None:
    """Take one small step forward and backward."""
    x, kernel = np.ones((1, 1, 3, 3, 1), dtype), np.ones((3, 3, 1, 4), dtype)
    sigmoid, tanh = activations.get("sigmoid"), activations.get("tanh")
    spec = ConvLSTMSpec.infer(x.shape, kernel.shape, kernel.shape, activation=tanh, recurrent_activation=sigmoid,
                              output_activation=tanh)  # fmt: skip
    *_, saved = convlstm2d(spec, x, kernel, kernel, None, None, None, None, None, algorithm=algorithm, save=True)
    assert saved is not None
    convlstm2d_backward(spec, saved, x, None, None)


def _compile_alike(serial: Any, parallel: Any) -> None:
    """Compile a kernel for the types that its serial twin, which takes the same arguments, has met."""
    for signature in serial.signatures:
        parallel.compile(signature)

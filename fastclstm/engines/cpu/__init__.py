"""The cpu engine: Numba kernels on LLVM vectors, on many cores."""

from fastclstm.engines.cpu.conv2d import conv2d, conv2d_backward
from fastclstm.engines.cpu.convlstm2d import convlstm2d, convlstm2d_backward
from fastclstm.engines.cpu.max_pool3d import max_pool3d, max_pool3d_backward
from fastclstm.engines.cpu.memory import copy
from fastclstm.engines.cpu.recurrent import recurrent, recurrent_backward

ALGORITHMS = ("direct", "winograd")

__all__ = [
    "ALGORITHMS", "conv2d", "conv2d_backward", "convlstm2d", "convlstm2d_backward", "copy", "max_pool3d",
    "max_pool3d_backward", "recurrent", "recurrent_backward",
]  # fmt: skip

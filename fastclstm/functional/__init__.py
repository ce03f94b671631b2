"""The operations as functions: validate, choose an engine, return the same kind of array.

Arrays are channels-last. NumPy arrays, nested sequences and any array with DLPack (PyTorch, JAX, CuPy) are accepted;
results come back as the kind of array that ``x`` is. float32 and float64 are computed as they are (mixed: float64),
other real dtypes as float32. Inputs are never modified.

With an x on a GPU they are computed there, by the engine "cuda": without copies, on the caller's stream. The arrays
beside x may be there too, C-contiguous and of its dtype, or be NumPy's.
"""

from fastclstm.functional.cells import (
    convgru2d,
    convgru2d_vjp,
    convlstm3d,
    convlstm3d_vjp,
    convrnn2d,
    convrnn2d_vjp,
)
from fastclstm.functional.convlstm import ConvLSTMPullback, convlstm2d, convlstm2d_step, convlstm2d_vjp
from fastclstm.functional.convolution import conv2d, conv2d_vjp
from fastclstm.functional.pooling import max_pool3d, max_pool3d_vjp
from fastclstm.functional.transposed import (
    conv2d_transpose,
    conv2d_transpose_vjp,
    conv3d_transpose,
    conv3d_transpose_vjp,
)
from fastclstm.functional.volumes import conv3d, conv3d_vjp

__all__ = [
    "ConvLSTMPullback", "conv2d", "conv2d_transpose", "conv2d_transpose_vjp", "conv2d_vjp", "conv3d",
    "conv3d_transpose", "conv3d_transpose_vjp", "conv3d_vjp", "convgru2d", "convgru2d_vjp", "convlstm2d",
    "convlstm2d_step", "convlstm2d_vjp", "convlstm3d", "convlstm3d_vjp", "convrnn2d", "convrnn2d_vjp", "max_pool3d",
    "max_pool3d_vjp",
]  # fmt: skip

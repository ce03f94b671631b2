"""Geometry, computed once: every size, every padding amount and every shape error of the package.

Size letters, used everywhere: ``B`` batch, ``T`` time steps, ``H``×``W`` frame, ``C`` input channels, ``F`` filters,
``KH``×``KW`` kernel, ``HO``×``WO`` (and ``TO``) the sizes after a convolution or a pooling.
"""

from fastclstm.spec.cells import CELL_GATES, CELL_STATES, CellSpec
from fastclstm.spec.convlstm import GATES, NORMALIZED_PARTS, PEEPHOLE_GATES, ConvLSTMSpec
from fastclstm.spec.convolution import Conv3DSpec, ConvSpec, of_rank, transposed
from fastclstm.spec.options import (
    DATA_FORMATS,
    Pair,
    Shape,
    choice,
    expect_shape,
    flag,
    integers,
    rate,
    refuse_masked,
)
from fastclstm.spec.pooling import PoolSpec
from fastclstm.spec.windows import UNKNOWN, window_padding

__all__ = [
    "CELL_GATES", "CELL_STATES", "DATA_FORMATS", "GATES", "NORMALIZED_PARTS", "PEEPHOLE_GATES", "UNKNOWN", "CellSpec",
    "Conv3DSpec", "ConvLSTMSpec", "ConvSpec", "Pair", "PoolSpec", "Shape", "choice", "expect_shape", "flag", "integers",
    "of_rank", "rate", "refuse_masked", "transposed", "window_padding",
]  # fmt: skip

"""fastclstm: the ConvLSTM from plain NumPy, fast on many cores.

Public names are imported when first used, so ``import fastclstm`` costs NumPy and nothing more.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "ConvLSTM2D": "fastclstm.layers",
    "ConvLSTM2DCell": "fastclstm.layers",
    "MaxPooling3D": "fastclstm.layers",
    "TimeDistributionCalculator": "fastclstm.layers",
    "conv2d": "fastclstm.functional",
    "convlstm2d": "fastclstm.functional",
    "get_num_threads": "fastclstm.engines.cpu.threads",
    "max_pool3d": "fastclstm.functional",
    "set_num_threads": "fastclstm.engines.cpu.threads",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from fastclstm.engines.cpu.threads import get_num_threads as get_num_threads
    from fastclstm.engines.cpu.threads import set_num_threads as set_num_threads
    from fastclstm.functional import conv2d as conv2d
    from fastclstm.functional import convlstm2d as convlstm2d
    from fastclstm.functional import max_pool3d as max_pool3d
    from fastclstm.layers import ConvLSTM2D as ConvLSTM2D
    from fastclstm.layers import ConvLSTM2DCell as ConvLSTM2DCell
    from fastclstm.layers import MaxPooling3D as MaxPooling3D
    from fastclstm.layers import TimeDistributionCalculator as TimeDistributionCalculator


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastclstm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""Layers from other libraries' weights, and back: `torch`, `flax`, `keras`, `onnx`, imported when first asked for."""

from typing import TYPE_CHECKING

from fastclstm.lazy import on_first_use, submodules

if not TYPE_CHECKING:
    __getattr__, __dir__ = on_first_use(
        __name__, submodules(__name__, "flax", "keras", "legacy_order", "onnx", "torch")
    )

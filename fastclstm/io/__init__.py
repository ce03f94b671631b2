"""Weights in and out: safetensors files, and files that appear complete or not at all."""

from typing import TYPE_CHECKING

from fastclstm.lazy import on_first_use, submodules

if not TYPE_CHECKING:
    __getattr__, __dir__ = on_first_use(
        __name__, submodules(__name__, "files", "keras_files", "progress", "torch_files", "weights")
    )

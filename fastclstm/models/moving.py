"""Where the layers of a network compute, and the way of arrays from one to the next."""

from __future__ import annotations

from typing import Any

from fastclstm import dispatch
from fastclstm.layers.base import Layer
from fastclstm.layers.container import parts
from fastclstm.layers.place import GPUPlace
from fastclstm.layers.recurrent_cell import RecurrentCell


def engines(layer: Layer) -> set[str | None]:
    """Return the engines that a layer and those within it are to compute with; None: where x is.

    The cells of a ConvLSTM2D are told when it runs.
    """
    return {getattr(part, "engine", None) for part in parts(layer) if not isinstance(part, RecurrentCell)}


def moved(layer: Layer, y: Any, *, stays: bool, first: bool, training: bool) -> Any:
    """Return what a layer is to take where that computes best: on a GPU, where y `stays` if the network's x was there.

    Arrays of NumPy go there with the first layer whose engine is "cuda", and come back with the first that does not
    compute there. The network's `first` layer gets x in its own dtype.
    """
    wanted = engines(layer)
    if not stays and not (layer._knows_gpu(training) and wanted <= {None, "cuda"} and all(map(_is_ours, parts(layer)))):
        return dispatch.to_numpy(y)
    dtype = next((part.dtype for part in parts(layer) if hasattr(part, "dtype")), None)
    if dispatch.on_gpu(y):
        return y if dtype in (None, y.dtype) or first else y.astype(dtype)
    return GPUPlace(type(layer).__name__, y).read("x", y, dtype) if "cuda" in wanted else y


def _is_ours(layer: Layer) -> bool:
    """Whether a layer is of this package; those of others may expect arrays of NumPy."""
    return type(layer).__module__.partition(".")[0] == "fastclstm"

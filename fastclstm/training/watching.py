"""Where what is not finite began."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.base import Layer
from fastclstm.layers.container import told
from fastclstm.training.model import Model


def finite(*values: Any) -> bool:
    """Whether all arrays in nested tuples, lists and dicts are finite."""
    for value in map(dispatch.to_numpy, values):
        if isinstance(value, tuple | list):
            if not finite(*value):
                return False
        elif isinstance(value, Mapping):
            if not finite(*value.values()):
                return False
        elif isinstance(value, np.ndarray) and not np.isfinite(value).all():
            return False
    return True


@contextmanager
def watched_layers(model: Model) -> Iterator[list[str]]:
    """Give a list that gets the first output or gradient of a layer that is not finite, by name."""
    found: list[str] = []

    def watch(path: str, layer: Layer, method: str, what: str) -> None:
        call = getattr(layer, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            if not found and not finite(result, layer.get_gradients() if method == "backward" else ()):
                found.append(f"{what} of {told(path, layer)}")
            return result

        setattr(layer, method, watched)

    layers = list(model._walk())
    for path, layer in layers:
        watch(path, layer, "forward", "the output")
        watch(path, layer, "backward", "the gradients")
    try:
        yield found
    finally:
        for _, layer in layers:
            del layer.forward, layer.backward  # those of the instance: the class's are seen again

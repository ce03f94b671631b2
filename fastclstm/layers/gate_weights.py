"""A ConvLSTM's parameters gate by gate, under the names and in the layout of the equations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from fastclstm import dispatch
from fastclstm.layers.base import Layer
from fastclstm.spec import expect_shape

_GATES = "ifco"
"""The gates' names in the keys, where g is called c, in their order on the 4F axis."""


class GateWeights(MutableMapping[str, np.ndarray]):
    """A layer's parameters gate by gate, in the layout (F, C, KH, KW).

    The keys are W_xi W_hi W_xf W_hf W_xc W_hc W_xo W_ho (F, C, KH, KW) for the kernels of x and of h, and b_i b_f b_c
    b_o (F, 1, 1) for the biases, where c is the gate that the equations call g. What is read is a read-only view; what
    is assigned, any real array of that shape, is copied into the layer.

    Raises
    ------
    KeyError
        A name that is not among the keys.
    ValueError, TypeError
        An assigned value of another shape, or not a real array.
    """

    def __init__(self, cells: Mapping[str, Layer]):
        self._places = {
            f"{prefix}{kind}{gate}": (cell, parameter, slice(n * F, (n + 1) * F))
            for prefix, cell in cells.items()
            for kind, parameter in (("W_x", "kernel"), ("W_h", "recurrent_kernel"), ("b_", "bias"))
            if parameter in cell.parameters
            for F in (cell.parameters[parameter].shape[-1] // len(_GATES),)
            for n, gate in enumerate(_GATES)
        }

    def __getitem__(self, key: str) -> np.ndarray:
        cell, parameter, block = self._place(key)
        part = getattr(cell, parameter)[..., block]
        return part.transpose(3, 2, 0, 1) if part.ndim == 4 else part[:, np.newaxis, np.newaxis]

    def __setitem__(self, key: str, value: Any) -> None:
        cell, parameter, block = self._place(key)
        array = dispatch.as_numpy("weights", key, value)
        expect_shape("weights", key, array.shape, self[key].shape, "(filters, channels, height, width) of the layer")
        new = getattr(cell, parameter).copy()
        new[..., block] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array[:, 0, 0]
        setattr(cell, parameter, new)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"weights: {key} is part of the layer and cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"GateWeights({{{', '.join(f'{key!r}: {array.shape}' for key, array in self.items())}}})"

    def _place(self, key: str) -> tuple[Layer, str, slice]:
        if key not in self._places:
            raise KeyError(f"no weight {key!r}; the keys are {', '.join(self._places)}")
        return self._places[key]

"""ConvLSTM2D from the parameters of Flax's ConvLSTMCell, and back; neither Flax nor JAX is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastclstm.convert.torch import layer_of, state_dict_of
from fastclstm.convert.torch_cells import Arrays
from fastclstm.convert.torch_dialects import Dialect
from fastclstm.convert.torch_recognition import recognize
from fastclstm.layers import ConvLSTM2D

Tree = dict[str, Any]

ROW = Dialect("", split=("ih", "hh"), gates="igfo", forget_bias=1.0, layout="HWIO", name="flax")
"""Of flax.linen.ConvLSTMCell: it adds 1 to the forget gate when it runs."""


def from_flax(
    params: Mapping[Any, Any], prefix: str = "", *, cells: Sequence[str] | None = None, **options: Any
) -> ConvLSTM2D:
    """Return the ConvLSTM2D that has the parameters of a ``flax.linen.ConvLSTMCell``, as `flax.linen.RNN` runs it.

    It computes what the module computes: x (B, T, H, W, C) to outputs (B, T, H, W, F). States are (h, c) in ours,
    (c, h) in Flax.

    Parameters
    ----------
    params : mapping
        Nested, or flat with keys "a/b", "a.b" or ("a", "b"); of arrays of any kind that NumPy takes. All variables of a
        model may be given.
    prefix : str
        Where the cell is, as in "params/RNN_0/cell"; needed only where there are several.
    cells : sequence of str, optional
        The places of several cells, to be stacked.
    **options
        Further options of `ConvLSTM2D`. padding="valid" and the like are the module's, where they are not "same".

    Raises
    ------
    ValueError
        There is no ConvLSTMCell, or there are several; options that the parameters decide.
    TypeError
        `params` is no mapping, or has what are no real numbers.

    Examples
    --------
    >>> import numpy as np
    >>> kernels = {"ih": np.zeros((3, 3, 2, 16)), "hh": np.zeros((3, 3, 4, 16))}
    >>> params = {"RNN_0": {"cell": {name: {"kernel": kernel} for name, kernel in kernels.items()}}}
    >>> layer = from_flax(params, engine="reference")
    >>> layer(np.zeros((1, 5, 8, 8, 2))).shape
    (1, 5, 8, 8, 4)
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"from_flax: params must be a mapping, got {type(params).__name__}")
    row = ROW if cells is None else replace(ROW, cells=[_dotted(place) for place in cells])
    state = _flat(params)
    found = recognize(state, [row], _dotted(prefix))
    layer = layer_of(found, {"data_format": "channels_last"} | options)
    assert isinstance(layer, ConvLSTM2D)
    return layer


def to_flax(layer: ConvLSTM2D, cells: Sequence[str] | None = None) -> Tree:
    """Return the parameters with which ``flax.linen.ConvLSTMCell``, with biases, computes what `layer` computes.

    Parameters
    ----------
    layer : ConvLSTM2D
    cells : sequence of str, optional
        The places of its cells, one a layer, as in ["RNN_0/cell", "RNN_1/cell"]. None: of a single one the parameters
        themselves, of several those names that Flax gives them, ConvLSTMCell_0 and so on.

    Raises
    ------
    ValueError
        A ConvLSTMCell has no place for one of the layer's options; another number of places than layers.
    TypeError
        Another layer.

    Examples
    --------
    >>> {name: conv["kernel"].shape for name, conv in to_flax(ConvLSTM2D(2, 4, 3)).items()}
    {'ih': (3, 3, 2, 16), 'hh': (3, 3, 4, 16)}
    """
    if not isinstance(layer, ConvLSTM2D):
        raise TypeError(f"to_flax: layer must be a ConvLSTM2D, got {type(layer).__name__}")
    count = layer.num_layers
    places = cells if cells is not None else [""] if count == 1 else [f"ConvLSTMCell_{n}" for n in range(count)]
    if isinstance(places, str) or len(places) != count:
        raise ValueError(f"to_flax: cells must be the places of {count} cell(s), got {places!r}")
    row = replace(ROW, cells=[_dotted(place) for place in places])
    tree: Tree = {}
    for name, array in state_dict_of(row, layer).items():
        *path, last = name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = array
    return tree


def _flat(params: Mapping[Any, Any], start: str = "") -> Arrays:
    """Return the leaves of nested mappings under names with dots."""
    flat: Arrays = {}
    for key, value in params.items():
        name = start + _dotted("/".join(map(str, key)) if isinstance(key, tuple) else str(key))
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value if hasattr(value, "shape") else np.asarray(value)
    return flat


def _dotted(place: str) -> str:
    return place.strip("/").replace("/", ".")

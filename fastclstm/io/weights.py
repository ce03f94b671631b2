"""Named arrays and what they mean, in one safetensors file.

The tensors are those of the mapping saved; the file's metadata holds one entry, ``fastclstm``, with a JSON object:
``format_version``, ``fastclstm_version`` and whatever the caller wants to keep. Saving the same twice gives the same
bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastclstm import __version__
from fastclstm.io.bounds import Bounds, Refused
from fastclstm.io.files import replacing
from fastclstm.io.kinds import told

FORMAT = "fastclstm"
FORMAT_VERSION = 1

Path = str | os.PathLike[str]


def save(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write `arrays` and `metadata` (anything JSON can hold) to a safetensors file, whole or not at all.

    Raises
    ------
    OSError
        The file cannot be written.
    TypeError
        `metadata` holds what JSON cannot.
    """
    from safetensors.numpy import save as to_bytes

    header = {"format_version": FORMAT_VERSION, "fastclstm_version": __version__, **metadata}
    data = to_bytes(dict(arrays), {FORMAT: json.dumps(header)})
    with replacing(path) as new:
        new.write_bytes(data)


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save` wrote: the arrays by name, and the metadata.

    Raises
    ------
    OSError
        The file is missing or cannot be read.
    ValueError
        It is not a safetensors file, is damaged, comes from another program or from a later version of this one.
    """
    from safetensors import SafetensorError, safe_open

    bounds = Bounds(path)
    name = bounds.name
    try:
        with safe_open(name, framework="numpy") as file:
            header = _header(bounds, (file.metadata() or {}).get(FORMAT))
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, AttributeError, KeyError, TypeError, OverflowError) as error:  # of dtypes NumPy has not
        kind = told(name)
        why = kind if kind and "safetensors" not in kind else f": {str(error)[:200]}; copy or write it anew"
        raise ValueError(f"{name} is damaged or not a safetensors file{why}") from error
    return arrays, header


def _header(bounds: Bounds, text: str | None) -> dict[str, Any]:
    name = bounds.name
    if text is None:
        raise ValueError(
            f"{name} was not written by fastclstm: its metadata has no {FORMAT!r} entry; weights of PyTorch are "
            f"read by from_torch, any tensors by safetensors.numpy.load_file, for a layer's set_parameters"
        )
    try:
        header: dict[str, Any] = bounds.json(f"its {FORMAT!r} metadata", text)
        version = header["format_version"]
    except Refused:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} is damaged: its {FORMAT!r} metadata cannot be read ({error!r})") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{name} is in format {version!r:.60}, written by fastclstm {header.get('fastclstm_version', '?')!s:.20}; "
            f"fastclstm {__version__} reads format {FORMAT_VERSION}: upgrade it with pip install -U fastclstm"
        )
    return header

"""Keras's files of models and weights, read without Keras."""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np

Path = str | os.PathLike[str]
Arrays = dict[str, list[np.ndarray]]
"""The arrays of each layer, in the order of Keras's ``get_weights``."""

_ZIP_MAGIC = b"PK\x03\x04"
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


def read(path: Path) -> tuple[dict[str, Any] | None, Arrays]:
    """Read a model from a .keras or .h5 file, or its weights from a .weights.h5 file.

    Returns
    -------
    config : dict or None
        The model's class_name and config, as Keras wrote them, and keras_version. None: the file has weights alone.
    arrays : dict from str to list of array
        Each layer's arrays in the order of Keras's ``get_weights``, under the layer's name, where there is a config;
        without one, under its path in the file (Keras 3) or its name (Keras 2).

    Raises
    ------
    ImportError
        h5py is missing.
    OSError
        The file is missing or cannot be read.
    ValueError
        A damaged or foreign file, or one that refers to other files.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        start = file.read(8)
    if start.startswith(_ZIP_MAGIC):
        return _read_zip(name)
    if start == _HDF5_MAGIC:
        return _read_hdf5(name)
    raise ValueError(f"{name} is damaged or no file of a Keras model; write one with model.save('….keras')")


def layer_paths(class_names: Iterable[str]) -> list[str]:
    """Return where Keras 3 keeps the weights of a model's layers, given their classes in order.

    Examples
    --------
    >>> layer_paths(["ConvLSTM2D", "LeakyReLU", "ConvLSTM2D"])
    ['layers/conv_lstm2d', 'layers/leaky_re_lu', 'layers/conv_lstm2d_1']
    """
    counts: dict[str, int] = {}
    paths = []
    for class_name in class_names:
        words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", class_name))
        snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()
        count = counts[snake] = counts.get(snake, -1) + 1
        paths.append(f"layers/{snake}_{count}" if count else f"layers/{snake}")
    return paths


def _read_zip(name: str) -> tuple[dict[str, Any], Arrays]:
    with _telling(name), zipfile.ZipFile(name) as archive:
        config = json.loads(archive.read("config.json"))
        version = json.loads(archive.read("metadata.json")).get("keras_version", "3")
        layers = config["config"].get("layers", [])
        paths = layer_paths(layer["class_name"] for layer in layers)
        names = [layer["config"]["name"] for layer in layers]
        weights = archive.read("model.weights.h5")
    with _hdf5(name, BytesIO(weights)) as file, _telling(name):
        arrays = _arrays(file)
    return config | {"keras_version": version}, {n: arrays.get(p, []) for n, p in zip(names, paths, strict=True)}


def _read_hdf5(name: str) -> tuple[dict[str, Any] | None, Arrays]:
    with _hdf5(name, name) as file, _telling(name):
        if "keras_version" not in file.attrs:
            return None, _arrays(file)
        group = _member(file, "model_weights") if "model_weights" in file else file
        arrays = {}
        for layer in map(_text, group.attrs["layer_names"]):
            own = _member(group, layer)
            arrays[layer] = [_array(own, _text(weight)) for weight in own.attrs["weight_names"]]
        if "model_config" not in file.attrs:
            return None, arrays
        config = json.loads(_text(file.attrs["model_config"]))
        return config | {"keras_version": _text(file.attrs["keras_version"])}, arrays


@contextmanager
def _telling(name: str) -> Iterator[None]:
    """Turn what a damaged file can raise into an error that names it."""
    try:
        yield
    except (zipfile.BadZipFile, AttributeError, EOFError, LookupError, NotImplementedError, OSError, OverflowError,
            RuntimeError, TypeError, ValueError, struct.error, zlib.error) as error:  # fmt: skip
        raise ValueError(f"{name} is damaged or no file of a Keras model ({error}); write it anew with "
                         f"model.save('….keras')") from error  # fmt: skip


def _arrays(file: Any) -> Arrays:
    """Return the arrays of each layer in a file of Keras 3, by path."""
    layers = _member(file, "layers")
    return {f"layers/{layer}": list(_walk(_member(layers, layer))) for layer in layers}


def _walk(group: Any) -> Iterator[np.ndarray]:
    """Give the arrays of a layer: its own, then those of the layers in it, the forward one first."""
    if "vars" in group:
        own = _member(group, "vars")
        for key in sorted(own, key=int):
            yield _array(own, key)
    for key in sorted(group, key=lambda key: (key.startswith("backward"), key)):
        if key not in ("vars", "seed_generator"):
            yield from _walk(_member(group, key))


def _member(group: Any, path: str) -> Any:
    """Return what `group` has under `path`, which must lie in this file."""
    import h5py

    for key in filter(None, path.split("/")):
        link = group.get(key, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{key} is not in it" if link is None else f"{key} does not lie within it")
        group = group[key]
    return group


def _array(group: Any, path: str) -> np.ndarray:
    """Read one dataset, whose numbers must lie in this file."""
    import h5py

    dataset = _member(group, path)
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise ValueError(f"the numbers of {path} do not lie within it")
    return np.asarray(dataset)


def _hdf5(name: str, source: Any) -> Any:
    """Open an HDF5 file, given as a path or a file object."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"reading {name} needs h5py: pip install 'fastclstm[keras]'") from error
    with _telling(name):
        return h5py.File(source, "r")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

"""Keras's files of models and weights, read without Keras."""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

from fastclstm.io.bounds import Bounds, Refused, shown
from fastclstm.io.kinds import told

Path = str | os.PathLike[str]
Arrays = dict[str, Any]
"""The arrays of each layer, in the order of Keras's ``get_weights``. Of a model within they are by its layers in turn,
but in an .h5 file of Keras 2, or of a whole model, in one row: those that are trained first."""

_ZIP_MAGIC = b"PK\x03\x04"
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_RESAVE = "write it anew with model.save('….keras')"
_LAYERS = ("layers", "_layer_checkpoint_dependencies")
"""Where the layers are in a file of weights: of Keras 3, and of 2.12 to 2.14."""
_MODELS = ("Sequential", "Functional", "Model")
_BESIDE_LAYERS = ("vars", "optimizer", "metrics", "seed_generator")
_DEFLATE, _SHUFFLE, _CHECKSUM = 1, 2, 3
"""HDF5's numbers for the filters that its chunks may have passed, in one of these orders."""
_FILTERS: tuple[list[int], ...] = (
    [],
    [_SHUFFLE],
    [_CHECKSUM],
    [_SHUFFLE, _CHECKSUM],
    [_DEFLATE],
    [_SHUFFLE, _DEFLATE],
    [_DEFLATE, _CHECKSUM],
    [_SHUFFLE, _DEFLATE, _CHECKSUM],
)


class KerasFile(NamedTuple):
    """What a file of Keras holds."""

    config: dict[str, Any] | None
    """The model's class_name and config, as Keras wrote them, and keras_version. None: the file has weights alone."""
    arrays: Arrays
    """Under the layer's name, where there is a config; without one, under its path in a file of Keras 3 ("layers/…", of
    2.12 to 2.14 too; others are attributes of a subclassed model), or its name (other Keras 2)."""
    version: str
    """Of Keras, as far as the file shows it: "2" and "3" where it has no number."""
    names: dict[str, str] = {}  # noqa: RUF012
    """Of the layers, by their paths, where `arrays` has these and the file tells."""


def read(path: Path) -> KerasFile:
    """Read a model from a .keras or .h5 file, or its weights from a .weights.h5 file.

    Weights in bfloat16 are returned as float32.

    Raises
    ------
    ImportError
        h5py is missing.
    OSError
        The file is missing or cannot be read.
    ValueError
        A damaged or foreign file, one that refers to other files, one that takes far more memory than it has bytes;
        a subclassed model, a model without its weights (.json), a folder of TensorFlow.
    """
    name = os.fspath(path)
    if os.path.isdir(name) and {"saved_model.pb", "keras_metadata.pb"} & set(os.listdir(name)):
        raise Refused(f"{name} is a SavedModel folder of TensorFlow; load it with tf.keras.models.load_model there, "
                      f"and {_RESAVE}")  # fmt: skip
    bounds = Bounds(path)
    with open(name, "rb") as file:
        start = file.read(8)
    if start.startswith(_ZIP_MAGIC):
        return _read_zip(bounds)
    if start == _HDF5_MAGIC:
        return _read_hdf5(bounds)
    if start.lstrip().startswith(b"{"):
        raise Refused(f"{name} is a JSON description, which has no weights; {_RESAVE}")
    raise ValueError(f"{name} is damaged or no file of a Keras model{told(name)}; {_RESAVE}")


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


def layer_name(spec: Any) -> Any:
    """Return the name in a layer's description."""
    return spec["config"].get("name", spec.get("name"))


def inner_layers(spec: Any) -> list[Any] | None:
    """Return the descriptions of a model's layers; None where `spec` is of a layer."""
    config = spec["config"]
    known = spec["class_name"] in _MODELS and isinstance(config, dict) and isinstance(config.get("layers"), list)
    return config["layers"] if known else None


def _read_zip(bounds: Bounds) -> KerasFile:
    name = bounds.name
    with _telling(name), zipfile.ZipFile(name) as archive:
        if "config.json" not in archive.NameToInfo:
            raise ValueError(f"it has no config.json{told(name)}")
        config = bounds.json("config.json", bounds.member(archive, "config.json"))
        metadata = bounds.json("metadata.json", bounds.member(archive, "metadata.json"))
        version = str(metadata.get("keras_version", "3"))
        layers = config["config"].get("layers")
        if layers is None:
            raise Refused(f"{name} holds a subclassed model, {config['class_name']:.60}, whose layers only its class "
                          f"knows; make a keras.Sequential of them and save that")  # fmt: skip
        weights = bounds.member(archive, "model.weights.h5")
    with _hdf5(name, BytesIO(weights)) as file, _telling(name):
        arrays = _Reader(bounds).model(file, layers)
    return KerasFile(config | {"keras_version": version}, arrays, version)


def _read_hdf5(bounds: Bounds) -> KerasFile:
    reader = _Reader(bounds)
    with _hdf5(bounds.name, bounds.name) as file, _telling(bounds.name):
        if "keras_version" not in file.attrs:
            others = reader.beside_layers(file)
            if others and not any(place in file for place in _LAYERS):
                raise Refused(f"{bounds.name} holds the weights of a subclassed model ({shown(others)}), in an order "
                              f"that only its class knows; in Keras, hand each layer's get_weights() on")  # fmt: skip
            version = "2" if _LAYERS[1] in file else "3"
            return KerasFile(None, reader.layers(file) | others, version, reader.layer_names(file))
        version = reader.text(file, "keras_version")
        group = _member(file, "model_weights") if "model_weights" in file else file
        arrays = {}
        for layer in reader.texts(group, "layer_names"):
            own = _member(group, layer)
            arrays[layer] = [reader.array(own, weight) for weight in reader.texts(own, "weight_names")]
        if "model_config" not in file.attrs:
            return KerasFile(None, arrays, version)
        config = bounds.json("model_config", reader.text(file, "model_config"))
        return KerasFile(config | {"keras_version": version}, arrays, version)


@contextmanager
def _telling(name: str) -> Iterator[None]:
    """Turn what a damaged file can raise into an error that names it."""
    try:
        yield
    except Refused:
        raise
    except (zipfile.BadZipFile, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, OSError,
            OverflowError, RuntimeError, TypeError, ValueError, struct.error, zlib.error) as error:  # fmt: skip
        raise ValueError(f"{name} is damaged or no file of a Keras model ({str(error)[:200]}); {_RESAVE}") from error


class _Reader:
    """Reads an open HDF5 file; what that costs is counted before it is paid."""

    def __init__(self, bounds: Bounds):
        self._bounds = bounds
        self._seen: set[Any] = set()

    def layers(self, file: Any) -> Arrays:
        """Return the arrays of each layer in a file of Keras 3, or of 2.12 to 2.14, under the path that Keras 3 gives.

        Keras 2.12 and 2.13 leave out every other number, as they meet each layer with weights twice.
        """
        place = next((place for place in _LAYERS if place in file), _LAYERS[0])
        group = _member(file, place)
        new = {layer: layer for layer in group} if place == _LAYERS[0] else numbered(group)
        return {f"layers/{new[layer]}": self._of_layer(_member(group, layer)) for layer in group}

    def layer_names(self, file: Any) -> dict[str, str]:
        """Return the names of the layers, as far as a file of Keras 3 tells them, by the paths that `layers` gives."""
        group = _member(file, _LAYERS[0]) if _LAYERS[0] in file else {}
        return {f"layers/{layer}": self._name(_member(group, layer), layer) for layer in group}

    def _name(self, group: Any, otherwise: str) -> str:
        told = "vars" in group and "name" in _member(group, "vars").attrs
        return self.text(_member(group, "vars"), "name") if told else otherwise

    def _of_layer(self, group: Any) -> Any:
        """Return the arrays of a layer; of a model, or one for every step, by the names of its layers."""
        own = _member(group, "layer") if "layer" in group else group
        place = next((place for place in _LAYERS if place in own), None)
        if place is None:
            return list(self._walk(group))
        layers = _member(own, place)
        return {self._name(_member(layers, key), key): self._of_layer(_member(layers, key)) for key in layers}

    def model(self, group: Any, specs: list[Any]) -> Arrays:
        """Return the arrays of the layers that are described, by their names; of models among them, likewise."""
        place = next((place for place in _LAYERS if place in group), _LAYERS[0])
        found = _member(group, place)
        new = {layer: layer for layer in found} if place == _LAYERS[0] else numbered(found)
        stored = {f"layers/{number}": layer for layer, number in new.items()}
        arrays: Arrays = {}
        for spec, path in zip(specs, layer_paths(spec["class_name"] for spec in specs), strict=True):
            if path not in stored:
                arrays[layer_name(spec)] = []
                continue
            own = _member(found, stored[path])
            distributed = spec["class_name"] == "TimeDistributed" and "layer" in own
            inner = inner_layers(spec["config"]["layer"] if distributed else spec)
            own = _member(own, "layer") if distributed else own
            arrays[layer_name(spec)] = list(self._walk(own)) if inner is None else self.model(own, inner)
        return arrays

    def beside_layers(self, file: Any) -> Arrays:
        """Return the arrays that a subclassed model has outside its list of layers, under the attributes' names."""
        import h5py

        names = [key for key in file if key not in (*_LAYERS, *_BESIDE_LAYERS) and not key.startswith("_")
                 and isinstance(file.get(key, getlink=True), h5py.HardLink)]  # fmt: skip
        found = {name: list(self._walk(file[name])) for name in names if isinstance(file[name], h5py.Group)}
        return {name: arrays for name, arrays in found.items() if arrays}

    def _walk(self, group: Any) -> Iterator[np.ndarray]:
        """Give the arrays of a layer: its own, then those of the layers in it, the forward one first."""
        if group in self._seen:
            raise ValueError(f"{group.name} is in it twice")
        self._seen.add(group)
        if "vars" in group:
            own = _member(group, "vars")
            for key in sorted(own, key=int):
                yield self.array(own, key)
        for key in sorted(group, key=lambda key: (key.startswith("backward"), key)):
            if key not in ("vars", "seed_generator"):
                yield from self._walk(_member(group, key))

    def array(self, group: Any, path: str) -> np.ndarray:
        """Read one dataset, whose numbers must all lie in this file."""
        import h5py

        dataset = _member(group, path)
        if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
            raise ValueError(f"the numbers of {path} do not lie within it")
        if dataset.dtype.kind not in "biuf" and dataset.dtype != "V2":
            raise ValueError(f"{path} holds {dataset.dtype}, not numbers")
        self._bounds.spend(path, dataset.nbytes)
        self._check_stored(dataset, path)
        numbers = np.asarray(dataset)
        if numbers.dtype == "V2":  # bfloat16, which is the upper half of float32
            upper = np.frombuffer(numbers.tobytes(), "<u2").astype(np.uint32)
            return (upper << 16).view(np.float32).reshape(numbers.shape)
        return numbers

    def _check_stored(self, dataset: Any, path: str) -> None:
        """Raise ValueError where less is stored than there are numbers, or where a chunk unpacks to more than it is."""
        plan, chunk = dataset.id.get_create_plist(), dataset.chunks
        filters = [plan.get_filter(n)[0] for n in range(plan.get_nfilters())]
        if filters not in _FILTERS:
            raise ValueError(f"{path} has passed HDF5 filters {filters}, of which only deflate, shuffle and checksum "
                             f"are read")  # fmt: skip
        if not filters and dataset.id.get_storage_size() < dataset.nbytes:
            raise ValueError(f"{path} has fewer bytes than its shape {dataset.shape} needs")
        if chunk is None:
            return
        size = math.prod(chunk) * dataset.dtype.itemsize
        self._bounds.check(f"a chunk of {path}", size)
        stored: list[Any] = []
        dataset.id.chunk_iter(stored.append)
        if len(stored) != math.prod(-(-n // c) for n, c in zip(dataset.shape, chunk, strict=True)):
            raise ValueError(f"{path} lacks chunks of its shape {dataset.shape}")
        for part in stored if _DEFLATE in filters else ():
            if part.size > self._bounds.size:
                raise ValueError(f"a chunk of {path} reaches beyond its end")
            skipped, packed = dataset.id.read_direct_chunk(part.chunk_offset)
            if skipped or len(zlib.decompressobj().decompress(packed, size + 1)) > size:
                raise ValueError(f"a chunk of {path} does not unpack to its {size:,} bytes")

    def text(self, node: Any, name: str) -> str:
        """Return an attribute that is a string."""
        value = self._attribute(node, name)
        return value.decode() if isinstance(value, bytes) else str(value)

    def texts(self, node: Any, name: str) -> list[str]:
        """Return an attribute that is a list of strings, or that Keras cut into NAME0, NAME1, … for its length."""
        parts = [name] if name in node.attrs else [key for n in range(len(node.attrs))
                                                   if (key := f"{name}{n}") in node.attrs]  # fmt: skip
        if not parts:
            raise ValueError(f"{node.name} has no {name}")
        values = [value for part in parts for value in self._attribute(node, part)]
        return [value.decode() if isinstance(value, bytes) else str(value) for value in values]

    def _attribute(self, node: Any, name: str) -> Any:
        """Return an attribute of strings."""
        import h5py

        found = node.attrs.get_id(name)
        count = math.prod(found.shape)
        kind = h5py.check_string_dtype(found.dtype)
        if kind is None and count:
            raise ValueError(f"{name} of {node.name} holds {found.dtype}, not text")
        if count:
            longest = found.dtype.itemsize if kind.length else self._longest_text
            self._bounds.check(f"{name} of {node.name}", count * longest)
        return node.attrs[name]

    @cached_property
    def _longest_text(self) -> int:
        """How long strings of no fixed length are at most: they lie in the file's global heaps.

        Raises ValueError where a heap is damaged: in some HDF5 would search for ever.
        """
        longest = 0
        with open(self._bounds.name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for heap in re.finditer(rb"GCOL\x01\0\0\0", data):
                end = heap.start() + int.from_bytes(data[heap.end() : heap.end() + 8], "little")
                position = heap.end() + 8
                while position + 16 <= min(end, len(data)):
                    index, _, size = struct.unpack_from("<HHxxxxQ", data, position)
                    taken = 16 + -(-size // 8) * 8 if index else size  # the last one is free space, its head included
                    if not 16 <= taken <= min(end, len(data)) - position:
                        raise ValueError("a list of texts is damaged")
                    position += taken
                    longest = max(longest, size if index else 0)
        return longest


def numbered(names: Iterable[str]) -> dict[str, str]:
    """Return each of Keras's names of layers with the number that it has when none is left out.

    Examples
    --------
    >>> numbered(["conv2d_10", "conv2d", "dense", "conv2d_2"])
    {'conv2d': 'conv2d', 'conv2d_2': 'conv2d_1', 'conv2d_10': 'conv2d_2', 'dense': 'dense'}
    """
    split = sorted((match[1], int(match[2] or 0), name) for name in names
                   if (match := re.fullmatch(r"(.*?)(?:_(\d+))?", name, re.DOTALL)))  # fmt: skip
    counts: dict[str, int] = {}
    new = {}
    for stem, _, name in split:
        count = counts[stem] = counts.get(stem, -1) + 1
        new[name] = f"{stem}_{count}" if count else stem
    return new


def _member(group: Any, path: str) -> Any:
    """Return what `group` has under `path`, which must lie in this file."""
    import h5py

    for key in filter(None, path.split("/")):
        link = group.get(key, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{key} is not in it" if link is None else f"{key} does not lie within it")
        group = group[key]
    return group


def _hdf5(name: str, source: Any) -> Any:
    """Open an HDF5 file, given as a path or a file object."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"reading {name} needs h5py: pip install 'fastclstm[h5]'") from error
    with _telling(name):
        return h5py.File(source, "r")

"""PyTorch's files of weights, read without PyTorch and without running anything that they hold."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

Path = str | os.PathLike[str]

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
"""Where checkpoints keep the state_dict."""

_RESAVE = "torch.save(model.state_dict(), path)"
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_ZIP_MAGIC = b"PK\x03\x04"
_STORAGES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "bf16", "LongStorage": "i8",
    "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "bool",
}  # fmt: skip
_SAFETENSORS = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "bf16", "I64": "i8", "I32": "i4", "I16": "i2",
                "I8": "i1", "U8": "u1", "BOOL": "bool"}  # fmt: skip


def read(path: Path, key: str | None = None) -> dict[str, np.ndarray]:
    """Read the tensors of a state_dict from a .pt, .pth, .ckpt or .safetensors file.

    Names and arrays are in the file's order, the arrays read-only and of the tensors' dtypes, bfloat16 as float32. A
    prefix ``module.`` that all names share, as DataParallel writes it, is left out. Of what is not a tensor nothing is
    returned, and nothing in the file is run: a file that needs more than tensors, numbers, strings, lists and
    dictionaries is refused.

    Parameters
    ----------
    path : path
        Written by ``torch.save`` (of PyTorch 1.6 or later) or by safetensors.
    key : str, optional
        Under which entry of a checkpoint the state_dict lies. None: under "state_dict", "model_state_dict" or
        "model", or else it is the whole file.

    Raises
    ------
    OSError
        The file is missing or cannot be read.
    ValueError
        A damaged or foreign file; objects in it that are not allowed; a state_dict that is not found.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"module.weight": np.ones((2, 3), np.float32)}, f"{folder}/w.safetensors")
    ...     read(f"{folder}/w.safetensors")["weight"].shape
    (2, 3)
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        start = file.read(len(_LEGACY_MAGIC))
    if start.startswith(_ZIP_MAGIC):
        return _plain_names(_read_zip(name, key))
    if start[8:9] == b"{":
        if key is not None:
            raise ValueError(f"{name} is a safetensors file, which has no entry {key!r}; leave key out")
        return _plain_names(_read_safetensors(name))
    if start == _LEGACY_MAGIC:
        raise ValueError(
            f"{name} is in PyTorch's format from before version 1.6; write it anew where PyTorch is installed: "
            f"torch.save(torch.load(path, map_location='cpu', weights_only=True), path)"
        )
    raise ValueError(f"{name} is damaged or neither a PyTorch nor a safetensors file; write one with {_RESAVE}")


class _Storage(NamedTuple):
    """A run of numbers in the file."""

    kind: str
    record: str
    size: int


class _Tensor(NamedTuple):
    """A view of a storage, not yet read: what unpickling makes of a tensor, so that nothing in a file can act on it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageType(NamedTuple):
    kind: str


class _RebuildTensor(NamedTuple):
    """What a file calls for each tensor. As a tuple it has no attributes that a file could set."""

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        numbers = isinstance(shape, tuple) and isinstance(strides, tuple) and (offset, *shape, *strides)
        if not (isinstance(storage, _Storage) and numbers and all(type(n) is int and n >= 0 for n in numbers)):
            raise pickle.UnpicklingError("a tensor in it is not made of a storage and sizes")
        if len(shape) != len(strides):
            raise pickle.UnpicklingError(f"a tensor in it has shape {shape} but strides {strides}")
        return _Tensor(storage, offset, shape, strides)


class _RebuildParameter(NamedTuple):
    def __call__(self, data: Any, *_: Any) -> Any:
        return data


class _Unpickler(pickle.Unpickler):
    """Makes dictionaries and `_Tensor`, and refuses the rest. What it hands out cannot be altered by the file."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "dict"): dict,
            ("__builtin__", "dict"): dict,
            ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
            ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
        }
        if (module, name) not in allowed:
            raise _NotAllowed(f"{module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(kind), str(record), str(), int(size)) if size >= 0:
                return _Storage(kind, record, size)
        raise pickle.UnpicklingError(f"it refers to {pid!r}, which is no storage")


class _NotAllowed(Exception):
    """A name in the file that is not on the list."""


class _Damaged(Exception):
    """What the file says of itself does not hold."""


def _read_zip(name: str, key: str | None) -> dict[str, np.ndarray]:
    try:
        with _archive(name) as (archive, folder):
            content = _unpickle(_record(archive, f"{folder}/data.pkl"))
    except _NotAllowed as error:
        raise ValueError(
            f"{name} holds more than weights: it needs {error}, and only dictionaries and plain tensors are read. "
            f"Where PyTorch is installed, and if you trust the file, write the weights alone: {_RESAVE}"
        ) from None
    tensors = _state_dict(name, content, key)
    with _archive(name) as (archive, folder):
        entry = f"{folder}/byteorder"
        big_endian = entry in archive.namelist() and _record(archive, entry) == b"big"
        storages = {}
        for storage in {tensor.storage for tensor in tensors.values()}:
            data = _record(archive, f"{folder}/data/{storage.record}")
            numbers = storages[storage] = _numbers(data, storage.kind, big_endian)
            if numbers.size != storage.size:
                raise _Damaged(f"storage {storage.record} holds {numbers.size} numbers, not {storage.size}")
        return {n: _view(n, storages[tensor.storage], tensor) for n, tensor in tensors.items()}


@contextmanager
def _archive(name: str) -> Iterator[tuple[zipfile.ZipFile, str]]:
    """Open the archive and find the one folder that holds all records; turn what damage can raise into ValueError."""
    try:
        with zipfile.ZipFile(name) as archive:
            folders = [entry.removesuffix("/data.pkl") for entry in archive.namelist() if entry.endswith("/data.pkl")]
            if len(folders) != 1:
                raise _Damaged(f"it has {len(folders)} entries …/data.pkl instead of one")
            yield archive, folders[0]
    except (zipfile.BadZipFile, EOFError, LookupError, NotImplementedError, OSError, OverflowError, RuntimeError,
            ValueError, struct.error, _Damaged) as error:  # fmt: skip
        raise ValueError(f"{name} is damaged or not a PyTorch file: {error}; copy or write it anew") from error


def _record(archive: zipfile.ZipFile, entry: str) -> bytes:
    """Return the bytes of an entry; PyTorch compresses none, so none can be larger than its file."""
    info = archive.getinfo(entry)
    if info.compress_type != zipfile.ZIP_STORED:
        raise _Damaged(f"its entry {entry} is compressed, as torch.save never does")
    return archive.read(info)


def _unpickle(data: bytes) -> Any:
    try:
        return _Unpickler(BytesIO(data)).load()
    except _NotAllowed:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise _Damaged(f"its list of tensors cannot be read ({error})") from error


def _state_dict(name: str, content: Any, key: str | None) -> dict[str, _Tensor]:
    """Return the named tensors in what the file holds."""
    if not isinstance(content, dict):
        raise ValueError(
            f"{name} holds a {type(content).__name__.strip('_')}, not a state_dict; write it with {_RESAVE}"
        )
    entries = ", ".join(map(repr, content)) or "none"
    if key is not None:
        if not _tensors(content.get(key)):
            raise ValueError(f"{name} has no tensors under {key!r}; its entries are {entries}")
        return _tensors(content[key])
    nested = [k for k in STATE_DICT_KEYS if _tensors(content.get(k))]
    if len(nested) > 1:
        raise ValueError(f"{name} has tensors under {' and '.join(map(repr, nested))}; say which with key=…")
    tensors = _tensors(content[nested[0]] if nested else content)
    if not tensors:
        raise ValueError(f"{name} has no state_dict at the top nor under {', '.join(STATE_DICT_KEYS)}; "
                         f"its entries are {entries}: say which with key=…")  # fmt: skip
    return tensors


def _tensors(content: Any) -> dict[str, _Tensor]:
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, _Tensor)}


def _view(name: str, numbers: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """Return the tensor as a view of its storage, checked to lie within it."""
    _, offset, shape, strides = tensor
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        return np.zeros(shape, numbers.dtype)
    if last >= numbers.size:
        raise _Damaged(f"tensor {name!r} reaches beyond its storage of {numbers.size} numbers")
    try:
        size = numbers.itemsize
        return np.lib.stride_tricks.as_strided(
            numbers[offset:], shape, [stride * size for stride in strides], writeable=False
        )
    except (ValueError, OverflowError) as error:
        raise _Damaged(f"tensor {name!r} of shape {shape} cannot be read ({error})") from error


def _numbers(data: bytes, kind: str, big_endian: bool = False) -> np.ndarray:
    """Return bytes of the file as a read-only array of the machine's byte order."""
    stored = np.dtype({"bf16": "u2", "bool": "u1"}.get(kind, kind)).newbyteorder(">" if big_endian else "<")
    if len(data) % stored.itemsize:
        raise _Damaged(f"{len(data)} bytes are no whole number of {stored.itemsize}-byte numbers")
    numbers = np.frombuffer(data, stored)
    numbers = numbers.astype(stored.newbyteorder("="), copy=False)
    if kind == "bf16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers != 0 if kind == "bool" else numbers


def _read_safetensors(name: str) -> dict[str, np.ndarray]:
    import safetensors

    with open(name, "rb") as file:
        data = file.read()
    arrays = {}
    deserialize: Any = safetensors.deserialize
    try:
        for key, entry in deserialize(data):
            if entry["dtype"] not in _SAFETENSORS:
                raise ValueError(f"{name}: {key} has dtype {entry['dtype']}; readable are {', '.join(_SAFETENSORS)}")
            numbers = _numbers(bytes(entry["data"]), _SAFETENSORS[entry["dtype"]])
            arrays[key] = numbers.reshape(entry["shape"])
    except safetensors.SafetensorError as error:
        raise ValueError(f"{name} is damaged or not a safetensors file: {error}; copy or write it anew") from error
    return arrays


def _plain_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leave out the ``module.`` of DataParallel, and make all arrays read-only."""
    shared = all(name.startswith("module.") for name in arrays)
    for array in arrays.values():
        array.flags.writeable = False
    return {name.removeprefix("module.") if shared else name: array for name, array in arrays.items()}

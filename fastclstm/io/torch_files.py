"""PyTorch's files of weights, read without PyTorch and without running anything that they hold."""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np

from fastclstm.io import pickles
from fastclstm.io.bounds import Bounds, Refused, shown
from fastclstm.io.kinds import told
from fastclstm.io.pickles import Damaged, Global, Inert
from fastclstm.nn.names import with_article

Path = str | os.PathLike[str]

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
"""Where checkpoints keep the state_dict."""

_RESAVE = "torch.save(model.state_dict(), path)"
_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_LEGACY_PROTOCOL = 1001
_ZIP_MAGIC = b"PK\x03\x04"
_STORAGES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "bf16", "LongStorage": "i8",
    "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "bool",
    "ComplexDoubleStorage": "c16", "ComplexFloatStorage": "c8",
}  # fmt: skip
_BYTES = {"QInt8Storage": "V1", "QUInt8Storage": "V1", "QInt32Storage": "V4", "QUInt4x2Storage": "V1",
          "QUInt2x4Storage": "V1", "storage.UntypedStorage": "V1"}  # fmt: skip
"""Storages of which no more is known than how long they are."""
_KINDS = {f"torch.{name}": kind for name, kind in (_STORAGES | _BYTES).items()}
_SAFETENSORS = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "bf16", "I64": "i8", "I32": "i4", "I16": "i2",
                "I8": "i1", "U8": "u1", "BOOL": "bool"}  # fmt: skip
_DEEPEST, _MOST_PARTS = 100, 100_000
"""Of modules within modules."""


def read(path: Path, key: str | None = None) -> dict[str, np.ndarray]:
    """Read the tensors of a state_dict from a .pt, .pth, .ckpt or .safetensors file.

    Names and arrays are in the file's order, the arrays read-only and of the tensors' dtypes, bfloat16 as float32. A
    prefix ``module.`` that all names share, as DataParallel writes it, is left out. Of what is not a tensor nothing is
    returned, and nothing in the file is run: an object of another class is a name and a state. So a module that was
    saved whole is read without its class, as its state_dict would be.

    Parameters
    ----------
    path : path
        Written by ``torch.save``, of PyTorch before 1.6 too, or by safetensors.
    key : str, optional
        Under which entry of a checkpoint the state_dict lies; "a.b" is the entry "b" of the entry "a". None: under
        "state_dict", "model_state_dict" or "model", or else it is the whole file.

    Raises
    ------
    OSError
        The file is missing or cannot be read.
    ValueError
        A damaged or foreign file; tensors of a kind that NumPy has not; a state_dict that is not found; a file that
        would take more than about ten times its size to read.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"module.weight": np.ones((2, 3), np.float32)}, f"{folder}/w.safetensors")
    ...     read(f"{folder}/w.safetensors")["weight"].shape
    (2, 3)
    """
    bounds = Bounds(path, f"write the tensors alone: {_RESAVE}")
    name = bounds.name
    with open(name, "rb") as file:
        start = file.read(64)
    if start[8:9] == b"{":
        _refuse_own(name)
        if key is not None:
            raise ValueError(f"{name} is a safetensors file, which has no entry {key!r}; leave key out")
        return _locked(_read_safetensors(name))
    if start.startswith(_ZIP_MAGIC):
        return _locked(_read_zip(bounds, key))
    if start[:1] == b"\x80" and _LEGACY_MAGIC in start:
        return _locked(_read_legacy(bounds, key))
    raise ValueError(f"{name} is damaged or neither a PyTorch nor a safetensors file{told(name)}; "
                     f"write one with {_RESAVE}")  # fmt: skip


def find_state_dict(name: str, content: Any, key: str | None, tensors: Callable[[Any], dict[str, Any]]) -> Any:
    """Return the tensors, by name, of the state_dict in a checkpoint's `content`.

    Parameters
    ----------
    name : str
        What errors call the checkpoint.
    content : mapping, or what `tensors` takes
    key : str, optional
        As in `read`.
    tensors : function
        What of a value are tensors by name: none, where it is no state_dict.

    Raises
    ------
    ValueError
        There is none, or several.
    """
    if key is not None:
        found = tensors(_entry(content, key))
        if not found:
            raise ValueError(f"{name} has no tensors under {key!r}; its entries are {_entries(content)}")
        return found
    nested = {}
    if isinstance(content, Mapping):
        nested = {k: found for k in STATE_DICT_KEYS if k in content and (found := tensors(content[k]))}
    if len(nested) > 1:
        raise ValueError(f"{name} has tensors under {' and '.join(map(repr, nested))}; say which with key=…")
    found = next(iter(nested.values())) if nested else tensors(content)
    if not found:
        raise ValueError(f"{name} has no state_dict at the top nor under {', '.join(STATE_DICT_KEYS)}; "
                         f"its entries are {_entries(content)}: say which with key=…")  # fmt: skip
    return found


def _entries(content: Any) -> str:
    return shown(map(repr, content)) if isinstance(content, Mapping) else "none"


def _entry(content: Any, key: str) -> Any:
    """Return the entry of `content` under `key`, or under the first part of it that leads to one; None for none."""
    if not isinstance(content, Mapping):
        return None
    if key in content:
        return content[key]
    heads = [key[:i] for i, letter in enumerate(key) if letter == "."]
    return next((found for head in heads if head in content
                 and (found := _entry(content[head], key[len(head) + 1 :])) is not None), None)  # fmt: skip


# What a file's pickles hold


@dataclass(frozen=True, slots=True)
class _Storage:
    """A run of numbers in the file."""

    kind: str
    record: str
    size: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A view of a storage, not yet read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """A tensor of a kind that is not read."""

    made_by: str


def _refer(pid: Any) -> Any:
    """Return what a persistent id stands for."""
    match pid if type(pid) is tuple and len(pid) <= 6 else None:
        case ("module", Global() as cls, _, _):  # of a module that was saved whole: its source, which is not wanted
            return cls
        case ("storage", Global(name), str(record), _, int(size), *view) if view in ([], [None]):
            kind = _KINDS.get(name)
            if 0 <= size < 1 << 60 and len(record) <= pickles.LONGEST_NAME:
                return _Unreadable(name) if kind is None else _Storage(kind, record, size)
    raise Damaged("it refers to what is no storage")


def _call(function: Global, arguments: tuple[Any, ...]) -> Any:
    """Return what a function of PyTorch makes of arguments, if it is a tensor."""
    match function.name, arguments:
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", _:
            return _rebuilt(*arguments[:4])
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", (data, *_):
            return data
        case "torch._tensor._rebuild_from_type_v2", (Global() as inner, _, tuple() as inner_arguments, *_):
            return _call(inner, inner_arguments) if inner.name != function.name else _Unreadable(inner.name)
        case "torch.Size", (tuple() as shape,):
            return shape
        case name, _ if name.startswith(("torch._utils._rebuild", "torch._tensor._rebuild")):
            return _Unreadable(name)
    return pickles.inert(function, arguments)


def _rebuilt(storage: Any = None, offset: Any = None, shape: Any = None, strides: Any = None) -> Any:
    if isinstance(storage, _Unreadable):
        return storage
    numbers = (
        type(shape) is type(strides) is tuple and max(len(shape), len(strides)) <= 64 and (offset, *shape, *strides)
    )
    if not (isinstance(storage, _Storage) and numbers and all(type(n) is int and 0 <= n < 1 << 60 for n in numbers)):
        raise Damaged("a tensor in it is not made of a storage and sizes")
    if len(shape) != len(strides):
        raise Damaged(f"a tensor in it has shape {shape} but strides {strides}")
    if storage.kind.startswith("V"):
        return _Unreadable("a quantized or newer kind of storage")
    return _Tensor(storage, offset, shape, strides)


def _unpickle(file: BinaryIO, bounds: Bounds, refer: Callable[[Any], Any] = _refer) -> Any:
    try:
        return pickles.load(file, bounds, _call, refer)
    except Damaged as error:
        raise Damaged(f"its list of tensors cannot be read ({error})") from error


def _tensors(content: Any) -> dict[str, Any]:
    """Return the tensors of a state_dict, or those of a module, under the names that its state_dict would have."""
    if isinstance(content, dict):
        return {name: value for name, value in content.items() if isinstance(value, _Tensor | _Unreadable)}
    found: dict[str, Any] = {}
    parts = [("", 0, content)] if isinstance(content, Inert) else []
    visited = 0
    while parts:
        prefix, depth, part = parts.pop()
        state = part.state or {}
        named = [state.get(f"_{group}") for group in ("parameters", "buffers", "modules")]
        groups = [group for group in named if isinstance(group, dict)] if isinstance(named[2], dict) else [state]
        passing = state.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, list) else []
        visited += 1 + (sum(map(len, groups)) + len(passing)) * (1 + len(prefix) // 64)
        if visited > _MOST_PARTS or depth > _DEEPEST or len(prefix) > pickles.LONGEST_NAME:
            raise Damaged(f"its modules have more than {_MOST_PARTS} parts, or stand {_DEEPEST} deep in each other")
        left_out = {name for name in passing if type(name) is str}
        inner = []
        for name, value in ((name, value) for group in groups for name, value in group.items()):
            if isinstance(value, Inert):
                inner.append((f"{prefix}{name}.", depth + 1, value))
            elif isinstance(value, _Tensor | _Unreadable) and name not in left_out:
                found[f"{prefix}{name}"] = value
        parts += reversed(inner)
    return found


def _chosen(name: str, content: Any, key: str | None) -> dict[str, _Tensor]:
    """Return the state_dict's tensors, all of them readable."""
    if not isinstance(content, dict) and not _tensors(content):
        kind = content.name.rpartition(".")[2] if isinstance(content, Inert) else type(content).__name__.strip("_")
        raise ValueError(f"{name} holds {with_article(kind[:80])}, not a state_dict; write it with {_RESAVE}")
    tensors = find_state_dict(name, content, key, _tensors)
    for n, tensor in tensors.items():
        if isinstance(tensor, _Unreadable):
            raise ValueError(f"{name}: the tensor {n[:80]!r} is made by {tensor.made_by[:80]}; readable are dense "
                             f"tensors of real or complex numbers: convert it where PyTorch is installed")  # fmt: skip
    return tensors


# Formats


@contextmanager
def _telling(name: str) -> Iterator[None]:
    """Turn what a damaged file can raise into an error that names it."""
    try:
        yield
    except (Damaged, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise ValueError(f"{name} is damaged or not a PyTorch file: {error}; copy or write it anew") from error


def _read_zip(bounds: Bounds, key: str | None) -> dict[str, np.ndarray]:
    name = bounds.name
    with _telling(name), _archive(name) as (archive, folder):
        content = _unpickle(BytesIO(_record(bounds, archive, f"{folder}/data.pkl")), bounds)
        tensors = _chosen(name, content, key)
        entry = f"{folder}/byteorder"
        big_endian = entry in archive.NameToInfo and _record(bounds, archive, entry) == b"big"
        storages = {}
        for storage in {tensor.storage for tensor in tensors.values()}:
            data = _record(bounds, archive, f"{folder}/data/{storage.record}")
            numbers = storages[storage] = _numbers(data, storage.kind, big_endian)
            if numbers.size != storage.size:
                raise Damaged(f"storage {storage.record} holds {numbers.size} numbers, not {storage.size}")
        return {n: _view(n, storages[tensor.storage], tensor, bounds) for n, tensor in tensors.items()}


@contextmanager
def _archive(name: str) -> Iterator[tuple[zipfile.ZipFile, str]]:
    """Open the archive and find the one folder that holds all records."""
    try:
        archive = zipfile.ZipFile(name)
    except (LookupError, OverflowError, OSError, ValueError) as error:  # a directory of entries that makes no sense
        raise Damaged(str(error)) from error
    with archive:
        folders = [entry.removesuffix("/data.pkl") for entry in archive.NameToInfo if entry.endswith("/data.pkl")]
        if len(folders) != 1:
            what = "" if folders else told(name)
            raise Damaged(f"it has {len(folders)} entries …/data.pkl instead of one{what}")
        if sum(info.compress_size for info in archive.filelist) > os.path.getsize(name):
            raise Damaged("its entries together are larger than the file")
        yield archive, folders[0]


def _record(bounds: Bounds, archive: zipfile.ZipFile, entry: str) -> bytes:
    """Return the bytes of an entry; PyTorch compresses none, so none can be larger than its file."""
    info = archive.NameToInfo.get(entry)
    if info is None:
        raise Damaged(f"it has no entry {entry[:80]}")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise Damaged(f"its entry {entry[:80]} is compressed, as torch.save never does")
    try:
        return bounds.member(archive, entry)
    except Refused:
        raise
    except (LookupError, OverflowError, OSError, ValueError) as error:
        raise Damaged(str(error)) from error


def _read_legacy(bounds: Bounds, key: str | None) -> dict[str, np.ndarray]:
    """Read PyTorch's format from before version 1.6: five pickles, then the storages' numbers one after another."""
    name = bounds.name
    with open(name, "rb") as opened:
        data = opened.read()
    with _telling(name):
        storages: dict[str, _Storage] = {}

        def refer(pid: Any) -> Any:
            storage = _refer(pid)
            if isinstance(storage, _Storage):
                storages[storage.record] = storage
            return storage

        file = BytesIO(data)
        _, protocol, _, content, records = [_unpickle(file, bounds, refer) for _ in range(5)]
        if protocol != _LEGACY_PROTOCOL or not (type(records) is list and all(type(r) is str for r in records)):
            raise Damaged("it has no list of storages")
        tensors = _chosen(name, content, key)
        numbers = {}
        position = file.tell()
        for record in records:
            if record not in storages:
                raise Damaged(f"it lists the storage {record[:80]!r}, which no tensor has")
            numbers[record], position = _stored_numbers(data, position, storages[record])
        if position != len(data):
            raise Damaged(f"{len(data) - position} bytes more follow than its storages have")
        for tensor in tensors.values():
            if storages[tensor.storage.record] != tensor.storage or tensor.storage.record not in numbers:
                raise Damaged(f"a tensor's storage {tensor.storage.record[:80]!r} is missing")
        return {n: _view(n, numbers[tensor.storage.record], tensor, bounds) for n, tensor in tensors.items()}


def _stored_numbers(data: bytes, position: int, storage: _Storage) -> tuple[np.ndarray, int]:
    """Return the numbers of a storage that starts at `position` with their count, and where it ends."""
    start = position + 8
    end = start + storage.size * _stored(storage.kind).itemsize
    if end > len(data) or int.from_bytes(data[position:start], "little") != storage.size:
        raise Damaged(f"storage {storage.record[:80]} does not hold {storage.size} numbers")
    return _numbers(memoryview(data)[start:end], storage.kind), end


def _view(name: str, numbers: np.ndarray, tensor: _Tensor, bounds: Bounds) -> np.ndarray:
    """Return the tensor as a view of its storage, checked to lie within it and to be no larger than the file allows."""
    offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    try:
        if 0 in shape:
            return np.zeros(shape, numbers.dtype)
        if last >= numbers.size:
            raise Damaged(f"tensor {name[:80]!r} reaches beyond its storage of {numbers.size} numbers")
        size = numbers.itemsize
        bounds.spend(f"tensor {name[:80]!r}", math.prod(shape) * size)
        return np.lib.stride_tricks.as_strided(
            numbers[offset:], shape, [stride * size for stride in strides], writeable=False
        )
    except Refused:
        raise
    except (ValueError, OverflowError) as error:
        raise Damaged(f"tensor {name[:80]!r} of shape {shape} cannot be read ({error})") from error


def _stored(kind: str) -> np.dtype[Any]:
    """Return the dtype of numbers of a kind, as they stand in a file."""
    return np.dtype({"bf16": "u2", "bool": "u1"}.get(kind, kind))


def _numbers(data: bytes | memoryview, kind: str, big_endian: bool = False) -> np.ndarray:
    """Return bytes of the file as a read-only array of the machine's byte order."""
    stored = _stored(kind).newbyteorder(">" if big_endian else "<")
    if len(data) % stored.itemsize:
        raise Damaged(f"{len(data)} bytes are no whole number of {stored.itemsize}-byte numbers")
    numbers = np.frombuffer(data, stored)
    numbers = numbers.astype(stored.newbyteorder("="), copy=False)
    if kind == "bf16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers != 0 if kind == "bool" else numbers


def _refuse_own(name: str) -> None:
    """Raise ValueError where a safetensors file is one of ours."""
    import safetensors

    try:
        with safetensors.safe_open(name, framework="numpy") as file:
            text = (file.metadata() or {}).get("fastclstm")
        described = None if text is None else json.loads(text)
    except (safetensors.SafetensorError, ValueError, RecursionError):  # a damaged file, whose reader will say so
        return
    if isinstance(described, dict):
        own = str(described.get("class", "layer"))[:80]
        raise ValueError(f"{name} holds {with_article(own)} of fastclstm; load it with {own}.load(path)")


def _read_safetensors(name: str) -> dict[str, np.ndarray]:
    import safetensors

    with open(name, "rb") as file:
        data = file.read()
    arrays = {}
    deserialize: Any = safetensors.deserialize
    try:
        for key, entry in deserialize(data):
            if entry["dtype"] not in _SAFETENSORS:
                raise ValueError(f"{name}: {key[:80]} has dtype {entry['dtype']}; "
                                 f"readable are {', '.join(_SAFETENSORS)}")  # fmt: skip
            numbers = _numbers(entry["data"], _SAFETENSORS[entry["dtype"]])
            if len(entry["shape"]) > 64:
                raise ValueError(f"{name}: {key[:80]} has {len(entry['shape'])} axes, and NumPy up to 64")
            arrays[key] = numbers.reshape(entry["shape"])
    except safetensors.SafetensorError as error:
        raise ValueError(f"{name} is damaged or not a safetensors file: {error}; copy or write it anew") from error
    return arrays


def _locked(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Make arrays read-only, and leave out what `plain_names` does."""
    for array in arrays.values():
        array.flags.writeable = False
    return plain_names(arrays)


def plain_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the ``module.`` of DataParallel, where all names begin with it.

    Examples
    --------
    >>> plain_names({"module.weight": 1, "module.bias": 2})
    {'weight': 1, 'bias': 2}
    """
    shared = all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if shared else name: tensor for name, tensor in tensors.items()}

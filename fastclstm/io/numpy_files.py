"""NumPy's files of arrays, .npy and .npz, read without running anything and at a cost that their size bounds."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from fastclstm.io.bounds import Bounds, Refused

Path = str | os.PathLike[str]

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npy(path: Path) -> np.ndarray:
    """Map the array of an .npy file into memory, read-only.

    Raises
    ------
    OSError
        The file is missing or cannot be read.
    ValueError
        It is no .npy file, is damaged or cut short, or holds Python objects; the message names it.
    """
    bounds = Bounds(path)
    with _telling(bounds.name, "cannot be read as a .npy array of numbers"), open(bounds.name, "rb") as file:
        found = _header(file)
        found.check(bounds.size - found.start)
        if not found.size:
            return np.zeros(found.shape, found.dtype)
        return np.memmap(bounds.name, found.dtype, "r", found.start, found.shape, found.order)


def names(path: Path) -> list[str]:
    """Return the names of the arrays in an .npz file, of another file none; errors are those of `read_npz`."""
    bounds = Bounds(path)
    if not zipfile.is_zipfile(bounds.name):
        return []
    with _archive(bounds) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_npz(path: Path, wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """Read arrays of an .npz file, compressed or not, read-only.

    Raises
    ------
    OSError
        The file is missing or cannot be read.
    ValueError
        It is no .npz file, lacks one of the arrays or is damaged; one holds Python objects; or together they take more
        than about ten times the file's size.
    """
    bounds, arrays = Bounds(path), {}
    with _archive(bounds) as archive:
        for name in wanted:
            if f"{name}.npy" not in archive.namelist():
                raise ValueError(f"it has no array {name}")
            data = bounds.member(archive, f"{name}.npy")
            found = _header(BytesIO(data))
            found.check(len(data) - found.start)
            flat = np.frombuffer(data, found.dtype, found.size, found.start) if found.size else np.zeros(0, found.dtype)
            arrays[name] = flat.reshape(found.shape, order=found.order)
    return arrays


class _Header(NamedTuple):
    """What the first bytes of an .npy file say."""

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype
    start: int
    """Where the numbers begin."""

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)

    def check(self, there: int) -> None:
        """Raise ValueError where the numbers are not in `there` bytes."""
        if self.dtype.hasobject:
            raise ValueError("it holds Python objects, which are not read")
        if min(self.shape, default=0) < 0 or not self.dtype.itemsize or self.size * self.dtype.itemsize > there:
            raise ValueError(f"shape {self.shape} of {self.dtype} does not fit the {there:,} bytes that are there")


def _header(file: BinaryIO) -> _Header:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format is none of numbers")
    try:
        shape, fortran, dtype = _HEADERS[version](file)
    except Exception as error:  # NumPy parses a text of Python, which can end in any error
        raise ValueError("its header cannot be read") from error
    return _Header(shape, "F" if fortran else "C", dtype, file.tell())


@contextmanager
def _archive(bounds: Bounds) -> Iterator[zipfile.ZipFile]:
    with _telling(bounds.name, "is no .npz file of numbers"), zipfile.ZipFile(bounds.name) as archive:
        yield archive


@contextmanager
def _telling(name: str, what: str) -> Iterator[None]:
    """Turn what a damaged file can raise into an error that names it."""
    try:
        yield
    except Refused:
        raise
    except (AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, OSError, OverflowError,
            RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        raise ValueError(f"{name} {what}: {str(error)[:200]}") from error

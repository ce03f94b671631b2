"""What a file is that a reader of another kind was given."""

from __future__ import annotations

import os
import zipfile

_PYTORCH = "a file of PyTorch, of which fastclstm.from_torch reads the weights"
_KERAS = "a file of Keras (or other HDF5), which fastclstm.from_keras reads"
_SAVED_MODEL = "a SavedModel of TensorFlow; load it there, and write it anew with model.save('….keras')"
_ONNX = "a file of ONNX, which to_onnx writes and nothing here reads"
_NPZ = "a .npz of NumPy; hand on what dict(numpy.load(path)) gives"
_BEGINNINGS = (
    (b"\x89HDF\r\n\x1a\n", _KERAS),
    (b"\x93NUMPY", "a .npy of NumPy, one array without a name"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", _PYTORCH),  # before version 1.6
    (b"\x80", "a pickle, which is not read as it may run code"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file itself with git lfs pull"),
    (b"\x08\x01\x12", _SAVED_MODEL),
    *((bytes((8, version, 18)), _ONNX) for version in range(3, 16)),
    (b"<", "a page of the web, perhaps an error that was saved for the file"),
)
_MEMBERS = (("/data.pkl", _PYTORCH), ("model.weights.h5", _KERAS), (".npy", _NPZ))
"""What the members of an archive end in."""


def told(path: str) -> str:
    """Return what a file is, with the way to read it, for an error's message; nothing where that is not known.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(b"<!DOCTYPE html>"), file.flush()
    ...     told(file.name)
    ': it is a page of the web, perhaps an error that was saved for the file'
    """
    with open(path, "rb") as file:
        first = file.read(40)
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") < os.path.getsize(path):
        return ": it is a safetensors file; fastclstm.load reads its own, fastclstm.from_torch PyTorch's"
    if first[4:8] == b"TFL3":
        return ": it is a file of TensorFlow Lite, which is not read; save the Keras model that it was made of"
    kinds = [what for start, what in _BEGINNINGS if first.startswith(start)]
    if first.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                kinds = [what for end, what in _MEMBERS if any(name.endswith(end) for name in archive.NameToInfo)]
        except (zipfile.BadZipFile, LookupError, NotImplementedError, OSError, OverflowError, ValueError):
            pass
    return f": it is {kinds[0]}" if kinds else ""

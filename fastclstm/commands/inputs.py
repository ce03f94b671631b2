"""Arrays in files that a user hands over, and what a file is where that is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastclstm.io import numpy_files
from fastclstm.layers import Layer
from fastclstm.layers.container import parts
from fastclstm.layers.conv_recurrent import ConvRecurrent
from fastclstm.spec.windows import axis_names

_BEGINNINGS = (
    (b"CDF", "a netCDF file", "xarray.open_dataset({path!r})[NAME].values"),
    (b"\x89HDF\r\n\x1a\n", "a netCDF-4 or HDF5 file", "h5py.File({path!r})[NAME][:]"),
    (b"GRIB", "a GRIB file", "xarray.open_dataset({path!r}, engine='cfgrib')[NAME].values"),
    (b"GIF8", "a GIF", "[np.asarray(f.convert('L')) for f in PIL.ImageSequence.Iterator(PIL.Image.open({path!r}))]"),
    (b"II*\x00", "a TIFF", "tifffile.imread({path!r})"),
    (b"MM\x00*", "a TIFF", "tifffile.imread({path!r})"),
    (b"\x1f\x8b", "compressed by gzip", ""),
    (b"\x80", "a pickle, which is not read as it may run code", ""),
)
"""First bytes, what they stand for, and what makes an array of such a file."""


def check_distinct(op: str, inputs: tuple[Path | None, ...], outputs: tuple[Path | None, ...]) -> None:
    """Raise ValueError where an output would overwrite an input or another output."""
    taken = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path is not None:
            if path.resolve() in taken:
                raise ValueError(
                    f"{op}: writing {path} would overwrite an input or another output; choose another name"
                )
            taken.add(path.resolve())


def check_array_target(op: str, out: Path) -> None:
    """Raise ValueError where the name of an output tells another kind of file than .npy."""
    if out.suffix.lower() not in ("", ".npy"):
        raise ValueError(f"{op}: what comes of an array is written as .npy, but --out is {out}; give a name.npy")


def check_folder(op: str, out: Path) -> None:
    """Raise ValueError where --out, a folder that is made if need be, is something else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{op}: {out} is a file; --out names a folder")


def is_array_file(path: Path) -> bool:
    """Whether a file is NumPy's by its name; xarray reads the others."""
    return path.suffix.lower() in (".npy", ".npz")


def open_array(op: str, path: Path) -> np.ndarray:
    """Memory-map the array of a ``.npy`` file."""
    try:
        return numpy_files.read_npy(path)
    except ValueError as error:
        told = what_is(path) or (_told(path, "a .npz", "np.load({path!r})[NAME]") if path.suffix == ".npz" else "")
        if not told:
            raise ValueError(f"{op}: {error}") from error
        raise ValueError(f"{op}: {path} cannot be read as a .npy array of numbers: {told}") from error


def takes_sequences(network: Layer) -> bool:
    """Whether there is a ConvLSTM2D, or its like, in a network."""
    return any(isinstance(part, ConvRecurrent) for part in parts(network))


def open_sequences(op: str, path: Path, network: Layer) -> tuple[np.ndarray, bool]:
    """Memory-map sequences as (B, T, H, W, C), C where `network` has it; also tell whether there is a batch axis.

    Those of a network that begins with a ConvLSTM1D have no H, with a ConvLSTM3D a depth before it.
    """
    x = open_array(op, path)
    first = next(part for part in parts(network) if hasattr(part, "_rank"))
    rank = first._rank if isinstance(first, ConvRecurrent) else 2
    if x.ndim not in (rank + 1, rank + 2, rank + 3):
        names = "time", *axis_names(rank, "depth")
        axes, said = ", ".join(name[0].upper() for name in names), ", ".join(names)
        raise ValueError(f"{op}: {path} has shape {x.shape} but must be ({axes}), ({axes}, C) or (B, {axes}, C): "
                         f"{said} and channels, after a batch axis")  # fmt: skip
    if x.ndim == rank + 1:
        formats = (part.data_format for part in parts(network) if hasattr(part, "data_format"))
        x = np.expand_dims(x, -rank - 1 if next(formats) == "channels_first" else -1)
    return (x, True) if x.ndim == rank + 3 else (x[np.newaxis], False)


def what_is(path: Path) -> str:
    """Return what a file is, other than .npy and .npz, and how it becomes an array; nothing where that is not known."""
    with path.open("rb") as file:
        first = file.read(12)
    if first[4:8] == b"ftyp":
        return _told(path, "a film (MP4)", "imageio.v3.imread({path!r})")
    known = (told for told in _BEGINNINGS if first.startswith(told[0]))
    return next((_told(path, what, how) for _, what, how in known), "")


def _told(path: Path, what: str, how: str) -> str:
    call = how.format(path=str(path))
    return f"it is {what}" + (f"; save the array first: np.save('films.npy', {call})" if how else "")

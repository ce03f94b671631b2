"""Frames in NetCDF files and Zarr stores, as one DataArray along time, and back: through xarray, which knows them.

Names may be of files, of stores, of folders that hold them, or patterns (``2026-07-*.nc``). Frames of several files
are one sequence, in the order of their times. Up to `IN_MEMORY` they are read at once; more stays in the files, in
Dask arrays of a few frames a chunk. Missing is what xarray makes NaN (``_FillValue``, ``missing_value``), and what lies
outside of ``valid_range``, ``valid_min`` or ``valid_max``, be these packed or not.
"""

from __future__ import annotations

import glob
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from fastclstm.adapters.xarray_axes import CHANNELS, TIMES, Axes, time_dim
from fastclstm.io.files import replacing

SUFFIXES = (".nc", ".nc4", ".cdf", ".netcdf", ".h5", ".hdf5", ".zarr")
"""Of what is read in a folder."""
IN_MEMORY = 1 << 30
"""Bytes of frames, as float32, that are read at once."""
CHUNK = 8 << 20
"""Bytes of a chunk of frames that stay in files."""
ROUNDING = 1e-6
"""Share by which a value that stands for missing ones may differ from what is told."""

Names = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def find(op: str, names: Names) -> list[str]:
    """Return the files and stores that names stand for, in the order of the names.

    Raises
    ------
    OSError
        One that is not there.
    ValueError
        A pattern or a folder without any.
    """
    given = [names] if isinstance(names, str | os.PathLike) else list(names)
    return list(dict.fromkeys(path for name in given for path in _found(op, os.fspath(name))))


def open_frames(
    op: str, names: Names, variable: str | None = None, *, missing: float | None = None, time: str | None = None,
    space: Sequence[str] | None = None, usual: Sequence[str] = (),
) -> tuple[xarray.DataArray, dict[str, Any]]:  # fmt: skip
    """Return a variable of files as a DataArray of float32 along time, and the attributes of the first file.

    Parameters
    ----------
    op : str
        Who asks, for errors.
    names : path, or sequence of paths
        See the module.
    variable : str, optional
        None: the only one with rows and columns.
    missing : float, optional
        A value that is missing, beside what the files say.
    time, space : str, and (str, str), optional
        The dims, where they are not known by their names.
    usual : (str, str, str), optional
        Dims of time, rows and columns that are meant where a file has them.

    Returns
    -------
    DataArray
        Frames of files that have no dim of time follow one another by their coordinate of time.
    dict

    Raises
    ------
    OSError
        A file that is not there or cannot be read.
    ValueError
        No such variable, or several; files that do not fit together.
    TypeError
        A variable that holds no real numbers.
    ImportError
        What reads such files is not installed.
    """
    paths = find(op, names)
    opened = [_opened(op, path, variable, time, space, usual) for path in paths]
    parts, attrs = [part for part, _, _ in opened], opened[0][1]
    first, dim = parts[0], opened[0][2].time
    for path, part in zip(paths[1:], parts[1:], strict=True):
        _check_alike(op, dim, paths[0], first, path, part)
    in_memory = sum(part.size for part in parts) * 4 <= IN_MEMORY
    parts = [part.load() if in_memory else _chunked(part, dim) for part in parts]  # before anything is computed
    parts = [_without_invalid(op, *both, missing).astype(np.float32) for both in zip(paths, parts, strict=True)]
    frames = parts[0]
    if len(parts) > 1:
        frames = xarray.concat(parts, dim, coords="minimal", compat="override", join="override",
                               combine_attrs="override")  # fmt: skip
    if dim in frames.coords:
        if (undated := int(frames[dim].isnull().sum())) > 0:
            raise ValueError(f"{op}: {undated} of {frames.sizes[dim]} times of {first.name} are missing; give the "
                             f"files without these frames, or with their times")  # fmt: skip
        frames = _in_order(frames, dim)
    frames.encoding = {key: value for key, value in first.encoding.items() if key == "grid_mapping"}
    return frames, attrs


def write_frames(
    path: str | os.PathLike[str], frames: xarray.DataArray, history: str, attrs: Mapping[str, Any] | None = None
) -> None:
    """Write a DataArray to a NetCDF file or, by the suffix ``.zarr``, to a Zarr store, whole or not at all.

    Parameters
    ----------
    path : path
    frames : DataArray
    history : str
        A line on how it was made, put before the history in `attrs`.
    attrs : mapping, optional
        Attributes of the file.

    Raises
    ------
    OSError
        It cannot be written.
    ValueError
        A suffix of neither.
    ImportError
        What writes such files is not installed.
    """
    target, name = Path(path), str(frames.name or "frames")
    check_target("write_frames", target)
    told = dict(attrs or {})
    told["history"] = "\n".join(filter(None, (history, str(told.get("history", "")))))
    dataset = frames.to_dataset(name=name).assign_attrs(told)
    if (mapping := frames.encoding.get("grid_mapping")) in dataset.coords:
        dataset = dataset.reset_coords(mapping)
        dataset[name].attrs["grid_mapping"] = mapping
    if target.suffix.lower() == ".zarr":
        _write_zarr(dataset, target)
        return
    with replacing(target) as new:
        dataset.to_netcdf(new, engine="netcdf4", encoding={name: {"_FillValue": np.float32(np.nan), "zlib": True}})


def check_target(op: str, target: Path) -> None:
    """Raise where a file of frames could not be written: another suffix, or what writes it is not installed."""
    suffix = target.suffix.lower()
    if suffix not in (".nc", ".nc4", ".zarr"):
        raise ValueError(f"{op}: {target} must end in .nc (NetCDF) or .zarr, as its input is no .npy")
    _need(op, "zarr" if suffix == ".zarr" else "netCDF4", target)


def _found(op: str, name: str) -> Iterator[str]:
    path = Path(name)
    if "://" in name or _is_zarr(path) or path.is_file():
        yield name
    elif path.is_dir():
        inside = sorted(str(entry) for entry in path.iterdir()
                        if entry.suffix.lower() in SUFFIXES and (entry.is_file() or _is_zarr(entry)))  # fmt: skip
        if not inside:
            raise ValueError(f"{op}: the folder {name} holds no file that ends in {', '.join(SUFFIXES)}; give the "
                             f"files, or a pattern in quotes: '{name}/*'")  # fmt: skip
        yield from inside
    elif glob.has_magic(name):
        matches = sorted(glob.glob(name, recursive=True))
        if not matches:
            raise ValueError(f"{op}: no file matches {name}")
        for match in matches:
            yield from _found(op, match)
    else:
        raise FileNotFoundError(2, "No such file or directory", name)


def _is_zarr(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zmetadata"))


def _need(op: str, package: str, path: Any) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise ImportError(f"{op}: {path} needs {package} ({error}); pip install 'fastclstm[nowcast]'") from error


def _opened(
    op: str, path: str, variable: str | None, time: str | None, space: Sequence[str] | None, usual: Sequence[str]
) -> tuple[xarray.DataArray, dict[str, Any], Axes]:  # fmt: skip
    """Return a variable of one file, lazily, with a dim of time; the file's attributes, and the dims."""
    store = _is_zarr(Path(path)) or path.rstrip("/").endswith(".zarr")
    if store:
        _need(op, "zarr", path)
    try:
        dataset = xarray.open_dataset(path, decode_coords="all", cache=False, **({"engine": "zarr"} if store else {}))
    except (ValueError, ImportError, RuntimeError) as error:
        if "did not find a match" in str(error) or "no engine" in str(error).lower() or isinstance(error, ImportError):
            raise ValueError(f"{op}: {path} is in no format that xarray reads here; for NetCDF, pip install "
                             f"'fastclstm[nowcast]'") from error  # fmt: skip
        raise ValueError(f"{op}: {path} cannot be read: {error}") from error
    except OSError as error:
        if error.strerror and error.filename:
            raise
        raise OSError(f"{op}: {path} cannot be read: {error}") from error
    frames = dataset[_chosen(op, path, dataset, variable)]
    if frames.dtype.kind not in "fiub":
        raise TypeError(f"{op}: in {path}, {frames.name} has dtype {frames.dtype} but must hold real numbers")
    frames = _with_time(op, path, frames, time)
    if usual and set(usual) <= set(frames.dims):
        time, *space = usual
    try:
        axes = Axes.of(op, frames, time, space)
    except ValueError as error:
        raise ValueError(f"{error}; on the command line: --time NAME and --space ROWS COLUMNS; in {path}") from error
    return frames, dict(dataset.attrs), axes


def _chosen(op: str, path: str, dataset: xarray.Dataset, variable: str | None) -> Any:
    there = {str(name): data for name, data in dataset.data_vars.items()}
    told = ", ".join(f"{name} {tuple(data.dims)}" for name, data in there.items()) or "none"
    if variable is not None:
        if variable not in there:
            raise ValueError(f"{op}: {path} has no variable {variable!r}; it has {told}")
        return variable
    frames = [name for name, data in there.items() if data.ndim >= 2 and data.dtype.kind in "fiu"]
    if len(frames) != 1:
        raise ValueError(f"{op}: which variable of {path}? It has {told}; give --variable NAME")
    return frames[0]


def _with_time(op: str, path: str, frames: xarray.DataArray, time: str | None) -> xarray.DataArray:
    """Return frames with a dim of time: a file of one frame may have it as a coordinate alone."""
    if time in frames.dims or time_dim(frames, frames.dims) is not None:
        return frames
    scalars = [name for name, coord in frames.coords.items() if not coord.dims]
    for name in TIMES if time is None else (time,):
        if name in scalars:
            return frames.expand_dims(name)
    if len([dim for dim in frames.dims if str(dim).lower() not in CHANNELS]) > 2:
        return frames  # which dim is time, Axes asks
    raise ValueError(f"{op}: in {path}, {frames.name} {tuple(frames.dims)} has no dim of time, and no coordinate that "
                     f"tells it; add one: frames.expand_dims(time=[…])")  # fmt: skip


def _without_invalid(op: str, path: str, frames: xarray.DataArray, missing: float | None) -> xarray.DataArray:
    """Return frames with NaN where the file's attributes, or the user, say that values are none."""
    attrs = frames.attrs
    bounds = [attrs.pop(name, None) for name in ("valid_min", "valid_max")]
    if (both := attrs.pop("valid_range", None)) is not None:
        if np.shape(both) != (2,):
            raise ValueError(f"{op}: in {path}, valid_range of {frames.name} is {both!r} but must be two numbers, the "
                             f"least and the largest; mend or remove the attribute")  # fmt: skip
        bounds = list(both)
    for bound, name, beyond in zip(bounds, ("valid_min", "valid_max"), (np.less, np.greater), strict=True):
        if bound is not None:
            try:
                edge = _unpacked(frames, bound)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{op}: in {path}, {name} of {frames.name} is {bound!r} but must be a number; mend or "
                                 f"remove the attribute") from error  # fmt: skip
            frames = _masked(frames, beyond(frames, edge))
            frames.attrs[name] = np.float32(edge)
    if missing is None:
        return frames
    near = abs(frames - float(missing)) <= ROUNDING * abs(missing)  # as packed values are rounded
    return _masked(frames, near | (frames == float(missing)))


def _unpacked(frames: xarray.DataArray, bound: Any) -> Any:
    """Return a bound of valid values in the units of the frames.

    It is one of the packed values, as the CF conventions have it, with the sign that ``_Unsigned`` gives these; but
    that of integers is among what is unpacked where it is no integer itself (NetCDF Users Guide, appendix A).
    """
    told, edge = frames.encoding, np.asarray(bound)
    held, counts = np.dtype(told.get("dtype", frames.dtype)), edge.dtype.kind in "iu"
    if held.kind in "iu" and counts and (signs := told.get("_Unsigned")) is not None:
        edge = edge.astype(f"{'u' if str(signs).lower() == 'true' else 'i'}{held.itemsize}")
    edge = edge.astype(frames.dtype if frames.dtype.kind == "f" else np.float64).reshape(1)
    if counts or held.kind == "f":
        edge *= told.get("scale_factor", 1.0)  # in an array, as xarray does it: to the same rounding
        edge += told.get("add_offset", 0.0)
    return edge[0]


def _masked(frames: xarray.DataArray, absent: Any) -> xarray.DataArray:
    encoding = frames.encoding
    made = frames.where(~absent)
    made.attrs, made.encoding = frames.attrs, encoding
    return made


def _chunked(frames: xarray.DataArray, time: Any) -> xarray.DataArray:
    frame = 4 * frames.size // max(1, frames.sizes[time])
    return frames.chunk({dim: -1 for dim in frames.dims} | {time: max(1, CHUNK // max(1, frame))})


def _check_alike(op: str, time: Any, path: str, first: xarray.DataArray, other_path: str, other: Any) -> None:
    """Raise ValueError where frames of two files are no one sequence."""
    sizes = [{dim: n for dim, n in part.sizes.items() if dim != time} for part in (first, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{op}: {first.name} is {sizes[0]} in {path} but {sizes[1]} in {other_path}; give files of "
                         f"one grid")  # fmt: skip
    for dim in sizes[0]:
        if dim in first.coords and dim in other.coords:
            a, b = first[dim].values, other[dim].values
            same = np.array_equal(a, b) if a.dtype.kind not in "fiu" else np.allclose(a, b, rtol=1e-5)
            if not same:
                raise ValueError(f"{op}: the coordinate {dim} differs between {path} and {other_path}; give files of "
                                 f"one grid")  # fmt: skip
    units = first.attrs.get("units"), other.attrs.get("units")
    if units[0] != units[1]:
        raise ValueError(f"{op}: {first.name} is in {units[0]!r} in {path} but in {units[1]!r} in {other_path}; "
                         f"convert one of them")  # fmt: skip


def _in_order(frames: xarray.DataArray, time: Any) -> xarray.DataArray:
    """Return frames in the order of their times, each once."""
    index = frames.indexes[time]
    if not index.is_monotonic_increasing:
        frames = frames.isel({time: np.argsort(index.values, kind="stable")})
    twice = frames.indexes[time].duplicated()
    return frames.isel({time: ~twice}) if twice.any() else frames


def _write_zarr(dataset: xarray.Dataset, target: Path) -> None:
    """Write a store beside the target, which it then takes the place of."""
    if target.exists() and not _is_zarr(target):
        raise OSError(f"cannot write {target}: it is there and no Zarr store; give another name")
    new = target.with_name(f".{target.name}.part")
    shutil.rmtree(new, ignore_errors=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Consolidated metadata")  # which others may not read, and need not
            dataset.drop_encoding().to_zarr(new, mode="w")
        if target.exists():
            shutil.rmtree(target)
        os.replace(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise

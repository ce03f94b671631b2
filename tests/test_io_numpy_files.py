import os
import subprocess
import sys

import numpy as np
import pytest

from fastclstm.io import numpy_files
from fastclstm.io.bounds import FREE, TIMES, Bounds, Refused

ARRAYS = {
    "frames": np.arange(24, dtype="f4").reshape(2, 3, 4),
    "big-endian": np.arange(6, dtype=">i2").reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 4), "f4"),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_npy(tmp_path, name):
    np.save(tmp_path / "a.npy", ARRAYS[name])
    found = numpy_files.read_npy(tmp_path / "a.npy")
    assert (found.dtype, found.shape, found.flags.f_contiguous) == (
        ARRAYS[name].dtype, ARRAYS[name].shape, ARRAYS[name].flags.f_contiguous
    )  # fmt: skip
    assert isinstance(found, np.memmap) is (found.size > 0)
    np.testing.assert_array_equal(found, ARRAYS[name])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)
    assert numpy_files.names(tmp_path / "a.npz") == list(ARRAYS)
    found = numpy_files.read_npz(tmp_path / "a.npz", ARRAYS)
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)
    assert list(numpy_files.read_npz(tmp_path / "a.npz", ["scalar"])) == ["scalar"]
    with pytest.raises(ValueError, match=r"a\.npz is no \.npz file of numbers: it has no array y"):
        numpy_files.read_npz(tmp_path / "a.npz", ["y"])


def test_other_files(tmp_path):
    (tmp_path / "text.npy").write_text("text")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", x=np.array([{}], object))
    assert numpy_files.names(tmp_path / "text.npy") == []
    for read, name, word in (
        (numpy_files.read_npy, "text.npy", r"text\.npy cannot be read as a \.npy array of numbers"),
        (lambda path: numpy_files.read_npz(path, ["x"]), "text.npy", r"text\.npy is no \.npz file of numbers"),
        (numpy_files.read_npy, "objects.npy", "it holds Python objects, which are not read"),
        (lambda path: numpy_files.read_npz(path, ["x"]), "objects.npz", "it holds Python objects"),
    ):
        with pytest.raises(ValueError, match=word):
            read(tmp_path / name)
    for read in (numpy_files.read_npy, numpy_files.names):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")
        with pytest.raises(IsADirectoryError):
            read(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_pipe_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code = "import sys; from fastclstm.io.bounds import Bounds; Bounds(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "pipe"], timeout=60, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert "pipe: it is not a regular file" in done.stderr


def test_what_a_file_may_cost(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1000))
    bounds = Bounds(tmp_path / "file")
    bounds.check("all", TIMES * 1000 + FREE)
    bounds.spend("half", 500)
    bounds.spend("the rest", TIMES * 1000 + FREE - 500)
    for count in (bounds.check, bounds.spend):
        with pytest.raises(
            Refused, match=r"file is refused: with a byte it takes 16,787,217 bytes .* may take 16,787,216"
        ):
            count("a byte", 1)


def test_json_as_deep_as_may_be(tmp_path):
    (tmp_path / "file").touch()
    bounds = Bounds(tmp_path / "file")
    assert bounds.json("it", '[{"a": [1, 2]}, "]]"]') == [{"a": [1, 2]}, "]]"]
    assert bounds.json("it", "[" * 100 + "]" * 100)
    assert bounds.json("it", b'{"[[": 1}') == {"[[": 1}
    with pytest.raises(Refused, match="file is refused: lists and objects of it lie more than 100 deep in each other"):
        bounds.json("it", "[" * 101 + "]" * 101)
    with pytest.raises(ValueError, match="Expecting value"):
        bounds.json("it", "[")

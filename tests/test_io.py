import errno
import json
import os
import stat
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

import fastclstm
from fastclstm.io import files, weights

ARRAYS = {"a": np.arange(6, dtype="float32").reshape(2, 3), "b": np.array([np.nan, -0.0])}
METADATA = {"class": "Thing", "options": {"n": 1, "pair": [1, 2]}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.safetensors"


def test_round_trip(path):
    weights.save(path, ARRAYS, METADATA)
    arrays, metadata = weights.load(str(path))
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].tobytes() == array.tobytes()
    assert metadata == {"format_version": 1, "fastclstm_version": fastclstm.__version__, **METADATA}


def test_the_same_weights_give_the_same_bytes(path):
    weights.save(path, ARRAYS, METADATA)
    first = path.read_bytes()
    weights.save(path, ARRAYS, METADATA)
    assert path.read_bytes() == first


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        weights.load(tmp_path / "nothing.safetensors")
    with pytest.raises(IsADirectoryError):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:5], id="within the length"),
        pytest.param(lambda data: data[:50], id="within the header"),
        pytest.param(lambda data: data[:-1], id="truncated"),
        pytest.param(lambda data: data + b"!", id="too long"),
        pytest.param(lambda data: b"\x93NUMPY" + data, id="something else"),
        pytest.param(lambda data: struct.pack("<Q", 1 << 60) + data[8:], id="absurd header size"),
        pytest.param(lambda data: data.replace(b'"dtype":"F32"', b'"dtype":"Q32"'), id="unknown dtype"),
    ],
)
def test_damaged_file(path, damage):
    weights.save(path, ARRAYS, METADATA)
    data = path.read_bytes()
    damaged = damage(data)
    assert damaged != data
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged or not a safetensors file"):
        weights.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_file(path, metadata):
    save_file(ARRAYS, path, metadata)
    with pytest.raises(ValueError, match=r"was not written by fastclstm.*set_parameters"):
        weights.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"options": {}}'])
def test_unreadable_metadata(path, text):
    save_file(ARRAYS, path, {"fastclstm": text})
    with pytest.raises(ValueError, match="is damaged: its 'fastclstm' metadata cannot be read"):
        weights.load(path)


def test_later_format(path):
    save_file(ARRAYS, path, {"fastclstm": json.dumps({"format_version": 2, "fastclstm_version": "9.0"})})
    with pytest.raises(ValueError, match=r"format 2, written by fastclstm 9\.0; .* reads format 1: upgrade"):
        weights.load(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_nothing_else(path, monkeypatch, call):
    weights.save(path, ARRAYS, METADATA)
    old = path.read_bytes()

    def full(*of):
        raise OSError(errno.ENOSPC, "No space left on device", *map(os.fspath, of[:1] if call == "replace" else ()))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(OSError, match=r"No space left on device: '.*w\.safetensors'$") as caught:
            weights.save(path, {"a": np.zeros(9)}, METADATA)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_name_of_the_file(path):
    resource = pytest.importorskip("resource")
    path.write_text("old")
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, kept[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            weights.save(path, {"a": np.zeros(999)}, METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "no", "another"), OSError("no disk"), OSError(errno.EPIPE, "of a pipe")]
)
def test_errors_of_something_else_stay_as_they_are(tmp_path, error):
    def failing():
        with files.replacing(tmp_path / "a"):
            raise error

    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one is checked below
        failing()
    assert caught.value is error


def test_what_a_killed_writer_left_is_removed_after_a_day(tmp_path):
    code = ("import os, sys; from fastclstm.io.files import replacing\n"
            "with replacing(sys.argv[1]) as new: new.write_text('half'); os._exit(9)")  # fmt: skip
    target = tmp_path / "[a]*.bin"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, target]).returncode == 9
    old, young = tmp_path.iterdir()
    assert old.name.startswith(".[a]*.bin.")
    keep = [tmp_path / name for name in (".[a]*.bin.part", ".[a]*.bin.mine0000.part", ".a.bin.00000000.part",
                                         ".[a]*.bin.00000000.parts", "[a]*.bin.00000000.part")]  # fmt: skip
    for file in (old, *keep):
        file.write_text("")
        os.utime(file, (time.time() - 90_000,) * 2)
    os.utime(young, (time.time() - 80_000,) * 2)
    with files.replacing(target) as new:
        assert set(tmp_path.iterdir()) == {new, young, *keep}
    assert set(tmp_path.iterdir()) == {target, young, *keep}


def test_the_longest_names(tmp_path):
    for name in (255 * "n", 85 * "字"):
        with files.replacing(tmp_path / name) as new:
            new.write_text(name)
        assert (tmp_path / name).read_text() == name


def test_metadata_that_json_cannot_hold_writes_nothing(path):
    with pytest.raises(TypeError):
        weights.save(path, ARRAYS, {"options": object()})
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interrupted_replacing(tmp_path, error):
    target = tmp_path / "a.bin"
    target.write_text("old")

    def interrupted():
        with files.replacing(target) as new:
            new.write_text("half")
            assert new.parent == tmp_path
            raise error

    with pytest.raises(error):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_target_is_old_until_the_end(tmp_path):
    target = tmp_path / "a.bin"
    target.write_text("old")
    with files.replacing(target) as new:
        new.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_unwritable_places(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"cannot write here: No such file or directory: '.*nowhere/w"):
        weights.save(tmp_path / "nowhere" / "w.safetensors", ARRAYS, METADATA)
    path.write_text("a file")
    with pytest.raises(NotADirectoryError, match="cannot write here"):
        weights.save(path / "w.safetensors", ARRAYS, METADATA)
    with pytest.raises(OSError, match="it is not a regular file"):
        weights.save(tmp_path, ARRAYS, METADATA)
    assert path.read_text() == "a file"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_links_pipes_and_permissions(tmp_path):
    real, link, pipe = tmp_path / "real", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(real)
    old = os.umask(0o027)
    try:
        weights.save(link, ARRAYS, METADATA)
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    for mode in (0o600, 0o444, 0o666):
        real.chmod(mode)
        with files.replacing(link) as new:
            assert stat.S_IMODE(new.stat().st_mode) == 0o600
            new.write_text("new")
        assert stat.S_IMODE(real.stat().st_mode) == mode
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="it is not a regular file"):
        weights.save(pipe, ARRAYS, METADATA)
    assert pipe.is_fifo()


def test_imports_are_lazy():
    code = "import sys, fastclstm.layers; print([m for m in ('safetensors', 'torch', 'numba') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

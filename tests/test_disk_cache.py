import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fastclstm
from fastclstm.engines import disk_cache

ROOT = Path(fastclstm.__file__).parents[1]


@pytest.fixture
def parent(monkeypatch, tmp_path):
    """The folder that the user asked for."""
    monkeypatch.setenv(disk_cache.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def refused(monkeypatch):
    """Function that makes a method of Path, or a function of os, fail."""

    def fail(*args, **kwargs):
        raise PermissionError

    return lambda owner, name: monkeypatch.setattr(owner, name, fail)


def folder():
    return disk_cache.folder("kernels", "new")


def test_folder_is_below_the_one_asked_for(parent, monkeypatch):
    assert folder() == parent / "kernels-new"
    assert folder().is_dir()
    monkeypatch.chdir(parent)
    monkeypatch.setenv(disk_cache.CACHE_VARIABLE, "relative")
    assert folder().parent == parent / "relative"  # which stays where it is when the working folder changes


def test_user_without_a_home_has_no_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(disk_cache.CACHE_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk_cache, "user_cache_path", lambda name: Path("~/.cache") / name)
    assert folder() is None
    assert list(tmp_path.iterdir()) == []


def test_read_only_folder_is_read(parent, refused):
    refused(os, "utime")
    expected = folder()
    assert expected.is_dir()
    refused(Path, "mkdir")
    assert folder() == expected
    expected.rmdir()
    assert folder() is None


def test_old_folders_are_few(parent):
    others = [parent / f"kernels-{n:016}" for n in range(7)]
    for age, other in enumerate(others):
        other.mkdir()
        (other / "code").touch()
        os.utime(other, (10_000 - age, 10_000 - age))
    (parent / "cuda-of-another-kind").mkdir()
    new = folder()
    kept = [*others[: disk_cache.FOLDERS_KEPT], new, parent / "cuda-of-another-kind"]
    assert sorted(parent.iterdir()) == sorted(kept)


def test_folder_in_use_stays(parent):
    new = folder()
    os.utime(new, (1, 1))
    for n in range(7):
        (parent / f"kernels-{n:016}").mkdir()
    assert folder() == new
    assert new.stat().st_mtime > 1e9  # used now
    assert len(list(parent.iterdir())) == 8  # only a new version prunes


def test_digest_sees_names_contents_and_versions(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    second.write_bytes(b"1")
    digests = {disk_cache.digest_of("1.0", sources) for sources in ([first], [second], [first, second])}
    digests.add(disk_cache.digest_of("1.1", [first]))
    first.write_bytes(b"2")
    digests.add(disk_cache.digest_of("1.0", [first]))
    assert len(digests) == 5


@pytest.mark.parametrize("content", [b"", b"code", b"code" * 1000])
def test_what_was_written_is_read(tmp_path, content):
    disk_cache.write(tmp_path / "file", content)
    assert disk_cache.read(tmp_path / "file") == content


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: b"", lambda c: c[:34] + b"?" + c[35:], lambda c: c + b"?"]
)
def test_a_damaged_file_is_not_read(tmp_path, damage):
    path = tmp_path / "file"
    disk_cache.write(path, b"machine code")
    path.write_bytes(damage(path.read_bytes()))
    assert disk_cache.read(path) is None
    assert disk_cache.read(tmp_path / "missing") is None


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_a_write_that_breaks_off_leaves_nothing(tmp_path, refused, method):
    refused(Path, method)
    disk_cache.write(tmp_path / "file", b"code")
    assert list(tmp_path.iterdir()) == []


def test_writers_at_once(tmp_path):
    """Processes that write the same files at the same time leave whole ones."""
    code = f"""
        from pathlib import Path
        from fastclstm.engines import disk_cache
        for n in range(50):
            path = Path({str(tmp_path)!r}) / f"{{n % 5}}"
            disk_cache.write(path, b"code" * 100_000)
            assert disk_cache.read(path) == b"code" * 100_000
    """
    workers = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "4"]

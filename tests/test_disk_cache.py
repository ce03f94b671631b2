import os
import shutil
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
    """Our folder, in the one that the user asked for."""
    monkeypatch.setenv(disk_cache.CACHE_VARIABLE, str(tmp_path))
    (tmp_path / "fastclstm").mkdir()
    return tmp_path / "fastclstm"


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
    assert folder().parent == parent / "relative" / "fastclstm"  # wherever the process works later


def test_user_without_a_home_has_no_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(disk_cache.CACHE_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk_cache, "user_cache_path", lambda name: Path("~/.cache") / name)
    assert folder() is None
    assert list(tmp_path.iterdir()) == []


def homeless(code, **environment):
    """Run code as a user without an account and HOME, as containers have them; how it ends."""
    gone = ("HOME", "XDG_CACHE_HOME", disk_cache.CACHE_VARIABLE)
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    become = "import os; os.getuid = lambda: 54321\n"  # whom the list of accounts does not know
    result = subprocess.run([sys.executable, "-c", become + code], cwd=ROOT, env=kept | environment, timeout=200,
                            capture_output=True, text=True, check=False)  # fmt: skip
    assert "Traceback" not in result.stderr, result.stderr
    return result


@pytest.mark.skipif(os.name == "nt", reason="POSIX accounts")
@pytest.mark.parametrize("chosen", [None, "~nosuchuser", "~/cache"])
def test_without_a_home_nothing_is_kept_and_nothing_raises(chosen):
    environment = {} if chosen is None else {disk_cache.CACHE_VARIABLE: chosen}
    code = """
from fastclstm.engines import disk_cache
from fastclstm.engines.cuda import compilation
assert disk_cache.folder("kernels", 16 * "0") is None
compilation.source_digest = lambda: 16 * "0"
assert compilation.cache_folder() is None
import sys
from fastclstm.commands import main
sys.argv[1:] = [COMMAND]
main()
"""
    told = homeless(code.replace("COMMAND", "'info'"), **environment)
    assert told.returncode == 0, told.stderr
    assert "kernel cache    none: " in told.stdout
    assert "FASTCLSTM_CACHE_DIR" in told.stdout
    refused = homeless(code.replace("COMMAND", "'warmup'"), **environment)
    assert refused.returncode == 2
    assert "kernels cannot be kept in any folder; set FASTCLSTM_CACHE_DIR" in refused.stderr


def test_read_only_folder_is_read(parent, refused):
    refused(os, "utime")
    expected = folder()
    assert expected.is_dir()
    refused(Path, "mkdir")
    assert folder() == expected
    expected.rmdir()
    assert folder() is None


def old(parent, count=7, kind="kernels"):
    """Folders of ours with a kernel in each, the last used first."""
    folders = [parent / f"{kind}-{n:016x}" for n in range(count)]
    for age, place in enumerate(folders):
        place.mkdir()
        (place / f"convolution.tile-{32 * 'a'}.pickle").touch()
        (place / f"{32 * 'b'}.unfinished").touch()
        (place / f"conv2d-sm_90a-{24 * 'c'}.cubin").touch()
        os.utime(place, (10_000 - age, 10_000 - age))
    return folders


def test_old_folders_are_few(parent):
    others, another = old(parent), old(parent, 6, "cuda")
    new = folder()
    assert sorted(parent.iterdir()) == sorted([*others[: disk_cache.FOLDERS_KEPT], new, *another])


def test_nothing_of_others_is_removed(parent):
    """A project's folder as cache folder: its own kernels-* stay, in ours too, and what lies among our files."""
    mine = [*old(parent.parent), parent.parent / "kernels-gaussian", parent / "kernels-laplace", parent / "kernels-12"]
    for place in mine[-3:]:
        place.mkdir()
        (place / "data").touch()
    others = old(parent)
    (others[5] / "notes.txt").write_text("mine")
    (others[6] / "inner").mkdir()
    for age, place in enumerate(others):
        os.utime(place, (10_000 - age, 10_000 - age))
    (parent.parent / "elsewhere").mkdir()
    (parent.parent / "elsewhere" / f"k-{32 * 'd'}.pickle").touch()
    (parent / f"kernels-{16 * 'e'}").symlink_to(parent.parent / "elsewhere")
    before = {path for place in mine for path in place.rglob("*")}
    folder()
    assert {path for place in mine for path in place.rglob("*")} == before
    assert list(others[5].iterdir()) == [others[5] / "notes.txt"]
    assert list(others[6].iterdir()) == [others[6] / "inner"]
    assert not others[4].exists()
    assert (parent / f"kernels-{16 * 'e'}" / f"k-{32 * 'd'}.pickle").exists()


def test_pruning_survives_what_others_do_meanwhile(parent, monkeypatch):
    """Another process has removed a file, and the whole folder, just before this one would."""
    others, unlink = old(parent), Path.unlink

    def late(path):
        unlink(path)
        unlink(path)

    monkeypatch.setattr(Path, "unlink", late)
    assert folder().is_dir()
    assert all(other.is_dir() for other in others[: disk_cache.FOLDERS_KEPT])
    monkeypatch.setattr(Path, "unlink", lambda path: shutil.rmtree(path.parent))
    folder().rmdir()
    assert folder().is_dir()


def test_folder_in_use_stays(parent):
    new = folder()
    os.utime(new, (1, 1))
    old(parent)
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

"""Files that appear complete or not at all."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STALE_SECONDS = 86_400
_WRITING = (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC)
"""Errors of writing to an open file, which do not name it."""


@contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a new, empty file beside `target` that takes its place when the block ends.

    The file is on the disk before it takes its place, with the permissions of the file that was there. After any error,
    an interruption too, it is gone and `target` is as it was. A symbolic link is followed, and stays.

    A process that is killed leaves ``.NAME.<hex>.part``; the next to replace NAME removes those that nobody has written
    to for a day.

    Raises
    ------
    OSError
        `target`, which it names, cannot be written, or is no regular file.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder, "a.txt")) as new:
    ...         _ = new.write_text("all of it")
    ...     Path(folder, "a.txt").read_text()
    'all of it'
    """
    path = Path(os.path.realpath(target))
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    if mode is not None and not path.is_file():
        raise OSError(f"cannot write {os.fspath(target)}: it is not a regular file; give the name of a file")
    stem = f".{path.name[:60]}."  # 60 characters are up to 240 bytes, and a name has up to 255
    new = path.with_name(f"{stem}{secrets.token_hex(4)}.part")
    try:
        new.touch(0o666 if mode is None else 0o600, exist_ok=False)
        for stale in path.parent.glob(f"{glob.escape(stem)}{8 * '[0-9a-f]'}.part"):
            with suppress(OSError):
                if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                    stale.unlink()
        yield new
        with new.open("rb+") as file:
            if mode is not None:
                new.chmod(mode)
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException as error:
        with suppress(OSError):
            new.unlink()
        if isinstance(error, OSError) and (
            error.filename == os.fspath(new) or (error.filename is None and error.errno in _WRITING)
        ):
            raise OSError(error.errno, f"cannot write here: {error.strerror}", os.fspath(target)) from error
        raise

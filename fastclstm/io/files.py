"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a new, empty file beside `target` that takes its place when the block ends.

    The file is on the disk before it takes its place. After any error, an interruption too, it is gone and `target` is
    as it was. A symbolic link is followed, and stays.

    Raises
    ------
    OSError
        `target` cannot be written, or is no regular file.

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
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {os.fspath(target)}: it is not a regular file; give the name of a file")
    new = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        try:
            new.touch(exist_ok=False)
        except OSError as error:
            raise OSError(error.errno, f"cannot write here: {error.strerror}", os.fspath(target)) from error
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise

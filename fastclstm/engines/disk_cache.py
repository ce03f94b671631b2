"""Where compiled kernels are kept between runs: a folder for each state of the sources, a file for each kernel.

Writers rename a finished file into place. What cannot be read is compiled again, what cannot be written is left. Only
what has our names is ever removed, file by file, and a folder only once it is empty.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from platformdirs import user_cache_path

CACHE_VARIABLE = "FASTCLSTM_CACHE_DIR"
OWN_FOLDER = "fastclstm"
"""Below the folder asked for, which may hold others' files."""
FOLDERS_KEPT = 4
"""Folders of other states of the sources that a new one leaves: those used last."""
_DIGEST_BYTES = 32
_OWN_FILE = re.compile(r".+-[0-9a-f]{24,32}\.(?:pickle|cubin)|[0-9a-f]{32}\.unfinished")


def digest_of(versions: Any, sources: Iterable[Path]) -> str:
    """Digest of the sources that kernels are made of, and of their compilers' versions."""
    digest = hashlib.sha256(repr(versions).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def folder(kind: str, digest: str) -> Path | None:
    """Find or make the folder ``kind-digest`` in ours, which is below $FASTCLSTM_CACHE_DIR or the user's cache folder.

    It may be read-only: then what is there is used. None: no folder can be made, or the user has no home.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    try:
        parent = Path(chosen).expanduser().absolute() / OWN_FOLDER if chosen else user_cache_path(OWN_FOLDER)
    except (OSError, RuntimeError):  # no home, or the working folder is gone
        return None
    if not parent.is_absolute():  # a user without a home
        return None
    folder = parent / f"{kind}-{digest}"
    try:
        is_new = not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # the time of its last use
    except OSError:
        return folder if folder.is_dir() else None
    if is_new:
        _prune(kind, folder)
    return folder


def _prune(kind: str, new: Path) -> None:
    """Remove the older folders of a kind but a few, as far as they are ours.

    Processes that still run them have loaded their code, or compile what is gone; several may prune at once.
    """
    name = re.compile(rf"{kind}-[0-9a-f]{{16}}")
    used: list[tuple[float, Path]] = []
    with suppress(OSError):
        for folder in new.parent.iterdir():
            if name.fullmatch(folder.name) and folder != new and not folder.is_symlink():
                with suppress(OSError):
                    used.append((folder.stat().st_mtime, folder))
    for _, folder in sorted(used, reverse=True)[FOLDERS_KEPT:]:
        with suppress(OSError):
            for path in folder.iterdir():
                if _OWN_FILE.fullmatch(path.name):
                    path.unlink()
            folder.rmdir()  # fails where anything else is left


def read(path: Path) -> bytes | None:
    """Return what `write` wrote; None where it is missing, damaged or cannot be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, content = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def write(path: Path, content: bytes) -> None:
    """Write a file, its digest before its content, whole or not at all."""
    unfinished = path.with_name(f"{uuid4().hex}.unfinished")
    try:
        unfinished.write_bytes(hashlib.sha256(content).digest() + content)
        unfinished.replace(path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()

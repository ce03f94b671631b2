"""Where compiled kernels are kept between runs: a folder for each state of the sources, a file for each kernel.

Writers rename a finished file into place. What cannot be read is compiled again, what cannot be written is left.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from platformdirs import user_cache_path

CACHE_VARIABLE = "FASTCLSTM_CACHE_DIR"
FOLDERS_KEPT = 4
"""Folders of other states of the sources that a new one leaves: those used last."""
_DIGEST_BYTES = 32


def digest_of(versions: Any, sources: Iterable[Path]) -> str:
    """Digest of the sources that kernels are made of, and of their compilers' versions."""
    digest = hashlib.sha256(repr(versions).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def folder(kind: str, digest: str) -> Path | None:
    """Find or make the folder ``kind-digest`` below $FASTCLSTM_CACHE_DIR or the user's cache folder; None: neither.

    It may be read-only: then what is there is used.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    parent = Path(chosen).expanduser().absolute() if chosen else user_cache_path("fastclstm")
    if not parent.is_absolute():  # a user without a home
        return None
    folder = parent / f"{kind}-{digest}"
    try:
        is_new = not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        if is_new:
            _prune(kind, folder)
        os.utime(folder)  # the time of its last use
    except OSError:
        return folder if folder.is_dir() else None
    return folder


def _prune(kind: str, new: Path) -> None:
    """Remove the older folders of a kind but a few; processes that still run them have loaded their code."""
    others = [folder for folder in new.parent.glob(f"{kind}-*") if folder != new]
    for folder in sorted(others, key=lambda folder: folder.stat().st_mtime, reverse=True)[FOLDERS_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)


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

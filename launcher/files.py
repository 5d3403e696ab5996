"""Writing files so that a crash leaves the old content or the new, never half of it."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_MOST_NAME_BYTES = 200
"""Of a file's name in the name of its temporary file: file systems allow 255 in all."""


def sha256_of(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that replaces ``path`` when the block ends, and is removed when the block fails.

    Raises:
        OSError: the disk is full, or the folder cannot be written; ``path`` is as it was.
    """
    name = os.fsdecode(os.fsencode(path.name)[:_MOST_NAME_BYTES])
    temporary = path.with_name(f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:  # never a file that another process made
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write ``data`` to a temporary name, fsync, rename, fsync the folder.

    Raises:
        OSError: the disk is full, or the folder cannot be written; ``path`` is as it was, nothing else is left.
    """
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new file inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode(errors="backslashreplace"))  # a lone surrogate is then its own JSON escape


def read_json(path: Path) -> Any:
    """Read one JSON document."""
    return json.loads(path.read_text(encoding="utf-8"))

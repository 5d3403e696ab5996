"""Reading files of a run directory, which another user may have written: regular files of a bounded size only.

A link may lead into private files of the reader, a FIFO or a device blocks for ever, and a sparse file is larger than
memory. Every verb that shows runs reads through ``open_regular`` or ``read_regular``.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 64 << 20
"""Of a file that is read whole; the plan of a thousand hosts has a tenth."""

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


class UnreadableFile(OSError):
    """A file that is not read: a link, a FIFO, a device, or too large."""


def open_regular(path: Path, *, inside: Path | None = None) -> BinaryIO:
    """Return a regular file, opened for reading; it never blocks and follows no symbolic link.

    Args:
        path: the file.
        inside: a folder above it, which may be a link itself: no folder between the two may be one. ``None`` is the
            file's own folder.

    Raises:
        FileNotFoundError: there is none.
        UnreadableFile: it is a link, or no regular file.
        OSError: it cannot be read.
    """
    folder = path.parent if inside is None else inside
    *between, name = path.relative_to(folder).parts
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in between:
        descriptor = _exchanged(descriptor, part, path, _FLAGS | os.O_DIRECTORY)
    descriptor = _exchanged(descriptor, name, path, _FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableFile(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, *, inside: Path | None = None, limit: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file.
        inside: as for ``open_regular``.
        limit: bytes that it may have.

    Raises:
        FileNotFoundError: there is none.
        UnreadableFile: it is a link, no regular file, or larger.
        OSError: it cannot be read.
    """
    with open_regular(path, inside=inside) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UnreadableFile(errno.EFBIG, f"is larger than {limit:,} bytes", str(path))
    return data


def read_object(path: Path, *, inside: Path | None = None) -> dict[str, Any]:
    """Return the JSON object in a regular file.

    Raises:
        OSError: it cannot be read; see ``read_regular``.
        ValueError: it holds something else.
    """
    data = read_regular(path, inside=inside)
    try:
        tree = json.loads(data)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except ValueError as error:
        raise ValueError("is not JSON") from error
    if not isinstance(tree, dict):
        raise ValueError("is not a JSON object")  # noqa: TRY004 (of content, as all the others)
    return tree


def is_regular(path: Path) -> bool:
    """Return whether a regular file is there; a link to one is none."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _exchanged(descriptor: int, name: str, path: Path, flags: int) -> int:
    """Return ``name`` in an open folder, opened, and close the folder."""
    try:
        return os.open(name, flags, dir_fd=descriptor)
    except OSError as error:
        if error.errno == errno.ELOOP or (error.errno == errno.ENOTDIR and flags & os.O_DIRECTORY):
            raise UnreadableFile(errno.ELOOP, "is a symbolic link, or below one", str(path)) from error
        if error.errno == errno.ENXIO:  # a socket
            raise UnreadableFile(errno.EINVAL, "is not a regular file", str(path)) from error
        raise
    finally:
        os.close(descriptor)

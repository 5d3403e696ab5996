"""Files: atomic writes, safe reads of other users' files, and staged changes.

A crash during a write leaves the old content or the new, never half of it. Files of a run directory are read only where
they are regular files of a bounded size.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

_MAX_NAME_BYTES = 200
"""Of a file's name in the name of its temporary file: file systems allow 255 in all."""


def sha256_of(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of the system when a disk or its quota is full."""


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that replaces ``path`` at the end of the block, unless the block fails.

    Raises:
        OSError: the disk is full, or the folder cannot be written; ``path`` is as it was.
    """
    name = os.fsdecode(os.fsencode(path.name)[:_MAX_NAME_BYTES])
    temporary = path.with_name(f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:  # never a file that another process made
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS and error.filename is None:
            error.filename = str(path.absolute())  # write() names no file, and there may be room once this one is gone
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


MAX_BYTES = 64 << 20
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
        descriptor = _open_below(descriptor, part, path, _FLAGS | os.O_DIRECTORY)
    descriptor = _open_below(descriptor, name, path, _FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableFile(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def open_append(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Open a regular file to append and read; create it if missing.

    Nothing is written through a symbolic link: in a run directory of another user it could lead to any file.

    Raises:
        UnreadableFile: it is a link, or no regular file.
        OSError: it cannot be written.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnreadableFile(errno.ELOOP, "is a symbolic link", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableFile(errno.EINVAL, "is not a regular file", str(path))
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "a+b", buffering)


def read_regular(path: Path, *, inside: Path | None = None, limit: int = MAX_BYTES) -> bytes:
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


def read_named(path: Path, *, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a file named by the user.

    Links are followed; FIFOs and devices are not waited for.

    Args:
        path: the file.
        limit: bytes that it may have.

    Raises:
        FileNotFoundError: there is none.
        UnreadableFile: it is no regular file, or larger.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, _FLAGS & ~os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnreadableFile(errno.EINVAL, "is not a regular file", str(path))
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
    """Return whether this is a regular file and not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _open_below(descriptor: int, name: str, path: Path, flags: int) -> int:
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


class StagedFiles:
    """Files and folders that are added to a run directory, and removed if nothing is started.

    ``undo`` removes only what was added through this object and was not there before, and restores what was.
    """

    def __init__(self) -> None:
        self._before: dict[Path, tuple[bytes, os.stat_result] | None] = {}
        self._folders: list[Path] = []

    def make_folder(self, folder: Path) -> None:
        """Make ``folder`` and the folders above it that are missing.

        Raises:
            OSError: one of them cannot be made.
        """
        missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
        for path in reversed(missing):
            try:
                path.mkdir()
            except FileExistsError:
                if not path.is_dir():
                    raise
            else:  # otherwise another process made it a moment ago
                self._folders.append(path)

    def remember(self, *paths: Path) -> None:
        """Keep the content of files that are about to be written or removed."""
        for path in paths:
            if path not in self._before:
                self._before[path] = (path.read_bytes(), path.stat()) if path.is_file() else None

    def write(self, path: Path, text: str) -> None:
        """Write a file, atomically.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        self.remember(path)
        write_atomic(path, text)

    def remove(self, path: Path) -> None:
        """Remove a file that is no longer true, if it is there."""
        self.remember(path)
        path.unlink(missing_ok=True)

    def undo(self) -> None:
        """Leave everything as it was before; folders that hold files of others stay."""
        for path, before in self._before.items():
            if before is None:
                path.unlink(missing_ok=True)
            else:
                content, stat = before
                write_atomic(path, content)
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a run's age is that of its snapshot
        self._before.clear()
        while self._folders:
            with contextlib.suppress(OSError):
                self._folders.pop().rmdir()


def exists(path: Path) -> bool:
    """Return whether something is at ``path`` that this process can look at."""
    try:
        path.stat()
    except (OSError, ValueError):  # the latter for a NUL character
        return False
    return True


def is_folder(path: Path) -> bool:
    """Return whether ``path`` is a folder, as far as this process can look."""
    return exists(path) and path.is_dir()


def home_folder() -> Path:
    """Return this user's home folder; ``/`` if the system knows none, as in some containers."""
    home = os.path.expanduser("~")  # noqa: PTH111 (Path.home raises where there is none)
    return Path("/" if home == "~" else home)

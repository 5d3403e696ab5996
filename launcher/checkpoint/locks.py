"""Keep a checkpoint while it is read: readers share a lock, and removal takes it alone.

The lock is ``flock`` on the checkpoint's ``manifest.json``; the kernel releases it when its holder exits for any
reason. Standard library only: the parent reads checkpoints too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from collections.abc import Callable
from pathlib import Path

from launcher.checkpoint.manifest import MANIFEST

_NO_LOCKS = "its file system has no flock: do not remove it while it is read"


class ReadLock:
    """Keeps a checkpoint: while this lock exists, no run removes it.

    It is released by ``close``, or with the last reference to it.

    Args:
        folder: a checkpoint, or a folder in one; any other folder is not locked.
        say: takes one line where the file system has no locks.

    Raises:
        FileNotFoundError: the checkpoint was removed before it could be locked.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None] = print) -> None:
        places = (parent / MANIFEST for parent in (folder, folder.parent))
        manifest = next((place for place in places if place.exists()), None)
        self.close: Callable[[], object] = _nothing
        if manifest is None:
            return
        descriptor = os.open(manifest, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.close = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            say(f"checkpoint {manifest.parent} cannot be locked ({error.strerror}): {_NO_LOCKS}")
        os.stat(manifest)  # noqa: PTH116  (raises the error of a checkpoint that was removed meanwhile)

    def __enter__(self) -> ReadLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CheckpointLocks:
    """Read locks of the checkpoints that a process has chosen, one each; released by ``close``."""

    def __init__(self) -> None:
        self._held: dict[Path, ReadLock] = {}

    def keep(self, folder: Path, *, say: Callable[[str], None] = print) -> None:
        """Keep a checkpoint.

        Raises:
            FileNotFoundError: it is not there any more.
        """
        folder = folder.resolve()
        if not (folder / MANIFEST).exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / MANIFEST))
        if folder not in self._held:
            self._held[folder] = ReadLock(folder, say=say)

    def release(self, folder: Path) -> None:
        """Release one that was kept and is not wanted after all."""
        if (lock := self._held.pop(folder.resolve(), None)) is not None:
            lock.close()

    def close(self) -> None:
        """Release all."""
        for lock in self._held.values():
            lock.close()
        self._held.clear()

    def __enter__(self) -> CheckpointLocks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _nothing() -> None:
    """Release no lock."""


class RemovalLock:
    """Exclusive lock of one checkpoint, for removing it; the kernel releases it at exit.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._manifest = folder / MANIFEST
        self._descriptor: int | None = None
        self.unsupported: str | None = None
        """Why the file system cannot tell whether it is read; ``None`` where it can."""

    def __enter__(self) -> RemovalLock:
        return self

    def acquire(self) -> bool:
        """Take the lock without waiting; return False if the checkpoint is being read.

        A file system without locks counts as free.
        """
        try:
            self._descriptor = os.open(self._manifest, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)  # NFS asks for writing
        except OSError:
            self._descriptor = os.open(self._manifest, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            self.unsupported = error.strerror
        return True

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

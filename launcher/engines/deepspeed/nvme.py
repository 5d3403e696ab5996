"""The swap folder of a run on NVMe, never shared between runs and never left behind."""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from launcher.errors import JobError
from launcher.utils.system import describe_full_disk

_IN_USE = "in_use"
_UNSAFE = re.compile(r"[^\w.-]")
_SHARED = 0o1777
"""Mode of ``parallel.nvme_path`` where it has to be made: as /tmp, so that every user can keep a folder in it."""


class SwapFolder:
    """The folder of one run on this host, held by every rank of it and removed with the last.

    DeepSpeed empties the folder it is given when it starts, and never when it ends. So each run gets one of its own,
    named after its user and its run id, and what killed runs of this user left is removed: the kernel drops their lock.

    Args:
        path: ``parallel.nvme_path``.
        run_id: no two runs have the same; names of run directories repeat (``000`` of every sweep).

    Raises:
        OSError: the folder cannot be written, or belongs to another user.
    """

    def __init__(self, path: Path, *, run_id: str) -> None:
        _make_shared(path)
        mine = f"launcher-{os.geteuid()}-"
        self.path = path / f"{mine}{_UNSAFE.sub('_', run_id)}"
        while (descriptor := self._hold()) is None:  # a rank that was leaving removed it
            pass
        self._descriptor: int | None = descriptor
        atexit.register(self.release)  # after an error too: it may be this folder that fills the disk
        for other in path.glob(f"{mine}*"):
            if other != self.path:
                _remove_unused(other)

    def check_room(self) -> None:
        """Raise where the disk is full: DeepSpeed does not notice writes that were cut, and aborts when it reads them.

        Raises:
            JobError: no space is left.
        """
        if full := describe_full_disk(self.path):
            raise JobError(f"{full}. Free some of it, or set parallel.nvme_path to a folder on another disk")

    def release(self) -> None:
        """Remove the folder unless another rank of the run still uses it; doing so twice is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            atexit.unregister(self.release)
            _remove_unused(self.path)

    def _hold(self) -> int | None:
        """Make the folder and share its lock; return ``None`` where it was removed meanwhile."""
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        if not _is_own(self.path):
            raise PermissionError(
                errno.EACCES, "is not a folder of this user; set another parallel.nvme_path", str(self.path)
            )
        file = self.path / _IN_USE
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not _is_same(descriptor, file):
            os.close(descriptor)
            return None
        return descriptor


def _make_shared(path: Path) -> None:
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:  # another rank was first
        return
    path.chmod(_SHARED)  # mkdir takes the umask away


def _is_own(folder: Path) -> bool:
    """Return whether it is a folder of this user, and no link to one."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except FileNotFoundError:
        return False


def _remove_unused(folder: Path) -> None:
    """Remove a folder whose lock no rank holds; one without a lock was not made here and stays."""
    try:
        if not _is_own(folder):
            return
        descriptor = os.open(folder / _IN_USE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # another rank removed it meanwhile
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return
    finally:
        os.close(descriptor)

"""The swap folder of a run on NVMe, never shared between runs and never left behind."""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from launcher.errors import JobError
from launcher.protocol.swap import IN_USE, is_own, remove_unused, run_swap_folder, sweep
from launcher.utils.system import describe_full_disk

_SHARED = 0o1777
"""Mode of a new ``parallel.nvme_path``, as /tmp: every user can keep a folder in it."""
_ABOVE_SHARED = 0o755
"""Mode of missing folders above it, so that every user reaches it."""


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
        sweep(path)  # first: what a killed run left may take all of the disk's files, and this one needs two
        _make_shared(path)
        self.path = run_swap_folder(path, run_id)
        while (descriptor := self._hold()) is None:  # a rank that was leaving removed it
            pass
        self._descriptor: int | None = descriptor
        atexit.register(self.release)  # after an error too: it may be this folder that fills the disk

    def check_room(self) -> None:
        """Raise if the disk is full.

        DeepSpeed does not notice writes that were cut short, and aborts when it reads them.

        Raises:
            JobError: no space is left.
        """
        if full := describe_full_disk(self.path):
            raise JobError(f"{full}. Free some space, or set parallel.nvme_path to a folder on another disk")

    def release(self) -> None:
        """Remove the folder unless another rank of the run still uses it; doing so twice is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            atexit.unregister(self.release)
            remove_unused(self.path)

    def _hold(self) -> int | None:
        """Make the folder and share its lock; return ``None`` if it was removed meanwhile."""
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            return None
        if not is_own(found):
            raise PermissionError(
                errno.EACCES, "is not a folder of this user; set another parallel.nvme_path", str(self.path)
            )
        file = self.path / IN_USE
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
    missing = [parent for parent in path.parents if not parent.is_dir()]
    for folder, mode in [*((parent, _ABOVE_SHARED) for parent in reversed(missing)), (path, _SHARED)]:
        with suppress(FileExistsError):  # another rank was first
            folder.mkdir()
            folder.chmod(mode)  # mkdir takes the umask away


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except FileNotFoundError:
        return False

"""Swap folders of runs on NVMe: names, lock, and removal of those that dead runs left.

Every rank of a run holds a shared lock on ``in_use`` in its folder. The kernel drops the lock of a process that dies,
so a folder whose lock nothing holds is a leftover. Ranks and their parent both remove leftovers, without torch.
filelock does not fit: its shared lock is a SQLite database, and it opens no file relative to an open folder.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path

IN_USE = "in_use"
"""Name of the lock file: created first, removed last in its folder."""
_DEEPSPEED_MAKES = frozenset({"zero_stage_3"})
"""Names that DeepSpeed creates in a swap folder."""
_UNSAFE = re.compile(r"[^\w.-]")


def run_swap_folder(path: Path, run_id: str) -> Path:
    """Return the folder of one run of this user below ``parallel.nvme_path``."""
    return path / f"{_prefix()}{_UNSAFE.sub('_', run_id)}"


def sweep(path: Path) -> None:
    """Remove what dead runs of this user left below ``parallel.nvme_path``; folders in use stay."""
    for folder in list(path.glob(f"{_prefix()}*")):
        remove_unused(folder)


def remove_unused(folder: Path) -> None:
    """Remove a run's folder if no rank holds its lock.

    What no run created stays, as does what cannot be removed.
    """
    with suppress(OSError):  # another process removed it meanwhile, or it is a link
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if is_own(os.fstat(opened)) and _clear(opened):
                folder.rmdir()  # refused where a rank has begun to use it again
        finally:
            os.close(opened)


def is_own(found: os.stat_result) -> bool:
    """Return whether it is a folder of this user, and no link to one."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _prefix() -> str:
    return f"launcher-{os.geteuid()}-"


def _clear(opened: int) -> bool:
    """Empty an open folder under its lock, the lock's file last; return whether it is empty.

    A removal that is killed thus leaves a folder that has the file, or an empty one. A rank that begins to use the
    folder meanwhile waits for the lock, or finds no folder, and makes a new one.

    Raises:
        OSError: a rank holds the lock, or the folder has none and was not made by a run.
    """
    create = 0
    names = set(os.listdir(opened))
    if IN_USE not in names:  # an older release, when killed, could leave such a folder
        is_private = not os.fstat(opened).st_mode & 0o077
        if not is_private or not names <= _DEEPSPEED_MAKES:
            return False
        if not names:
            return True
        create = os.O_CREAT
    lock = os.open(IN_USE, os.O_RDWR | create | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=opened)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(IN_USE, dir_fd=opened, follow_symlinks=False)):
            return False  # removed and made again since it was opened
        for name in set(os.listdir(opened)) - {IN_USE}:
            _remove(name, opened)
        if os.listdir(opened) != [IN_USE]:
            return False
        os.unlink(IN_USE, dir_fd=opened)
        return True
    finally:
        os.close(lock)


def _remove(name: str, opened: int) -> None:
    """Remove a file or a folder of an open folder, as far as that is possible."""
    with suppress(OSError):
        if stat.S_ISDIR(os.stat(name, dir_fd=opened, follow_symlinks=False).st_mode):
            shutil.rmtree(name, ignore_errors=True, dir_fd=opened)
        else:
            os.unlink(name, dir_fd=opened)

"""Whether a run directory can be written to and is the one the launching machine sees, and how much room is left.

The directory itself is never made: what is asked is the nearest folder above it that exists.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launcher.doctor.facts import Storage
from launcher.doctor.mounts import served_folder

_SHM = Path("/dev/shm")  # noqa: S108 (only its size is asked)


@dataclass(frozen=True, kw_only=True)
class Token:
    """A file of the launching machine that hosts look for."""

    folder: str
    """Where it is."""
    path: str | None
    """``None`` when it could not be written."""
    problem: str | None = None


@contextmanager
def token(run_dir: Path) -> Iterator[Token]:
    """Leave an empty file with a name nobody can know beside the run directory, for as long as the hosts look."""
    folder = nearest(run_dir)
    file = folder / f".launcher-doctor-{secrets.token_hex(8)}"
    try:
        file.touch(mode=0o600, exist_ok=False)
    except OSError as error:
        yield Token(folder=str(folder), path=None, problem=error.strerror or str(error))
        return
    try:
        yield Token(folder=str(folder), path=str(file))
    finally:
        file.unlink(missing_ok=True)


def storage(run_dir: Path, *, token: str | None) -> Storage:
    """Return how this machine sees the run directory.

    Args:
        run_dir: absolute.
        token: the file that the launching machine wrote, if it could.
    """
    folder = nearest(run_dir)
    disk = os.statvfs(folder)
    shm = os.statvfs(_SHM) if _SHM.is_dir() else None
    return Storage(
        folder=str(folder),
        problem=_problem(folder),
        is_ours=token is not None and Path(token).exists(),
        served_by=served_folder(folder),
        free_bytes=disk.f_bavail * disk.f_frsize,
        shm_bytes=shm.f_blocks * shm.f_frsize if shm else 0,
        shm_free_bytes=shm.f_bavail * shm.f_frsize if shm else 0,
    )


def nearest(folder: Path) -> Path:
    """Return ``folder``, or the nearest one above it that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def _problem(folder: Path) -> str | None:
    """Return why no file can be made; root and network file systems make permissions a poor guide, so make one."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # has no name where the file system can do without
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None

"""Exclusive lock on a run directory; the kernel releases it when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from types import TracebackType

from launcher.errors import ConfigError


class RunLock:
    """Exclusive right to write to one run directory, held by the launcher for the whole run.

    It is ``flock`` (POSIX systems; over NFS since Linux 2.6.12) on an open file that children do not inherit: the
    kernel releases it when its holder exits for any reason, and ranks that outlive the launcher do not keep it.
    filelock does not fit: it makes a missing folder, and reports a file that was removed meanwhile as a held lock.

        with RunLock(folder).acquire():
            ...
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str = ".lock",
        option: str = "run.dir",
        user: str = "another run",
        fix: str = "wait for it to end, or leave run.dir out to get a directory of its own",
    ) -> None:
        """Name the lock, and what an error says where another process holds it.

        Args:
            folder: to lock.
            name: of the file in it.
            option: that names the folder.
            user: who else may hold it.
            fix: what to do then.
        """
        self._folder, self._path = folder, folder / name
        self._option, self._user, self._fix = option, user, fix
        self._descriptor: int | None = None
        self._is_new = False

    def acquire(self) -> RunLock:
        """Take the lock without waiting.

        Raises:
            ConfigError: another process holds it.
            OSError: the folder is missing or not writable.
        """
        assert self._descriptor is None, "acquired twice"
        while not self._try():  # the file was removed between opening and locking it
            pass
        return self

    def _try(self) -> bool:
        """Take the lock; return False if the locked file was replaced in the folder meanwhile."""
        is_new = not self._path.exists()
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 32).decode(errors="replace") or "unknown"
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            why = f"{self._user} (process {holder}) is using this directory"
            raise ConfigError(self._option, self._folder, why=why, fix=self._fix) from None
        if not self._path.exists() or not os.path.samestat(os.fstat(descriptor), self._path.lstat()):
            os.close(descriptor)
            return False
        with contextlib.suppress(OSError):  # a full disk: the lock works without the name of its holder
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        self._descriptor, self._is_new = descriptor, is_new
        return True

    def remove(self) -> None:
        """Remove the lock's file, if this process created it, while it still holds the lock."""
        if self._descriptor is not None and self._is_new:
            self._path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        assert self._descriptor is not None, "acquire first"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

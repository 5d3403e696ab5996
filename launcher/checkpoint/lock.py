"""One run a directory: a lock that the kernel releases when its holder dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from launcher.errors import ConfigError


class RunLock:
    """The right to write to one run directory; held by the launcher for the whole run.

    It is ``flock`` (POSIX systems; over NFS since Linux 2.6.12) on an open file that programs started meanwhile do not
    inherit: it ends with its holder, however that ends, and ranks that outlive the launcher do not keep it.

        with RunLock(folder).acquire():
            ...
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> RunLock:
        """Take the lock without waiting.

        Raises:
            ConfigError: another process holds it.
            OSError: the folder is missing or not writable.
        """
        assert self._descriptor is None, "acquired twice"
        descriptor = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 32).decode(errors="replace") or "unknown"
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            why = f"another run (process {holder}) is using this directory"
            fix = "wait for it to end, or leave run.dir out to get a directory of its own"
            raise ConfigError("run.dir", self._folder, why=why, fix=fix) from None
        os.truncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._descriptor = descriptor
        return self

    def release(self) -> None:
        """Let others have the directory; doing so twice is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        assert self._descriptor is not None, "acquire first"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

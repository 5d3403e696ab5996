"""A run's own folder on NVMe: tens of gigabytes that two runs must not share and no run may leave behind."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

_IN_USE = "in_use"


class SwapFolder:
    """The folder of one run on this host, held by every rank of it and removed with the last.

    DeepSpeed empties the folder it is given when it starts, and never when it ends. So each run gets one of its own,
    named after the run, and what killed runs left is removed: the kernel drops their lock.

    Args:
        path: ``parallel.nvme_path``.
        run_name: name of the run directory.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path, *, run_name: str) -> None:
        self.path = path / f"launcher-{run_name}"
        self.path.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path / _IN_USE, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        for other in path.glob("launcher-*"):
            if other != self.path:
                _remove_unused(other)

    def release(self) -> None:
        """Remove the folder unless another rank of the run still uses it."""
        os.close(self._descriptor)
        _remove_unused(self.path)


def _remove_unused(folder: Path) -> None:
    try:
        descriptor = os.open(folder / _IN_USE, os.O_RDWR)
    except FileNotFoundError:  # another rank removed it meanwhile
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return
    finally:
        os.close(descriptor)

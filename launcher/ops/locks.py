"""Two locks: our own around all building, and torch's, which a killed build leaves behind."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Say = Callable[[str], None]

_POLL_S = 0.5
_SAY_EVERY_S = 10.0


@contextmanager
def only_builder(folder: Path, *, say: Say) -> Iterator[None]:
    """Hold the folder's lock, waiting for another run that builds; the kernel drops it when its holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "building").open("a") as file:
        started, told = time.monotonic(), float("-inf")
        while not _try_lock(file.fileno()):
            waited = time.monotonic() - started
            if waited - told >= _SAY_EVERY_S:
                say(f"another run is building DeepSpeed's operators, waited {waited:.0f} s so far")
                told = waited
            time.sleep(_POLL_S)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def clear_stale_lock(path: Path, *, say: Say) -> None:
    """Wait until no living process holds torch's lock at ``path``, then remove it if it is still there.

    torch keeps the file open while it holds the lock, so a lock that no process has open belongs to a dead one. Only
    processes of this machine are seen.
    """
    while path.exists():
        owner = lock_owner(path)
        if owner is None:
            age_s = max(0.0, time.time() - path.stat().st_mtime) if path.exists() else 0.0
            path.unlink(missing_ok=True)
            say(f"cleared {path}: a build that was killed left it {age_s:.0f} s ago")
            return
        time.sleep(_POLL_S)


def lock_owner(path: Path) -> int | None:
    """Return the process that has ``path`` open, or ``None``. Linux only: elsewhere nothing can be told."""
    target = str(path.resolve())
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        if target in _open_files(descriptors):
            return int(descriptors.parent.name)
    return None


def _open_files(descriptors: Path) -> Iterator[str]:
    """Yield what a process has open; nothing of one that ended meanwhile or belongs to another user."""
    try:
        links = list(descriptors.iterdir())
    except OSError:
        return
    for link in links:
        try:
            yield str(link.readlink())
        except OSError:  # closed meanwhile
            continue

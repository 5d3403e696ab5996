"""Finding and ending processes without ever touching somebody else's. Linux only.

A process is known by its number *and* its start time, because numbers are used again. Signals go through a pidfd, so
nothing can take the number between the check and the signal.
"""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Process:
    """One process, for ever: never another that was later given its number."""

    pid: int
    started: int
    """Clock ticks since the machine started."""

    def is_alive(self) -> bool:
        """Return whether it is there and has not ended."""
        entry = _read(self.pid)
        return entry is not None and entry.process == self and not entry.is_zombie

    def send(self, number: int) -> bool:
        """Send a signal; return whether the process was still there."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if identify(self.pid) != self:
                return False
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True


@dataclass(frozen=True)
class _Entry:
    process: Process
    parent: int
    is_zombie: bool


def identify(pid: int) -> Process | None:
    """Return the process that has this number now; ``None`` when nobody has."""
    entry = _read(pid)
    return entry.process if entry else None


def descendants(ancestor: int, *, spare: Collection[Process] = ()) -> list[Process]:
    """Return every living process below ``ancestor``, without those in ``spare`` and what is below them."""
    children: dict[int, list[_Entry]] = defaultdict(list)
    for name in os.listdir("/proc"):  # noqa: PTH208 (half the time of Path.iterdir, and this is a busy loop)
        entry = _read(int(name)) if name.isdigit() else None
        if entry is not None:
            children[entry.parent].append(entry)
    found: list[Process] = []
    unvisited = [ancestor]
    while unvisited:
        for entry in children.pop(unvisited.pop(), ()):
            if entry.process in spare:
                continue
            unvisited.append(entry.process.pid)
            if not entry.is_zombie:
                found.append(entry.process)
    return found


def end_descendants(ancestor: int, *, spare: Collection[Process] = ()) -> list[Process]:
    """Kill everything below ``ancestor``, which must be a subreaper, even what forks while it is being killed.

    All are stopped first, again and again until no new one appears: what is stopped cannot fork.

    Returns:
        What the kernel had not let go within five seconds (a process waiting for a dead disk).
    """
    deadline = time.monotonic() + _PATIENCE_S
    stopped: set[Process] = set()
    while living := descendants(ancestor, spare=spare):
        if time.monotonic() > deadline:
            return living
        new = [process for process in living if process not in stopped]
        for process in new:
            process.send(signal.SIGSTOP)
        stopped.update(new)
        if not new:
            for process in living:
                process.send(signal.SIGKILL)
            time.sleep(0.005)
    return []


def _read(pid: int) -> _Entry | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(b")") + 2 :].split()  # the name before it may hold spaces and brackets
    return _Entry(Process(pid, int(fields[19])), int(fields[1]), fields[0] in b"ZX")

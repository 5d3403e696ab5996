"""Processes known by number and start time, and what lives in a namespace."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_DEADLINE_S = 20.0
_PROC = Path("/proc")


class LabError(RuntimeError):
    """The lab cannot do what was asked; the message is for people."""


@dataclass(frozen=True)
class Process:
    """One process; a later one with the same number is another."""

    pid: int
    started: int
    """Clock ticks since the boot."""

    @classmethod
    def of(cls, pid: int) -> Process:
        """Return the process with that number.

        Raises:
            LabError: there is none.
        """
        if (found := _stat(pid)) is None:
            raise LabError(f"process {pid} has ended already")
        return cls(pid, found[1])

    def is_alive(self) -> bool:
        """Return whether it still runs; a zombie does not."""
        found = _stat(self.pid)
        return found is not None and found[0] not in "ZX" and found[1] == self.started

    def namespace(self, kind: str) -> str:
        """Return the name of its namespace, such as ``net:[4026531840]``; empty once it has ended."""
        if not self.is_alive():
            return ""
        return _namespace(self.pid, kind)

    def kill(self) -> None:
        """End it at once; nothing happens when it is gone, also when its number is in use again."""
        with contextlib.suppress(ProcessLookupError):
            if self.is_alive():
                os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: self._is_reaped(), f"process {self.pid} does not end")

    def _is_reaped(self) -> bool:
        with contextlib.suppress(ChildProcessError):  # the process that started the lab may have exited
            os.waitpid(self.pid, os.WNOHANG)
        return not self.is_alive()


def spawn(argv: Sequence[str], *, log: Path, leash: int | None) -> Process:
    """Start a process that outlives this one and belongs to no terminal.

    Args:
        argv: the command. It reads its stdin and ends when that ends.
        log: gets what it prints.
        leash: becomes its stdin; without one its stdin never ends.
    """
    reader, writer = os.pipe()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_DUP2, reader if leash is None else leash, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    if leash is None:
        actions.append((os.POSIX_SPAWN_DUP2, writer, 3))  # it holds its own stdin open
    try:
        pid = os.posix_spawnp(argv[0], list(argv), {"PATH": os.environ["PATH"]}, file_actions=actions, setsid=True)
    finally:
        os.close(reader)
        os.close(writer)
    return Process.of(pid)


def inhabitants(namespace: str, kind: str) -> Iterator[Process]:
    """Yield the live processes in a namespace."""
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and _namespace(int(entry.name), kind) == namespace:
            with contextlib.suppress(LabError):
                if (found := Process.of(int(entry.name))).is_alive():
                    yield found


def number_inside(process: Process) -> int | None:
    """Return the number that a process has in its own PID namespace."""
    try:
        lines = (_PROC / str(process.pid) / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[-1]) for line in lines if line.startswith("NSpid:")), None)


def wait_until(condition: Callable[[], object], otherwise: str) -> None:
    """Wait for ``condition``.

    Raises:
        LabError: ``otherwise``, after a time in which it should long have come true.
    """
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(otherwise)
        time.sleep(0.005)


def _namespace(pid: int, kind: str) -> str:
    try:
        return str((_PROC / str(pid) / "ns" / kind).readlink())
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int] | None:
    """Return state and start time."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold anything
    return fields[0], int(fields[19])

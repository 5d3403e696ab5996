"""Asking one rank for its stack. It writes to the rank's log, by way of faulthandler, even while it is stuck in C."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launcher.supervise.processes import Process
from launcher.supervise.stacks import NATIVE

_LONGEST = 1 << 16
_BEGINNING = "(most recent call first)"
_MOMENT_S = 0.2
_NATIVE_S = 1.0
"""Least time in which it makes sense to ask py-spy too."""


class StackDump:
    """One question to one rank, and its answer.

    A rank that a signal had stopped is continued for the moment that it needs to answer.

    Args:
        process: the rank; ``None`` when it is on another machine and somebody else asks it.
        log: the rank's.
        within_s: time it gets.
    """

    def __init__(self, process: Process | None, log: Path, *, within_s: float) -> None:
        self._log, self._until = log, time.monotonic() + within_s
        self._start = self._size = _size_of(log)
        self._answer = ""
        self._native: NativeDump | None = None
        self.is_stopped = process is not None and _state_of(process.pid) in ("T", "t")
        """Whether a signal, or a debugger, had stopped the rank."""
        if process is None:
            return
        process.send(signal.SIGUSR2)
        if self.is_stopped:
            self._continue_for_a_moment(process)
        elif within_s >= _NATIVE_S and (program := py_spy()):
            self._native = NativeDump(program, process.pid)

    def is_complete(self) -> bool:
        """Return whether there is nothing more to come: the log rests after the stacks, or time is up."""
        if time.monotonic() >= self._until:
            return True
        return self._has_answered() and (self._native is None or self._native.is_over())

    def take(self) -> str:
        """Return what the rank wrote since it was asked, and what py-spy saw."""
        native = self._native.take() if self._native else ""
        return (self._answer or self._read()) + native

    def _continue_for_a_moment(self, process: Process) -> None:
        """Let the rank go on until it has answered, and hardly further: the others may go on with it."""
        process.send(signal.SIGCONT)
        until = time.monotonic() + _MOMENT_S
        while not self._has_answered() and time.monotonic() < until:
            time.sleep(_MOMENT_S / 50)
        process.send(signal.SIGSTOP)

    def _has_answered(self) -> bool:
        before, self._size = self._size, _size_of(self._log)
        if not self._answer and self._size == before and _BEGINNING in (text := self._read()):
            self._answer = text
        return self._answer != ""

    def _read(self) -> str:
        """Return what was written since the question."""
        if self._size <= self._start:
            return ""
        with self._log.open("rb") as file:
            file.seek(self._start)
            return file.read(_LONGEST).decode(errors="replace")


class NativeDump:
    """py-spy's view of a process, C frames included.

    Args:
        program: py-spy.
        pid: whose stack.
    """

    def __init__(self, program: str, pid: int) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by take)
        argv = [program, "dump", "--native", "--pid", str(pid)]
        self._popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output)

    def is_over(self) -> bool:
        """Return whether it has said all."""
        return self._popen.poll() is not None

    def take(self) -> str:
        """End it and return what it said."""
        self._popen.kill()
        self._popen.wait()
        with self._output as file:
            file.seek(0)
            return f"{NATIVE}\n{file.read(_LONGEST).decode(errors='replace')}"


def py_spy() -> str | None:
    """Return the path of py-spy where it is installed, beside this Python or on the search path."""
    return shutil.which("py-spy", path=Path(sys.executable).parent) or shutil.which("py-spy")


def _size_of(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _state_of(pid: int) -> str:
    """Return the kernel's letter for the state of a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"

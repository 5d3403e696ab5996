"""Stack dumps of ranks: request one, and read the line and the collective a rank is in.

A rank writes its stacks to its log through faulthandler, even while it is stuck in C code.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.utils.processes import Process

_MAX_BYTES = 1 << 16
_DUMP_MARK = "(most recent call first)"
_MAIN_MARK = "Current thread 0x"
"""Begins the stack of the thread that took the signal, the main thread, which comes last."""
_SETTLED_S = 0.05
"""Time without output after which the main thread's stack is taken as complete."""
_SETTLED_WITHOUT_MAIN_S = 0.5
"""The same for a dump without ``_MAIN_MARK``.
Another thread than Python's took the signal, or more is to come."""
_CONTINUE_S = 2.0
"""Longest time in seconds for which a suspended rank is continued to answer.
Its main thread answers before it does anything else."""
_NATIVE_S = 1.0
"""Minimum time for a dump by py-spy."""
NATIVE_MARK = "py-spy dump --native:"
"""Line before the C frames, where py-spy is installed."""
_THREAD = re.compile(r"(Current thread|Thread) 0x[0-9a-f]{1,16}.{0,100}\(most recent call first\):")
_DUMPED = re.compile(r' *File "(.+)", line (\d+) in (.+)')
_TRACED = re.compile(r' *File "(.+)", line (\d+), in (.+)')
_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARY = re.compile(r"^<|/(site|dist)-packages/(?!launcher/)|/lib\d*/python3\.\d+/(?!(site|dist)-packages/launcher/)")
_COLLECTIVES = re.compile(r"/(torch/distributed/(distributed_c10d|_functional_collectives)|deepspeed/comm/\w+)\.py$")
_WRAPPERS = ("wrapper", "log_wrapper")

_WAITS = {
    ("torch/autograd/graph.py", "_engine_run_backward"): "backward",  # DDP and ZeRO reduce gradients in it
    ("launcher/engines/distributed.py", "total"): "all_reduce",
}
"""Functions that wait for other ranks outside of Python, and their collective.
A key is the end of the file's path and the function's name."""


class StackDump:
    """A request for the stacks of one rank, and the answer.

    A suspended rank is continued for as long as it needs to answer.

    Args:
        process: the rank; ``None`` when it is on another machine and its monitor signals it.
        log: of the rank.
        within_s: time to answer.
    """

    def __init__(self, process: Process | None, log: Path, *, within_s: float) -> None:
        self._log, self._until = log, time.monotonic() + within_s
        self._start = self._size = _size_of(log)
        self._grew_at = time.monotonic()
        self._answer = ""
        self._native: NativeDump | None = None
        self.is_stopped = process is not None and _state_of(process.pid) in ("T", "t")
        """Whether the rank was suspended, by a signal or a debugger."""
        if process is None:
            return
        process.send_to_main_thread(signal.SIGUSR2)
        if self.is_stopped:
            self._continue_for_a_moment(process)
        elif within_s >= _NATIVE_S and (program := find_py_spy()):
            self._native = NativeDump(program, process.pid)

    def is_complete(self) -> bool:
        """Return whether the answer is complete or has timed out."""
        if time.monotonic() >= self._until:
            return True
        return self._has_answered() and (self._native is None or self._native.has_exited())

    def take(self) -> str:
        """Return the output of the rank since the request, and that of py-spy."""
        native = self._native.take() if self._native else ""
        return (self._answer or self._read()) + native

    def _continue_for_a_moment(self, process: Process) -> None:
        """Continue the rank until it has answered, then suspend it again."""
        process.send(signal.SIGCONT)
        until = time.monotonic() + _CONTINUE_S
        while not self._has_answered() and time.monotonic() < until:
            time.sleep(_SETTLED_S / 10)
        process.send(signal.SIGSTOP)

    def _has_answered(self) -> bool:
        before, self._size = self._size, _size_of(self._log)
        if self._size != before:
            self._grew_at = time.monotonic()
        elif not self._answer and _DUMP_MARK in (text := self._read()):
            settled_s = _SETTLED_S if _MAIN_MARK in text else _SETTLED_WITHOUT_MAIN_S
            if time.monotonic() - self._grew_at >= settled_s:
                self._answer = text
        return self._answer != ""

    def _read(self) -> str:
        """Return the log since the request."""
        if self._size <= self._start:
            return ""
        with self._log.open("rb") as file:
            file.seek(self._start)
            return file.read(_MAX_BYTES).decode(errors="replace")


class NativeDump:
    """py-spy's view of a process, C frames included.

    Args:
        program: py-spy.
        pid: of the process.
    """

    def __init__(self, program: str, pid: int) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by take)
        argv = [program, "dump", "--native", "--pid", str(pid)]
        self._popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output)

    def has_exited(self) -> bool:
        """Return whether py-spy has exited."""
        return self._popen.poll() is not None

    def take(self) -> str:
        """Kill it and return its output."""
        self._popen.kill()
        self._popen.wait()
        with self._output as file:
            file.seek(0)
            return f"{NATIVE_MARK}\n{file.read(_MAX_BYTES).decode(errors='replace')}"


def find_py_spy() -> str | None:
    """Return the path of py-spy next to this Python or on the search path, ``None`` without it."""
    return shutil.which("py-spy", path=Path(sys.executable).parent) or shutil.which("py-spy")


def _size_of(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _state_of(pid: int) -> str:
    """Return the kernel's letter for the state of a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


@dataclass(frozen=True, kw_only=True)
class StackTrace:
    """Stack of a rank's main thread."""

    text: str
    """The stacks of all its threads, or its traceback."""
    where: str = ""
    """Innermost line outside libraries (``launcher/training/trainer.py:88 in train_step``)."""
    collective: str = ""
    """Collective in which the rank waited (``all_reduce``); empty if it did not wait."""
    is_stopped: bool = False
    """It was suspended (SIGSTOP), as a debugger does."""

    @property
    def python(self) -> str:
        """The text without C frames."""
        return self.text.partition(NATIVE_MARK)[0]

    @property
    def place(self) -> str:
        """Collective and line, as text."""
        return f"{self.collective} ({self.where})" if self.collective else self.where


@dataclass(frozen=True)
class _StackFrame:
    file: str
    line: str
    function: str

    @property
    def is_library(self) -> bool:
        return _LIBRARY.search(self.file) is not None

    @property
    def wait(self) -> str:
        """Collective that the function waits in, if it does."""
        for (file, function), name in _WAITS.items():
            if self.function == function and self.file.endswith(f"/{file}"):
                return name
        is_public = not self.function.startswith("_") and self.function not in _WRAPPERS
        return self.function if is_public and _COLLECTIVES.search(self.file) else ""

    def __str__(self) -> str:
        return f"{_shown_path(self.file)}:{self.line} in {self.function}"


def _shown_path(file: str) -> str:
    """Return ``launcher/…`` for a module of this package and the bare name for any other file.

    The folder's name decides nothing: a clone, or a user's own folder, may be named ``launcher`` too. The package may
    lie elsewhere on the rank's host, so the module is looked up in the copy at hand.
    """
    _, separator, inside = file.rpartition("/launcher/")
    if separator and (_PACKAGE / inside).is_file():
        return f"launcher/{inside}"
    return file.rpartition("/")[2]


def read_dump(text: str, *, is_stopped: bool = False) -> StackTrace:
    """Return the main thread's stack from faulthandler's dump, which other lines may interrupt.

    Args:
        text: the dump; the last of several is used.
        is_stopped: whether the process was suspended before the dump.
    """
    threads: list[tuple[bool, list[_StackFrame]]] = []
    for line in text.splitlines():
        if thread := _THREAD.search(line):
            threads.append((thread[1] != "Thread", []))
        elif threads and (frame := _DUMPED.fullmatch(line)):
            threads[-1][1].append(_StackFrame(*frame.groups()))
    # signals go to the main thread, which therefore is the current one; else it is the oldest, which comes last
    frames = next((found for current, found in reversed(threads) if current), threads[-1][1] if threads else [])
    return _stack_of(text, frames, is_stopped=is_stopped)


def read_traceback(text: str) -> StackTrace:
    """Return the stack from a traceback."""
    frames = [_StackFrame(*frame.groups()) for line in text.splitlines() if (frame := _TRACED.fullmatch(line))]
    return _stack_of(text, frames[::-1])


def _stack_of(text: str, frames: Sequence[_StackFrame], *, is_stopped: bool = False) -> StackTrace:
    """Return the stack of ``frames``, innermost first."""
    own = next((number for number, frame in enumerate(frames) if not frame.is_library), len(frames))
    waits = [wait for frame in frames[: own + 1] if (wait := frame.wait)]
    shown = frames[own] if own < len(frames) else frames[0] if frames else ""
    return StackTrace(text=text, where=str(shown), collective=waits[-1] if waits else "", is_stopped=is_stopped)

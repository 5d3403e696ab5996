"""Processes and signals on Linux: find, signal and end processes, and describe exits.

A process is identified by its PID *and* its start time, because PIDs are reused. Signals are sent through a pidfd, so
the PID cannot be reused between the check and the signal.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launcher.errors import EnvironmentProblem

_KILL_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_TGKILL = {"x86_64": 234, "aarch64": 131}
"""Number of the tgkill system call, which glibc before 2.30 does not wrap."""
COLLECTED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGTSTP)


@dataclass(frozen=True)
class Process:
    """One process, never another that reuses its PID."""

    pid: int
    started: int
    """Clock ticks since the machine started."""

    def is_alive(self) -> bool:
        """Return whether it exists and is not a zombie."""
        entry = _read(self.pid)
        return entry is not None and entry.process == self and not entry.is_zombie

    def send(self, number: int) -> bool:
        """Send a signal; return whether the process still existed."""
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

    def send_to_main_thread(self, number: int) -> bool:
        """Send a signal to the main thread; return whether the process still existed."""
        try:
            if identify(self.pid) != self:
                return False
            signal_main_thread(self.pid, number)
        except ProcessLookupError:
            return False
        return True


@dataclass(frozen=True)
class _Entry:
    process: Process
    parent: int
    is_zombie: bool


def signal_main_thread(pid: int, number: int) -> None:
    """Send a signal to the main thread of a process.

    The kernel may hand a signal for a whole process to any of its threads; where the process is suspended, the main
    thread can then run on before another one takes the signal. A signal for the main thread is handled before that
    thread's next instruction.

    Raises:
        ProcessLookupError: there is no such process.
    """
    call = _TGKILL.get(platform.machine())
    if call is None:
        os.kill(pid, number)
    elif ctypes.CDLL(None, use_errno=True).syscall(call, pid, pid, int(number)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))  # its class follows from the number


def identify(pid: int) -> Process | None:
    """Return the process that has this PID now; ``None`` without one."""
    entry = _read(pid)
    return entry.process if entry else None


def descendants(ancestor: int, *, spare: Collection[Process] = ()) -> list[Process]:
    """Return every living descendant of ``ancestor``, except ``spare`` and their descendants."""
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
    """Kill all descendants of ``ancestor``, a subreaper, even those that fork meanwhile.

    All are suspended first, repeatedly until no new one appears: a suspended process cannot fork.

    Returns:
        Processes that still exist after five seconds (waiting for a dead disk).
    """
    deadline = time.monotonic() + _KILL_TIMEOUT_S
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


def become_subreaper() -> None:
    """Make this process the parent of its orphaned descendants."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent``, which just forked it, exits."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it exited before the prctl call
        os.kill(os.getpid(), signal.SIGKILL)


def exit_like(status: int) -> None:
    """Exit like another process, with the code or signal in its wait ``status``; no core dump."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _prctl(option: int, value: int) -> None:
    if sys.platform != "linux":
        raise EnvironmentProblem(f"runs are supervised with prctl, which {sys.platform} lacks: use Linux")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"prctl({option})")


def shell_exit_code(code: int | None, number: int | None) -> int:
    """Return the exit code as a shell reports it: the code itself, or 128 plus the signal."""
    return 128 + number if number else code or 0


def describe_exit(code: int | None, number: int | None) -> str:
    """Return a description of a process's exit."""
    if not number:
        return f"ended with exit code {code}"
    return f"was ended by signal {number} ({signal_name(number)})"


def signal_name(number: int) -> str:
    """Return ``SIGKILL`` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"real-time signal {number}"


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Yield a list that grows by every signal; signals ignored before (nohup) stay ignored."""
    received: list[int] = []

    def add(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    handled = [number for number in COLLECTED_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, add) for number in handled}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

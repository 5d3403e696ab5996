"""Child processes of a host agent: preparing commands, launcher, and sidecars."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from launcher.protocol.messages import AgentMessage, OutputLine, UserNote
from launcher.protocol.plan import Command
from launcher.utils.logs import LineSplitter
from launcher.utils.processes import Process, identify

_CHUNK = 1 << 16
_KEPT_LINES = 60
SIDECAR_TIMEOUT_S = 60.0
"""Time for a sidecar to flush its data once the ranks have exited."""
_REPORT_AFTER_S = 2.0


class ChildProcess:
    """One running command.

    Args:
        command: what to start, in a session of its own, so that no signal to a group reaches others.
        env: its whole environment.
        on_line: called with every whole line it prints.
        reads_stdin: whether it reads a message on its stdin.

    Raises:
        OSError: it cannot be started at all.
    """

    def __init__(
        self, command: Command, *, env: Mapping[str, str], on_line: Callable[[str], None], reads_stdin: bool = False
    ) -> None:
        self.name = command_name(command)
        self._popen = subprocess.Popen(
            command.argv,
            env=dict(env),
            stdin=subprocess.PIPE if reads_stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._popen.stdout is not None
        self.output = self._popen.stdout.fileno()
        os.set_blocking(self.output, False)
        self._on_line, self._splitter = on_line, LineSplitter()
        self._last: deque[str] = deque(maxlen=_KEPT_LINES)
        found = identify(self._popen.pid)
        assert found is not None, "a child that was not waited for still exists"
        self.process: Process = found

    def has_exited(self) -> bool:
        """Return whether it has exited."""
        return self._popen.poll() is not None

    @property
    def code(self) -> int | None:
        """Exit code; ``None`` while it runs, and when a signal ended it."""
        status = self._popen.returncode
        return status if status is not None and status >= 0 else None

    @property
    def signal(self) -> int | None:
        """The signal that ended it, if one did."""
        status = self._popen.returncode
        return -status if status is not None and status < 0 else None

    @property
    def tail(self) -> str:
        """The last lines it printed."""
        return "\n".join(self._last)

    def read(self) -> bool:
        """Read and pass on new lines; return False at the end of its output."""
        try:
            data = os.read(self.output, _CHUNK)
        except BlockingIOError:
            return True
        self._pass_on(self._splitter.feed(data))
        return bool(data)

    def drain(self) -> None:
        """Read and pass on the rest, the unfinished last line too."""
        while True:
            try:
                data = os.read(self.output, _CHUNK)
            except BlockingIOError:  # a descendant still holds the pipe
                break
            if not data:
                break
            self._pass_on(self._splitter.feed(data))
        self._pass_on(self._splitter.rest())

    def send_last(self, message: Mapping[str, object]) -> None:
        """Write one JSON line to its stdin and close it."""
        assert self._popen.stdin is not None, "the child was started without a stdin"
        try:
            self._popen.stdin.write(json.dumps(message).encode() + b"\n")
            self._popen.stdin.close()
        except BrokenPipeError:  # it has exited
            pass

    def _pass_on(self, lines: list[str]) -> None:
        self._last.extend(lines)
        for line in lines:
            self._on_line(line)


def command_name(command: Command) -> str:
    """Return a short name: ``torchrun``, ``deepspeed``, a module, or the program's file name."""
    argv = command.argv
    module = argv[2] if argv[1:2] == ("-m",) and len(argv) > 2 else ""
    known = {
        "torch.distributed.run": "torchrun",
        "launcher.jobs.torchrun": "torchrun",
        "deepspeed.launcher.launch": "deepspeed",
        "deepspeed.launcher.runner": "deepspeed",
    }
    if module == "launcher.trackers.sidecar":
        return f"tracker {argv[-1]}"
    script = next((word for word in argv[1:2] if word.endswith(".py")), argv[0])
    return known.get(module, module) or Path(script).name


class StartChild(Protocol):
    """Starts a command and reads its output."""

    def __call__(self, command: Command, *, on_line: Callable[[str], None], reads_stdin: bool) -> ChildProcess:
        """Return the running child."""


class Sidecars:
    """The sidecars of one host."""

    def __init__(self, *, start: StartChild, emit: Callable[[AgentMessage], None]) -> None:
        self._start, self._emit = start, emit
        self._children: list[ChildProcess] = []
        self._reported: set[ChildProcess] = set()

    @property
    def processes(self) -> list[Process]:
        """Those that have been started."""
        return [child.process for child in self._children]

    def start(self, commands: Sequence[Command]) -> None:
        """Start all; one that cannot start is reported and skipped."""
        for command in commands:
            try:
                child = self._start(command, on_line=partial(self._send_line, command_name(command)), reads_stdin=True)
            except OSError as error:
                self._emit(
                    UserNote(text=f"{command_name(command)} cannot be started ({error.strerror}); the run continues")
                )
            else:
                self._children.append(child)

    def report_failed(self) -> None:
        """Report those that have failed since the last call."""
        for child in self._children:
            if child not in self._reported and child.has_exited():
                self._reported.add(child)
                child.drain()
                if child.code != 0:
                    how = f"signal {child.signal}" if child.signal else f"exit code {child.code}"
                    self._emit(UserNote(text=f"{child.name} ended with {how}; this does not change the run"))

    def finish(self, exit_code: int, *, poll: Callable[[], None], killed: Callable[[], bool]) -> None:
        """Send the exit code of the run to all and wait until they exit.

        Args:
            exit_code: of the run, sent as one line ``{"exit_code": …}`` before their stdin is closed.
            poll: waits briefly.
            killed: whether to stop waiting.
        """
        for child in self._children:
            child.send_last({"exit_code": exit_code})
        started, has_reported = time.monotonic(), False
        while waiting := [child.name for child in self._children if not child.has_exited()]:
            waited = time.monotonic() - started
            if killed():
                return
            if waited > SIDECAR_TIMEOUT_S:
                self._emit(UserNote(text=f"{', '.join(waiting)} did not end within {SIDECAR_TIMEOUT_S:.0f} s: killed"))
                return
            if waited > _REPORT_AFTER_S and not has_reported:
                has_reported = True
                self._emit(UserNote(text=f"waiting for {', '.join(waiting)} (at most {SIDECAR_TIMEOUT_S:.0f} s)"))
            poll()
        self.report_failed()

    def _send_line(self, name: str, line: str) -> None:
        self._emit(OutputLine(source=name, text=line))

"""A command that the host agent started: its output as lines, its end as it was."""

from __future__ import annotations

import json
import os
import subprocess
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from launcher.plan import Command
from launcher.supervise.lines import LineSplitter
from launcher.supervise.processes import Process, identify

_CHUNK = 1 << 16
_KEPT_LINES = 60


class Child:
    """One running command.

    Args:
        command: what to start, in a session of its own, so that no signal to a group reaches others.
        env: its whole environment.
        on_line: called with every whole line it prints.
        listens: whether it reads a last message on its stdin.

    Raises:
        OSError: it cannot be started at all.
    """

    def __init__(
        self, command: Command, *, env: Mapping[str, str], on_line: Callable[[str], None], listens: bool = False
    ) -> None:
        self.name = name_of(command)
        self._popen = subprocess.Popen(
            command.argv,
            env=dict(env),
            stdin=subprocess.PIPE if listens else subprocess.DEVNULL,
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
        assert found is not None, "a child that nobody waited for is still known"
        self.process: Process = found

    def ended(self) -> bool:
        """Return whether it has ended."""
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
        """Hand on what it printed; return False once there can be no more."""
        try:
            data = os.read(self.output, _CHUNK)
        except BlockingIOError:
            return True
        self._hand_on(self._splitter.feed(data))
        return bool(data)

    def drain(self) -> None:
        """Hand on all that is left, the unfinished last line too."""
        while True:
            try:
                data = os.read(self.output, _CHUNK)
            except BlockingIOError:  # a descendant still holds the pipe
                break
            if not data:
                break
            self._hand_on(self._splitter.feed(data))
        self._hand_on(self._splitter.rest())

    def tell_last(self, message: Mapping[str, object]) -> None:
        """Write one JSON line to its stdin and close it."""
        assert self._popen.stdin is not None, "only a child that listens is told something"
        try:
            self._popen.stdin.write(json.dumps(message).encode() + b"\n")
            self._popen.stdin.close()
        except BrokenPipeError:  # it has ended
            pass

    def _hand_on(self, lines: list[str]) -> None:
        self._last.extend(lines)
        for line in lines:
            self._on_line(line)


def name_of(command: Command) -> str:
    """Return what a person calls this command: ``torchrun``, ``deepspeed``, a module, or the program's file name."""
    argv = command.argv
    module = argv[2] if argv[1:2] == ("-m",) and len(argv) > 2 else ""
    known = {
        "torch.distributed.run": "torchrun",
        "launcher.torchrun": "torchrun",
        "deepspeed.launcher.launch": "deepspeed",
        "deepspeed.launcher.runner": "deepspeed",
        "launcher.trackers.sidecar": "tracker",
    }
    script = next((word for word in argv[1:2] if word.endswith(".py")), argv[0])
    return known.get(module, module) or Path(script).name

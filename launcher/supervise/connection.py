"""A host agent, as the session reaches it."""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path

from launcher.supervise.messages import Message, decode

_CHUNK = 1 << 16


class Connection(ABC):
    """A pipe of messages to one host's agent; backends differ in how they open it."""

    host: str
    """Name of the host in the plan."""

    @abstractmethod
    def fileno(self) -> int:
        """Return the descriptor that is readable when there are messages."""

    @abstractmethod
    def send(self, message: Message) -> None:
        """Send one message; an agent that is gone is noticed by ``receive``."""

    @abstractmethod
    def receive(self) -> list[Message] | None:
        """Return the messages that have arrived; ``None`` once the agent is gone."""

    @abstractmethod
    def close(self) -> int:
        """Kill the agent if it is not gone; return its exit code, negative for a signal."""


class LocalConnection(Connection):
    """The agent is a child of this process.

    Args:
        host: its name in the plan.
        log: takes what the agent itself has to say should it break.
    """

    def __init__(self, host: str, *, log: Path) -> None:
        self.host = host
        with log.open("ab") as errors:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "launcher.supervise.agent"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # the terminal's Ctrl-C is for the session alone, which passes it on
                bufsize=0,
            )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._stdin, self._stdout = self._popen.stdin, self._popen.stdout
        self._partial = b""

    def fileno(self) -> int:
        """Return the agent's stdout."""
        return self._stdout.fileno()

    def send(self, message: Message) -> None:
        """Write to the agent's stdin."""
        payload = memoryview(message.encode())
        try:
            while payload:
                payload = payload[os.write(self._stdin.fileno(), payload) :]
        except BrokenPipeError:
            pass

    def receive(self) -> list[Message] | None:
        """Read what the agent wrote; call it when ``fileno`` is readable."""
        data = os.read(self._stdout.fileno(), _CHUNK)
        if not data:
            return None
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [decode(line) for line in lines]

    def close(self) -> int:
        """Kill the agent if it has not ended."""
        self._popen.kill()
        code = self._popen.wait()
        self._stdin.close()
        self._stdout.close()
        return code

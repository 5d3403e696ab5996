"""A host agent, as the session reaches it."""

from __future__ import annotations

import os
import subprocess
import threading
from abc import ABC, abstractmethod
from pathlib import Path

from launcher.remote.command import Remote
from launcher.supervise.lines import open_log
from launcher.supervise.messages import FROM_AGENT, Message
from launcher.supervise.wire import Inbox

_CHUNK = 1 << 16


class Connection(ABC):
    """Messages to and from one host's agent; backends differ in how they open it.

    ``send`` may be called from a second thread.
    """

    host: str
    """Name of the host in the plan."""
    program: str | None
    """What carries the messages (``ssh``), and whose exit code ``close`` returns; ``None`` for a bare socket."""
    _inbox: Inbox

    @property
    def malformed(self) -> str:
        """What arrived that no agent sends, in words; empty while there is nothing of that kind."""
        return self._inbox.malformed

    @abstractmethod
    def fileno(self) -> int:
        """Return the descriptor that is readable when there are messages."""

    @abstractmethod
    def outlet(self) -> int | None:
        """Return the descriptor to wait for until it is writable; ``None`` when nothing waits to be sent."""

    @abstractmethod
    def send(self, message: Message) -> None:
        """Queue one message and write what fits; an agent that is gone is noticed by ``receive``."""

    @abstractmethod
    def flush(self) -> None:
        """Write what fits of the queue."""

    @abstractmethod
    def receive(self) -> list[Message] | None:
        """Return the messages that have arrived; ``None`` once the agent is gone."""

    @abstractmethod
    def close(self) -> int:
        """Break the connection off if it is not broken; return the exit code behind it, negative for a signal."""


class PipeConnection(Connection):
    """The agent's stdin and stdout are those of a child of this process: the agent itself, ssh, srun.

    Args:
        host: its name in the plan.
        remote: what to start, in a session of its own, so that the terminal's Ctrl-C is for the caller alone.
        log: takes what the command itself has to say, above all when it breaks.
    """

    def __init__(self, host: str, remote: Remote, *, log: Path) -> None:
        self.host, self.program = host, Path(remote.argv[0]).name
        with open_log(log) as errors:
            self._popen = subprocess.Popen(
                remote.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                bufsize=0,
            )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._stdin, self._stdout = self._popen.stdin, self._popen.stdout
        os.set_blocking(self._stdin.fileno(), False)
        self._inbox, self._log = Inbox(FROM_AGENT), log
        self._lock = threading.Lock()
        self._queue = bytearray(remote.prologue)
        self._is_broken = False

    def fileno(self) -> int:
        """Return the command's stdout."""
        return self._stdout.fileno()

    def outlet(self) -> int | None:
        """Return the command's stdin while something waits."""
        return self._stdin.fileno() if self._queue and not self._is_broken else None

    def send(self, message: Message) -> None:
        """Write to the command's stdin."""
        with self._lock:
            self._queue += message.encode()
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes."""
        with self._lock:
            while self._queue and not self._is_broken:
                try:
                    written = os.write(self._stdin.fileno(), self._queue[:_CHUNK])
                except BlockingIOError:
                    return
                except BrokenPipeError:
                    self._is_broken = True
                    return
                del self._queue[:written]

    def receive(self) -> list[Message] | None:
        """Read what has arrived; call it when ``fileno`` is readable."""
        data = os.read(self._stdout.fileno(), _CHUNK)
        if not data:
            return None
        messages, noise = self._inbox.take(data)
        if noise:
            with self._log.open("ab") as log:
                log.write(noise)
        return messages

    def close(self) -> int:
        """Kill the command if it has not ended."""
        self._popen.kill()
        code = self._popen.wait()
        with self._lock:
            self._is_broken = True
            self._stdin.close()
        self._stdout.close()
        return code

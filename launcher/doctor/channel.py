"""One host's probe, as the doctor reaches it: a child process with three pipes, none of which ever blocks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from typing import IO, Any

from launcher.doctor.speech import heard
from launcher.remote.command import Remote

_CHUNK = 1 << 16
_MOST_STDERR = 1 << 14
_LONGEST_LINE = 1 << 22
"""Far more than a probe says in one; the rest of a longer one is noise."""
_EXIT_S = 1.0
"""Time to exit for a command that has closed its stdout."""


class Channel:
    """A probe that was started.

    Args:
        name: of the host.
        remote: what to start, in a session of its own, so that the terminal's Ctrl-C is for the doctor alone.

    Raises:
        OSError: the program is not there.
    """

    def __init__(self, name: str, remote: Remote) -> None:
        self.name = name
        self.messages: list[dict[str, Any]] = []
        self.is_open = True
        """Whether it may still say something."""
        self.exit_code: int | None = None
        """How the command ended before we hung up; ``None`` when it did not."""
        self._popen = subprocess.Popen(
            remote.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        self.stdin, self.stdout, self.stderr = map(
            _unblocked, (self._popen.stdin, self._popen.stdout, self._popen.stderr)
        )
        self._unsent = bytearray(remote.prologue)
        self._partial = b""
        self._said = b""

    @property
    def has_unsent(self) -> bool:
        """Whether something waits until ``stdin`` is writable."""
        return bool(self._unsent)

    @property
    def complaint(self) -> str:
        """The end of what came over stderr."""
        return self._said.decode(errors="replace")

    def ask(self, question: dict[str, Any]) -> None:
        """Queue one question."""
        self._unsent += json.dumps(question).encode() + b"\n"

    def write(self) -> None:
        """Send what the pipe takes."""
        try:
            del self._unsent[: os.write(self.stdin.fileno(), self._unsent[:_CHUNK])]
        except BlockingIOError:
            return
        except BrokenPipeError:  # the reason comes over stderr and stdout
            self._unsent.clear()

    def read(self) -> bool:
        """Take what stdout has; return whether more may come."""
        data = _read(self.stdout)
        if data is None:
            return True
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > _LONGEST_LINE:
            self._partial = b""
        now = time.time()
        for message in filter(None, map(heard, lines)):
            self.messages.append({**message, "heard": now})
        self.is_open = bool(data)
        return self.is_open

    def read_complaints(self) -> bool:
        """Take what stderr has; return whether more may come."""
        data = _read(self.stderr)
        self._said = (self._said + (data or b""))[-_MOST_STDERR:]
        return data != b""

    def hang_up(self) -> None:
        """Close stdin, which ends the probe and with it what it started."""
        if not self.is_open:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.exit_code = self._popen.wait(timeout=_EXIT_S)
        self.stdin.close()

    def end(self) -> None:
        """Kill the command if it has not ended; keep what it said last."""
        self._popen.kill()
        self._popen.wait()
        self.read_complaints()
        self.stdout.close()
        self.stderr.close()


def _unblocked(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    os.set_blocking(pipe.fileno(), False)
    return pipe


def _read(pipe: IO[bytes]) -> bytes | None:
    try:
        return os.read(pipe.fileno(), _CHUNK)
    except BlockingIOError:
        return None

"""The process that starts runs for a script: a notebook keeps its own signals and children."""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.api.messages import error_from_tree, parse_answer
from launcher.errors import EnvironmentProblem, LauncherError
from launcher.plugins.loading import loaded_plugins, path_environment
from launcher.utils.system import child_environment

_MODULE = "launcher.api.starter"
_INTERRUPT_S = 30.0
"""Time after which a second interrupt ends a run at once."""
_MAX_LINES = 100_000
"""Limit of lines that are kept until a script reads them, the newest ones."""


class StarterProcess:
    """A process that starts what it is sent; a thread of this process reads its output."""

    def __init__(self, request: dict[str, Any], *, command: tuple[str, ...] = ("-m", _MODULE)) -> None:
        self._command = command
        found = path_environment(plugin.module for plugin in loaded_plugins())
        self._request, self._environ = json.dumps(request), {**child_environment(), **found}
        self._lines: deque[str] = deque(maxlen=_MAX_LINES)
        self._answer: dict[str, Any] = {}
        self._changed = threading.Condition()
        self._process: subprocess.Popen[str] | None = None
        self._failure: OSError | None = None
        self._has_ended = False
        atexit.register(self.end)
        threading.Thread(target=self._supervise, name="launcher-starter", daemon=True).start()
        self._wait_for(lambda: self._process is not None or self._has_ended)
        if self._process is None:
            raise EnvironmentProblem(f"the process that starts the run cannot be started: {self._failure}")

    @property
    def has_ended(self) -> bool:
        """Whether the process has exited."""
        return self._has_ended

    @property
    def exit_code(self) -> int:
        """Exit code of the process, which has ended."""
        assert self._process is not None
        assert self._process.returncode is not None
        return self._process.returncode

    @property
    def error(self) -> LauncherError | None:
        """Why the process started nothing; ``None`` if it started something or still might."""
        if "error" in self._answer:
            return error_from_tree(self._answer["error"])
        if self._has_ended and "folder" not in self._answer:
            return EnvironmentProblem(f"the process that starts the run ended with exit code {self.exit_code}")
        return None

    def wait_for_folder(self) -> Path:
        """Return the folder of what it starts.

        Raises:
            LauncherError: it starts nothing; its output is printed.
        """
        self._wait_for(lambda: self._has_ended or "folder" in self._answer)
        if "folder" in self._answer:
            return Path(self._answer["folder"])
        self.print_until_end()
        error = self.error
        assert error is not None, "it has ended without a folder"
        raise error

    def print_until_end(self, *, timeout_s: float | None = None) -> None:
        """Print the lines of the process until it has ended.

        Raises:
            TimeoutError: it has not ended within ``timeout_s`` seconds.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._wait_for(lambda: bool(self._lines) or self._has_ended, timeout_s=left_s)
            has_ended = self._has_ended  # read first: no line comes after it
            while self._lines:
                print(self._lines.popleft(), end="", flush=True)
            if has_ended:
                return
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"the run has not ended within {timeout_s} s")

    def interrupt(self) -> None:
        """Send the process a Ctrl-C: it ends its run and exits."""
        if self._process is not None and not self._has_ended:
            self._process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Make sure that the process has ended: interrupt it, and again if that takes long."""
        while not self._has_ended:
            self.interrupt()
            self._wait_for(lambda: self._has_ended, timeout_s=_INTERRUPT_S)

    def _wait_for(self, is_true: Callable[[], bool], *, timeout_s: float | None = None) -> None:
        with self._changed:
            self._changed.wait_for(is_true, timeout_s)

    def _supervise(self) -> None:
        """Start the process and read it until it ends, in one thread.

        The kernel kills the process when the thread that started it ends, and a script's thread may end at any time.
        """
        try:
            self._start_and_read()
        except OSError as error:  # raised in the thread of the script
            self._failure = error
        finally:
            atexit.unregister(self.end)
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _start_and_read(self) -> None:
        process = subprocess.Popen(
            [sys.executable, *self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environ,
            start_new_session=True,  # Ctrl-C reaches it once, through this process
            text=True,
            errors="replace",
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with self._changed:
            self._process = process
            self._changed.notify_all()
        with suppress(BrokenPipeError):  # it has ended already, and printed why
            process.stdin.write(self._request)
            process.stdin.close()
        with process.stdout:
            for line in process.stdout:
                answer = parse_answer(line)
                with self._changed:
                    if answer is None:
                        self._lines.append(line)
                    else:
                        self._answer |= answer
                    self._changed.notify_all()
        process.wait()

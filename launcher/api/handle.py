"""A run that a script has started and does not wait for."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

from launcher.api.process import StarterProcess
from launcher.api.result import Result
from launcher.errors import EnvironmentProblem
from launcher.utils.system import child_environment


class RunHandle:
    """A started run: its status, its end, and a way to cancel it.

    The run is cancelled when the handle is deleted or the script ends, unless a cluster has accepted it.
    """

    def __init__(self, starter: StarterProcess) -> None:
        self._starter = starter
        self.folder: Path = starter.wait_for_folder()
        """The run directory."""
        weakref.finalize(self, starter.interrupt).atexit = False  # at exit, the starter is ended and waited for

    def __repr__(self) -> str:
        return f"RunHandle({str(self.folder)!r}, status={self.status!r})"

    @property
    def status(self) -> str:
        """``running``, then the status of the result."""
        return self._result().status if self._starter.has_ended else "running"

    def wait(self, *, timeout_s: float | None = None) -> Result:
        """Print the run's output since its start, wait for its end, and return what it left.

        An interrupt (Ctrl-C, a notebook's stop button) ends the run on every host first.

        Raises:
            ConfigErrors: it cannot start; nothing was started.
            Unfit: a host is not fit for it; nothing was started.
            TimeoutError: it is still running after ``timeout_s`` seconds, and continues.
            KeyboardInterrupt: it was interrupted, and has ended.
        """
        try:
            self._starter.print_until_end(timeout_s=timeout_s)
        except TimeoutError:
            raise
        except BaseException:
            self._cancel()
            raise
        if (error := self._starter.error) is not None:
            raise error
        return self._result()

    def cancel(self) -> Result:
        """End the run on every host, as Ctrl-C does, and return what it left.

        A run that a cluster has accepted is cancelled by its scheduler. A run that has ended stays as it is.

        Raises:
            EnvironmentProblem: the scheduler does not accept the cancellation.
        """
        self._cancel()
        if self._result().status == "submitted":
            command = [sys.executable, "-m", "launcher", "cancel", str(self.folder)]
            ended = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
            if ended.returncode:
                raise EnvironmentProblem(ended.stderr.removeprefix("error: ").strip())
        return self._result()

    def _cancel(self) -> None:
        """End the starter; print what it says of that."""
        self._starter.interrupt()
        try:
            self._starter.print_until_end()
        finally:
            self._starter.end()

    def _result(self) -> Result:
        return Result(self.folder, submit_code=self._starter.exit_code)

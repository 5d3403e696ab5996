"""One run under one launcher: start it, see it work, look at its processes, be rid of it."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from typing import Self

from faults_processes import MARK, Seen, kill_marked, marked
from faults_start import STARTS, Job

_START_S = 180.0
_EXITS_S = 10.0
_TAIL = 40


class StartTroubleError(RuntimeError):
    """The run never began to work; nothing can be said about its faults."""


class Run:
    """A launcher at work, or that was.

    Args:
        launcher: one of ``LAUNCHERS``.
        job: what it runs; its folder is made.
    """

    def __init__(self, launcher: str, job: Job) -> None:
        job.folder.mkdir(parents=True)
        self.job = job
        self.mark = uuid.uuid4().hex
        command, env = STARTS[launcher](job)
        self._output = job.folder / "output"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **env, MARK: self.mark},
                cwd=job.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_working(self, *, num_steps: int = 3) -> None:
        """Wait until every rank has taken some steps from now on.

        Raises:
            StartTroubleError: it ended, or took too long.
        """
        deadline, first = time.monotonic() + _START_S, self.steps()
        while min(now - then for now, then in zip(self.steps(), first, strict=True)) < num_steps:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise StartTroubleError(f"the run does not work, exit code {self.process.poll()}: {self.said()}")
            time.sleep(0.1)

    def steps(self) -> list[int]:
        """Return the steps that each rank has done."""
        files = [self.job.folder / f"steps.{rank}" for rank in range(self.job.num_ranks)]
        return [int(file.read_text() or 0) if file.exists() else 0 for file in files]

    def processes(self) -> list[Seen]:
        """Return what lives of it, anywhere."""
        self.process.poll()
        return marked(self.mark)

    def said(self, *, after: int = 0, num_lines: int | None = _TAIL) -> str:
        """Return the end of what the launcher printed; ``after`` so many bytes."""
        lines = self._output.read_bytes()[after:].decode(errors="replace").splitlines()
        return "\n".join(lines if num_lines is None else lines[-num_lines:])

    def output_bytes(self) -> int:
        """Return how much it has printed."""
        return self._output.stat().st_size

    def exit_code(self) -> int | None:
        """Return the exit code as a shell would say it; ``None`` while the launcher runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def wait(self) -> None:
        """Wait until the launcher, which is ending, has its exit code."""
        self.process.wait(_EXITS_S)

    def end(self) -> None:
        """Kill what is left of it."""
        kill_marked(self.mark)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

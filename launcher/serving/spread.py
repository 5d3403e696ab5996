"""The job ``serve`` on ranks that hold one model between them: the first leads, and a child of it speaks HTTP."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from types import FrameType
from typing import TYPE_CHECKING

from launcher.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_UNFIT, JobError
from launcher.serving.drive import drive
from launcher.serving.link import EngineLink, Gone

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.jobs.serve import Serve

_TOLD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def serve_over_ranks(job: Serve, context: Context) -> None:
    """Serve until told to end, on every rank."""
    front = _Child(context) if context.is_main else None
    for number in _TOLD:
        signal.signal(number, signal.SIG_IGN if front is None else front.pass_on)  # what ends the others is the first
    from launcher.engines.distributed import disconnect
    from launcher.serving.ranks import engine_of_ranks

    def beat(phase: str = "build") -> None:
        context.heartbeat.beat(phase)

    generator = engine_of_ranks(context, limits=job.limits, beat=beat)
    if front is None or generator is None:
        return
    generator.warm_up(job.warm_up)
    generator.profiler = context.profiler
    with contextlib.suppress(Gone):  # its exit code says why
        drive(generator, front.link, beat=beat)
    generator.close()
    disconnect()
    front.finish()


class _Child:
    """The process that speaks HTTP, as the first rank sees it."""

    def __init__(self, context: Context) -> None:
        ours, theirs = socket.socketpair()
        words = (str(context.run_dir.path), str(theirs.fileno()), str(os.getpid()))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launcher.serving.front", *words],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self.link = EngineLink(ours)

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Tell it what this rank was told."""
        if self._process.poll() is None:  # not waited for yet, so the number is still its own
            self._process.send_signal(number)

    def finish(self) -> None:
        """Let it end, and end as it did.

        Raises:
            SystemExit: it asks to be started again.
            JobError: it failed, with its exit code where that says what is bad (65, 69).
        """
        self.link.close()
        code = self._process.wait()
        if code == EXIT_PREEMPTED:
            sys.exit(code)
        if code in (EXIT_BAD_INPUT, EXIT_UNFIT):
            raise JobError("the server could not start: see its error above", exit_code=code)
        if code:
            raise JobError(f"the process that speaks HTTP ended with exit code {code}; its words are above")

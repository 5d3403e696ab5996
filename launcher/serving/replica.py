"""``python -m launcher.serving.replica RUN_DIR NUMBER DESCRIPTOR PARENT``: one engine in a process of its own.

Started by the front, which it never outlives. What it prints goes where the front's words go.
"""

from __future__ import annotations

import faulthandler
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import LauncherError, exit_code_of_rank
from launcher.rundir import RunDir
from launcher.serving.drive import drive
from launcher.serving.link import EngineLink, Gone
from launcher.snapshot import load_run
from launcher.supervise.entry import quiet_libraries
from launcher.supervise.linux import die_with_parent

if TYPE_CHECKING:
    from launcher.jobs.serve import Serve

_BEAT_S = 0.5


def main(run_dir: RunDir, link: EngineLink) -> int:
    """Build the engine, warm it up, serve; return the exit code."""
    last = 0.0

    def beat(phase: str = "build") -> None:
        nonlocal last
        if time.monotonic() - last > _BEAT_S:
            last = time.monotonic()
            link.send({"kind": "beat", "phase": phase})

    try:
        beat()
        run = load_run(run_dir.snapshot)
        job: Serve = run.job  # type: ignore[assignment]
        from launcher.profiling.make import make_profiler
        from launcher.serving.choose import chosen_generator

        generator = chosen_generator(run, job, beat=beat)
        beat("warm up")
        generator.warm_up(job.warm_up)
        name = f"engine{sys.argv[2]}"
        try:
            with make_profiler(run.profile, by=job.profiled_by, folder=run_dir.profile, name=name) as profiler:
                generator.profiler = profiler
                drive(generator, link, beat=lambda phase: None)
        finally:
            generator.close()
    except Gone:
        return 0  # the front is ending, or was ended: nobody waits for an answer
    except LauncherError as problem:
        print(problem, file=sys.stderr, flush=True)
        link.send({"kind": "failed", "why": str(problem), "code": exit_code_of_rank(problem)})
        return exit_code_of_rank(problem)
    return 0


if __name__ == "__main__":
    die_with_parent(int(sys.argv[4]))
    faulthandler.enable()
    quiet_libraries()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the front hears of it, and tells when there is nothing left to do
    sys.exit(main(RunDir(Path(sys.argv[1])), EngineLink(socket.socket(fileno=int(sys.argv[3])))))

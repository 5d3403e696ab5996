"""``python -m launcher.inference.server.replica RUN_DIR NUMBER FD PARENT``: an engine."""

from __future__ import annotations

import faulthandler
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.snapshot import load_run
from launcher.errors import LauncherError, exit_code_of_rank
from launcher.inference.engine.loop import BuildFailed, BuildPhase, ConnectionLost, EngineConnection, run_engine_loop
from launcher.protocol.rundir import RunDir
from launcher.utils.logs import quiet_libraries
from launcher.utils.processes import die_with_parent
from launcher.utils.text import printable

if TYPE_CHECKING:
    from launcher.config.job.serve import Serve

_HEARTBEAT_S = 0.5


def main(run_dir: RunDir, connection: EngineConnection) -> int:
    """Build the engine, warm it up, serve; return the exit code."""
    last, shown = 0.0, ""

    def heartbeat(phase: str = "build") -> None:
        nonlocal last, shown
        if phase != shown or time.monotonic() - last > _HEARTBEAT_S:
            last, shown = time.monotonic(), phase
            connection.send(BuildPhase(phase=phase))

    try:
        heartbeat()
        run = load_run(run_dir.snapshot, is_own_run=True)
        job: Serve = run.job  # type: ignore[assignment]
        from launcher.inference.engine.registry import make_engine
        from launcher.profiling.profiler import make_profiler

        engine = make_engine(run, job, heartbeat=heartbeat)
        heartbeat("warm up")
        engine.warm_up(job.warm_up)
        name = f"engine{sys.argv[2]}"
        try:
            with make_profiler(run.profile, unit=job.profile_unit, folder=run_dir.profile, name=name) as profiler:
                engine.profiler = profiler
                run_engine_loop(engine, connection, heartbeat=lambda phase: None)
        finally:
            engine.close()
    except ConnectionLost:
        return 0  # the server has ended: no request is waiting
    except LauncherError as problem:
        print(problem, file=sys.stderr, flush=True)
        connection.send(BuildFailed(why=printable(str(problem)), code=exit_code_of_rank(problem)))
        return exit_code_of_rank(problem)
    return 0


if __name__ == "__main__":
    die_with_parent(int(sys.argv[4]))
    faulthandler.enable()
    quiet_libraries()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the server handles signals, and ends its engines with a message
    sys.exit(main(RunDir(Path(sys.argv[1])), EngineConnection(socket.socket(fileno=int(sys.argv[3])))))

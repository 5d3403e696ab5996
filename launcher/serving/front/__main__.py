"""``python -m launcher.serving.front RUN_DIR DESCRIPTOR PARENT``: the front of an engine that is its parent."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import LauncherError, exit_code_of_rank
from launcher.open_files import room_for_files
from launcher.rundir import RunDir
from launcher.serving.front.main import Front
from launcher.serving.front.ours import Ours
from launcher.serving.front.pool import Pool
from launcher.serving.front.remote import Remote
from launcher.snapshot import load_run
from launcher.supervise.linux import die_with_parent

if TYPE_CHECKING:
    from launcher.jobs.serve import Serve

_FILES_OF_OURS = 256


def main(run_dir: RunDir, connection: socket.socket) -> int:
    """Serve until told to end; return the exit code."""
    run = load_run(run_dir.snapshot)
    job: Serve = run.job  # type: ignore[assignment]
    connection.setblocking(False)

    def start(number: int, pool: Pool) -> Remote:
        return Remote(number, connection, process=None, on_ready=pool.on_ready, on_lost=pool.on_lost)

    async def front() -> int:
        backing = lambda: Ours(run, job, start=start)  # noqa: E731
        return await Front(run, job, run_dir=run_dir, make_backing=backing, beat=lambda phase: None).serve()

    try:
        with room_for_files(job.max_connections + _FILES_OF_OURS):
            return asyncio.run(front())
    except LauncherError as problem:
        print(problem, file=sys.stderr, flush=True)
        return exit_code_of_rank(problem)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[3]))
    sys.exit(main(RunDir(Path(sys.argv[1])), socket.socket(fileno=int(sys.argv[2]))))

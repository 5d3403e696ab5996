"""``python -m launcher.inference.server RUN_DIR FD PARENT``: serves its parent's engine."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.snapshot import load_run
from launcher.errors import LauncherError, exit_code_of_rank
from launcher.inference.server.api_server import ApiServer
from launcher.inference.server.backends import ReplicaBackend
from launcher.inference.server.replica_pool import ReplicaClient, ReplicaPool
from launcher.protocol.rundir import RunDir
from launcher.utils.processes import die_with_parent
from launcher.utils.system import raise_open_file_limit

if TYPE_CHECKING:
    from launcher.config.job.serve import Serve

_RESERVED_FILES = 256


def main(run_dir: RunDir, connection: socket.socket) -> int:
    """Serve until a signal; return the exit code."""
    run = load_run(run_dir.snapshot, is_own_run=True)
    job: Serve = run.job  # type: ignore[assignment]
    connection.setblocking(False)

    def start(number: int, pool: ReplicaPool) -> ReplicaClient:
        return ReplicaClient(number, connection, process=None, on_ready=pool.on_ready, on_lost=pool.on_lost)

    async def serve() -> int:
        backend = lambda: ReplicaBackend(run, job, start=start)  # noqa: E731
        return await ApiServer(run, job, run_dir=run_dir, make_backend=backend, heartbeat=lambda phase: None).serve()

    try:
        with raise_open_file_limit(job.max_connections + _RESERVED_FILES):
            return asyncio.run(serve())
    except LauncherError as error:
        print(error, file=sys.stderr, flush=True)
        return exit_code_of_rank(error)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[3]))
    sys.exit(main(RunDir(Path(sys.argv[1])), socket.socket(fileno=int(sys.argv[2]))))

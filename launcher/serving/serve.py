"""The job ``serve`` on a rank: this process speaks HTTP, and each engine is a process below it."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

from launcher.open_files import room_for_files
from launcher.serving.api.keys import VARIABLE
from launcher.serving.front.backing import Backing
from launcher.serving.front.main import Front
from launcher.serving.front.ours import Ours
from launcher.serving.front.pool import Pool
from launcher.serving.front.remote import Remote, start_replica
from launcher.serving.front.vllm import Vllm

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.jobs.serve import Serve

_FILES_OF_OURS = 256


def serve(job: Serve, context: Context) -> None:
    """Serve until told to end."""
    if context.world_size > 1:
        from launcher.serving.spread import serve_over_ranks

        serve_over_ranks(job, context)
        return
    environ = _environ_of_engines(job)

    def start(number: int, pool: Pool) -> Remote:
        process, connection = start_replica(context.run_dir.path, number, environ=environ)
        return Remote(number, connection, process=process, on_ready=pool.on_ready, on_lost=pool.on_lost)

    def backing() -> Backing:
        return Vllm(context.run, job) if job.engine == "vllm" else Ours(context.run, job, start=start)

    async def front() -> int:
        beat = context.heartbeat.beat
        return await Front(context.run, job, run_dir=context.run_dir, make_backing=backing, beat=beat).serve()

    with room_for_files(job.max_connections + _FILES_OF_OURS):
        code = asyncio.run(front())
    if code:
        sys.exit(code)


def _environ_of_engines(job: Serve) -> dict[str, str]:
    """Return what engines inherit: their share of the cores, and no keys."""
    environ = {name: value for name, value in os.environ.items() if name != VARIABLE}
    threads = int(environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    return {**environ, "OMP_NUM_THREADS": str(max(1, threads // job.replicas))}

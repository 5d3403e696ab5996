"""Entry of every rank: ``python -m launcher.jobs.rank RUN_DIR``."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import JobError, LauncherError, exit_code_of_rank
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.rank_env import RankEnv, read_rank_env
from launcher.supervision.rank_monitor import run_rank
from launcher.utils.system import disk_full_message

if TYPE_CHECKING:
    from launcher.config.run import Run


def main() -> None:
    """Become the rank in the environment and run its job."""
    try:
        env = read_rank_env(Path(sys.argv[1]), os.environ)
    except LauncherError as problem:
        print(problem, file=sys.stderr)
        sys.exit(exit_code_of_rank(problem))
    run_rank(run_job, env)


def run_job(env: RankEnv, heartbeat: Heartbeat) -> None:
    """Load the snapshot, refuse one that changed, and run its job on this rank."""
    from launcher.config.snapshot import load_run
    from launcher.engines.context import Context
    from launcher.jobs.registry import execute_job
    from launcher.profiling.profiler import make_profiler
    from launcher.utils.files import write_json
    from launcher.utils.hardware import describe_environment

    run = load_run(env.run_dir.snapshot, expected_hash=env.run_hash)
    if env.rank == 0:
        write_json(env.run_dir.environment, describe_environment())
    name = f"rank{env.rank}"
    with make_profiler(run.profile, unit=run.job.profile_unit, folder=env.run_dir.profile, name=name) as profiler:
        context = Context(
            run=run,
            run_dir=env.run_dir,
            rank=env.rank,
            local_rank=env.local_rank,
            world_size=env.world_size,
            heartbeat=heartbeat,
            run_id=env.run_id,
            profiler=profiler,
        )
        try:
            execute_job(context)
        except Exception as error:
            if message := disk_full_message(error, _folders(run, env)):
                raise JobError(message) from error
            raise


def _folders(run: Run, env: RankEnv) -> dict[str, Path]:
    """Return the folders that a run writes to, by option."""
    nvme, output = getattr(run.parallel, "nvme_path", None), getattr(run.job, "output", None)
    return {
        "run.dir" if run.run.dir else "run.root": env.run_dir.path,
        **({"parallel.nvme_path": Path(nvme).expanduser()} if nvme else {}),
        **({"job.output": Path(output).expanduser().parent} if output else {}),
        "TMPDIR": Path(tempfile.gettempdir()),
    }


if __name__ == "__main__":
    main()

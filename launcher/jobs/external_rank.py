"""Entry of externally launched ranks: ``python -m launcher.jobs.external_rank WORD``.

pdsh, mpirun and srun pass arguments and environment through remote shells, which lose or damage much of both. So this
entry takes one word without special characters, the run directory in base64, and reads everything else there: the
identity of the rank, the working folder of the launch, and its environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from launcher.errors import EnvironmentProblem, LauncherError, exit_code_of_rank
from launcher.jobs.rank import run_job
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.native_ops import ops_folder
from launcher.protocol.plan import Command, HostPlan, Plan, plan_from_json
from launcher.protocol.rank_env import RankEnv, read_rank_env
from launcher.protocol.rundir import RunDir, decode_run_dir
from launcher.supervision.file_channel import (
    AgentFile,
    FileChannel,
    StartFile,
    agent_file,
    channel_folder,
    read_channel_file,
)
from launcher.supervision.rank_monitor import run_rank
from launcher.utils.files import read_json
from launcher.utils.system import LOOPBACK

_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


def main() -> None:
    """Become the rank in the environment and the run directory, and run its job."""
    try:
        run_dir = decode_run_dir(sys.argv[1])
        env, host, channel = _read_channel(run_dir, os.environ)
    except LauncherError as problem:
        print(problem, file=sys.stderr)
        sys.exit(exit_code_of_rank(problem))
    run_rank(partial(_prepare_and_run, prepare=host.build_commands), env, channel=channel)


def _read_channel(run_dir: RunDir, environ: Mapping[str, str]) -> tuple[RankEnv, HostPlan, FileChannel]:
    """Adopt the environment and working folder of the launch; return the identity of this rank.

    Raises:
        EnvironmentProblem: the run directory is absent, the run is over, or the launcher numbers ranks differently.
    """
    folder = channel_folder(run_dir)
    start = read_channel_file(folder / "start.json", StartFile)
    agent = read_channel_file(agent_file(folder), AgentFile)
    if start is None or agent is None:
        raise EnvironmentProblem(
            f"{run_dir.path} cannot be read here: this backend needs it on a disk shared by all hosts"
        )
    if agent.is_over or agent.token != start.token:
        raise EnvironmentProblem(f"the run in {run_dir.path} has ended already")
    plan = plan_from_json(read_json(run_dir.plan))
    rank = _number(environ, _RANKS)
    place = plan.ranks[rank]
    host = next(each for each in plan.hosts if each.host.name == place.host)
    if (found := _number(environ, _LOCAL_RANKS)) != place.local_rank:
        difference = f"rank {rank} has local rank {found}, and {place.local_rank} on {place.host} in the plan"
        raise EnvironmentProblem(
            f"the launcher numbers ranks differently from the plan: {difference}; sort the hostfile as it does"
        )
    os.environ.update(start.env)
    if host.host.slot_ids and "CUDA_VISIBLE_DEVICES" not in host.agent_command.env:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, host.host.slot_ids))
    os.environ.update(host.agent_command.env)
    os.environ.update(_identity(plan, rank))
    if host.build_commands or "DS_ACCELERATOR" in host.agent_command.env:
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ops_folder()))
    _enter(start.cwd)
    channel = FileChannel(folder, rank=rank, token=start.token, timeout_s=plan.heartbeat_timeout_s)
    return read_rank_env(run_dir.path, os.environ), host, channel


def _identity(plan: Plan, rank: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(plan.ranks[rank].local_rank),
        "WORLD_SIZE": str(plan.world_size),
        "MASTER_ADDR": plan.hosts[0].host.address if len(plan.hosts) > 1 else LOOPBACK,
        "MASTER_PORT": str(plan.port),
    }


def _number(environ: Mapping[str, str], names: Sequence[str]) -> int:
    for name in names:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    raise EnvironmentProblem(f"the rank is unknown: none of {', '.join(names)} is set")


def _enter(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        print(f"cannot enter {folder}: {error.strerror}; staying in {Path.cwd()}", file=sys.stderr)


def _prepare_and_run(env: RankEnv, heartbeat: Heartbeat, *, prepare: Sequence[Command]) -> None:
    """Run the preparing commands of this host, which external launchers do not, and the job."""
    for command in prepare:  # ranks of a host wait for the first one's lock
        heartbeat.update("preparing")
        ended = subprocess.run(command.argv, env={**os.environ, **command.env}, check=False)
        if ended.returncode != 0:
            raise EnvironmentProblem(f"preparing this host ended with exit code {ended.returncode}")
    run_job(env, heartbeat)


if __name__ == "__main__":
    main()

"""Entry point of a Slurm job: the batch process on the first node.

``python -m launcher.backends.slurm.entrypoint RUN_DIR``. It reads the job's nodes from Slurm, plans the run
on them and executes it, with an agent on each node behind srun. A preempted run is requeued, and then resumes in the
same directory under the same id.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from launcher.backends.base import AgentExecutor
from launcher.backends.slurm.client import error_text, run_slurm
from launcher.checkpoint.resume import find_checkpoint
from launcher.checkpoint.store import silent
from launcher.config.backend.slurm import SlurmAllocation, SlurmBackend
from launcher.config.run import Run
from launcher.config.snapshot import load_run
from launcher.errors import EXIT_PREEMPTED, EnvironmentProblem, LauncherError
from launcher.execution.lifecycle import execute_run
from launcher.execution.prepare import PreparedRun, replan
from launcher.execution.probe import probe_and_replan
from launcher.protocol.plan import Host
from launcher.protocol.results import write_result
from launcher.protocol.rundir import RunDir
from launcher.remote.command import RemoteCommand
from launcher.runs.lock import RunLock
from launcher.supervision.finalize import remove_previous_result
from launcher.utils.files import read_json

_REQUEUE_S = 60.0
"""Time for Slurm to end a job after requeueing it."""


class AllocationExecutor(AgentExecutor[SlurmAllocation]):
    """Starts ranks on the nodes of the job that this process runs in."""

    def remote_command(self, host: Host, module: str) -> RemoteCommand:
        """Return the srun command that runs ``module`` on a node of this job.

        It is a separate job step that shares the resources of the job. Not ``--unbuffered``, which inserts a terminal
        that changes bytes. No binding: the ranks together use every core of the node.
        """
        step = ("--nodes=1", "--ntasks=1", f"--nodelist={host.name}", "--overlap", "--cpu-bind=none", "--mpi=none")
        return RemoteCommand(argv=("srun", "--quiet", *step, "--export=ALL", host.python, "-m", module))

    @property
    def job(self) -> dict[str, str]:
        """The id of this job."""
        return {"id": job_id()}


class _PreemptedBeforeStart(Exception):
    """Slurm preempts the job before any rank has started."""


def main() -> None:
    """Execute the run whose directory is the first argument."""
    run_dir = RunDir(Path(sys.argv[1]))
    # programs installed beside this interpreter (ninja) are found as in an activated environment
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # delivered once `run` says whether to requeue
    signal.signal(signal.SIGUSR1, _raise_preempted)
    try:
        with RunLock(run_dir.path).acquire():
            with _failure_recorded(run_dir):
                run = with_auto_resume(load_run(run_dir.snapshot, is_own_run=True), run_dir)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
            code = run_on_nodes(run, run_dir)
    except _PreemptedBeforeStart:
        code = EXIT_PREEMPTED
    except LauncherError as problem:
        print(problem, file=sys.stderr, flush=True)
        sys.exit(problem.exit_code)
    if code == EXIT_PREEMPTED and getattr(run.backend, "requeue", False):
        requeue()
    sys.exit(code)


def run_on_nodes(run: Run, run_dir: RunDir) -> int:
    """Execute ``run`` on the nodes of this job and return its exit code.

    Raises:
        LauncherError: the run cannot start on these nodes.
    """
    assert isinstance(run.backend, SlurmBackend), "its batch script started this"
    executor = AllocationExecutor(SlurmAllocation(**vars(run.backend)), plugins=run.plugins)
    run = replace(run, backend=executor.backend)
    with _failure_recorded(run_dir):
        planned = plan_on_nodes(run, run_dir, run_id=_run_id(run_dir))
        prepared = probe_and_replan(planned, executor, is_fresh=False)
    return execute_run(prepared, executor, on_end=_ignore_preemption).exit_code


@contextmanager
def _failure_recorded(run_dir: RunDir) -> Iterator[None]:
    """Write the result of a run that cannot start, which the block raises."""
    remove_previous_result(run_dir)
    try:
        yield
    except LauncherError as problem:
        write_result(run_dir, status="failed", exit_code=problem.exit_code, run_id=_run_id(run_dir))
        raise


def _run_id(run_dir: RunDir) -> str:
    return str(read_json(run_dir.plan)["run_id"])


def with_auto_resume(run: Run, run_dir: RunDir) -> Run:
    """Return ``run``, set to resume from its own newest checkpoint after a requeue."""
    if find_checkpoint("auto", run_dir, say=silent) is None:
        return run
    return replace(run, run=replace(run.run, dir=str(run_dir.path)), checkpoint=replace(run.checkpoint, resume="auto"))


def plan_on_nodes(run: Run, run_dir: RunDir, *, run_id: str) -> PreparedRun:
    """Return ``run`` planned on the nodes of this job, which are not probed yet."""
    assumed = run.backend.hosts(max_ranks=run.job.max_ranks(run))
    names, addresses = node_names(), node_addresses()
    if len(names) != len(assumed):
        raise EnvironmentProblem(f"Slurm allocated {len(names)} nodes instead of backend.nodes={len(assumed)}")
    hosts: list[Host] = [
        replace(host, name=name, address=addresses.get(name, name), ssh_destination=name)
        for host, name in zip(assumed, names, strict=True)
    ]
    return replan(run, hosts, run_id=run_id, folder=run_dir.path, port=0)


def node_names() -> list[str]:
    """Return the nodes of this job; this process runs on the first one."""
    listed = run_slurm(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]])
    if listed.returncode:
        raise EnvironmentProblem(f"Slurm does not list the nodes of this job: {error_text(listed.stderr)}")
    return listed.stdout.split()


def node_addresses() -> dict[str, str]:
    """Return the addresses at which Slurm reaches the nodes, which may differ from their names."""
    shown = run_slurm(["scontrol", "--oneliner", "show", "node", os.environ["SLURM_JOB_NODELIST"]])
    addresses = {}
    for line in shown.stdout.splitlines():
        facts = dict(word.partition("=")[::2] for word in line.split())
        if "NodeName" in facts and "NodeAddr" in facts:
            addresses[facts["NodeName"]] = facts["NodeAddr"]
    return addresses


def job_id() -> str:
    """Return the id of the job that this process runs in."""
    return os.environ["SLURM_JOB_ID"]


def requeue() -> None:
    """Requeue this job unless it was cancelled; Slurm then ends this process."""
    state = run_slurm(["squeue", "--noheader", f"--jobs={job_id()}", "--format=%T"]).stdout.strip()
    if state != "RUNNING":
        print(f"not requeued: the job is {state.lower() or 'gone'}", flush=True)
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # how Slurm ends a job that it requeues
    answer = run_slurm(["scontrol", "requeue", job_id()])
    if answer.returncode:
        print(f"cannot be requeued: {error_text(answer.stderr)}", file=sys.stderr, flush=True)
        return
    print(f"job {job_id()} is requeued and will continue from there", flush=True)
    time.sleep(_REQUEUE_S)


def _ignore_preemption() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the run has ended: there is nothing to save


def _raise_preempted(_number: int, _frame: FrameType | None) -> None:
    raise _PreemptedBeforeStart


if __name__ == "__main__":
    main()

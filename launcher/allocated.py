"""The entry of a Slurm job: ``python -m launcher.allocated RUN_DIR``, the batch process on the first node.

It asks Slurm which nodes it got, plans the run on them and carries it out, with an agent on each node behind srun. What
was told to save and end is queued again, and then goes on in the same directory under the same id.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, ClassVar

from launcher.announce import closing, opening
from launcher.attempts import carry_out
from launcher.backends.slurm.backend import Slurm
from launcher.backends.slurm.client import ask, words_of
from launcher.checkpoint.lock import RunLock
from launcher.checkpoint.resume import find
from launcher.checkpoint.store import quiet
from launcher.config import Run
from launcher.errors import EXIT_PREEMPTED, EnvironmentProblem, LauncherError
from launcher.examination import examined
from launcher.files import read_json
from launcher.plan import Host
from launcher.prepare import Prepared, replan
from launcher.remote.command import Remote
from launcher.results import write_result
from launcher.rundir import RunDir
from launcher.snapshot import load_run
from launcher.supervise.conclude import forget_last_end

if TYPE_CHECKING:
    from launcher.plan import HostPlan, Plan
    from launcher.supervise.outcome import Outcome

_WARDEN = "launcher.supervise.warden"
_REQUEUE_S = 60.0
"""Time Slurm gets to end a job that is queued again."""


@dataclass(frozen=True, kw_only=True)
class Allocation(Slurm):
    """The nodes of the job that this process is in."""

    asks_hosts: ClassVar[bool] = True

    def remote(self, host: Host, module: str) -> Remote:
        """Return the srun command that runs ``module`` on a node of this job.

        A job step of its own, which shares what the job holds. Not ``--unbuffered``: it would put a terminal between,
        which changes bytes. No binding: the ranks together use every core of the node.
        """
        step = ("--nodes=1", "--ntasks=1", f"--nodelist={host.name}", "--overlap", "--cpu-bind=none", "--mpi=none")
        return Remote(argv=("srun", "--quiet", *step, "--export=ALL", host.python, "-m", module))

    def submit(self, plan: Plan) -> Outcome:
        """Start ``plan`` under an agent on every node."""
        from launcher.supervise.connection import PipeConnection
        from launcher.supervise.session import run_session

        run_dir = RunDir(Path(plan.run_dir))

        def connect(host: HostPlan) -> PipeConnection:
            name = host.host.name
            return PipeConnection(name, self.remote(host.host, _WARDEN), log=run_dir.log_of(name, "agent"))

        return run_session(plan, connect, job={"id": job_id()})


class _ToldTooEarly(Exception):
    """Slurm wants the nodes back before any rank has started."""


def main() -> None:
    """Carry out the run whose directory is the first argument."""
    run_dir = RunDir(Path(sys.argv[1]))
    # programs that came with this interpreter (ninja) are found as in an activated environment
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    signal.signal(signal.SIGUSR1, _note_preemption)
    try:
        with RunLock(run_dir.path).acquire():
            run = continued(load_run(run_dir.snapshot), run_dir)
            code = run_here(run, run_dir)
    except _ToldTooEarly:
        code = EXIT_PREEMPTED
    except LauncherError as problem:
        print(problem, file=sys.stderr, flush=True)
        sys.exit(problem.exit_code)
    if code == EXIT_PREEMPTED and getattr(run.backend, "requeue", False):
        requeue()
    sys.exit(code)


def run_here(run: Run, run_dir: RunDir) -> int:
    """Carry out ``run`` on the nodes of this job and return its exit code.

    Raises:
        LauncherError: something stands against it; nothing was started.
    """
    assert isinstance(run.backend, Slurm), "its batch script started this"
    run = replace(run, backend=Allocation(**vars(run.backend)))
    forget_last_end(run_dir)
    run_id = str(read_json(run_dir.plan)["run_id"])
    try:
        prepared = examined(stand_in(run, run_dir, run_id=run_id), is_fresh=False)
    except LauncherError as problem:
        write_result(run_dir, status="failed", exit_code=problem.exit_code, run_id=run_id)
        raise
    print("\n".join(opening(prepared.plan)), flush=True)
    started = time.monotonic()
    code = carry_out(prepared)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it is over: nothing is left to be saved
    if code == 0:
        print(closing(read_json(run_dir.result), run_dir, elapsed_s=time.monotonic() - started), flush=True)
    return code


def continued(run: Run, run_dir: RunDir) -> Run:
    """Return ``run``, set to go on from its own newest checkpoint where it has one: then it has been here before."""
    if find("auto", run_dir, say=quiet) is None:
        return run
    return replace(run, run=replace(run.run, dir=str(run_dir.path)), checkpoint=replace(run.checkpoint, resume="auto"))


def stand_in(run: Run, run_dir: RunDir, *, run_id: str) -> Prepared:
    """Return ``run`` planned on the nodes of this job, which have not been asked yet for what they are."""
    assumed = run.backend.hosts(max_ranks=run.job.max_ranks(run))
    names, addresses = node_names(), node_addresses()
    if len(names) != len(assumed):
        raise EnvironmentProblem(f"Slurm gave {len(names)} nodes for backend.nodes={len(assumed)}")
    hosts: list[Host] = [
        replace(host, name=name, address=addresses.get(name, name), login=name)
        for host, name in zip(assumed, names, strict=True)
    ]
    return replan(run, hosts, run_id=run_id, folder=run_dir.path, port=0)


def node_names() -> list[str]:
    """Return the nodes of this job; the first is the one that this process is on."""
    listed = ask(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]])
    if listed.returncode:
        raise EnvironmentProblem(f"Slurm does not say which nodes it gave: {words_of(listed.stderr)}")
    return listed.stdout.split()


def node_addresses() -> dict[str, str]:
    """Return where Slurm reaches the nodes of this job, which is not always their name."""
    shown = ask(["scontrol", "--oneliner", "show", "node", os.environ["SLURM_JOB_NODELIST"]])
    addresses = {}
    for line in shown.stdout.splitlines():
        facts = dict(word.partition("=")[::2] for word in line.split())
        if "NodeName" in facts and "NodeAddr" in facts:
            addresses[facts["NodeName"]] = facts["NodeAddr"]
    return addresses


def job_id() -> str:
    """Return the number of the job that this process is in."""
    return os.environ["SLURM_JOB_ID"]


def requeue() -> None:
    """Queue this job again, unless somebody has cancelled it; what ends this process then is Slurm."""
    state = ask(["squeue", "--noheader", f"--jobs={job_id()}", "--format=%T"]).stdout.strip()
    if state != "RUNNING":
        print(f"not queued again: the job is {state.lower() or 'gone'}", flush=True)
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm's way to end a job that it queues again
    answer = ask(["scontrol", "requeue", job_id()])
    if answer.returncode:
        print(f"cannot be queued again: {words_of(answer.stderr)}", file=sys.stderr, flush=True)
        return
    print(f"job {job_id()} is queued again and will go on from there", flush=True)
    time.sleep(_REQUEUE_S)


def _note_preemption(_number: int, _frame: FrameType | None) -> None:
    raise _ToldTooEarly


if __name__ == "__main__":
    main()

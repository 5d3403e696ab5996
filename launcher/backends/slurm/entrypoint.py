"""Entry point of a Slurm job: the batch process on the first node.

``python -m launcher.backends.slurm.entrypoint RUN_DIR``, or ``--array SWEEP_DIR`` in a task of a job array. It reads
the job's nodes from Slurm, plans the run on them and executes it, with an agent on each node behind srun. A preempted
run is requeued, and then resumes in the same directory under the same id.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from launcher.backends.base import AgentExecutor
from launcher.backends.slurm.client import error_text, run_slurm
from launcher.backends.slurm.sbatch import ARRAY_FLAG
from launcher.backends.slurm.setup import FAILED_FLAG
from launcher.backends.slurm.steps import step_command
from launcher.checkpoint.resume import find_checkpoint
from launcher.checkpoint.store import silent
from launcher.config.backend.containers import container_folders, ops_folder_of_image
from launcher.config.backend.slurm import SlurmAllocation, SlurmBackend
from launcher.config.run import Run
from launcher.config.snapshot import load_run
from launcher.errors import EXIT_PREEMPTED, EXIT_UNFIT, EnvironmentProblem, LauncherError
from launcher.errors.secrets import redact
from launcher.execution.lifecycle import execute_run
from launcher.execution.prepare import PreparedRun, replan
from launcher.execution.probe import probe_and_replan
from launcher.plugins.loading import PLUGIN_PATH
from launcher.protocol.outcome import Failure
from launcher.protocol.plan import Host
from launcher.protocol.results import write_result
from launcher.protocol.rundir import RunDir
from launcher.remote.command import RemoteCommand
from launcher.runs.lock import RunLock
from launcher.runs.sweeps import SWEEP_FILE, collect_results, trial_folder
from launcher.supervision.finalize import remove_previous_result
from launcher.utils.files import read_json, write_json

_REQUEUE_S = 60.0
"""Time for Slurm to end a job after requeueing it."""


class AllocationExecutor(AgentExecutor[SlurmAllocation]):
    """Starts ranks on the nodes of the job that this process runs in.

    Args:
        backend: options of the job.
        plugins: modules of the plugins that the run uses.
        folders: what containers must see.
    """

    def __init__(self, backend: SlurmAllocation, *, plugins: Sequence[str] = (), folders: Sequence[Path] = ()) -> None:
        super().__init__(backend, plugins=plugins)
        self._folders = tuple(folders)

    def remote_command(self, host: Host, module: str) -> RemoteCommand:
        """Return the srun command that runs ``module`` on a node of this job."""
        command = (host.python, "-m", module)
        return RemoteCommand(argv=step_command(self.backend, host.name, command, folders=self._folders, cwd=Path.cwd()))

    @property
    def job(self) -> dict[str, str]:
        """The id of this job."""
        return {"id": job_id()}


class _PreemptedBeforeStart(Exception):
    """Slurm preempts the job before any rank has started."""


def main() -> None:
    """Execute the run that the arguments name."""
    run_dir, setup_failure = _parse(sys.argv[1:])
    try:
        if setup_failure is not None:
            record_setup_failure(run_dir, setup_failure)
        else:
            _execute(run_dir)
    finally:
        _collect(run_dir)


def _parse(arguments: Sequence[str]) -> tuple[RunDir, str | None]:
    """Return the run directory, and the message about a failed line of ``backend.setup``."""
    left = list(arguments)
    folder = trial_folder(Path(left[1]), _array_task()) if left[0] == ARRAY_FLAG else Path(left[0])
    message = left[left.index(FAILED_FLAG) + 1] if FAILED_FLAG in left else None
    return RunDir(folder), message


def _collect(run_dir: RunDir) -> None:
    """Write the result of a task of an array into its sweep's table."""
    folder = run_dir.path.parent
    if "SLURM_ARRAY_TASK_ID" not in os.environ or not (folder / SWEEP_FILE).is_file():
        return
    try:
        collect_results(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{folder / SWEEP_FILE} is not updated: {error}", file=sys.stderr, flush=True)


def record_setup_failure(run_dir: RunDir, message: str) -> None:
    """Write the result of a run whose ``backend.setup`` failed.

    The batch script has printed the message.
    """
    remove_previous_result(run_dir)
    log = str(run_dir.logs / f"slurm.{job_id()}.log")
    name = socket.gethostname()
    failure = Failure(
        host=name, rank=None, exit_code=EXIT_UNFIT, signal=None, reason=message, log=log, time=time.time()
    )
    write_json(run_dir.failure, redact(failure.tree(), os.environ))
    write_result(run_dir, status="failed", exit_code=EXIT_UNFIT, run_id=_run_id(run_dir))


def _execute(run_dir: RunDir) -> None:
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
    backend = SlurmAllocation(**vars(run.backend))
    folders: tuple[Path, ...] = ()
    if backend.container != "none":
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ops_folder_of_image(str(backend.image), os.environ)))
        folders = _container_folders(run, run_dir)
    executor = AllocationExecutor(backend, plugins=run.plugins, folders=folders)
    run = replace(run, backend=executor.backend)
    with _failure_recorded(run_dir):
        planned = plan_on_nodes(run, run_dir, run_id=_run_id(run_dir))
        prepared = probe_and_replan(planned, executor, is_fresh=False)
    return execute_run(prepared, executor, on_end=_ignore_preemption).exit_code


def _container_folders(run: Run, run_dir: RunDir) -> tuple[Path, ...]:
    """Return what containers of the run must see: what it names, and its plugins."""
    plugins = os.environ.get(PLUGIN_PATH, "").split(os.pathsep)
    paths = [("run.dir", str(run_dir.path)), *run.paths(), *(("plugins", folder) for folder in plugins)]
    return container_folders(paths, cwd=Path.cwd(), environ=os.environ)


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
    """Return the id of the job that this process runs in; ``JOB_TASK`` in a job array."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{_array_task()}"
    return os.environ["SLURM_JOB_ID"]


def _array_task() -> int:
    """Return the number of the task of a job array that this process executes."""
    return int(os.environ["SLURM_ARRAY_TASK_ID"])


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

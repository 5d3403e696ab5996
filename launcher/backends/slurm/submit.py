"""Submit a run with sbatch; follow its job: print its output and return its exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launcher.backends.slurm.client import (
    JobState,
    SlurmPartition,
    array_states,
    error_text,
    job_state,
    partitions,
    run_slurm,
)
from launcher.backends.slurm.sbatch import render_array, render_sbatch, slurm_log_path
from launcher.config.backend.slurm import SlurmBackend
from launcher.errors import EXIT_PREEMPTED, EXIT_STALLED, ConfigError, ConfigErrors, EnvironmentProblem
from launcher.execution.executor import ArrayExecutor
from launcher.protocol.outcome import RunOutcome
from launcher.protocol.plan import Host, Plan
from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import SessionRecord, locate_this_process, read_session_file, write_session_file
from launcher.remote.command import RemoteCommand
from launcher.supervision.finalize import result_files
from launcher.utils.files import StagedFiles, read_json
from launcher.utils.processes import collect_signals
from launcher.utils.text import counted, printable

_HABITS = ("ACCOUNT", "PARTITION", "QOS", "RESERVATION", "CONSTRAINT")
"""SBATCH_… variables that apply where the option of ours is not set.
All others would override the script."""

_OPTION_BY_MESSAGE = {
    "account": "account",
    "partition": "partition",
    "qos": "qos",
    "time limit": "time",
    "generic resource": "gpus_per_node",
    "gres": "gpus_per_node",
    "reservation": "reservation",
    "feature": "constraint",
    "memory": "mem",
    "cpu count": "cpus_per_task",
    "processors": "cpus_per_task",
    "node name": "nodelist",
    "node count": "nodes",
    "node configuration": "nodes",
    "nodes": "nodes",
}
"""Our options by words of Slurm's messages; the first match is used."""


class SlurmExecutor(ArrayExecutor[SlurmBackend]):
    """Queues a batch job, whose entry point executes the run on the nodes that Slurm chooses."""

    def remote_command(self, host: Host, module: str) -> RemoteCommand:
        """Raise: Slurm has not chosen the nodes yet; the job itself reaches them later.

        Raises:
            EnvironmentProblem: always.
        """
        why = "the job checks its nodes before it starts anything there"
        raise EnvironmentProblem(f"{host.name} is a placeholder for a node that Slurm has not chosen yet: {why}")

    def render(self, plan: Plan, *, snapshot: str) -> str:
        """Return the batch script."""
        return render_sbatch(self.backend, plan, plugins=self.plugins)

    def check_submission(self, plan: Plan) -> None:
        """Check that the run is not queued already, and that a partition can give what it asks for.

        Raises:
            ConfigErrors: Slurm would reject it, or leave it pending indefinitely.
            EnvironmentProblem: Slurm is not installed here, or does not answer.
        """
        check_submission(self.backend, plan)

    def submit(self, plan: Plan) -> RunOutcome:
        """Queue the job; wait until it has ended where ``wait`` is set.

        Raises:
            ConfigError: Slurm rejects it; the message says why.
            EnvironmentProblem: Slurm is not installed here, or does not answer.
        """
        job_id = submit_job(self.backend, plan, plugins=self.plugins)
        return RunOutcome(status="submitted", exit_code=follow(plan, job_id) if self.backend.wait else 0)

    @property
    def uses_arrays(self) -> bool:
        """Whether the runs of a sweep are tasks of job arrays."""
        return self.backend.array

    def render_array(self, plan: Plan, *, folder: Path, tasks: Sequence[int]) -> str:
        """Return the batch script of an array."""
        return render_array(self.backend, plan, folder=folder, tasks=tasks, plugins=self.plugins)

    def submit_array(self, plans: Mapping[int, Plan], *, folder: Path) -> str:
        """Queue an array whose tasks execute ``plans``; return its job id.

        Raises:
            ConfigError: Slurm rejects it; the message says why.
            EnvironmentProblem: Slurm is not installed here, or does not answer.
        """
        tasks = tuple(plans)
        text = self.render_array(plans[tasks[0]], folder=folder, tasks=tasks)
        file, staged = folder / f"array_{tasks[0]:03d}.sbatch", StagedFiles()
        try:
            staged.write(file, text)
            job_id = _sbatch(self.backend, file)
        except (ConfigError, EnvironmentProblem):
            staged.undo()
            raise
        limit = f", at most {self.backend.max_parallel} at a time" if self.backend.max_parallel else ""
        print(f"job array {job_id} is queued: {counted(len(tasks), 'run')}{limit}", flush=True)
        for number, plan in plans.items():
            run_dir = RunDir(Path(plan.run_dir))
            _record(run_dir, f"{job_id}_{number}")
            print(f"  {job_id}_{number}  {run_dir.path}", flush=True)
        return job_id

    def follow_arrays(self, arrays: Mapping[str, Mapping[int, Plan]]) -> dict[int, int]:
        """Wait until all tasks have ended, and return their exit codes by number."""
        return follow_arrays(arrays)


def submit_job(backend: SlurmBackend, plan: Plan, *, plugins: Sequence[str] = ()) -> str:
    """Write the batch script into the run directory, submit it, and return the job id.

    Raises:
        ConfigError: Slurm rejects it; the run directory is unchanged.
        EnvironmentProblem: Slurm is not installed here, or does not answer.
    """
    run_dir, staged = RunDir(Path(plan.run_dir)), StagedFiles()
    file = run_dir.path / "job.sbatch"
    try:
        staged.write(file, render_sbatch(backend, plan, plugins=plugins))
        for ended in result_files(run_dir):  # before the job may write its own
            staged.remove(ended)
        job_id = _sbatch(backend, file)
    except (ConfigError, EnvironmentProblem):
        staged.undo()
        raise
    print(f"job {job_id} is queued; its output goes to {run_dir.logs / f'slurm.{job_id}.log'}", flush=True)
    _record(run_dir, job_id)
    if not backend.wait:
        for verb in ("status", "logs -f", "cancel"):
            print(f"  launch {verb} {run_dir.path}")
    return job_id


def check_submission(backend: SlurmBackend, plan: Plan) -> None:
    """Check that the run is not queued already, and that a partition can give what it asks for.

    Raises:
        ConfigErrors: Slurm would reject it, or leave it pending indefinitely.
        EnvironmentProblem: Slurm is not installed here, or does not answer.
    """
    _check_not_queued(RunDir(Path(plan.run_dir)))
    if backend.image is not None and backend.image.startswith("/") and not Path(backend.image).exists():
        raise backend.error("image", "there is no such file", "name a file that the nodes see at this path, too")
    if mistakes := list(validate_partitions(backend, partitions())):
        raise ConfigErrors(mistakes)


def _record(run_dir: RunDir, job_id: str) -> None:
    """Write the job id to session.json, unless the job has started and did so itself.

    On a full disk, a message is printed: the job is queued anyway.
    """
    written = read_session_file(run_dir)
    if written is not None and written.job.get("id") == job_id:
        return
    try:
        here = str(Path.cwd())
        record = SessionRecord(backend="slurm", session=locate_this_process(), cwd=here, job={"id": job_id})
        write_session_file(run_dir, record)
    except OSError as error:
        print(
            f"{run_dir.session} cannot be written ({error.strerror}): cancel the job with scancel {job_id}", flush=True
        )


def validate_partitions(backend: SlurmBackend, known: Sequence[SlurmPartition]) -> Iterator[ConfigError]:
    """Yield options that no partition can satisfy.

    Slurm may leave such a job pending without an error.
    """
    wanted = backend.partition or os.environ.get("SBATCH_PARTITION")
    named = wanted.split(",") if wanted else [queue.name for queue in known if queue.is_default]
    chosen = [queue for queue in known if queue.name in named]
    for name in named:
        if name not in [queue.name for queue in known]:
            yield backend.error("partition", f"there is no partition {name}", _known_partitions(known))
    if not named:
        yield ConfigError("backend.partition", why="is not set, and Slurm has no default", fix=_known_partitions(known))
    if not chosen:
        return
    time_s, longest = backend.time_s(), max(chosen, key=lambda queue: queue.limit_s)
    if time_s is not None and time_s > longest.limit_s:
        yield backend.error("time", f"partition {longest.name} allows {longest.limit}", _known_partitions(known))
    largest = max(chosen, key=lambda queue: queue.num_nodes)
    if backend.nodes > largest.num_nodes:
        yield backend.error("nodes", f"partition {largest.name} has {largest.num_nodes}", _known_partitions(known))


def submission_env(backend: SlurmBackend, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for sbatch, without variables that override the script.

    SBATCH_… variables override a script, and SLURM_… variables of an enclosing job leak into the new one.
    """
    unset = {f"SBATCH_{name}" for name in _HABITS if getattr(backend, name.lower()) is None}
    kept = {"SLURM_CONF", *unset}
    return {
        name: value for name, value in environ.items() if name in kept or not name.startswith(("SBATCH_", "SLURM_"))
    }


def _sbatch(backend: SlurmBackend, file: Path) -> str:
    answer = run_slurm(["sbatch", "--parsable", str(file)], env=submission_env(backend, os.environ))
    if answer.returncode:
        raise sbatch_error(backend, error_text(answer.stderr))
    return answer.stdout.strip().partition(";")[0]


def sbatch_error(backend: SlurmBackend, words: str) -> ConfigError:
    """Return sbatch's message as the error of the option that it names, if it names one."""
    lower = words.lower()
    if "array" in lower:
        fix = "give fewer runs (`scontrol show config` shows MaxArraySize), or set backend.array=false"
        return ConfigError("sweep", why=f"Slurm reports: {words}", fix=fix)
    for about, option in _OPTION_BY_MESSAGE.items():
        if about in lower:
            fix = (
                _known_partitions(partitions())
                if option in ("partition", "time", "nodes")
                else "`scontrol show node` shows more"
            )
            return ConfigError(f"backend.{option}", getattr(backend, option), why=f"Slurm reports: {words}", fix=fix)
    return ConfigError("backend", "slurm", why=f"Slurm reports: {words}", fix="`sinfo` shows what it has")


def _check_not_queued(run_dir: RunDir) -> None:
    """Raise if the run is queued already: both jobs would write into its directory."""
    before = read_session_file(run_dir)
    if before is None or before.backend != "slurm" or "id" not in before.job:
        return
    job_id = before.job["id"]
    if run_slurm(["squeue", "--noheader", f"--jobs={job_id}", "--format=%T"]).stdout.strip():
        fix = f"wait for it, or type: launch cancel {run_dir.path}"
        raise ConfigError("run.dir", run_dir.path, why=f"job {job_id} of this run is still queued or running", fix=fix)


def _known_partitions(known: Sequence[SlurmPartition]) -> str:
    return f"the partitions are {', '.join(map(str, known))}"


_TICK_S = 0.2
_ASK_S = 5.0
"""Time between two queries of the scheduler, which all users share."""
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING")
_CODES = {"TIMEOUT": EXIT_STALLED, "CANCELLED": 128 + signal.SIGTERM, "PREEMPTED": EXIT_PREEMPTED}
"""Exit codes of jobs that were killed before they wrote result.json; 1 for other states."""


def follow(plan: Plan, job_id: str) -> int:
    """Print the job's output until it ends; return the exit code of the run.

    A requeued job is followed further.

    The first signal cancels the job; this function still waits until it has ended.
    """
    run_dir, printed = RunDir(Path(plan.run_dir)), _LogTail(slurm_log_path(plan, job_id))
    shown = cancelled_by = None
    with collect_signals() as arrived:
        while True:
            state = job_state(job_id)
            if state.is_over:
                break
            if state.name in _WAITING and state.reason and state != shown:
                print(f"job {job_id} is waiting: {state.reason}", flush=True)
                shown = state
            again_at = time.monotonic() + _ASK_S
            while time.monotonic() < again_at and not (run_dir.result.exists() and state.name == "RUNNING"):
                printed.show()
                if arrived and cancelled_by is None:
                    cancelled_by = arrived[0]
                    print(f"cancelling job {job_id}", flush=True)
                    run_slurm(["scancel", "--", job_id])
                    break
                time.sleep(_TICK_S)
            time.sleep(_TICK_S)
    printed.show()
    return _exit_code(run_dir, state, cancelled_by)


def follow_arrays(arrays: Mapping[str, Mapping[int, Plan]]) -> dict[int, int]:
    """Print each task of job arrays as it ends; return the exit codes of their runs by number.

    The first signal cancels the arrays; this function still waits until they have ended.
    """
    codes: dict[int, int] = {}
    cancelled_by = None
    with collect_signals() as arrived:
        while left := {job: [n for n in plans if n not in codes] for job, plans in arrays.items()}:
            left = {job: numbers for job, numbers in left.items() if numbers}
            if not left:
                break
            for job, numbers in left.items():
                states = array_states(job)
                for number in numbers:
                    state = states.get(f"{job}_{number}", JobState(name=""))
                    if not state.is_over:
                        continue
                    run_dir = RunDir(Path(arrays[job][number].run_dir))
                    codes[number] = _exit_code(run_dir, state, cancelled_by)
                    print(f"{run_dir.path} ended with exit code {codes[number]}", flush=True)
            again_at = time.monotonic() + _ASK_S
            while time.monotonic() < again_at and len(codes) < sum(map(len, arrays.values())):
                if arrived and cancelled_by is None:
                    cancelled_by = arrived[0]
                    print(f"cancelling job {', '.join(left)}", flush=True)
                    run_slurm(["scancel", "--", *left])
                    break
                time.sleep(_TICK_S)
    return codes


def _exit_code(run_dir: RunDir, state: JobState, cancelled_by: int | None) -> int:
    """Return the exit code in result.json; without one, that of the state that Slurm reports.

    The state is printed.
    """
    if run_dir.result.exists():
        return int(read_json(run_dir.result)["exit_code"])
    if cancelled_by is not None:
        return 128 + cancelled_by
    if state.name == "COMPLETED":
        return 0
    print(
        f"the job ended before the run wrote its result: Slurm's state is {state.name or 'forgotten'}", file=sys.stderr
    )
    return _CODES.get(state.name, 1)


class _LogTail:
    """Prints what is appended to a file, which may not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path, self._seen = path, 0

    def show(self) -> None:
        """Print the new output."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._seen)
                text = file.read()
        except FileNotFoundError:
            return
        self._seen += len(text)
        if text:
            sys.stdout.write(printable(text.decode(errors="replace")))
            sys.stdout.flush()

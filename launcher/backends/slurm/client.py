"""Slurm's own programs: partitions of the cluster and the state of a job."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.errors import EnvironmentProblem

_TIMEOUT_S = 60.0
_UNLIMITED = ("infinite", "n/a")


@dataclass(frozen=True, kw_only=True)
class SlurmPartition:
    """A partition, as sinfo reports it."""

    name: str
    is_default: bool
    limit: str
    num_nodes: int

    @property
    def limit_s(self) -> float:
        """Its time limit in seconds."""
        if self.limit in _UNLIMITED:
            return float("inf")
        days, _, rest = self.limit.rpartition("-")
        seconds = 0
        for part in rest.split(":"):  # from "5:00" up to "1-00:00:00"
            seconds = seconds * 60 + int(part)
        return seconds + int(days or 0) * 86400

    def __str__(self) -> str:
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes"
        return f"{self.name} (up to {self.limit}, {nodes})"


def partitions() -> list[SlurmPartition]:
    """Return the partitions of the cluster.

    Raises:
        EnvironmentProblem: Slurm is not installed here, or does not answer.
    """
    answer = run_slurm(["sinfo", "--noheader", "--format=%P|%l|%D"])
    if answer.returncode:
        raise EnvironmentProblem(f"Slurm does not answer: {error_text(answer.stderr)}")
    found: dict[str, SlurmPartition] = {}
    for line in answer.stdout.splitlines():  # a partition has one line for each time limit and state
        name, limit, num_nodes = line.strip().split("|")
        own, so_far = name.rstrip("*"), found.get(name)
        count = int(num_nodes) + (so_far.num_nodes if so_far else 0)
        found[name] = SlurmPartition(name=own, is_default=name.endswith("*"), limit=limit, num_nodes=count)
    return list(found.values())


def run_slurm(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = _TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs and return its output.

    Raises:
        EnvironmentProblem: it is not installed, or does not answer.
    """
    program = shutil.which(command[0])
    if program is None:
        fix = "submit from a machine with Slurm's programs (a login node); Debian has them in the package slurm-client"
        raise EnvironmentProblem(f"{command[0]} is not installed on this machine: {fix}")
    try:
        return subprocess.run(
            [program, *command[1:]],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(f"Slurm does not answer: {command[0]} gave no output for {timeout_s:g} s") from error


def error_text(stderr: str) -> str:
    """Return the errors that a program of Slurm printed, as one line."""
    lines = [line.partition("error: ")[2] or line for line in stderr.splitlines()]
    return "; ".join(line.strip().rstrip(".") for line in lines if line.strip()) or "nothing"


_OVER = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL"),
    *("DEADLINE", "REVOKED"),
)


@dataclass(frozen=True, kw_only=True)
class JobState:
    """The state of a job, as Slurm reports it."""

    name: str
    """``RUNNING``, ``PENDING``, …; empty once Slurm has forgotten the job."""
    reason: str = ""
    """Why it is pending."""

    @property
    def is_over(self) -> bool:
        """Whether the job has ended."""
        return self.name in _OVER or not self.name


def job_state(job_id: str) -> JobState:
    """Return the state of a job; retry while Slurm's controller does not answer.

    Raises:
        EnvironmentProblem: it does not answer after several tries.
    """
    name, _, reason = "".join(_squeue(job_id, "--format=%T|%r")).strip().partition("|")
    return JobState(name=name, reason=reason.replace("None", ""))


def array_states(job_id: str) -> dict[str, JobState]:
    """Return the states of the tasks of a job array by their id (``JOB_TASK``).

    Slurm forgets tasks that ended minutes ago.

    Raises:
        EnvironmentProblem: Slurm's controller does not answer after several tries.
    """
    lines = _squeue(job_id, "--array", "--format=%i|%T|%r")
    found = [line.strip().split("|", 2) for line in lines if line.strip()]
    return {task: JobState(name=name, reason=reason.replace("None", "")) for task, name, reason in found}


def _squeue(job_id: str, *options: str) -> list[str]:
    """Return the lines of squeue about a job, none for a forgotten one; ask until it answers."""
    for pause_s in (1.0, 5.0, 20.0, 60.0, 0.0):
        answer = run_slurm(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", *options])
        if answer.returncode == 0 or "Invalid job id" in answer.stderr:
            return answer.stdout.splitlines()
        time.sleep(pause_s)
    raise EnvironmentProblem(f"Slurm no longer answers, and job {job_id} continues: {error_text(answer.stderr)}")

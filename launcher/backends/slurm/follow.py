"""Staying with a queued job: what it prints is shown as it comes, and its end becomes ours."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.backends.slurm.client import ask, words_of
from launcher.backends.slurm.script import log_of
from launcher.errors import EXIT_PREEMPTED, EXIT_STALLED, EnvironmentProblem
from launcher.files import read_json
from launcher.rundir import RunDir
from launcher.supervise.signals import collected_signals
from launcher.terminal import printable

if TYPE_CHECKING:
    from launcher.plan import Plan

_TICK_S = 0.2
_ASK_S = 5.0
"""Between two questions to the scheduler: it serves everybody."""
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING")
_OVER = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL"),
    *("DEADLINE", "REVOKED"),
)
_CODES = {"TIMEOUT": EXIT_STALLED, "CANCELLED": 128 + signal.SIGTERM, "PREEMPTED": EXIT_PREEMPTED}
"""For jobs that were killed before the run could say how it ended; 1 for the others."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What Slurm knows of a job."""

    name: str
    """``RUNNING``, ``PENDING``, …; empty once Slurm has forgotten the job."""
    reason: str = ""
    """Why it waits."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.name in _OVER or not self.name


def follow(plan: Plan, job_id: str) -> int:
    """Show what the job prints until it has ended, through requeues; return the exit code of the run.

    The first signal that comes cancels the job; its end is waited for all the same.
    """
    run_dir, printed = RunDir(Path(plan.run_dir)), _Tail(log_of(plan, job_id))
    shown = cancelled_by = None
    with collected_signals() as arrived:
        while True:
            state = state_of(job_id)
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
                    ask(["scancel", "--", job_id])
                    break
                time.sleep(_TICK_S)
            time.sleep(_TICK_S)
    printed.show()
    return _exit_code(run_dir, state, cancelled_by)


def state_of(job_id: str) -> JobState:
    """Return what Slurm says of a job; its controller may be away for a while, and then it is asked again.

    Raises:
        EnvironmentProblem: it stays away.
    """
    for pause_s in (1.0, 5.0, 20.0, 60.0, 0.0):
        answer = ask(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T|%r"])
        if answer.returncode == 0 or "Invalid job id" in answer.stderr:
            name, _, reason = answer.stdout.strip().partition("|")
            return JobState(name=name, reason=reason.replace("None", ""))
        time.sleep(pause_s)
    raise EnvironmentProblem(f"Slurm does not answer any more, and job {job_id} goes on: {words_of(answer.stderr)}")


def _exit_code(run_dir: RunDir, state: JobState, cancelled_by: int | None) -> int:
    """Return the code that the session wrote down; where it could not, what Slurm says, and say so."""
    if run_dir.result.exists():
        return int(read_json(run_dir.result)["exit_code"])
    if cancelled_by is not None:
        return 128 + cancelled_by
    if state.name == "COMPLETED":
        return 0
    print(f"the job ended before the run could say how: Slurm calls it {state.name or 'forgotten'}", file=sys.stderr)
    return _CODES.get(state.name, 1)


class _Tail:
    """Prints what is appended to a file that may not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path, self._seen = path, 0

    def show(self) -> None:
        """Print what is new."""
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

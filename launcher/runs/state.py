"""The state of one run, from its directory and this machine's processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from launcher.config.model.base import has_tokenizer
from launcher.config.model.folder import checkpoint_files
from launcher.config.option_text import quoted_word
from launcher.protocol.results import NUM_STEPS, RunStatus, parse_metrics_line
from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import SessionRecord, read_session_file
from launcher.protocol.state_files import MODEL_FOLDER
from launcher.runs.logs import tail_lines
from launcher.utils.files import is_regular, read_object
from launcher.utils.text import shell_command, short_path

RUNNING, LOST, ELSEWHERE = "running", "lost", "elsewhere"
"""States of a run without a result: session running, session ended, session out of reach.
The last one may run on a machine that cannot be reached from here."""

_YOUNG_S = 30.0
"""Age below which a run without session.json counts as starting."""
_LATEST = 253_402_300_799.0
"""The last second of the year 9999: files may have any time, ``strftime`` fails later."""
_LARGEST = 1e300


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of one run."""

    run_dir: RunDir
    run_id: str
    name: str
    status: str
    started_at: float
    """When it was last started or resumed, in seconds since the epoch."""
    ended_at: float | None
    result: dict[str, Any]
    """``result.json``; empty if there is none."""
    plan: dict[str, Any]
    """``plan.json``; empty if there is none."""
    metrics: dict[str, Any]
    """The last value of each metric."""
    session: SessionRecord | None
    unreadable_files: tuple[str, ...] = ()
    """Files that exist and cannot be used, each with the reason; they count as missing."""

    @property
    def is_over(self) -> bool:
        """Whether the run has ended."""
        return self.status not in (RUNNING, ELSEWHERE)

    @property
    def exit_code(self) -> int | None:
        """Exit code of the launcher; ``None`` if it wrote none."""
        return self.result.get("exit_code")

    @property
    def backend(self) -> str | None:
        """The kind of its backend; ``None`` if it is not recorded."""
        written: str | None = self.plan.get("backend")
        return self.session.backend if self.session else written

    @property
    def cluster_job(self) -> dict[str, str] | None:
        """Names of the job in Kubernetes whose pods alone have the run's files; ``None`` otherwise.

        Where the claim of the pods is mounted on this machine too, the files are here.
        """
        session = self.session
        if session is None or session.backend != "kubernetes" or not session.job or session.invalid_job_names:
            return None
        return None if any(self.run_dir.logs.glob("*.log")) else session.job

    @property
    def slots(self) -> list[int]:
        """Number of ranks of each host."""
        return [host["slots"] for host in self.hosts]

    @property
    def hosts(self) -> list[dict[str, Any]]:
        """Hosts of the plan: each with ``name`` and ``slots``."""
        return [plan["host"] for plan in self.plan.get("hosts", [])]

    @property
    def failure(self) -> dict[str, Any]:
        """``failure.json``; empty if there is none."""
        try:
            return read_object(self.run_dir.failure)
        except (OSError, ValueError):
            return {}

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to continue from."""
        return any(is_regular(path) for path in self.run_dir.checkpoints.glob("step_*/manifest.json"))

    @property
    def has_kept_answers(self) -> bool:
        """Whether a file of prompts is answered in part: resuming answers the others."""
        parts = self.run_dir.generated.glob("*.part")
        return any(is_regular(path) and path.stat().st_size > 0 for path in parts)

    @property
    def last_checkpoint(self) -> Path | None:
        """Folder of the checkpoint with the most steps; ``None`` without one."""
        manifests = [path for path in self.run_dir.checkpoints.glob("step_*/manifest.json") if is_regular(path)]
        return max(manifests, key=_step_of).parent if manifests else None

    @property
    def step(self) -> int | None:
        """Number of steps done."""
        step: float | None = self.metrics.get("train/step")
        return None if step is None else int(step)

    @property
    def steps_text(self) -> str:
        """Progress (``20/300``); of an evaluation, the step of the checkpoint; ``-`` without steps."""
        if self.plan.get("job") == "evaluate":
            return f"of step {self.step}" if self.step else "-"
        if self.num_steps == 0:
            return "-"
        return f"{self.step or 0}/{'?' if self.num_steps is None else self.num_steps}"

    @property
    def num_steps(self) -> int | None:
        """Number of planned steps; ``None`` if they are not those that ``step`` counts.

        An evaluation counts batches, and its ``step`` is that of the checkpoint it measures.
        """
        if self.plan.get("job") == "evaluate":
            return None
        steps: int | None = self.plan.get("work", {}).get("num_steps")
        counted = self.metrics.get(NUM_STEPS)  # of epochs, once a rank has counted the data
        return int(counted) if counted else steps


def read_run_state(run_dir: RunDir) -> RunState:
    """Return the state of a run from its directory and this machine's processes.

    Another user may have written its files: one that is not a regular file, or has unexpected content, counts as
    missing and is listed in ``unreadable_files``.
    """
    unreadable_files: list[str] = []
    session, plan = read_session_file(run_dir), _read(run_dir.plan, _plan_fault, unreadable_files)
    if session is None and os.path.lexists(run_dir.session):
        unreadable_files.append(f"{run_dir.session.name} has unexpected content")
    status, result = _status(run_dir, session), {}
    if status != RUNNING or written_at(run_dir.result) > written_at(
        run_dir.session
    ):  # otherwise it is of an earlier start
        result = _read(run_dir.result, _result_fault, unreadable_files)
        status = str(result.get("status", status))
    try:
        metrics = _numbers(result.get("metrics") or {}) or last_metrics(run_dir.metrics)
    except OSError as error:
        metrics = {}
        unreadable_files.append(f"{run_dir.metrics.name} {error.strerror}")
    return RunState(
        run_dir=run_dir,
        run_id=str(plan.get("run_id", run_dir.path.name)),
        name=str(plan.get("name", run_dir.path.parent.name)),
        status=status,
        started_at=written_at(run_dir.snapshot),
        ended_at=written_at(run_dir.result) if result else None,
        result=result,
        plan=plan,
        metrics=metrics,
        session=session,
        unreadable_files=tuple(unreadable_files),
    )


def continue_command(state: RunState) -> str | None:
    """Return the command that continues a run, or generates with the weights of a completed one."""
    folder, checkpoint = short_path(state.run_dir.path), state.last_checkpoint
    if checkpoint is None:
        is_resumed = state.status in (LOST, "preempted") or state.has_kept_answers
        return shell_command(["launch", "resume", folder]) if is_resumed else None
    is_at_end = bool(state.num_steps and _step_of(checkpoint / "manifest.json") >= state.num_steps)
    weights = checkpoint / MODEL_FOLDER
    if (is_at_end or state.status == "completed") and checkpoint_files(weights) and has_tokenizer(weights):
        return f"launch job=generate {quoted_word('model.weights', folder)}"
    is_done = is_at_end and state.status == "completed"
    longer = [f"job.steps={2 * (state.num_steps or 1)}"] if is_done else []
    return shell_command(["launch", "resume", folder, *longer])


def _step_of(manifest: Path) -> int:
    """Return the steps in the name of a checkpoint folder; 0 for another name."""
    number = manifest.parent.name.removeprefix("step_")
    return int(number) if number.isdecimal() else 0


def last_metrics(path: Path) -> dict[str, Any]:
    """Return the last value of each metric at the end of a ``metrics.jsonl`` of any length.

    Raises:
        OSError: it is a link or not a regular file, or cannot be read.
    """
    last: dict[str, Any] = {}
    for line in tail_lines(path):
        last.update(_numbers(parse_metrics_line(line) or {}))
    return last


def _status(run_dir: RunDir, session: SessionRecord | None) -> str:
    """Return the status of a run without a result.

    run.yaml is written at every start or restart.
    """
    if session is None:
        return RUNNING if time.time() - written_at(run_dir.snapshot) < _YOUNG_S else LOST
    return {True: RUNNING, False: LOST, None: ELSEWHERE}[session.is_running()]


def _read(path: Path, fault: Callable[[dict[str, Any]], str], unreadable_files: list[str]) -> dict[str, Any]:
    """Return the object in a file; empty, with a reason in ``unreadable_files``, if unusable."""
    try:
        tree = read_object(path)
        if why := fault(tree):
            raise ValueError(why)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        unreadable_files.append(
            f"{path.name} {(error.strerror if isinstance(error, OSError) else error) or 'cannot be read'}"
        )
        return {}
    return tree


def _plan_fault(tree: dict[str, Any]) -> str:
    """Return why a ``plan.json`` cannot be used: a shown field has the wrong type."""
    hosts, work = tree.get("hosts", []), tree.get("work", {})
    kinds = {
        **{name: isinstance(tree.get(name, ""), str) for name in ("run_id", "name", "job", "backend")},
        "hosts": isinstance(hosts, list) and all(map(_is_host, hosts)),
        "work": isinstance(work, dict) and isinstance(work.get("num_steps"), int | None),
        "grace_s": _is_number(tree.get("grace_s", 0)),
        "forwarded_env": _are_texts(tree.get("forwarded_env", [])),
    }
    wrong = [name for name, is_right in kinds.items() if not is_right]
    return f"has unexpected content: {', '.join(wrong)}" if wrong else ""


def _is_host(plan: object) -> bool:
    host = plan.get("host") if isinstance(plan, dict) else None
    return (
        isinstance(host, dict)
        and isinstance(host.get("name"), str)
        and type(host.get("slots")) is int
        and _are_texts(host.get("devices") or [])
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _result_fault(tree: dict[str, Any]) -> str:
    """Return why a ``result.json`` cannot be used."""
    if tree.get("status") not in get_args(RunStatus):
        return "has unexpected content: status"
    if type(tree.get("exit_code")) is not int or not isinstance(tree.get("metrics", {}), dict):
        return "has unexpected content: exit_code, metrics"
    return ""


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics that are numbers, or that were not finite."""
    return {name: value for name, value in metrics.items() if value is None or _is_number(value)}


def _is_number(value: object) -> bool:
    """Return whether a value is a finite number of reasonable size."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
    )  # NaN compares as False


def written_at(path: Path) -> float:
    """Return when a file was written, in seconds since the epoch; 0 if it does not exist."""
    try:
        return min(max(0.0, path.lstat().st_mtime), _LATEST)
    except OSError:
        return 0.0

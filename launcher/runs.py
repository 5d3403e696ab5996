"""Runs on disk: finding them, and what can be told of one without asking anybody."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError
from launcher.files import read_json
from launcher.results import parse_line
from launcher.rundir import RunDir
from launcher.suggest import did_you_mean
from launcher.supervise.whereabouts import Whereabouts, read_whereabouts

RUNNING, LOST, ELSEWHERE = "running", "lost", "elsewhere"
"""Besides the statuses of ``result.json``: somebody works on it; nobody does and it has no result; somebody may, where
this machine cannot see it."""

_YOUNG_S = 30.0
"""Time in which a new run may not have said yet who runs it."""
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What is known of one run."""

    run_dir: RunDir
    run_id: str
    name: str
    status: str
    started_at: float
    """Of its last life, in seconds since the epoch."""
    ended_at: float | None
    result: dict[str, Any]
    """``result.json``; empty while there is none."""
    plan: dict[str, Any]
    """``plan.json``; empty while there is none."""
    metrics: dict[str, Any]
    """The last values."""
    whereabouts: Whereabouts | None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.status not in (RUNNING, ELSEWHERE)

    @property
    def exit_code(self) -> int | None:
        """Of the launcher; ``None`` where it left none."""
        return self.result.get("exit_code")

    @property
    def backend(self) -> str | None:
        """The backend's kind; ``None`` where nobody wrote it down."""
        written: str | None = self.plan.get("backend")
        return self.whereabouts.backend if self.whereabouts else written

    @property
    def slots(self) -> list[int]:
        """Ranks of each host."""
        return [plan["host"]["slots"] for plan in self.plan.get("hosts", [])]

    @property
    def failure(self) -> dict[str, Any]:
        """``failure.json``; empty while there is none."""
        return _json(self.run_dir.failure)

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint is there to continue from."""
        return any(self.run_dir.checkpoints.glob("step_*/manifest.json"))

    @property
    def step(self) -> int | None:
        """Steps done."""
        return self.metrics.get("train/step")

    @property
    def num_steps(self) -> int | None:
        """Steps planned."""
        steps: int | None = self.plan.get("work", {}).get("steps")
        return steps


def find_run(word: str | None, root: Path) -> RunDir:
    """Return the run that ``word`` names.

    Args:
        word: a run directory, a run id or how it begins, with or without its name before it (``gpt2/20260101``);
            ``None`` is the run below ``root`` that was started last.
        root: the folder of all runs.

    Raises:
        ConfigError: nothing is meant by it, or several runs are.
    """
    if word is not None and _is_run(Path(word)):
        return RunDir(Path(word).absolute())
    known = runs_below(root)
    if word is None:
        if not known:
            raise ConfigError("--root", root, why="holds no run", fix="name a run directory, or --root DIR")
        return known[0]
    ids = {run_dir.path.relative_to(root.absolute()).as_posix(): run_dir for run_dir in known}
    meant = [full for full in ids if full.startswith(word) or _without_name(full).startswith(word)]
    exact = [full for full in meant if word in (full, _without_name(full))]
    if len(exact or meant) == 1:
        return ids[(exact or meant)[0]]
    if meant:
        fix = f"write more of it: {', '.join(sorted(meant)[:5])}{', …' if len(meant) > 5 else ''}"
        raise ConfigError("run", word, why=f"{len(meant)} runs in {root} begin like this", fix=fix)
    if Path(word).is_dir():
        raise ConfigError("run", word, why="holds no run.yaml", fix="name a run directory (runs/<name>/<id>)")
    close = did_you_mean(word, ids) if ids and len(ids) < 20 else "launch runs lists those there are"
    raise ConfigError("run", word, why=f"is no run directory, and no run in {root} begins like this", fix=close)


def runs_below(root: Path) -> list[RunDir]:
    """Return every run in ``<root>/<name>/<id>`` and in the sweeps there, the last started first."""
    snapshots = [*root.glob("*/*/run.yaml"), *root.glob("*/sweep-*/*/run.yaml")]
    return [RunDir(path.parent.absolute()) for path in sorted(snapshots, key=_written_at, reverse=True)]


def look(run_dir: RunDir) -> RunState:
    """Return what can be told of a run from its directory and this machine's processes."""
    whereabouts, plan = read_whereabouts(run_dir), _json(run_dir.plan)
    status, result = _status(run_dir, whereabouts), {}
    if status != RUNNING or _written_at(run_dir.result) > _written_at(run_dir.session):  # else of an earlier life
        result = _json(run_dir.result)
        status = str(result.get("status", status))
    return RunState(
        run_dir=run_dir,
        run_id=str(plan.get("run_id", run_dir.path.name)),
        name=str(plan.get("name", run_dir.path.parent.name)),
        status=status,
        started_at=_written_at(run_dir.snapshot),
        ended_at=_written_at(run_dir.result) if result else None,
        result=result,
        plan=plan,
        metrics=result.get("metrics") or last_metrics(run_dir.metrics),
        whereabouts=whereabouts,
    )


def last_metrics(path: Path) -> dict[str, Any]:
    """Return the last value of each metric in the end of a ``metrics.jsonl``, however long it is."""
    last: dict[str, Any] = {}
    for line in tail_lines(path):
        last.update(parse_line(line) or {})
    return last


def tail_lines(path: Path) -> Iterator[bytes]:
    """Yield the whole lines in the last 64 KiB of a file; none of one that does not exist."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return
    yield from lines[1:] if size > _TAIL_BYTES else lines


def _status(run_dir: RunDir, whereabouts: Whereabouts | None) -> str:
    """Return the status of a run, its result aside; run.yaml is written whenever one starts or goes on."""
    if whereabouts is None:
        return RUNNING if time.time() - _written_at(run_dir.snapshot) < _YOUNG_S else LOST
    return {True: RUNNING, False: LOST, None: ELSEWHERE}[whereabouts.is_running()]


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = read_json(path)
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _is_run(folder: Path) -> bool:
    return RunDir(folder).snapshot.is_file()


def _without_name(full: str) -> str:
    return full.partition("/")[2]


def _written_at(path: Path) -> float:
    """Return when a file was written, in seconds since the epoch; 0 when it is not there."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0

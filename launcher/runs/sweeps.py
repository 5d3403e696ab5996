"""A sweep as its ``sweep.json`` describes it: trials, overrides, outcomes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.paths import is_named_path
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.runs.lock import RunLock
from launcher.utils.files import is_regular, read_object, write_json

SWEEP_FILE = "sweep.json"
SUBMITTED = "submitted"
"""Status of a trial that waits in a queue, or runs there: its own files say more."""
_LOCK_S = 10.0
"""Time to wait for another task of the sweep that writes the file."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One run of a sweep."""

    run_dir: RunDir
    overrides: tuple[str, ...]
    status: str
    exit_code: int
    value: float | None
    """Value of the metric that ranks the trials."""

    @property
    def name(self) -> str:
        """The overrides in which it differs from other trials."""
        return " ".join(self.overrides) or self.run_dir.path.name


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A sweep, finished or not."""

    folder: Path
    metric: str
    goal: str
    trials: tuple[TrialResult, ...]

    @property
    def best(self) -> TrialResult | None:
        """The completed trial with the best value."""
        scored = [
            (trial.value, trial) for trial in self.trials if trial.value is not None and trial.status == "completed"
        ]
        pick = min if self.goal == "minimize" else max
        return pick(scored, key=lambda pair: pair[0])[1] if scored else None


def find_sweep(word: str, root: Path) -> Path | None:
    """Return the folder of the sweep ``word``: a directory, an id or the beginning of one.

    Raises:
        ConfigError: it names several sweeps.
    """
    if is_named_path("run", word) and (Path(word) / SWEEP_FILE).is_file():
        return Path(word).absolute()
    known = [path.parent for path in root.glob(f"*/sweep-*/{SWEEP_FILE}") if is_regular(path)]
    meant = [path for path in known if path.name.startswith(word) or f"{path.parent.name}/{path.name}".startswith(word)]
    if "sweep-" not in word or not meant:
        return None
    exact = [path for path in meant if word in (path.name, f"{path.parent.name}/{path.name}")]
    if len(exact or meant) > 1:
        names = ", ".join(sorted(f"{path.parent.name}/{path.name}" for path in meant)[:5])
        raise ConfigError("sweep", word, why=f"{len(meant)} sweeps begin with it", fix=f"write more of it: {names}")
    return (exact or meant)[0].absolute()


def read_sweep(folder: Path) -> SweepResult:
    """Return the content of a ``sweep.json``.

    Raises:
        ConfigError: the file has unexpected content.
    """
    try:
        tree = read_object(folder / SWEEP_FILE)
        metric = str(tree["metric"])
        trials = tuple(_read_trial(folder, row, metric) for row in tree["trials"])
        return SweepResult(folder=folder, metric=metric, goal=str(tree["goal"]), trials=trials)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"is not a valid sweep.json ({type(error).__name__}: {error})"
        raise ConfigError(SWEEP_FILE, folder / SWEEP_FILE, why=why, fix="name its runs one by one") from error


def trial_folder(folder: Path, number: int) -> Path:
    """Return the run directory of a trial, which counts from 0, below its sweep's."""
    return folder / f"{number:03d}"


def collect_results(folder: Path) -> None:
    """Write the results of ended trials into ``sweep.json``; call it when one ends.

    Trials on several machines may end at once, so one of them at a time reads the results and writes the file.

    Raises:
        OSError: the file cannot be written.
        ValueError: it has unexpected content.
    """
    with _write_lock(folder):
        tree = read_object(folder / SWEEP_FILE)
        rows = [_with_result(folder, row, str(tree["metric"])) for row in tree["trials"]]
        write_json(folder / SWEEP_FILE, {**tree, "trials": rows})


@contextlib.contextmanager
def _write_lock(folder: Path) -> Iterator[None]:
    """Hold the lock on a sweep's file.

    It goes on without after ``_LOCK_S``: each writer reads all results.
    """
    lock, deadline = RunLock(folder, name=".sweep.lock"), time.monotonic() + _LOCK_S
    while time.monotonic() < deadline:
        try:
            lock.acquire()
            break
        except ConfigError:
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.release()


def _with_result(folder: Path, row: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return a row, with the result of its run if it was only submitted and has ended since."""
    result = folder / Path(row["run_dir"]).name / "result.json"
    if row["status"] != SUBMITTED or not is_regular(result):
        return row
    ended = read_object(result)
    code, status = int(ended["exit_code"]), str(ended["status"])
    return {**row, "exit_code": code, "status": status, metric: ended.get("metrics", {}).get(metric)}


def _read_trial(folder: Path, row: dict[str, Any], metric: str) -> TrialResult:
    name = Path(row["run_dir"]).name  # a sweep may have been moved, and its file may name other folders
    if name in ("", "..") or (folder / name).is_symlink():
        raise ValueError(f"its trial {name!r} is not a folder of the sweep")
    row = _with_result(folder, row, metric)
    value = row.get(metric)
    return TrialResult(
        run_dir=RunDir(folder / name),
        overrides=tuple(map(str, row["overrides"])),
        status=str(row["status"]),
        exit_code=int(row["exit_code"]),
        value=None if value is None else float(value),
    )

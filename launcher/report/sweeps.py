"""A sweep as its ``sweep.json`` tells it: trials, their overrides, how they ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError
from launcher.paths import is_named_path
from launcher.report.markup import Html, element, rows_of, section
from launcher.report.parts import number_text
from launcher.rundir import RunDir
from launcher.runfiles import is_regular, read_object

_FILE = "sweep.json"
_SHOWN = ("train/loss", "eval/loss", "perf/tokens_per_s", "memory/peak_bytes")
"""Last metrics beside the one that ranks the trials."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep."""

    run_dir: RunDir
    overrides: tuple[str, ...]
    status: str
    exit_code: int
    value: float | None
    """Of the metric that ranks the trials."""

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return " ".join(self.overrides) or self.run_dir.path.name


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep, as far as it has come."""

    folder: Path
    metric: str
    goal: str
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial | None:
        """The completed trial with the best value."""
        scored = [
            (trial.value, trial) for trial in self.trials if trial.value is not None and trial.status == "completed"
        ]
        pick = min if self.goal == "minimize" else max
        return pick(scored, key=lambda pair: pair[0])[1] if scored else None


def find_sweep(word: str, root: Path) -> Path | None:
    """Return the folder of the sweep that ``word`` names: a directory, or an id or how it begins, as of runs.

    Raises:
        ConfigError: several are meant.
    """
    if is_named_path("run", word) and (Path(word) / _FILE).is_file():
        return Path(word).absolute()
    known = [path.parent for path in root.glob(f"*/sweep-*/{_FILE}") if is_regular(path)]
    meant = [path for path in known if path.name.startswith(word) or f"{path.parent.name}/{path.name}".startswith(word)]
    if "sweep-" not in word or not meant:
        return None
    exact = [path for path in meant if word in (path.name, f"{path.parent.name}/{path.name}")]
    if len(exact or meant) > 1:
        names = ", ".join(sorted(f"{path.parent.name}/{path.name}" for path in meant)[:5])
        raise ConfigError("sweep", word, why=f"{len(meant)} sweeps begin like this", fix=f"write more of it: {names}")
    return (exact or meant)[0].absolute()


def read_sweep(folder: Path) -> Sweep:
    """Return what a sweep has written.

    Raises:
        ConfigError: its file is not what a sweep writes.
    """
    try:
        tree = read_object(folder / _FILE)
        metric = str(tree["metric"])
        trials = tuple(_trial(folder, row, metric) for row in tree["trials"])
        return Sweep(folder=folder, metric=metric, goal=str(tree["goal"]), trials=trials)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"is not what a sweep writes ({type(error).__name__}: {error})"
        raise ConfigError(_FILE, folder / _FILE, why=why, fix="name its runs one by one") from error


def _trial(folder: Path, row: dict[str, Any], metric: str) -> Trial:
    name = Path(row["run_dir"]).name  # a sweep may have been moved, and its file may name other folders
    if name in ("", "..") or (folder / name).is_symlink():
        raise ValueError(f"its trial {name!r} is no folder of the sweep")
    value = row.get(metric)
    return Trial(
        run_dir=RunDir(folder / name),
        overrides=tuple(map(str, row["overrides"])),
        status=str(row["status"]),
        exit_code=int(row["exit_code"]),
        value=None if value is None else float(value),
    )


def trials_of(sweep: Sweep, last: Sequence[dict[str, Any]]) -> Html:
    """Return the table of trials, the best one marked.

    Args:
        sweep: what it has written.
        last: last metrics of each trial, in order.
    """
    keys = [key for key in _SHOWN if key != sweep.metric and any(key in metrics for metrics in last)]
    head = ("trial", "overrides", "status", "exit code", sweep.metric, "", *keys)
    return section(f"Trials, {sweep.goal} {sweep.metric}", rows_of(head, list(_rows(sweep, last, keys))))


def _rows(sweep: Sweep, last: Sequence[dict[str, Any]], keys: Sequence[str]) -> Iterator[list[str]]:
    for trial, metrics in zip(sweep.trials, last, strict=True):
        value = "-" if trial.value is None else number_text(trial.value)
        yield [
            trial.run_dir.path.name,
            element("code", " ".join(trial.overrides)),
            element("span", trial.status, class_=f"status {trial.status}"),
            str(trial.exit_code),
            value,
            "best" if trial is sweep.best else "",
            *(number_text(metrics[key]) if key in metrics else "-" for key in keys),
        ]

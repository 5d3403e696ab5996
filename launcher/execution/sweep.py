"""Sweeps: all trials are checked before the first starts; a failed one stops no other."""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from launcher.checkpoint.locks import CheckpointLocks
from launcher.config.compose import Composition, compose
from launcher.config.folders import groups
from launcher.config.overrides import parse_overrides
from launcher.config.run import Run
from launcher.errors import ConfigError, ConfigErrors, LauncherError
from launcher.execution.executor import AnyExecutor, ArrayExecutor
from launcher.execution.held_checkpoints import keep_checkpoints
from launcher.execution.lifecycle import start_run, start_together
from launcher.execution.prepare import PreparedRun, prepare
from launcher.protocol.rundir import RunDir, new_run_id
from launcher.runs.sweeps import SUBMITTED, SWEEP_FILE, trial_folder
from launcher.supervision.finalize import try_to_write
from launcher.utils.files import read_json, write_json
from launcher.utils.schema import build
from launcher.utils.text import shell_command, short_path


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Content of a ``+sweep=NAME`` file."""

    parameters: dict[str, str] = field(default_factory=dict)
    """Values to try for each option, in Hydra's grammar: ``1e-4,3e-4`` or ``range(1,5)``."""

    metric: str = "eval/loss"
    """The metric that ranks the runs."""

    goal: Literal["minimize", "maximize"] = "minimize"
    """Whether the lowest or the highest value is best."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One combination of values, ready to start."""

    words: tuple[str, ...]
    """The overrides in which it differs from the base."""
    prepared: PreparedRun
    locks: CheckpointLocks
    """Keep the checkpoints that trials load; one object for the whole sweep."""


def expand_grid(words: Sequence[str], parameters: Mapping[str, str], config_dir: Path | None) -> list[tuple[str, ...]]:
    """Return the overrides of every combination.

    Raises:
        ConfigErrors: a word that is no override.
    """
    mistakes: list[ConfigError] = []
    asked = [*(f"{key}={values}" for key, values in parameters.items()), *words]
    parsed = parse_overrides(asked, groups(config_dir), sweeping=True, report=mistakes.append)
    if mistakes:
        raise ConfigErrors(mistakes)
    axes = {override.key: override.choices for override in parsed if override.choices is not None}
    return [
        tuple(f"{key}={value}" for key, value in zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    ]


def plan_sweep(words: Sequence[str], *, config_dir: Path | None) -> tuple[SweepConfig, list[Trial]]:
    """Compose, check and plan every run of a sweep; start none.

    Raises:
        ConfigErrors: the errors of all of them, each once.
    """
    base = compose(words, config_dir=config_dir, sweeping=True)
    mistakes: list[ConfigError] = []
    sweep = build(SweepConfig, base.sweep or {}, path="sweep", report=mistakes.append)
    if base.run.run.dir is not None:
        why, fix = "is the directory of one run, and each trial has its own", "set run.root or run.name instead"
        mistakes.append(ConfigError("run.dir", base.run.run.dir, why=why, fix=fix))
    if sweep is None:
        raise ConfigErrors(mistakes)
    kept = _without_sweeps(words, config_dir)
    sweep_id, trials, locks = f"sweep-{new_run_id()}", [], CheckpointLocks()
    for number, chosen in enumerate(expand_grid(words, sweep.parameters, config_dir)):
        try:
            composed = compose([*kept, *chosen], config_dir=config_dir)
            prepared = prepare(_placed(composed, base, sweep_id, number))
            with prepared.locks:  # one open file for all trials
                keep_checkpoints(prepared.run, prepared.directory, locks)
            trials.append(Trial(words=chosen, prepared=prepared, locks=locks))
        except ConfigErrors as several:
            mistakes += [error for error in several.errors if str(error) not in map(str, mistakes)]
    if mistakes:
        raise ConfigErrors(mistakes)
    if len(trials) < 2 and not sweep.parameters:
        fix = "give an option several values (optimizer.lr=1e-4,3e-4) or a grid (+sweep=lr_batch)"
        raise ConfigError("sweep", why="there is only one combination", fix=fix)
    return sweep, trials


def _without_sweeps(words: Sequence[str], config_dir: Path | None) -> list[str]:
    silent: list[ConfigError] = []  # the words were checked when the base was composed
    parsed = parse_overrides(words, groups(config_dir), sweeping=True, report=silent.append)
    swept = {override.key for override in parsed if override.choices is not None}
    return [word for word in words if word.partition("=")[0].lstrip("+") not in {*swept, "sweep"}]


def _placed(composed: Composition, base: Composition, sweep_id: str, number: int) -> Composition:
    """Return a trial with its own directory below the sweep's."""
    where = composed.run.run
    folder = trial_folder(Path(where.root) / base.run.run.name / sweep_id, number)
    return replace(composed, run=replace(composed.run, run=replace(where, dir=str(folder))))


def run_sweep(sweep: SweepConfig, trials: Sequence[Trial], executor_of: Callable[[Run], AnyExecutor]) -> int:
    """Run the trials and return 0, or the exit code of the first that failed.

    They run one after the other, or as the tasks of a job array. A trial that the user interrupts ends the sweep; one
    that fails does not.
    """
    executors = [executor_of(trial.prepared.run) for trial in trials]
    arrays = [executor for executor in executors if isinstance(executor, ArrayExecutor) and executor.uses_arrays]
    if len(arrays) == len(trials):
        return _run_in_arrays(sweep, trials, arrays)
    first_failure, rows = 0, []
    folder = _folder_of(trials)
    for number, (trial, executor) in enumerate(zip(trials, executors, strict=True), start=1):
        print(f"trial {number}/{len(trials)}: {' '.join(trial.words)}", flush=True)
        try:
            code = start_run(trial.prepared, executor)
        except LauncherError as problem:  # raised at its start: the other trials may still work
            print(problem, file=sys.stderr, flush=True)
            code = problem.exit_code
        first_failure = first_failure or code
        rows.append(_row(trial, code, sweep.metric))
        _keep_rows(sweep, rows, folder)
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP, 128 + signal.SIGQUIT):
            print(f"sweep interrupted after {number} of {len(trials)} trials", flush=True)
            break
    print(render_sweep(sweep, rows, folder))
    return first_failure


def _run_in_arrays(sweep: SweepConfig, trials: Sequence[Trial], executors: Sequence[ArrayExecutor[Any]]) -> int:
    """Queue the trials as job arrays; wait for them where ``backend.wait`` says so."""
    folder = _folder_of(trials)
    codes: dict[int, int] = {}

    def keep() -> list[dict[str, Any]]:
        rows = [_row(trial, codes.get(number, 0), sweep.metric) for number, trial in enumerate(trials)]
        _keep_rows(sweep, rows, folder)
        return rows

    keep()  # before a task may end: it writes its result here
    queued: dict[str, dict[int, PreparedRun]] = {}
    for group in group_by_array([trial.prepared for trial in trials], executors, folder):
        try:
            queued[start_together(group, executors[next(iter(group))], folder)] = group
        except LauncherError as problem:  # the other arrays may still work
            print(problem, file=sys.stderr, flush=True)
            codes |= dict.fromkeys(group, problem.exit_code)
    waits = [number for group in queued.values() for number in group if executors[number].backend.wait]
    if waits:
        plans = {job: {number: each.plan for number, each in group.items()} for job, group in queued.items()}
        codes |= executors[waits[0]].follow_arrays(plans)
    print(render_sweep(sweep, keep(), folder))
    return next(filter(None, (codes.get(number, 0) for number in range(len(trials)))), 0)


def group_by_array(
    prepared: Sequence[PreparedRun], executors: Sequence[ArrayExecutor[Any]], folder: Path
) -> list[dict[int, PreparedRun]]:
    """Return the runs by number, in one group for each array: options of its job are the same."""
    groups: dict[str, dict[int, PreparedRun]] = {}
    for number, (each, executor) in enumerate(zip(prepared, executors, strict=True)):
        text = executor.render_array(each.plan, folder=folder, tasks=())
        groups.setdefault(text, {})[number] = each
    return list(groups.values())


def render_arrays(trials: Sequence[Trial], executor_of: Callable[[Run], AnyExecutor]) -> str:
    """Return the submissions of a sweep whose trials are tasks of arrays; empty if they are not."""
    executors = [executor_of(trial.prepared.run) for trial in trials]
    arrays = [executor for executor in executors if isinstance(executor, ArrayExecutor) and executor.uses_arrays]
    if len(arrays) != len(trials):
        return ""
    folder = _folder_of(trials)
    texts = []
    for group in group_by_array([trial.prepared for trial in trials], arrays, folder):
        first = next(iter(group))
        texts.append(arrays[first].render_array(group[first].plan, folder=folder, tasks=tuple(group)))
    return "\n".join(texts)


def _folder_of(trials: Sequence[Trial]) -> Path:
    return trials[0].prepared.directory.path.parent


def _keep_rows(sweep: SweepConfig, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    table = {"metric": sweep.metric, "goal": sweep.goal, "trials": rows}
    for line in try_to_write(folder / SWEEP_FILE, partial(_keep, folder / SWEEP_FILE, table)):
        print(line, file=sys.stderr, flush=True)


def _keep(file: Path, table: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)  # absent when nothing of the first trial could be started
    write_json(file, table)


def _row(trial: Trial, code: int, metric: str) -> dict[str, Any]:
    directory = RunDir(trial.prepared.directory.path)
    without = {"status": "failed" if code else SUBMITTED, "metrics": {}}
    result: dict[str, Any] = read_json(directory.result) if directory.result.is_file() else without
    return {
        "overrides": list(trial.words),
        "run_dir": str(directory.path),
        "exit_code": code,
        "status": result["status"],
        metric: result["metrics"].get(metric),
    }


def render_sweep(sweep: SweepConfig, rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Return the table of a sweep, the best run marked."""
    scored = [row for row in rows if row[sweep.metric] is not None and row["status"] == "completed"]
    pick = min if sweep.goal == "minimize" else max
    best = pick(scored, key=lambda row: row[sweep.metric]) if scored else None
    lines = [f"{sweep.metric:>12}  {'status':10} overrides"]
    for row in rows:
        value = row[sweep.metric]
        shown = f"{value:.4f}" if value is not None else "-"
        mark = " ← best" if row is best else ""
        lines.append(f"{shown:>12}  {row['status']:10} {' '.join(row['overrides'])}{mark}")
    report = shell_command(["launch", "report", short_path(folder)])
    return "\n".join([*lines, f"table: {folder / SWEEP_FILE}", f"next: {report}"])

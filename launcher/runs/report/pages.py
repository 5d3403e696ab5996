"""Whole reports: of one run, of several runs, of a sweep."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.config.option_text import flatten_options
from launcher.config.snapshot import read_snapshot
from launcher.errors import ConfigError
from launcher.errors.secrets import redact
from launcher.protocol.plan import Plan
from launcher.runs.report.charts import Curves, charts_of, read_curves
from launcher.runs.report.html import render_macro, render_page
from launcher.runs.report.sections import (
    config_of,
    environment_of,
    events_of,
    facts_of,
    failure_of,
    files_of,
    findings_of,
    known_environment,
    metrics_of,
    number_text,
    plan_of,
    profiles_of,
    sample_of,
    samples_of,
)
from launcher.runs.state import RunState, read_run_state
from launcher.runs.sweeps import SweepResult

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_HEAD_BYTES = 1000
_COMPARED = ("train/loss", "eval/loss", "perf/tokens_per_s", "memory/peak_bytes")


def page_of_run(state: RunState, *, render_plan: Callable[[Plan], str]) -> str:
    """Return the report of one run; ``render_plan`` returns a plan as text."""
    name, run_dir = f"{state.name} {state.run_id}", state.run_dir
    return _page(
        "run.html",
        name,
        **_outcome(state),
        curves=_part(lambda: list(charts_of({name: read_curves(run_dir.metrics)})) or None),
        profile=_part(lambda: profiles_of(run_dir)),
        sample=_part(lambda: sample_of(run_dir)),
        samples=_part(lambda: samples_of(run_dir)),
        metrics=_part(lambda: metrics_of(state)),
        environment=_part(lambda: environment_of(state)),
        plan=_part(lambda: plan_of(run_dir, render_plan=render_plan)),
        events=_part(lambda: events_of(run_dir)),
        files=_part(lambda: files_of(run_dir)),
    )


def page_of_runs(states: Sequence[RunState]) -> str:
    """Return the report of several runs: side by side, with shared charts."""
    named = {f"{state.name} {state.run_id}": state for state in states}
    title = f"{len(named)} runs: {', '.join(dict.fromkeys(state.name for state in states))}"
    return _page_together(title, named, overview=_side_by_side(named))


def page_of_sweep(sweep: SweepResult) -> str:
    """Return the report of a sweep: its trials, with shared charts."""
    named = {trial.name: read_run_state(trial.run_dir) for trial in sweep.trials}
    overview = _trials(sweep, [state.metrics for state in named.values()])
    return _page_together(f"{sweep.folder.parent.name} {sweep.folder.name}", named, overview=overview)


def _page_together(title: str, named: Mapping[str, RunState], *, overview: Mapping[str, Any]) -> str:
    """Return the comparison of several runs."""
    differences = {
        "Configurations": _apart({name: _options(one) for name, one in named.items()}),
        "Environments": _apart({name: known_environment(one.run_dir) for name, one in named.items()}),
    }
    return _page(
        "runs.html",
        title,
        overview=overview,
        charts=list(charts_of({name: _curves(one) for name, one in named.items()})),
        differences=differences,
        runs={name: _outcome(one) for name, one in named.items()},
    )


def _outcome(state: RunState) -> dict[str, Any]:
    """Return the parts that pages of one run and of several have."""
    return {
        "facts": facts_of(state),
        "failure": _part(lambda: failure_of(state)),
        "findings": _part(lambda: findings_of(state.run_dir)),
        "config": _part(lambda: config_of(state.run_dir)),
    }


def _side_by_side(named: Mapping[str, RunState]) -> dict[str, Any]:
    keys = [key for key in _COMPARED if any(key in state.metrics for state in named.values())]
    rows = [(name, render_macro("badge", one.status), *_last_values(one.metrics, keys)) for name, one in named.items()]
    return {"title": "Runs", "head": ("run", "status", *keys), "rows": rows}


def _last_values(metrics: Mapping[str, Any], keys: Sequence[str]) -> Iterator[str]:
    return (number_text(metrics[key]) if key in metrics else "-" for key in keys)


def _apart(sides: Mapping[str, Mapping[str, str]]) -> list[tuple[str, ...]]:
    """Return the options in which the runs differ, with the value of each run."""
    keys = list(dict.fromkeys(key for side in sides.values() for key in side))
    differing = [key for key in keys if len({side.get(key) for side in sides.values()}) > 1]
    return [(key, *(side.get(key, "-") for side in sides.values())) for key in differing]


def _options(state: RunState) -> dict[str, str]:
    """Return the configuration of a run of any version, without the group ``run``."""
    try:
        options = dict(flatten_options(redact(read_snapshot(state.run_dir.snapshot), os.environ)))
    except ConfigError:
        return {}
    return {key: value for key, value in options.items() if not key.startswith("run.")}


def is_report(file: Path) -> bool:
    """Return whether a file is a report of this program, which another report can replace."""
    with file.open("rb") as opened:
        return _POLICY in html.unescape(opened.read(_HEAD_BYTES).decode(errors="replace"))


def _part(read: Callable[[], Any]) -> dict[str, Any]:
    """Return a part of the page, or why it cannot be shown when files are damaged."""
    try:
        return {"content": read(), "trouble": None}
    except OSError as error:
        why = f"{Path(error.filename or '').name} {error.strerror or error}"
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        why = f"its files have unexpected content ({type(error).__name__})"
    return {"trouble": why}


def _curves(state: RunState) -> Curves:
    """Return the curves of one of several runs; none if its file cannot be read."""
    try:
        return read_curves(state.run_dir.metrics)
    except OSError:
        return {}


def _page(template: str, title: str, **parts: Any) -> str:
    """Return the file, without external addresses and without values of secret variables."""
    from markupsafe import escape

    text = render_page(template, title=title, policy=_POLICY, **parts)
    return str(redact(text, {name: str(escape(value)) for name, value in os.environ.items()}))


def _trials(sweep: SweepResult, last: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the table of trials, the best one marked.

    Args:
        sweep: its sweep.json.
        last: last metrics of each trial, in order.
    """
    keys = [key for key in _COMPARED if key != sweep.metric and any(key in metrics for metrics in last)]
    rows = [
        (
            trial.run_dir.path.name,
            render_macro("code", " ".join(trial.overrides)),
            render_macro("badge", trial.status),
            trial.exit_code,
            "-" if trial.value is None else number_text(trial.value),
            "best" if trial is sweep.best else "",
            *_last_values(metrics, keys),
        )
        for trial, metrics in zip(sweep.trials, last, strict=True)
    ]
    head = ("trial", "overrides", "status", "exit code", sweep.metric, "", *keys)
    return {"title": f"Trials, {sweep.goal} {sweep.metric}", "head": head, "rows": rows}

"""Whole reports: of one run, of several runs, of a sweep."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from launcher.config.option_text import flatten_options
from launcher.config.snapshot import read_snapshot
from launcher.errors import ConfigError
from launcher.errors.secrets import redact
from launcher.protocol.plan import Plan
from launcher.runs.report.charts import Curves, charts_of, read_curves
from launcher.runs.report.html import Html, element, section, table_of
from launcher.runs.report.sections import (
    config_of,
    environment_of,
    events_of,
    failure_of,
    files_of,
    findings_of,
    head_of,
    known_environment,
    metrics_of,
    number_text,
    plan_of,
    profiles_of,
    sample_of,
    status_of,
)
from launcher.runs.state import RunState, read_run_state
from launcher.runs.sweeps import SweepResult

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_HEAD_BYTES = 1000
_COMPARED = ("train/loss", "eval/loss", "perf/tokens_per_s", "memory/peak_bytes")


def page_of_run(state: RunState, *, render_plan: Callable[[Plan], str]) -> str:
    """Return the report of one run; ``render_plan`` returns a plan as text."""
    name = f"{state.name} {state.run_id}"
    return _page(
        name,
        head_of(state),
        _part("Why it failed", lambda: failure_of(state)),
        _part("Curves", lambda: section("Curves", list(charts_of({name: read_curves(state.run_dir.metrics)})))),
        _part("Findings", lambda: findings_of(state.run_dir)),
        _part("Profile", lambda: profiles_of(state.run_dir)),
        _part("Sample", lambda: sample_of(state.run_dir)),
        _part("Last metrics", lambda: metrics_of(state)),
        _part("Environment", lambda: environment_of(state)),
        _part("Configuration", lambda: config_of(state.run_dir)),
        _part("Plan", lambda: plan_of(state.run_dir, render_plan=render_plan)),
        _part("Events", lambda: events_of(state.run_dir)),
        _part("Files", lambda: files_of(state.run_dir)),
    )


def page_of_runs(states: Sequence[RunState]) -> str:
    """Return the report of several runs: side by side, with shared charts."""
    named = {f"{state.name} {state.run_id}": state for state in states}
    return _page(
        f"{len(named)} runs: {', '.join(dict.fromkeys(state.name for state in states))}",
        section("Runs", _side_by_side(named)),
        *_together(named),
    )


def page_of_sweep(sweep: SweepResult) -> str:
    """Return the report of a sweep: its trials, with shared charts."""
    named = {trial.name: read_run_state(trial.run_dir) for trial in sweep.trials}
    return _page(
        f"{sweep.folder.parent.name} {sweep.folder.name}",
        trials_table(sweep, [state.metrics for state in named.values()]),
        *_together(named),
    )


def _together(named: Mapping[str, RunState]) -> list[Html]:
    """Return the comparison of several runs."""
    return [
        section("Curves", list(charts_of({name: _curves(one) for name, one in named.items()}))),
        section("Configurations, where they differ", _apart({name: _options(one) for name, one in named.items()})),
        section(
            "Environments, where they differ",
            _apart({name: known_environment(one.run_dir) for name, one in named.items()}),
        ),
        *(
            section(
                name,
                head_of(one),
                _part("Why it failed", partial(failure_of, one)),
                _part("Findings", partial(findings_of, one.run_dir)),
                _part("Configuration", partial(config_of, one.run_dir)),
            )
            for name, one in named.items()
        ),
    ]


def _side_by_side(named: Mapping[str, RunState]) -> Html:
    keys = [key for key in _COMPARED if any(key in state.metrics for state in named.values())]
    rows = [
        [name, status_of(one), *(number_text(one.metrics[key]) if key in one.metrics else "-" for key in keys)]
        for name, one in named.items()
    ]
    return table_of(("run", "status", *keys), rows)


def _apart(sides: Mapping[str, Mapping[str, str]]) -> Html | None:
    """Return the options in which the runs differ."""
    keys = list(dict.fromkeys(key for side in sides.values() for key in side))
    differing = [key for key in keys if len({side.get(key) for side in sides.values()}) > 1]
    rows = [[key, *(side.get(key, "-") for side in sides.values())] for key in differing]
    return table_of(("", *sides), rows) if rows else None


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
        return html.escape(_POLICY).encode() in opened.read(_HEAD_BYTES)


def _part(title: str, make: Callable[[], Html]) -> Html:
    """Return a part of the page, or why it cannot be shown when files are damaged."""
    try:
        return make()
    except OSError as error:
        why = f"{Path(error.filename or '').name} {error.strerror or error}"
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        why = f"its files are not what a run writes ({type(error).__name__})"
    return section(title, element("p", f"cannot be shown: {why}"))


def _curves(state: RunState) -> Curves:
    """Return the curves of one of several runs; none if its file cannot be read."""
    try:
        return read_curves(state.run_dir.metrics)
    except OSError:
        return {}


def _page(title: str, *content: Html) -> str:
    """Return the file, without external addresses and without values of secret variables."""
    style = files("launcher.runs.report").joinpath("page.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content=_POLICY,
        ),
        element("title", title),
        element("style", Html(style)),
    )
    body = element("body", element("main", element("h1", title), *content))
    text = f"<!doctype html>\n{element('html', head, body, lang='en')}\n"
    return str(redact(text, {name: html.escape(value) for name, value in os.environ.items()}))


_TRIAL_METRICS = ("train/loss", "eval/loss", "perf/tokens_per_s", "memory/peak_bytes")
"""Metrics shown for a trial, besides the one that ranks the trials."""


def trials_table(sweep: SweepResult, last: Sequence[dict[str, Any]]) -> Html:
    """Return the table of trials, the best one marked.

    Args:
        sweep: its sweep.json.
        last: last metrics of each trial, in order.
    """
    keys = [key for key in _TRIAL_METRICS if key != sweep.metric and any(key in metrics for metrics in last)]
    head = ("trial", "overrides", "status", "exit code", sweep.metric, "", *keys)
    return section(f"Trials, {sweep.goal} {sweep.metric}", table_of(head, list(_trial_rows(sweep, last, keys))))


def _trial_rows(sweep: SweepResult, last: Sequence[dict[str, Any]], keys: Sequence[str]) -> Iterator[list[str]]:
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

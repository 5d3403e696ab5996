"""``launch report``: a run, several runs or a sweep as one HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.cli.arguments import Arguments, parse_arguments
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.planning.render import render_plan
from launcher.protocol.rundir import RunDir
from launcher.runs.index import find_run
from launcher.runs.report.pages import is_report, page_of_run, page_of_runs, page_of_sweep
from launcher.runs.state import read_run_state
from launcher.runs.sweeps import find_sweep, read_sweep
from launcher.utils.files import write_atomic
from launcher.utils.text import printable

HELP = """\
launch report [RUN…] [--output FILE] [--root DIR]: one HTML file that shows a run and needs nothing besides itself.

  launch report                           the newest run in ./runs, into its own directory
  launch report 20260101                  the one whose id begins so
  launch report runs/a/2026… runs/a/2026… several: their curves over each other, and where they differ
  launch report runs/a/sweep-2026…        a sweep: its trials
  launch report --output today.html       somewhere else

It holds curves, tables, pictures, configuration, plan and environment, and why a run failed; no secrets, no scripts,
nothing from a network. Without --output it is report.html in the directory of the run or sweep; of several runs, here.
"""
_FILE = "report.html"


def run(arguments: Sequence[str]) -> int:
    """Write a report and say where."""
    line = parse_arguments(arguments, values=("--output",))
    if line.help:
        print(HELP)
        return 0
    folder, text = _page(line)
    file = line.path("--output", folder / _FILE)
    _refuse(file)
    try:
        write_atomic(file, text)
    except OSError as error:
        raise EnvironmentProblem(f"{file} cannot be written: {error.strerror}; name another with --output") from error
    print(printable(f"report: {file}"))
    return 0


def _page(line: Arguments) -> tuple[Path, str]:
    """Return where the report belongs, and its text."""
    sweep = find_sweep(line.words[0], line.root) if len(line.words) == 1 else None
    if sweep is not None:
        return sweep, page_of_sweep(read_sweep(sweep))
    runs = list(dict.fromkeys(_runs(line)))
    if len(runs) == 1:
        return runs[0].path, page_of_run(read_run_state(runs[0]), render_plan=render_plan)
    return Path.cwd(), page_of_runs([read_run_state(one) for one in runs])


def _runs(line: Arguments) -> Iterator[RunDir]:
    """Yield the runs that are named; of a sweep among several names, its trials."""
    for word in line.words or (None,):
        sweep = find_sweep(word, line.root) if word is not None else None
        if sweep is None:
            yield find_run(word, line.root)
        else:
            yield from (trial.run_dir for trial in read_sweep(sweep).trials)


def _refuse(file: Path) -> None:
    if file.is_dir():
        raise ConfigError("--output", file, why="is a folder", fix=f"write --output {file / _FILE}")
    if not file.parent.is_dir():
        raise ConfigError("--output", file, why=f"there is no folder {file.parent}", fix="make it, or name another")
    if file.is_file() and not is_report(file):
        why, fix = "is there already and is not a report", "name another, or move it away"
        raise ConfigError("--output", file, why=why, fix=fix)

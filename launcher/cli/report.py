"""``launch report``: a run, several runs or a sweep as one HTML file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.cli.arguments import Arguments
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.planning.render import render_plan
from launcher.protocol.rundir import RunDir
from launcher.runs.index import find_run
from launcher.runs.report.pages import is_report, page_of_run, page_of_runs, page_of_sweep
from launcher.runs.state import read_run_state
from launcher.runs.sweeps import find_sweep, read_sweep
from launcher.utils.files import write_atomic
from launcher.utils.text import printable

_FILE = "report.html"


def run(arguments: Arguments) -> int:
    """Write a report and print its path."""
    folder, text = _page(arguments)
    file = arguments.output or folder / _FILE
    _check_output(file)
    try:
        write_atomic(file, text)
    except OSError as error:
        raise EnvironmentProblem(f"{file} cannot be written: {error.strerror}; name another with --output") from error
    print(printable(f"report: {file}"))
    return 0


def _page(arguments: Arguments) -> tuple[Path, str]:
    """Return the default folder of the report, and its text."""
    sweep = find_sweep(arguments.runs[0], arguments.root) if len(arguments.runs) == 1 else None
    if sweep is not None:
        return sweep, page_of_sweep(read_sweep(sweep))
    runs = list(dict.fromkeys(_runs(arguments)))
    if len(runs) == 1:
        return runs[0].path, page_of_run(read_run_state(runs[0]), render_plan=render_plan)
    return Path.cwd(), page_of_runs([read_run_state(one) for one in runs])


def _runs(arguments: Arguments) -> Iterator[RunDir]:
    """Yield the named runs; of a sweep among several names, its trials."""
    for word in arguments.runs or (None,):
        sweep = find_sweep(word, arguments.root) if word is not None else None
        if sweep is None:
            yield find_run(word, arguments.root)
        else:
            yield from (trial.run_dir for trial in read_sweep(sweep).trials)


def _check_output(file: Path) -> None:
    if file.is_dir():
        raise ConfigError("--output", file, why="is a folder", fix=f"write --output {file / _FILE}")
    if not file.parent.is_dir():
        raise ConfigError("--output", file, why=f"there is no folder {file.parent}", fix="create it, or choose another")
    if file.is_file() and not is_report(file):
        why, fix = "exists and is not a report", "choose another, or move it"
        raise ConfigError("--output", file, why=why, fix=fix)

"""Start a saved run again with values changed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launcher.backends.registry import executor_of
from launcher.cli.arguments import Arguments
from launcher.config.compose import Composition
from launcher.config.folders import groups
from launcher.config.overrides import suggest_overrides
from launcher.config.run import Run, run_to_tree
from launcher.errors import ConfigError
from launcher.errors.secrets import is_secret_name
from launcher.execution.lifecycle import start_run
from launcher.execution.prepare import prepare
from launcher.planning.render import render_plan
from launcher.protocol.rundir import RunDir
from launcher.runs.index import find_run
from launcher.runs.state import read_run_state
from launcher.utils.schema import to_tree
from launcher.utils.text import json_text


def find_run_or_option(word: str, arguments: Arguments) -> Path:
    """Return the folder of the run that ``word`` names.

    Raises:
        ConfigError: there is no such run; the message shows how to write an option of that name.
    """
    try:
        return find_run(word, arguments.root).path
    except ConfigError as error:
        meant = suggest_overrides(word, groups(arguments.config_dir))
        if not meant:
            raise
        why = "is neither a run nor of the form option=value"
        raise ConfigError(word, why=why, fix=f"write {' or '.join(meant)}") from error


def start_saved_run(run: Run, arguments: Arguments, *, folder: Path) -> int:
    """Start ``run`` and return its exit code; with ``dry_run``, print its plan.

    Args:
        run: the saved run, changed.
        arguments: the parsed command line.
        folder: its run directory.

    Raises:
        ConfigErrors: every reason why it cannot start.
    """
    if arguments.multirun or arguments.config_dir:
        flag = "-m" if arguments.multirun else "--config-dir"
        raise ConfigError(flag, why="does not apply to a saved run, which is composed already", fix="leave it out")
    if arguments.json and not arguments.dry_run:
        raise ConfigError("--json", why="applies to plans only", fix="add dry_run=true")
    for name in _missing_secrets(folder):
        why = f"the run used {name} of its shell, and this shell does not set it"
        print(f"warning: {why}: export it if ranks need it", file=sys.stderr)
    prepared = prepare(Composition(run=run, tree=run_to_tree(run), sweep=None, overrides=tuple(arguments.overrides)))
    if not arguments.dry_run:
        return start_run(prepared, executor_of(prepared.run))
    plan = prepared.plan
    print(json_text(to_tree(plan)) if arguments.json else render_plan(plan), end="")
    return 0


def _missing_secrets(folder: Path) -> list[str]:
    """Return the secret variables that the run used and this process lacks.

    No file stores their values.
    """
    names = read_run_state(RunDir(folder)).plan.get("forwarded_env", [])
    return [name for name in names if is_secret_name(name) and name not in os.environ]

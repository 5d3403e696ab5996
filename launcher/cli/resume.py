"""``launch resume RUN``: continue a run in its directory, from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.checkpoint.resume import resume_of_restart
from launcher.cli.arguments import Arguments
from launcher.cli.saved_run import start_saved_run
from launcher.config.run import Run
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.runs.config_source import load_saved_run
from launcher.runs.index import find_run
from launcher.runs.state import read_run_state
from launcher.utils.text import shell_word


def run(arguments: Arguments) -> int:
    """Resume the run whose directory is the first argument."""
    folder = find_run(arguments.run, arguments.root).path
    return start_saved_run(_continued(folder, arguments.overrides), arguments, folder=folder)


def _continued(folder: Path, words: Sequence[str]) -> Run:
    """Return the run of ``folder``, changed by ``words``, set to continue where it stopped.

    Raises:
        ConfigError: starting over would replace its results, or lose the checkpoint that it started from.
    """
    run, state = load_saved_run(folder, words), read_run_state(RunDir(folder))
    if run.job.resumes and not state.has_checkpoint:
        if state.status == "completed":
            why = "has completed and saved no checkpoint, so there is nothing to continue from"
            fix = f"launch rerun {shell_word(str(folder))} starts it again; checkpoint.at_end=true saves a checkpoint"
            raise ConfigError("run", folder, why=why, fix=fix)
        if resume_of_restart(run.checkpoint.resume, RunDir(folder)) != "auto":
            why = f"has no checkpoint of its own yet; it started from checkpoint.resume={run.checkpoint.resume}"
            fix = f"launch rerun {shell_word(str(folder))} starts from it again, in a new directory"
            raise ConfigError("run", folder, why=why, fix=fix)
    return replace(
        run,
        run=replace(run.run, dir=str(folder)),
        checkpoint=replace(run.checkpoint, resume="auto"),
    )

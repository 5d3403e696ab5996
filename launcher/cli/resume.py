"""``launch resume RUN``: continue a run in its own directory, from its newest complete checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.checkpoint.resume import resume_of_restart
from launcher.cli.arguments import parse_command_line
from launcher.cli.saved_run import start_saved_run
from launcher.config.run import Run
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.runs.config_source import load_saved_run
from launcher.runs.index import find_run
from launcher.runs.state import read_run_state
from launcher.utils.text import shell_word

HELP = """\
launch resume RUN [OVERRIDES] [--root DIR]: continue RUN from its newest complete checkpoint.

  launch resume runs/gpt2_tiny/20260101-120000-abcd
  launch resume 20260101-120000-abcd                   the same; an id, or how it begins, is looked up in ./runs
  launch resume 20260101-120000-abcd job.steps=400     train on, further than planned
  launch resume 20260101-120000-abcd dry_run=true      print the plan, start nothing

The run keeps its directory and its W&B id. At the same number of ranks it continues exactly.
"""


def run(arguments: Sequence[str]) -> int:
    """Resume the run whose directory is the first argument."""
    line = parse_command_line(arguments, takes_runs=True)
    if line.help or not line.words:
        print(HELP)
        return 0 if line.help else 2
    folder, words = find_run(line.words[0], line.root).path, line.words[1:]
    return start_saved_run(_continued(folder, words), line, folder=folder)


def _continued(folder: Path, words: Sequence[str]) -> Run:
    """Return the run of ``folder`` with values changed by ``words``, set to continue where it stopped.

    Raises:
        ConfigError: beginning anew would replace what it has, or lose the checkpoint that it began from.
    """
    run, state = load_saved_run(folder, words), read_run_state(RunDir(folder))
    if run.job.resumes and not state.has_checkpoint:
        if state.status == "completed":
            why = "has completed and kept no checkpoint, so there is nothing to continue from"
            fix = f"launch rerun {shell_word(str(folder))} starts it anew; checkpoint.at_end=true keeps a checkpoint"
            raise ConfigError("run", folder, why=why, fix=fix)
        if resume_of_restart(run.checkpoint.resume, RunDir(folder)) != "auto":
            why = f"has no checkpoint of its own yet; it began from checkpoint.resume={run.checkpoint.resume}"
            fix = f"launch rerun {shell_word(str(folder))} begins there again, in a new directory"
            raise ConfigError("run", folder, why=why, fix=fix)
    return replace(
        run,
        run=replace(run.run, dir=str(folder)),
        checkpoint=replace(run.checkpoint, resume="auto"),
    )

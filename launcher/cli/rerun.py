"""``launch rerun RUN``: start what a stored run describes once more, in a directory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.cli.arguments import parse_command_line
from launcher.cli.saved_run import start_saved_run
from launcher.config.data.base import CHECKPOINT_TOKENIZER, Corpus
from launcher.config.run import Run
from launcher.runs.config_source import load_saved_run
from launcher.runs.index import find_run

HELP = """\
launch rerun RUN [OVERRIDES] [--root DIR]: start a run with the configuration of RUN, in a new run directory.

  launch rerun runs/gpt2_tiny/20260101-120000-abcd
  launch rerun 20260101-120000-abcd optimizer.lr=1e-4    the same, but for one value; an id is looked up in ./runs
  launch rerun 20260101-120000-abcd dry_run=true         print the plan, start nothing

It begins anew: the checkpoints of RUN are left alone. launch resume continues instead.
"""


def run(arguments: Sequence[str]) -> int:
    """Run what the first argument describes, changed by the others."""
    line = parse_command_line(arguments, takes_runs=True)
    if line.help or not line.words:
        print(HELP)
        return 0 if line.help else 2
    folder = find_run(line.words[0], line.root).path
    return start_saved_run(_anew(folder, line.words[1:]), line, folder=folder)


def _anew(folder: Path, words: Sequence[str]) -> Run:
    """Return the run of ``folder`` with values changed by ``words``, set to begin in a directory of its own."""
    run = load_saved_run(folder, words)
    given = {word.partition("=")[0].lstrip("+") for word in words}
    if "run.dir" not in given:
        run = replace(run, run=replace(run.run, dir=None))
    if run.checkpoint.resume == "auto" and "checkpoint.resume" not in given:  # left by launch resume
        run = replace(run, checkpoint=replace(run.checkpoint, resume="none"))
        data = run.data
        if isinstance(data, Corpus) and data.tokenizer == CHECKPOINT_TOKENIZER and "data.tokenizer" not in given:
            run = replace(run, data=replace(data, tokenizer="bpe"))
    return run

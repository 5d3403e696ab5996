"""``launch rerun RUN``: start a saved run again, in a new run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.cli.arguments import Arguments
from launcher.cli.saved_run import start_saved_run
from launcher.config.data.base import CHECKPOINT_TOKENIZER, Corpus
from launcher.config.run import Run
from launcher.runs.config_source import load_saved_run
from launcher.runs.index import find_run


def run(arguments: Arguments) -> int:
    """Run the configuration of the first argument, changed by the overrides."""
    folder = find_run(arguments.run, arguments.root).path
    return start_saved_run(_restarted(folder, arguments.overrides), arguments, folder=folder)


def _restarted(folder: Path, words: Sequence[str]) -> Run:
    """Return the run of ``folder``, changed by ``words``, set to start in a new directory."""
    run = load_saved_run(folder, words)
    given = {word.partition("=")[0].lstrip("+") for word in words}
    if "run.dir" not in given:
        run = replace(run, run=replace(run.run, dir=None))
    if run.checkpoint.resume == "auto" and "checkpoint.resume" not in given:  # set by launch resume
        run = replace(run, checkpoint=replace(run.checkpoint, resume="none"))
        data = run.data
        if isinstance(data, Corpus) and data.tokenizer == CHECKPOINT_TOKENIZER and "data.tokenizer" not in given:
            run = replace(run, data=replace(data, tokenizer="bpe"))
    return run

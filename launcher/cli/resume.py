"""``launch resume RUN``: continue a run in its directory, from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.checkpoint.adapter_base import missing_base
from launcher.checkpoint.resume import find_checkpoint, resume_of_restart
from launcher.checkpoint.store import silent
from launcher.cli.arguments import Arguments
from launcher.cli.saved_run import start_saved_run
from launcher.config.run import Run
from launcher.errors import ConfigError
from launcher.execution.resumed_batch import keep_global_batch
from launcher.protocol.rundir import RunDir
from launcher.runs.config_source import load_saved_run
from launcher.runs.index import find_run
from launcher.runs.state import read_run_state
from launcher.utils.text import shell_word

_BATCH_OPTIONS = (
    "job.global_batch=",
    "job.micro_batch=",
    "job.gradient_accumulation_steps=",
    "parallel.micro_batches=",
)


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
    if run.lora is not None and run.backend.shares_paths and (gone := missing_base(run.model)) is not None:
        why = f"trains an adapter of the weights in {gone}, which is not there"
        is_name = run.model.weights == "pretrained" or gone != (run.model.local_weights or gone).absolute()
        option = "model.name" if is_name else "model.weights"
        fix = f"if it has moved: launch resume {shell_word(str(folder))} {option}=FOLDER"
        raise ConfigError("run", folder, why=why, fix=fix)
    if run.job.resumes and not state.has_checkpoint:
        if state.status == "completed":
            why = "has completed and saved no checkpoint, so there is nothing to continue from"
            fix = f"launch rerun {shell_word(str(folder))} starts it again; checkpoint.at_end=true saves a checkpoint"
            raise ConfigError("run", folder, why=why, fix=fix)
        if resume_of_restart(run.checkpoint.resume, RunDir(folder)) != "auto":
            why = f"has no checkpoint of its own yet; it started from checkpoint.resume={run.checkpoint.resume}"
            fix = f"launch rerun {shell_word(str(folder))} starts from it again, in a new directory"
            raise ConfigError("run", folder, why=why, fix=fix)
    continued = replace(
        run,
        run=replace(run.run, dir=str(folder)),
        checkpoint=replace(run.checkpoint, resume="auto"),
    )
    return _with_its_batch(continued, folder, words)


def _with_its_batch(run: Run, folder: Path, words: Sequence[str]) -> Run:
    """Return the run with the global batch that it had, unless ``words`` say another."""
    if any(word.startswith(_BATCH_OPTIONS) for word in words) or not run.job.resumes:
        return run
    try:
        saved = find_checkpoint("auto", RunDir(folder), say=silent)
        hosts = run.backend.hosts(max_ranks=run.job.max_ranks(run))
    except ConfigError:
        return run  # preparing the run reports it
    return run if saved is None else keep_global_batch(run, saved, world_size=sum(host.slots for host in hosts))

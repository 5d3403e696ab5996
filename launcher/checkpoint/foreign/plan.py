"""What the plan says of a run that resumes from another program's checkpoint. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.checkpoint.resume import differing_keys, is_checkpoint
from launcher.config.job.train import Train
from launcher.config.model.config_json import sizes_from_config
from launcher.config.model.folder import read_config, weight_files
from launcher.config.optimizer import AdamW
from launcher.config.option_text import quoted_word
from launcher.config.run import Run
from launcher.errors import ConfigError
from launcher.protocol.foreign_files import ForeignCheckpoint, find_foreign
from launcher.protocol.rundir import RunDir
from launcher.utils.schema import to_tree
from launcher.utils.text import shell_word, short_path


def foreign_to_resume(resume: str) -> ForeignCheckpoint | None:
    """Return the checkpoint of another program that ``checkpoint.resume`` names, if any.

    Raises:
        ConfigError: it is one that cannot be read.
    """
    folder = Path(resume).expanduser()
    if resume in ("none", "auto") or not folder.is_dir() or is_checkpoint(folder) or RunDir(folder).is_run:
        return None
    try:
        return find_foreign(folder)
    except (OSError, ValueError) as error:
        fix = "save the whole model by the program that wrote it, and give that folder to model.weights"
        raise ConfigError("checkpoint.resume", folder, why=f"cannot be resumed from: {error}", fix=fix) from error


def validate_foreign(foreign: ForeignCheckpoint, run: Run) -> Iterator[ConfigError]:
    """Yield each reason why a run cannot continue from a checkpoint of another program."""
    option, folder = "checkpoint.resume", foreign.folder
    weights_only = f"set model.weights={shell_word(str(folder))} checkpoint.resume=none to start over from its weights"
    if not run.job.resumes or not run.batched_job.trains:
        return
    if run.optimizer.kind != AdamW.kind:
        why = f"takes over moments of AdamW, and this run has optimizer={run.optimizer.kind}"
        yield ConfigError(option, folder, why=why, fix=f"set optimizer=adamw, or {weights_only}")
    if foreign.step is None and not foreign.may_hold_moments:
        why = f"is a {foreign.title} without an optimizer, and nothing in it says how many steps were done"
        yield ConfigError(option, folder, why=why, fix=weights_only)
    counts_epochs = isinstance(run.job, Train) and run.job.epochs is not None
    steps = None if counts_epochs else run.job.optimizer_steps
    if foreign.step is not None and steps is not None and foreign.step >= steps:
        why = f"{folder} is already at step {foreign.step}"
        fix = f"set job.steps to more than {foreign.step}"
        yield ConfigError("job.steps", steps, why=why, fix=fix)
    try:
        sizes = sizes_from_config(read_config(foreign.folder))
    except (OSError, ValueError):
        return  # ranks compare the tensors
    if sizes is None:
        return
    written, ours = to_tree(sizes.architecture()), to_tree(run.model.architecture())
    if names := differing_keys(written, ours):
        why = ", ".join(f"its {name} is {written.get(name)}, this run's is {ours.get(name)}" for name in names)
        yield ConfigError(
            option,
            folder,
            why=f"is of another model: {why}",
            fix=f"set model=hf {quoted_word('model.name', str(folder))}",
        )


def describe_foreign(foreign: ForeignCheckpoint) -> str:
    """Return what a run takes over from another program's checkpoint, and what that lacks."""
    at = "" if foreign.step is None else f"step {foreign.step} of "
    taken = "weights and moments" if foreign.may_hold_moments else "weights (moments start at zero)"
    lacks = "not in it: order of the data, random generators, loss scale"
    return f"{at}{short_path(foreign.folder)} ({foreign.title}): {taken} are converted; {lacks}"


def foreign_weights_details(run: Run) -> Mapping[str, str]:
    """Return the line of the plan on weights from a checkpoint of another program."""
    folder = run.model.local_weights
    try:
        if folder is None or not folder.is_dir() or weight_files(folder):
            return {}
        foreign = find_foreign(folder)
    except (OSError, ValueError):
        return {}  # validate_machine reports it
    if foreign is None:
        return {}
    at = "" if foreign.step is None else f"step {foreign.step} of "
    return {"weights": f"{at}{short_path(foreign.folder)} ({foreign.title}), converted as they are read"}

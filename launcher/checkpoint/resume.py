"""Find the checkpoint a run resumes from, and check that it fits the run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.checkpoint.manifest import MANIFEST
from launcher.checkpoint.store import SavedCheckpoint, Say, complete_checkpoints, open_checkpoint
from launcher.config.model.base import Model
from launcher.config.model.hf import last_part
from launcher.config.optimizer import Optimizer
from launcher.config.parallel.base import Parallel
from launcher.config.precision import Precision
from launcher.config.schedule import Schedule
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.utils.schema import to_tree
from launcher.utils.text import shell_word

BEST = "best"
_SELECTED = re.compile(r"(?P<source>.+)@(?P<selector>best|step_(?P<step>\d+))", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class CheckpointReference:
    """A checkpoint as a user names one: ``SOURCE``, ``SOURCE@best`` or ``SOURCE@step_00000010``."""

    source: str
    """A run id, a run folder, the folder of its checkpoints, or a checkpoint."""
    selector: str | None = None
    """``best``, ``step_<n>``, or ``None`` for the newest."""
    step: int | None = None


def parse_reference(word: str) -> CheckpointReference:
    """Return the run or checkpoint that ``word`` names.

    A folder whose own name ends in ``@best`` is that folder.
    """
    found = _SELECTED.fullmatch(word)
    if found is None or (Path(word).expanduser().exists() and not Path(found["source"]).expanduser().exists()):
        return CheckpointReference(source=word)
    return CheckpointReference(
        source=found["source"], selector=found["selector"], step=int(found["step"]) if found["step"] else None
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` is one checkpoint, whole or not, and not what holds several."""
    return (folder / MANIFEST).exists() or folder.name.startswith("step_")


def find_checkpoint(resume: str, run_dir: RunDir, *, say: Say = print) -> SavedCheckpoint | None:
    """Return the checkpoint that ``checkpoint.resume`` names; ``None`` to start from scratch.

    Sizes are compared with the manifest, contents are not: ranks do that, see :func:`candidates`.

    Args:
        resume: ``none``; ``auto`` for the newest complete one of ``run_dir``, if it has any; or the folder of a
            checkpoint, of a run, or of a run's checkpoints.
        run_dir: this run's own directory.
        say: takes one line for each incomplete checkpoint passed over.

    Raises:
        ConfigError: the folder named is missing or holds no complete checkpoint, or ``run_dir`` only damaged ones.
    """
    return next(resume_candidates(resume, run_dir, say=say), None)


def resume_candidates(resume: str, run_dir: RunDir, *, say: Say = print) -> Iterator[SavedCheckpoint]:
    """Yield the complete checkpoints that ``checkpoint.resume`` allows, best first.

    Arguments and errors are those of :func:`find_checkpoint`.
    """
    if resume == "auto":
        found, errors = False, list[str]()

        def note(line: str) -> None:
            errors.append(line)
            say(line)

        for saved in complete_checkpoints(run_dir.checkpoints, say=note):
            found = True
            yield saved
        if not found and errors:
            raise no_intact_checkpoint("auto", "; ".join(errors))
    elif resume != "none":
        yield from find_checkpoints(Path(resume).expanduser(), say=say)


def resume_of_restart(resume: str, run_dir: RunDir) -> str:
    """Return the ``checkpoint.resume`` of a run that restarts in ``run_dir``.

    ``auto``, but for a run that began from another's checkpoint and has none of its own yet: that begins there again.
    """
    has_own = any(run_dir.checkpoints.glob("step_*/manifest.json"))
    return "auto" if has_own or resume == "none" else resume


def no_intact_checkpoint(resume: str, why: str) -> ConfigError:
    """Return the error of a run whose checkpoints are all damaged.

    Starting over would replace them.
    """
    fix = "copy an intact one there, or name one by checkpoint.resume=DIR in a new run"
    return ConfigError("checkpoint.resume", resume, why=f"no checkpoint is intact: {why}", fix=fix)


def find_checkpoints(folder: Path, *, say: Say = print, option: str = "checkpoint.resume") -> Iterator[SavedCheckpoint]:
    """Yield the complete checkpoints in ``folder``, newest first.

    It is a checkpoint, a run, or a run's ``checkpoints``.

    Raises:
        ConfigError: there is none that is complete.
    """
    fix = f"name a run directory, one of its checkpoints/step_…, or leave {option} out"
    if not folder.is_dir():
        why = "is a file" if folder.exists() else "no such folder"
        raise ConfigError(option, folder, why=why, fix=fix)
    if is_checkpoint(folder):
        try:
            yield open_checkpoint(folder)
        except ValueError as error:
            raise ConfigError(option, folder, why=f"is not complete: {error}", fix=fix) from error
        return
    below, found = RunDir(folder).checkpoints, False
    for saved in complete_checkpoints(below if below.is_dir() else folder, say=say):
        found = True
        yield saved
    if not found:
        raise ConfigError(option, folder, why="holds no complete checkpoint", fix=fix)


def validate_resume(
    saved: SavedCheckpoint, *, model: Model, parallel: Parallel, precision: Precision, world_size: int
) -> Iterator[ConfigError]:
    """Yield each reason why a run of these components cannot continue from ``saved`` exactly."""
    manifest = saved.manifest
    yield from _other_model(saved, model)
    if manifest.precision != precision.kind:
        why = f"was written with precision={manifest.precision}, this run has precision={precision.kind}"
        yield _error(saved, why, f"set precision={manifest.precision}")
    yield from _other_strategy(saved, parallel, world_size)


def lr_jump_warning(saved: SavedCheckpoint, optimizer: Optimizer, schedule: Schedule, steps: int) -> str | None:
    """Return a warning if a new schedule makes the learning rate jump on resume, or ``None``."""
    before, done = saved.manifest.lr, saved.manifest.step
    if before is None or math.isclose(before, optimizer.lr * schedule.factor(done - 1, steps), rel_tol=1e-3):
        return None
    after = optimizer.lr * schedule.factor(done, steps)
    return (
        f"the learning rate jumps from {before:.4g} (step {done}, in {saved.folder.name}) to {after:.4g} (step "
        f"{done + 1}): job.steps={steps}, optimizer.lr={optimizer.lr:g} or schedule={schedule.kind} is not what the "
        f"checkpoint was trained with. To keep the rate, start a new run with checkpoint.resume={saved.folder} "
        f"schedule=constant optimizer.lr={before:.4g}"
    )


def _other_model(saved: SavedCheckpoint, model: Model) -> Iterator[ConfigError]:
    written, ours = saved.manifest.architecture, to_tree(model.architecture())
    if ours.get("family") == "hf" != written.get("family"):
        return  # its files are not here: another check rejects this, or loading them shows what they are
    if "name" in written:  # of a folder, as the user typed it: from another folder it is another path
        written = {**written, "name": last_part(str(written["name"]))}
    names = [name for name in sorted(written.keys() | ours.keys()) if written.get(name) != ours.get(name)]
    if not names:
        return
    differences = ", ".join(f"its {name} is {written.get(name)}, this run's is {ours.get(name)}" for name in names)
    run = saved.folder.parent.parent
    if "family" not in names and all(name in written and hasattr(model, name) for name in names):
        fix = f"set {' '.join(f'model.{name}={written[name]}' for name in names)}"
    elif RunDir(run).snapshot.is_file():
        fix = f"choose the model it was trained with, which this prints: launch show {shell_word(str(run))}"
    else:
        fix = f"choose the model it was trained with, as {saved.folder / 'model/config.json'} describes it"
    yield _error(saved, f"is of another model: {differences}", fix)


def _other_strategy(saved: SavedCheckpoint, parallel: Parallel, world_size: int) -> Iterator[ConfigError]:
    written, ours, written_on = saved.manifest.parallel, to_tree(parallel), saved.manifest.world_size
    if written.get("kind") != ours["kind"]:
        why = f"was written with parallel of kind {written.get('kind')}, this run's is {ours['kind']}"
        option = f"zero{written.get('stage')}" if written.get("kind") == "zero" else written.get("kind")
        yield _error(saved, why, f"set parallel={option}{_or_weights(saved)}")
        return
    for name in parallel.checkpoint_options:
        if written.get(name) != ours[name]:
            why = f"was written with parallel.{name}={written.get(name)}, this run has {ours[name]}"
            yield _error(saved, why, f"set parallel.{name}={written.get(name)}")
    if written_on != world_size and not parallel.supports_resharding:
        why = f"is partitioned over {written_on} ranks, this run has {world_size}"
        yield _error(saved, why, f"run on {written_on} ranks in all (backend.ranks counts those of one host)")


def _or_weights(saved: SavedCheckpoint) -> str:
    """Return the advice to start over from a checkpoint's weights if they are whole, else ""."""
    if saved.manifest.parallel.get("kind") not in ("single", "ddp"):
        return ""
    return f", or model.weights={saved.folder} checkpoint.resume=none to start over from its weights"


def _error(saved: SavedCheckpoint, why: str, fix: str) -> ConfigError:
    return ConfigError("checkpoint.resume", saved.folder, why=why, fix=fix)

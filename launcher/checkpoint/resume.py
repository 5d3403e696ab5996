"""Find the checkpoint a run resumes from, and check that it fits the run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.adapter_base import (
    BaseWeights,
    adapter_differences,
    adapter_tree,
    base_weights,
    is_same_base,
)
from launcher.checkpoint.manifest import MANIFEST, UnsupportedManifest
from launcher.checkpoint.store import (
    SavedCheckpoint,
    Say,
    checkpoint_folders,
    complete_checkpoints,
    open_checkpoint,
)
from launcher.config.adapter import Lora
from launcher.config.model.base import Model
from launcher.config.model.hf import last_part
from launcher.config.optimizer import Optimizer
from launcher.config.parallel.base import Parallel
from launcher.config.precision import Precision
from launcher.config.schedule import Schedule
from launcher.errors import ConfigError
from launcher.protocol.foreign_files import LOOKED_FOR
from launcher.protocol.rundir import RunDir
from launcher.utils.schema import to_tree
from launcher.utils.text import counted, shell_word, short_path

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
        ConfigError: the folder named is missing or holds no complete checkpoint, or ``run_dir`` only damaged ones, or
            another version of this program wrote the one that would be taken.
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

        for saved in _newest_first(run_dir.checkpoints, say=note, option="checkpoint.resume", value="auto"):
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


def find_checkpoints(
    folder: Path, *, say: Say = print, option: str = "checkpoint.resume", skips_unsupported: bool = False
) -> Iterator[SavedCheckpoint]:
    """Yield the complete checkpoints in ``folder``, newest first.

    It is a checkpoint, a run, or a run's ``checkpoints``.

    Args:
        folder: where they are.
        say: takes one line for each that is passed over.
        option: which takes the folder, for messages.
        skips_unsupported: pass over those of another version of this program too, unless there is no other.

    Raises:
        ConfigError: there is none that is complete, or another version of this program wrote the next one.
    """
    fix = f"name a run directory, one of its checkpoints/step_…, or leave {option} out"
    if not folder.is_dir():
        why = "is a file" if folder.exists() else "no such folder"
        raise ConfigError(option, folder, why=why, fix=fix)
    if is_checkpoint(folder):
        try:
            yield open_checkpoint(folder)
        except UnsupportedManifest as error:
            raise ConfigError(option, folder, why=str(error), fix=error.fix) from error
        except ValueError as error:
            raise ConfigError(option, folder, why=f"is not complete: {error}", fix=fix) from error
        return
    below, found = RunDir(folder).checkpoints, False
    there = below if below.is_dir() else folder
    if skips_unsupported:
        for saved in complete_checkpoints(there, say=say):
            found = True
            yield saved
    if not found:
        for saved in _newest_first(there, say=say, option=option, value=folder):
            found = True
            yield saved
    if not found:
        if RunDir(folder).snapshot.is_file():
            fix = f"save one in a new run: launch rerun {shell_word(str(folder))} checkpoint.at_end=true"
        others = "" if below.is_dir() else f", also none of another program (looked for {LOOKED_FOR})"
        raise ConfigError(option, folder, why=f"holds no complete checkpoint{others}", fix=fix)


def _newest_first(folder: Path, *, say: Say, option: str, value: object) -> Iterator[SavedCheckpoint]:
    """Yield the complete checkpoints in ``folder``, newest first, saying which ones are damaged.

    Raises:
        ConfigError: another version of this program wrote the next one. It is no reason to take an older one: the run
            would repeat steps, and replace it.
    """
    for entry in checkpoint_folders(folder):
        try:
            yield open_checkpoint(entry)
        except UnsupportedManifest as error:
            raise ConfigError(option, value, why=str(error), fix=error.fix) from error
        except ValueError as error:
            say(f"checkpoint {entry} is skipped: {error}")


def validate_resume(
    saved: SavedCheckpoint,
    *,
    model: Model,
    optimizer: Optimizer | None = None,
    adapter: Lora | None = None,
    seed: int = 0,
) -> Iterator[ConfigError]:
    """Yield each reason why a run cannot continue from ``saved``.

    Strategy, ranks and precision may differ: every engine reads what every other wrote.

    Args:
        saved: the checkpoint.
        model: of the run.
        optimizer: of the run; ``None`` if it does not train.
        adapter: of the run; ``None`` if it trains all weights.
        seed: of the run, with which random weights are drawn.
    """
    others = list(_other_model(saved, model))
    yield from others
    if not others:
        yield from _other_adapter(saved, adapter, base_weights(model, seed=seed))
    written = saved.manifest.optimizer
    if optimizer is not None and written and written != optimizer.kind:
        why = f"has the state of optimizer={written}, this run has optimizer={optimizer.kind}"
        over = f"model.weights={saved.folder} checkpoint.resume=none to start over from its weights"
        yield _error(saved, why, f"set optimizer={written}, or {over}")


def describe_resume(saved: SavedCheckpoint, *, parallel: Parallel, precision: Precision, world_size: int) -> str:
    """Return what a run continues from, and what is converted.

    For example: ``step 20 of runs/x, fsdp on 4 ranks → zero3 on 2 ranks, bf16 → fp32``.
    """
    manifest = saved.manifest
    before = f"{_strategy(manifest.parallel)} on {counted(manifest.world_size, 'rank')}"
    now = f"{_strategy(to_tree(parallel))} on {counted(world_size, 'rank')}"
    changes = [f"{before} → {now}"] if before != now else []
    if manifest.precision != precision.kind:
        changes.append(f"{manifest.precision} → {precision.kind}")
    return ", ".join([f"step {manifest.step} of {short_path(saved.folder.parent.parent)}", *changes])


def _strategy(parallel: Mapping[str, Any]) -> str:
    kind = str(parallel.get("kind"))
    return f"{kind}{parallel.get('stage')}" if kind == "zero" else kind


def data_warnings(saved: SavedCheckpoint, *, seed: int, global_batch: int, sequence_length: int) -> Iterator[str]:
    """Yield what changes in the data of a run that resumes with other options."""
    data = saved.manifest.data
    if data is None:
        return
    if data.global_batch != global_batch:
        yield (
            f"the global batch changes from {data.global_batch} to {global_batch} sequences after step "
            f"{saved.manifest.step}; the data continues after its first {data.sequences:,} sequences"
        )
    for option, before, now in (
        ("job.seed", data.seed, seed),
        ("job.sequence_length", data.sequence_length, sequence_length),
    ):
        if before != now:
            yield f"{option} changes from {before} to {now}: in the new order some samples repeat or are left out"


def differing_keys(written: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return the keys of two architectures whose values differ."""
    return [name for name in sorted(written.keys() | ours.keys()) if written.get(name) != ours.get(name)]


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
    names = differing_keys(written, ours)
    if not names:
        return
    if "family" in names:
        names = ["family"]  # whose other options mean nothing to this model
    differences = ", ".join(f"its {name} is {written.get(name)}, this run's is {ours.get(name)}" for name in names)
    run = saved.folder.parent.parent
    if "family" not in names and all(name in written and hasattr(model, name) for name in names):
        fix = f"set {' '.join(f'model.{name}={written[name]}' for name in names)}"
    elif RunDir(run).snapshot.is_file():
        fix = f"choose the model it was trained with, which this prints: launch show {shell_word(str(run))}"
    else:
        fix = f"choose the model it was trained with, as {saved.folder / 'model/config.json'} describes it"
    yield _error(saved, f"is of another model: {differences}", fix)


def _other_adapter(saved: SavedCheckpoint, adapter: Lora | None, base: BaseWeights) -> Iterator[ConfigError]:
    """Yield why a checkpoint's adapter, or the weights below it, are not those of the run."""
    written, ours, manifest = saved.manifest.adapter, adapter_tree(adapter), saved.manifest
    over = f"model.weights={saved.folder} checkpoint.resume=none"
    export = f"launch export {shell_word(str(saved.folder))} DIR merge=true"
    if not written and not ours:
        return
    if not written:
        why = f"holds all weights of a model, this run trains adapter={adapter.kind if adapter else 'none'}"
        yield _error(saved, why, f"set adapter=none, or {over} to train an adapter on its weights")
    elif not ours:
        why = f"holds an adapter of {manifest.base}, this run trains all weights"
        yield _error(saved, why, f"leave adapter out to continue it; {export} writes the whole model")
    elif names := adapter_differences(written, ours):
        listed = ", ".join(f"its {name} is {written.get(name)}, this run's is {ours.get(name)}" for name in names)
        yield _error(saved, f"holds another adapter: {listed}", "leave the options of adapter out to continue it")
    elif manifest.base is not None and not is_same_base(manifest.base, base):
        why = f"holds an adapter of {manifest.base}, this run's weights are {base}"
        yield _error(saved, why, "choose the weights that it was trained on")


def _error(saved: SavedCheckpoint, why: str, fix: str) -> ConfigError:
    return ConfigError("checkpoint.resume", saved.folder, why=why, fix=fix)

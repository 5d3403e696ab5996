"""Which checkpoint a run starts from, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.checkpoint.manifest import MANIFEST
from launcher.checkpoint.store import Saved, Say, complete_in, open_checkpoint
from launcher.errors import ConfigError
from launcher.models.base import Model
from launcher.parallel.base import Parallel
from launcher.precision import Precision
from launcher.rundir import RunDir
from launcher.schema import to_tree


def find(resume: str, run_dir: RunDir, *, say: Say = print) -> Saved | None:
    """Return the checkpoint that ``checkpoint.resume`` names, or ``None`` to start from the beginning.

    Args:
        resume: ``none``; ``auto`` for the newest complete one of ``run_dir``, if it has any; or the folder of a
            checkpoint, of a run, or of a run's checkpoints.
        run_dir: this run's own directory.
        say: takes one line for each incomplete checkpoint passed over.

    Raises:
        ConfigError: the folder named is missing or holds no complete checkpoint.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return next(complete_in(run_dir.checkpoints, say=say), None)
    return find_in(Path(resume), say=say)


def find_in(folder: Path, *, say: Say = print) -> Saved:
    """Return the checkpoint in ``folder``, which may be a checkpoint, a run or a run's ``checkpoints``.

    Raises:
        ConfigError: there is none that is complete.
    """
    fix = "name a run directory, one of its checkpoints/step_…, or leave checkpoint.resume out"
    if not folder.is_dir():
        why = "is a file" if folder.exists() else "no such folder"
        raise ConfigError("checkpoint.resume", folder, why=why, fix=fix)
    if (folder / MANIFEST).exists() or folder.name.startswith("step_"):
        try:
            return open_checkpoint(folder)
        except ValueError as error:
            raise ConfigError("checkpoint.resume", folder, why=f"is not complete: {error}", fix=fix) from error
    below = RunDir(folder).checkpoints
    found = next(complete_in(below if below.is_dir() else folder, say=say), None)
    if found is None:
        raise ConfigError("checkpoint.resume", folder, why="holds no complete checkpoint", fix=fix)
    return found


def misfits(
    saved: Saved, *, model: Model, parallel: Parallel, precision: Precision, world_size: int
) -> Iterator[ConfigError]:
    """Yield each reason why a run of these components cannot continue from ``saved`` exactly."""
    manifest = saved.manifest
    yield from _other_model(saved, model)
    if manifest.precision != precision.kind:
        why = f"was written with precision={manifest.precision}, this run has precision={precision.kind}"
        yield _refuse(saved, why, f"set precision={manifest.precision}")
    yield from _other_strategy(saved, parallel, world_size)


def _other_model(saved: Saved, model: Model) -> Iterator[ConfigError]:
    theirs, ours = saved.manifest.architecture, to_tree(model.architecture())
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            why = f"is of another model: its {name} is {theirs.get(name)}, this run's is {ours.get(name)}"
            yield _refuse(saved, why, "choose the model it was trained with: the run.yaml of its run names it")


def _other_strategy(saved: Saved, parallel: Parallel, world_size: int) -> Iterator[ConfigError]:
    theirs, ours, written_on = saved.manifest.parallel, to_tree(parallel), saved.manifest.world_size
    if theirs.get("kind") != ours["kind"]:
        why = f"was written with parallel of kind {theirs.get('kind')}, this run's is {ours['kind']}"
        yield _refuse(saved, why, f"choose a parallel option of kind {theirs.get('kind')}")
        return
    for name in parallel.payload_options:
        if theirs.get(name) != ours[name]:
            why = f"was written with parallel.{name}={theirs.get(name)}, this run has {ours[name]}"
            yield _refuse(saved, why, f"set parallel.{name}={theirs.get(name)}")
    if written_on != world_size and not parallel.resizable:
        why = f"is partitioned over {written_on} ranks, this run has {world_size}"
        yield _refuse(saved, why, f"run on {written_on} ranks in all (backend.ranks counts those of one host)")


def _refuse(saved: Saved, why: str, fix: str) -> ConfigError:
    return ConfigError("checkpoint.resume", saved.folder, why=why, fix=fix)

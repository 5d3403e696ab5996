"""Find and verify the checkpoint that a user names.

That is a run, ``RUN@best``, ``RUN@step_00000010`` or a folder. ``RUN`` is its newest intact checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.checkpoint.locks import CheckpointLocks
from launcher.checkpoint.manifest import COMPARED_BYTES, UnsupportedManifest, damaged_files
from launcher.checkpoint.resume import BEST, find_checkpoints, is_checkpoint, parse_reference
from launcher.checkpoint.store import SavedCheckpoint, best_first, open_checkpoint
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.protocol.state_files import MODEL_FOLDER, TENSOR_FOLDER
from launcher.runs.index import find_run
from launcher.utils.progress import byte_progress


def find_run_or_checkpoint(word: str, root: Path, *, option: str) -> Path | None:
    """Return the folder of a run or checkpoint named without ``@…``; ``None`` if it is neither.

    Args:
        word: as the user typed it.
        root: the folder of all runs.
        option: which takes it, for messages.

    Raises:
        ConfigError: it is no folder, and no run, or more than one, begins like it.
    """
    reference = parse_reference(word)
    folder = Path(reference.source).expanduser()
    if not _exists(folder):
        if reference.source.startswith(("/", "./", "../", "~")):
            return None
        try:
            return find_run(reference.source, root).path.absolute()
        except ConfigError as error:
            why = error.why.replace("is not a run directory", "is not a folder")
            fix = f"write RUN@{BEST} or RUN@step_00000010" if "@" in reference.source else error.fix
            raise ConfigError(option, word, why=why, fix=fix) from error
    folder = folder.absolute()
    if folder.name == MODEL_FOLDER and is_checkpoint(folder.parent):
        return folder.parent
    if _holds_checkpoints(folder):
        # its run.yaml lies two folders above the checkpoint, not above a link to it
        return folder.resolve() if folder.is_symlink() and is_checkpoint(folder) else folder
    if reference.selector is not None:
        fix = f"leave @{reference.selector} out, or name a run"
        raise ConfigError(option, word, why=f"{reference.source} is neither a run nor a checkpoint", fix=fix)
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no permission, or too long a name: opening it raises the error
        return True


def _holds_checkpoints(folder: Path) -> bool:
    """Whether ``folder`` is a run, a run's checkpoints or one of them, and not a model folder."""
    try:
        if (folder / "config.json").is_file():
            return False
        run_dir = RunDir(folder)
        return (
            is_checkpoint(folder)
            or run_dir.snapshot.is_file()
            or run_dir.checkpoints.is_dir()
            or any(folder.glob("step_*/manifest.json"))
        )
    except OSError:
        return False


def find_model_folder(folder: Path, word: str, *, option: str, locks: CheckpointLocks) -> Path:
    """Return the model folder of a run or checkpoint, verified by checksums with its weights.

    Args:
        folder: of the run or checkpoint that ``word`` names.
        word: as the user typed it.
        option: which takes it, for messages.
        locks: keep the checkpoint.

    Raises:
        ConfigError: there is none that is intact.
    """
    selector = parse_reference(word).selector
    if (quantized := quantized_model(folder)) is not None:
        if selector is not None:
            why, fix = f"{folder} holds one model and no checkpoints", f"leave @{selector} out"
            raise ConfigError(option, word, why=why, fix=fix)
        return quantized
    return find_intact_checkpoint(folder, word, option=option, locks=locks).folder / MODEL_FOLDER


def quantized_model(folder: Path) -> Path | None:
    """Return the model folder that ``job=quantize`` or ``sparsify`` left in a run, if it is one."""
    model = folder / MODEL_FOLDER
    if RunDir(folder).checkpoints.is_dir() or is_checkpoint(folder) or not (model / "config.json").is_file():
        return None
    return model


def find_intact_checkpoint(folder: Path, word: str, *, option: str, locks: CheckpointLocks) -> SavedCheckpoint:
    """Return the first checkpoint that ``word`` allows and that is not damaged.

    A terminal shows how much of it is compared with its checksums.

    Args:
        folder: of the run or checkpoint that ``word`` names.
        word: as the user typed it.
        option: which takes it, for messages.
        locks: keep the checkpoint.

    Raises:
        ConfigError: there is none.
    """
    damaged: list[str] = []
    for saved in select_checkpoints(folder, word, option=option):
        try:
            locks.keep(saved.folder, say=_warn)
        except FileNotFoundError:
            damaged.append(f"{saved.folder} was removed by its run")
            continue
        bad = _damaged(saved)
        if not bad:
            if damaged:
                _warn(f"{option}={word}: {saved.folder} is loaded instead")
            return saved
        locks.release(saved.folder)
        damaged.append(f"{saved.folder} is damaged: the content of {', '.join(bad)} is not what was written (XXH3)")
        _warn(damaged[-1])
    fix = "name another checkpoint or run, or copy an intact one there"
    raise ConfigError(option, word, why=f"no checkpoint is intact: {'; '.join(damaged)}", fix=fix)


def _damaged(saved: SavedCheckpoint) -> list[str]:
    """Return the files of a checkpoint's model that are not as they were written."""
    names = files_of_model(saved)
    with byte_progress("verifying", sum(saved.manifest.files[name] for name in names)) as read:
        return damaged_files(saved.folder, saved.manifest, names, heartbeat=lambda: read(COMPARED_BYTES))


def files_of_model(saved: SavedCheckpoint) -> list[str]:
    """Return the files of a checkpoint that hold the model: config, tokenizer and tensors."""
    return [name for name in saved.manifest.files if name.startswith((f"{MODEL_FOLDER}/", f"{TENSOR_FOLDER}/"))]


def select_checkpoints(folder: Path, word: str, *, option: str) -> Iterator[SavedCheckpoint]:
    """Yield the checkpoints in ``folder`` that ``word`` allows, the preferred one first.

    Raises:
        ConfigError: there is none.
    """
    reference = parse_reference(word)
    if is_checkpoint(folder) and reference.selector is not None:
        why = f"{reference.source} is already one checkpoint"
        raise ConfigError(option, word, why=why, fix=f"leave @{reference.selector} out, or name its run")
    try:
        if reference.selector is None:
            yield from find_checkpoints(folder, say=_warn, option=option)
            return
        saved = list(find_checkpoints(folder, say=_warn, option=option, skips_unsupported=True))
    except ConfigError as error:
        raise ConfigError(option, word, why=error.why, fix=error.fix) from error
    if reference.step is not None:
        yield _of_step(reference.step, saved, word, option=option)
        return
    if reference.selector == BEST:
        rated = best_first(saved)
        if not rated:
            name = saved[0].manifest.best_metric.partition(":")[2]
            what = "has a held-out loss" if name == "loss" else f"has the metric {name}"
            why = f"no checkpoint of {reference.source} {what}: none was measured at its step"
            fix = f"leave @{BEST} out for the newest, or train with job.eval_every equal to checkpoint.every"
            raise ConfigError(option, word, why=why, fix=fix)
        yield from rated


def _of_step(step: int, saved: Sequence[SavedCheckpoint], word: str, *, option: str) -> SavedCheckpoint:
    """Return the checkpoint of a step.

    Raises:
        ConfigError: there is none that can be read; the message names others.
    """
    chosen = next((entry for entry in saved if entry.manifest.step == step), None)
    if chosen is not None:
        return chosen
    try:
        return open_checkpoint(saved[0].folder.with_name(f"step_{step:08d}"))
    except UnsupportedManifest as error:
        raise ConfigError(option, word, why=str(error), fix=error.fix) from error
    except ValueError as error:
        steps = ", ".join(f"@{entry.folder.name}" for entry in saved[:5])
        why = f"has no complete checkpoint of step {step}"
        raise ConfigError(option, word, why=why, fix=f"it has {steps}") from error


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

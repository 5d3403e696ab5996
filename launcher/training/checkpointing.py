"""Restore a training run on all ranks together: find, verify and load its checkpoint."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from launcher.checkpoint.foreign.plan import foreign_to_resume
from launcher.checkpoint.locks import ReadLock
from launcher.checkpoint.manifest import damaged_files
from launcher.checkpoint.resume import lr_jump_warning, no_intact_checkpoint, resume_candidates
from launcher.checkpoint.store import complete_checkpoints, silent
from launcher.config.data.base import CHECKPOINT_TOKENIZER, Corpus, Data
from launcher.config.job.train import Train
from launcher.errors import ConfigError, JobError
from launcher.training.early_check import CheckpointCheck
from launcher.training.foreign import restore_foreign
from launcher.utils.progress import ProgressLines

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from launcher.checkpoint.manifest import CheckpointManifest
    from launcher.checkpoint.store import CheckpointStore, SavedCheckpoint
    from launcher.engines.base import Engine
    from launcher.engines.context import Context
    from launcher.models.tokenizer import FastTokenizer
    from launcher.training.callbacks import Callbacks
    from launcher.utils.progress import OnProgress


_TOKENIZER = "model/tokenizer.json"
DataT = TypeVar("DataT", bound=Data)


def restore_checkpoint(
    store: CheckpointStore,
    context: Context,
    engine: Engine,
    callbacks: Callbacks | None = None,
    *,
    tokenizer: FastTokenizer | None = None,
    check: CheckpointCheck | None = None,
) -> CheckpointManifest | None:
    """Load what the run continues from, on every rank; return its manifest, ``None`` at step 0.

    No other run removes the checkpoint meanwhile.

    Args:
        store: of the run's checkpoints.
        context: of this rank.
        engine: takes the state.
        callbacks: take their states.
        tokenizer: of the data; must be the one that the weights were trained with.
        check: of the files, begun before the model was built.

    Raises:
        ConfigError: the folder named by ``checkpoint.resume`` is gone since the plan was made, damaged, or was trained
            with another tokenizer.
        JobError: ranks see different checkpoints.
    """
    from launcher.engines.distributed import barrier

    if context.is_main:
        store.clean()
    barrier()
    if (foreign := foreign_to_resume(context.run.checkpoint.resume)) is not None:
        return restore_foreign(foreign, context, engine, on_progress=loading_progress(context, phase="load"))
    with contextlib.ExitStack() as locks:
        check = locks.enter_context(check or CheckpointCheck(context))
        saved = _find_intact(store, context, engine, locks, resume=context.run.checkpoint.resume, check=check)
        if saved is None:
            return None
        if tokenizer is not None:
            _check_tokenizer(saved, tokenizer)
        engine.load(saved.folder, on_progress=loading_progress(context, phase="load"))
        if callbacks is not None:
            callbacks.load(saved.folder)
    if context.is_main:
        print(f"continuing after step {saved.manifest.step} of {saved.folder}", flush=True)
        run = context.run
        # of a run that counts steps the plan has said so
        epochs = run.job if isinstance(run.job, Train) and run.job.epochs is not None else None
        if epochs and (line := lr_jump_warning(saved, run.optimizer, run.schedule, epochs.steps)):
            print(line, flush=True)
    return saved.manifest


def reload_checkpoint(
    store: CheckpointStore, context: Context, engine: Engine, callbacks: Callbacks
) -> CheckpointManifest:
    """Load the run's own newest intact checkpoint again, on every rank, and return its manifest.

    Raises:
        ConfigError: none is intact.
    """
    with contextlib.ExitStack() as locks:
        check = locks.enter_context(CheckpointCheck(context))
        saved = _find_intact(store, context, engine, locks, resume="auto", check=check)
        assert saved is not None, "a run that rewinds has saved where it began"
        engine.load(saved.folder, on_progress=loading_progress(context, phase="checkpoint"))
        callbacks.load(saved.folder)
    return saved.manifest


def loading_progress(context: Context, *, phase: str) -> OnProgress:
    """Return what takes the progress of a load: a heartbeat of this rank, and lines of rank 0."""
    lines = ProgressLines("loading the checkpoint" + (" (share of rank 0)" if context.world_size > 1 else ""))

    def report(done: int, total: int) -> None:
        context.heartbeat.update(phase)
        if context.is_main:
            lines.update(done, total)

    return report


def resolve_tokenizer(context: Context, data: DataT) -> DataT:
    """Return a run's data, with the newest intact tokenizer for ``data.tokenizer=checkpoint``.

    Checkpoints of the run itself come first: the one that it began from may be removed while it trains.

    Raises:
        ConfigError: no checkpoint holds a tokenizer.
    """
    resume = context.run.checkpoint.resume
    if not isinstance(data, Corpus) or data.tokenizer != CHECKPOINT_TOKENIZER:
        return data
    own = complete_checkpoints(context.run_dir.checkpoints, say=silent)
    named = iter(()) if resume in ("none", "auto") else resume_candidates(resume, context.run_dir, say=silent)
    for saved in itertools.chain(own, named):
        names = [name for name in saved.manifest.files if name.startswith("model/")]
        if _TOKENIZER in names and not damaged_files(saved.folder, saved.manifest, names):
            return replace(data, tokenizer=str(saved.folder / "model"))
    why, fix = (
        f"no checkpoint of checkpoint.resume={resume} holds an intact tokenizer",
        "set data.tokenizer to bpe or a folder",
    )
    raise ConfigError("data.tokenizer", data.tokenizer, why=why, fix=fix)


def _check_tokenizer(saved: SavedCheckpoint, tokenizer: FastTokenizer) -> None:
    """Raise if the tokenizer is not the one that the weights were trained with.

    Transformers may add tokens to those of ``tokenizer.json`` as it loads a folder, so both ways of reading count.
    """
    from launcher.data.token_cache import read_bpe
    from launcher.models.tokenizer import load_tokenizer

    file = saved.folder / _TOKENIZER
    if not file.is_file():
        return
    vocabulary = tokenizer.inner.get_vocab()
    if vocabulary == read_bpe(file).inner.get_vocab():
        return
    if vocabulary == load_tokenizer(file.parent, option="checkpoint.resume").inner.get_vocab():
        return
    why = f"{saved.folder} was trained with another tokenizer than that of this run's data"
    fix = "set data.tokenizer=checkpoint, or model.weights=RUN checkpoint.resume=none to start over with this tokenizer"
    raise ConfigError("checkpoint.resume", saved.folder, why=why, fix=fix)


def _find_intact(
    store: CheckpointStore,
    context: Context,
    engine: Engine,
    locks: contextlib.ExitStack,
    *,
    resume: str,
    check: CheckpointCheck,
) -> SavedCheckpoint | None:
    """Return the newest intact checkpoint; each rank reads its share of the files.

    ``locks`` keeps what is read.
    """
    from launcher.engines.distributed import barrier, sum_over_ranks

    say = print if context.is_main else silent
    found = resume_candidates(resume, context.run_dir, say=say)
    damaged: dict[str, SavedCheckpoint] = {}
    while True:
        saved = next(found, None)
        step = -1.0 if saved is None else float(saved.manifest.step)
        if sum_over_ranks([step], device=engine.device) != [step * context.world_size]:
            fix = "set run.root to a folder that all hosts share"
            raise JobError(f"checkpoint.resume={resume}: ranks see different checkpoints; {fix}")
        if saved is None:
            break
        locks.enter_context(ReadLock(saved.folder, say=say))
        names = sorted(saved.manifest.files)
        own = check.damaged(saved)
        flags = sum_over_ranks([float(name in own) for name in names] or [0.0], device=engine.device)
        if not any(flags):
            break
        bad = ", ".join(name for name, flag in zip(names, flags, strict=True) if flag)
        why = f"{saved.folder} is damaged: the content of {bad} is not what was written (XXH3)"
        damaged[why] = saved
        say(f"checkpoint {why}")
    if saved is None and damaged:
        raise no_intact_checkpoint(resume, "; ".join(damaged))
    barrier()  # no rank still reads what rank 0 renames
    if context.is_main and resume == "auto":
        for entry in damaged.values():
            print(f"quarantined as {store.quarantine(entry)}", flush=True)
    return saved


def save_tokenizer(context: Context, tokenizer: FastTokenizer, folder: Path, *, heartbeat: Callable[[], None]) -> None:
    """Write the tokenizer of a run's data beside its weights."""
    from launcher.data.token_cache import save_tokenizer as save_to

    data = context.run.data
    assert isinstance(data, Corpus), "what has a tokenizer has text"
    try:
        data = resolve_tokenizer(context, data)
    except ConfigError:  # the checkpoint it came from is gone
        data = replace(data, tokenizer="bpe")
    save_to(data, context.run.model, tokenizer, folder, heartbeat=heartbeat)

"""Save and restore a training run on all ranks together."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from launcher.checkpoint.manifest import damaged_files, describe_checkpoint, files_of_part
from launcher.checkpoint.resume import lr_jump_warning, no_intact_checkpoint, resume_candidates
from launcher.checkpoint.store import complete_checkpoints, silent
from launcher.config.data.base import CHECKPOINT_TOKENIZER, Corpus, Data
from launcher.errors import ConfigError, JobError
from launcher.utils.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.checkpoint.manifest import CheckpointManifest
    from launcher.checkpoint.store import CheckpointStore, SavedCheckpoint
    from launcher.config.run import Run
    from launcher.engines.base import Engine
    from launcher.engines.context import Context
    from launcher.models.tokenizer import FastTokenizer
    from launcher.training.callbacks import Callbacks


_TOKENIZER = "model/tokenizer.json"
DataT = TypeVar("DataT", bound=Data)


def restore_checkpoint(
    store: CheckpointStore,
    context: Context,
    engine: Engine,
    callbacks: Callbacks | None = None,
    *,
    tokenizer: FastTokenizer | None = None,
) -> int:
    """Load what the run continues from, on every rank; return the steps already done.

    Args:
        store: of the run's checkpoints.
        context: of this rank.
        engine: takes the state.
        callbacks: take their states.
        tokenizer: of the data; must be the one that the weights were trained with.

    Raises:
        ConfigError: the folder named by ``checkpoint.resume`` is gone since the plan was made, damaged, or was trained
            with another tokenizer.
        JobError: ranks see different checkpoints.
    """
    from launcher.engines.distributed import barrier

    if context.is_main:
        store.clean()
    barrier()
    saved = _find_intact(store, context, engine)
    if saved is None:
        return 0
    if tokenizer is not None:
        _check_tokenizer(saved, tokenizer)
    engine.load(saved.folder)
    if callbacks is not None:
        callbacks.load(saved.folder)
    if context.is_main:
        print(f"continuing after step {saved.manifest.step} of {saved.folder}", flush=True)
        run = context.run
        if run.job.optimizer_steps is not None and (
            line := lr_jump_warning(saved, run.optimizer, run.schedule, run.job.optimizer_steps)
        ):
            print(line, flush=True)
    return saved.manifest.step


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
        names = [name for name in saved.manifest.files if name.startswith("model/") and "safetensors" not in name]
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


def _find_intact(store: CheckpointStore, context: Context, engine: Engine) -> SavedCheckpoint | None:
    """Return the newest intact checkpoint; each rank reads its share of the files."""
    from launcher.engines.distributed import barrier, sum_over_ranks

    say, resume = (print if context.is_main else silent), context.run.checkpoint.resume
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
        names = sorted(saved.manifest.files)
        sizes = saved.manifest.files
        own = damaged_files(
            saved.folder,
            saved.manifest,
            files_of_part(sizes, part=context.rank, parts=context.world_size),
            heartbeat=lambda: context.heartbeat.update("load"),
        )
        flags = sum_over_ranks([float(name in own) for name in names] or [0.0], device=engine.device)
        if not any(flags):
            break
        bad = ", ".join(name for name, flag in zip(names, flags, strict=True) if flag)
        why = f"{saved.folder} is damaged: the content of {bad} is not what was written (SHA-256)"
        damaged[why] = saved
        say(f"checkpoint {why}")
    if saved is None and damaged:
        raise no_intact_checkpoint(resume, "; ".join(damaged))
    if saved is not None and not saved.manifest.sha256:
        say(f"checkpoint {saved.folder} has no checksums (an earlier version wrote it): its content is not verified")
    barrier()  # no rank still reads what rank 0 renames
    if context.is_main and resume == "auto":
        for entry in damaged.values():
            print(f"quarantined as {store.quarantine(entry)}", flush=True)
    return saved


def save_checkpoint(
    store: CheckpointStore,
    context: Context,
    engine: Engine,
    callbacks: Callbacks | None = None,
    *,
    step: int,
    held_out_loss: float | None,
    tokenizer: FastTokenizer | None = None,
) -> None:
    """Write the checkpoint of ``step``; all ranks return once it is complete.

    Args:
        store: of the run's checkpoints.
        context: of this rank.
        engine: whose state is saved.
        callbacks: whose states are saved.
        step: optimizer steps done.
        held_out_loss: at this step, where it was measured.
        tokenizer: of the data, saved beside the weights; ``None`` where tokens stand for no text.

    Raises:
        JobError: the ranks do not share the run directory; nothing was saved that would look like a checkpoint.
    """
    from launcher.engines.distributed import barrier, ranks_where

    if context.is_main:
        store.begin(step)
    barrier()
    if blind := ranks_where(not store.is_visible(step), device=engine.device):
        raise JobError(
            f"no checkpoint of step {step} was written: rank {', '.join(map(str, blind))} does not see "
            f"{store.pending(step)}: set run.root to a folder that all hosts share"
        )
    engine.save(store.pending(step))
    if callbacks is not None:
        callbacks.save(store.pending(step), is_main=context.is_main)
    if context.is_main and tokenizer is not None:
        _save_tokenizer(context, tokenizer, store.pending(step) / "model")
    barrier()

    def heartbeat() -> None:
        context.heartbeat.update("checkpoint")

    if context.world_size > 1:
        store.checksum(step, rank=context.rank, world_size=context.world_size, heartbeat=heartbeat)
        barrier()
    if context.is_main:
        manifest = make_manifest(context, step=step, held_out_loss=held_out_loss)
        print(f"checkpoint {store.commit(manifest, heartbeat=heartbeat).folder}", flush=True)
    barrier()  # a rank that leaves now, with all others, leaves a whole checkpoint


def make_manifest(context: Context, *, step: int, held_out_loss: float | None) -> CheckpointManifest:
    """Return the manifest for the run's checkpoint of ``step``.

    The store adds the files.
    """
    plan = read_json(context.run_dir.plan)
    return describe_checkpoint(
        model=context.run.model,
        parallel=context.run.parallel,
        precision=context.run.precision,
        world_size=context.world_size,
        step=step,
        eval_loss=held_out_loss,
        run_id=plan["run_id"],
        run_hash=plan["run_hash"],
        lr=_last_lr(context.run, step),
    )


def _save_tokenizer(context: Context, tokenizer: FastTokenizer, folder: Path) -> None:
    from launcher.data.token_cache import save_tokenizer

    data = context.run.data
    assert isinstance(data, Corpus), "what has a tokenizer has text"
    try:
        data = resolve_tokenizer(context, data)
    except ConfigError:  # the checkpoint it came from is gone
        data = replace(data, tokenizer="bpe")
    save_tokenizer(data, context.run.model, tokenizer, folder, heartbeat=lambda: context.heartbeat.update("checkpoint"))


def _last_lr(run: Run, step: int) -> float | None:
    """Return the learning rate of optimizer step ``step`` (1-based), which has been taken."""
    steps = run.job.optimizer_steps
    return run.optimizer.lr * run.schedule.factor(step - 1, steps) if steps and step else None

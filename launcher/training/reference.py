"""Log-probabilities of preferences in the reference model, computed once a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launcher.checkpoint.foreign.plan import foreign_to_resume
from launcher.checkpoint.resume import find_checkpoint
from launcher.checkpoint.store import silent
from launcher.data.rows import PairRows
from launcher.errors import EXIT_BAD_INPUT, JobError
from launcher.protocol.rundir import RunDir

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.checkpoint.manifest import CheckpointManifest
    from launcher.config.job.train import Train
    from launcher.data.dataloader import Loader
    from launcher.data.dataset import Splits
    from launcher.engines.base import Engine
    from launcher.engines.context import Context

_SPLITS = ("train", "held_out")


@dataclass(frozen=True, kw_only=True)
class References:
    """Log-probabilities of both answers of every pair, fp64 of shape (pairs, 2)."""

    train: np.ndarray
    held_out: np.ndarray


def with_objective(job: Train, context: Context, splits: Splits) -> tuple[Train, Context]:
    """Return the job and the context, with the objective ``dpo`` if the data is preferences."""
    if not splits.is_paired:
        return job, context
    found = replace(job, objective="dpo")
    return found, replace(context, run=replace(context.run, job=found))


def load_references(
    loader: Loader,
    splits: Splits,
    context: Context,
    engine: Engine,
    *,
    restored: CheckpointManifest | None,
) -> References:
    """Return what the reference model says of every pair; all ranks call it together.

    The reference is the model without its adapter, else the weights with which the run begins. A run that continues
    reads what was computed then.

    Raises:
        JobError: a run without an adapter continues, and the file is gone or belongs to other data.
    """
    from launcher.engines.distributed import barrier

    own = context.run_dir.reference
    found = next((known for file in _files(context, restored) if (known := _read(file, splits)) is not None), None)
    if found is None:
        if restored is not None and context.run.lora is None and context.run.checkpoint.is_own:
            why = "the weights have changed since, so the reference model is gone"
            say = f"{own} does not hold the log-probabilities of this data, and {why}; start another run"
            raise JobError(say, exit_code=EXIT_BAD_INPUT)
        if context.is_main:
            pairs = splits.train.num_sequences + splits.held_out.num_sequences
            print(f"reference model: computing the log-probabilities of {pairs:,} pairs, once", flush=True)
        found = _compute(loader, splits, engine, heartbeat=lambda: context.heartbeat.update("reference"))
    barrier()  # no rank still looks for the file
    if context.is_main and _read(own, splits) is None:
        _write(own, found, splits)
    return found


def _files(context: Context, restored: CheckpointManifest | None) -> list[Path]:
    """Return where the log-probabilities may be: in this run, or in the one that it continues."""
    files, resume = [context.run_dir.reference], context.run.checkpoint.resume
    if restored is not None and not context.run.checkpoint.is_own and not foreign_to_resume(resume):
        saved = find_checkpoint(resume, context.run_dir, say=silent)
        files += [] if saved is None else [RunDir(saved.folder.parent.parent).reference]
    return files


def _fingerprints(splits: Splits) -> dict[str, str]:
    found = {}
    for name in _SPLITS:
        pairs = getattr(splits, name)
        assert isinstance(pairs, PairRows), "preferences have a reference"
        found[name] = pairs.fingerprint
    return found


def _read(file: Path, splits: Splits) -> References | None:
    """Return what a file holds; ``None`` if it is missing, damaged or of other data."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            if opened.metadata() != _fingerprints(splits):
                return None
            return References(**{name: opened.get_tensor(name) for name in _SPLITS})
    except (OSError, SafetensorError):
        return None


def _write(file: Path, found: References, splits: Splits) -> None:
    from safetensors.numpy import save_file

    temporary = file.with_name(f".{file.name}.tmp")
    save_file({name: getattr(found, name) for name in _SPLITS}, temporary, metadata=_fingerprints(splits))
    temporary.replace(file)


def _compute(loader: Loader, splits: Splits, engine: Engine, *, heartbeat: Callable[[], None]) -> References:
    from launcher.engines.preferences import without_adapter

    with without_adapter(engine.module):
        both = {name: _log_probs(loader, getattr(splits, name), engine, heartbeat) for name in _SPLITS}
    return References(**both)


def _log_probs(loader: Loader, pairs: PairRows, engine: Engine, heartbeat: Callable[[], None]) -> np.ndarray:
    import torch
    from torch import distributed as dist

    from launcher.engines.loss import row_log_probs

    size = pairs.num_sequences
    sums = torch.zeros((size, 3), dtype=torch.float64, device=engine.device)  # ranks may share a pair: the last counts
    for places, batches in zip(loader.positions(size), loader.in_order(pairs, size), strict=True):
        heartbeat()
        rows: list[Tensor] = []

        def observe(logits: Tensor, labels: Tensor, rows: list[Tensor] = rows) -> None:
            rows.append(row_log_probs(logits, labels).double())

        engine.loss_of([replace(batch, is_paired=False) for batch in batches], observe=observe)
        for at, found in zip(places, rows, strict=True):
            known = min(at.stop, size) - at.start
            if known > 0:
                both = found.view(2, -1).T[:known]
                sums[at.start : at.start + known] += torch.cat([both, torch.ones_like(both[:, :1])], dim=1)
    if dist.is_initialized():
        dist.all_reduce(sums)
    means: np.ndarray = (sums[:, :2] / sums[:, 2:]).cpu().contiguous().numpy()
    return means

"""Log-probabilities of preferences in the reference model, computed once a run."""

from __future__ import annotations

import time
from contextlib import nullcontext
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
from launcher.utils.files import write_atomic

if TYPE_CHECKING:
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

    The reference is the model without its new adapter, else the model as the run begins. A run that continues reads
    what was computed then.

    Raises:
        JobError: the run continues, the file is gone or belongs to other data, and the model has changed.
    """
    from launcher.engines.distributed import barrier

    own, run = context.run_dir.reference, context.run
    found = next((known for file in _files(context, restored) if (known := _read(file, splits)) is not None), None)
    if found is None:
        is_base = run.lora is not None and run.model.adapter is None
        is_kept = is_base and run.lora is not None and run.lora.bias == "none"
        if restored is not None and not is_kept and (run.checkpoint.is_own or is_base):
            why = "the weights have changed since, so the reference model is gone"
            say = f"{own} does not hold the log-probabilities of this data, and {why}; start another run"
            raise JobError(say, exit_code=EXIT_BAD_INPUT)
        named = f"as of step {restored.step}" if restored is not None else "as the run begins"
        progress = _Progress(context, splits, reference="the model without its adapter" if is_base else named)
        found = _compute(loader, splits, engine, progress, without=is_base)
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
    from safetensors.numpy import save

    write_atomic(file, save({name: getattr(found, name) for name in _SPLITS}, metadata=_fingerprints(splits)))


class _Progress:
    """Counts the pairs that are done, and prints them every few seconds.

    Args:
        context: of this rank.
        splits: whose pairs are counted.
        reference: what the reference model is.
    """

    _EVERY_S = 10.0

    def __init__(self, context: Context, splits: Splits, *, reference: str) -> None:
        self._context, self._done = context, 0
        self.batch = context.batch.global_batch
        """Pairs of a global batch."""
        self._total = splits.train.num_sequences + splits.held_out.num_sequences
        self._printed = time.monotonic()
        self._print(f"computing the log-probabilities of {self._total:,} pairs, once, by {reference}")

    def add(self, num_pairs: int) -> None:
        """Count the pairs of a global batch."""
        self._done += num_pairs
        self._context.heartbeat.update("reference")
        if time.monotonic() - self._printed > self._EVERY_S:
            self._printed = time.monotonic()
            self._print(f"{self._done:,} of {self._total:,} pairs")

    def _print(self, what: str) -> None:
        if self._context.is_main:
            print(f"reference model: {what}", flush=True)


def _compute(loader: Loader, splits: Splits, engine: Engine, progress: _Progress, *, without: bool) -> References:
    from launcher.engines.preferences import without_adapter

    with without_adapter(engine.module) if without else nullcontext():
        both = {name: _log_probs(loader, getattr(splits, name), engine, progress) for name in _SPLITS}
    return References(**both)


def _log_probs(loader: Loader, pairs: PairRows, engine: Engine, progress: _Progress) -> np.ndarray:
    import torch
    from torch import distributed as dist

    assert engine.preferences is not None, "a job on pairs has their loss"
    size = pairs.num_sequences
    sums = torch.zeros((size, 3), dtype=torch.float64, device=engine.device)  # and how many ranks had each pair
    for first, places, batches in zip(
        range(0, size, progress.batch), loader.positions(size), loader.in_order(pairs, size), strict=True
    ):
        with engine.preferences.collecting() as rows:
            engine.loss_of(batches)
        for at, found in zip(places, rows, strict=True):
            known = min(at.stop, size) - at.start
            if known > 0:
                both = found.double().view(2, -1).T[:known]
                sums[at.start : at.start + known] += torch.cat([both, torch.ones_like(both[:, :1])], dim=1)
        progress.add(min(progress.batch, size - first))
    if dist.is_initialized():
        dist.all_reduce(sums)
    means: np.ndarray = (sums[:, :2] / sums[:, 2:]).cpu().contiguous().numpy()
    return means

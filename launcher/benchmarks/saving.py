"""A training loop that saves in one way or another, as ranks go through it."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from launcher.benchmarks.batches import random_batches
from launcher.benchmarks.encoder import digest
from launcher.checkpoint.policy import Checkpoint
from launcher.checkpoint.store import CheckpointStore, quiet
from launcher.engines import make_engine
from launcher.engines.distributed import barrier, group_timeout
from launcher.engines.sharded_state import load_tensors
from launcher.engines.torch import TorchEngine
from launcher.errors import JobError
from launcher.training.clock import Clock
from launcher.training.resume import manifest_of, save

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.engines.base import Engine
    from launcher.verification.fork import Answer

_SHARDS = "shards"


class Saver(Protocol):
    """A way to save. Every method is called by all ranks together."""

    durable_s: list[float]
    """For each save on rank 0: seconds from its beginning until it was complete and on the disk."""

    def save(self, step: int) -> None:
        """Save, or begin to; training goes on when this returns."""

    def wait(self) -> None:
        """Return once everything that was begun is on the disk."""

    def restore(self, folder: Path) -> None:
        """Load what this way has written."""


class Blocking:
    """What job=train does."""

    def __init__(self, context: Context, engine: Engine, store: CheckpointStore) -> None:
        self._context, self._engine, self._store = context, engine, store
        self.durable_s: list[float] = []

    def save(self, step: int) -> None:
        """Write everything."""
        started = time.perf_counter()
        save(self._store, self._context, self._engine, step=step, held_out_loss=None)
        self.durable_s.append(time.perf_counter() - started)

    def wait(self) -> None:
        """Nothing is left to be done."""

    def restore(self, folder: Path) -> None:
        """Load it as a run that resumes does."""
        self._engine.load(folder)


class Asynchronous:
    """Copies are written by a thread, one checkpoint at a time, in a process group of its own."""

    def __init__(self, context: Context, engine: Engine, store: CheckpointStore) -> None:
        assert isinstance(engine, TorchEngine), "others are refused before anything starts"
        self._context, self._engine, self._store = context, engine, store
        self._group = dist.new_group(backend="gloo", timeout=group_timeout(context)) if dist.is_initialized() else None
        self._threads = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self.durable_s: list[float] = []

    def save(self, step: int) -> None:
        """Copy everything, once the checkpoint before is written."""
        started = time.perf_counter()
        self.wait()
        if self._context.is_main:
            self._store.begin(step)
        barrier()
        writer = HuggingFaceStorageWriter(str(self._store.pending(step) / _SHARDS), save_distributed=True)
        written: Any = dcp.async_save(
            self._engine.tensors(), storage_writer=writer, process_group=self._group, no_dist=self._group is None
        )
        self._pending = self._threads.submit(self._commit, written, step, started)

    def _commit(self, written: Any, step: int, started: float) -> None:
        """Wait until all ranks have written; then the checkpoint exists."""
        written.result()
        if self._context.is_main:
            self._store.commit(manifest_of(self._context, step=step, held_out_loss=None))
            self.durable_s.append(time.perf_counter() - started)

    def wait(self) -> None:
        """Wait for the thread."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
        barrier()

    def restore(self, folder: Path) -> None:
        """Load weights and moments."""
        load_tensors(folder / _SHARDS, self._engine.tensors())


SAVERS: dict[str, type[Blocking | Asynchronous]] = {"blocking": Blocking, "asynchronous": Asynchronous}


def train_and_save(context: Context, *, way: str, every: int, saves: int, warmup: int) -> Answer:
    """Train and save, then save once more and restore that; return seconds and bytes.

    Args:
        context: of this rank.
        way: of ``SAVERS``, or ``none``.
        every: steps before each save and after the last.
        saves: in the loop.
        warmup: steps before it.
    """
    folder = context.run_dir.path / "saved"
    store = CheckpointStore(folder, Checkpoint(keep=1, keep_best=False), say=quiet)
    with make_engine(context, Clock(context.heartbeat, cuda=torch.cuda.is_available())) as engine:
        saver = SAVERS[way](context, engine, store) if way in SAVERS else None
        batches = random_batches(context)

        def train() -> None:
            result = engine.step(batches, lr=context.run.optimizer.lr)  # fetches the loss, so a GPU is done too
            assert not result.skipped, "a step without an update"

        for _ in range(warmup):
            train()
        stalls: list[float] = []
        barrier()
        started = time.perf_counter()
        for step in range(1, every * (saves + 1) + 1):
            train()
            if saver is not None and step % every == 0 and step <= every * saves:
                before = time.perf_counter()
                saver.save(step)
                stalls.append(time.perf_counter() - before)
        loop_s = time.perf_counter() - started
        answer: Answer = {"loop_s": loop_s, "stalls_s": stalls}
        if saver is not None:
            saver.wait()
            answer["durable_s"] = list(saver.durable_s)
            saved_at = digest(tensor for _, tensor in engine.weights())
            saver.save(step + 1)
            for _ in range(every):
                train()
            saver.wait()
            answer |= _restore(saver, store, engine, expected=saved_at)
        barrier()
        if context.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    return answer


def _restore(saver: Saver, store: CheckpointStore, engine: Engine, *, expected: str) -> Answer:
    """Restore the newest checkpoint, from the disk and not from what the system remembers of it.

    Raises:
        JobError: the weights are not those that were there when it was saved.
    """
    saved = store.latest()
    assert saved is not None, "a save that ended without an error"
    forget(saved.folder)
    barrier()
    started = time.perf_counter()
    saver.restore(saved.folder)
    restore_s = time.perf_counter() - started
    if digest(tensor for _, tensor in engine.weights()) != expected:
        raise JobError(f"{saved.folder} does not restore the weights that were there when it was saved")
    return {"restore_s": restore_s, "checkpoint_bytes": sum(saved.manifest.files.values())}


def forget(folder: Path) -> None:
    """Let the system drop what it keeps in memory of the files of a folder, which are on the disk already."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

"""Save a training run: every rank writes its share, also beside the next steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch import distributed as dist

from launcher.checkpoint.manifest import CheckpointManifest, TrainingProgress, WrittenFile, describe_checkpoint
from launcher.checkpoint.tensors import Shard, shard_file_name, write_shards
from launcher.config.adapter_folder import ADAPTER_CONFIG
from launcher.engines.checkpoint_io import SCALARS
from launcher.engines.distributed import barrier, group_timeout, ranks_where
from launcher.engines.state import divide_copies
from launcher.errors import JobError
from launcher.models.weights import save_model_config
from launcher.protocol.state_files import MODEL_FOLDER, TENSOR_FOLDER
from launcher.training.background import BackgroundCall, Pace
from launcher.training.checkpointing import save_tokenizer
from launcher.utils.files import DISK_FULL_ERRNOS, read_json, write_json
from launcher.utils.text import bytes_text

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from launcher.checkpoint.regions import Region
    from launcher.checkpoint.store import CheckpointStore
    from launcher.engines.base import Engine
    from launcher.engines.context import Context
    from launcher.models.tokenizer import FastTokenizer

_WRITING_TIME = 0.5
"""Share of the time since the last save.

A save that takes longer is not slowed down for the steps beside it.
"""


class CheckpointSaver:
    """Writes checkpoints, one at a time; all ranks call every method together.

    Asynchronously (``checkpoint.async_mode``), a rank copies its share to buffers in host memory and goes on. A thread
    writes, hashes and syncs the copies, meets the other ranks' threads in a process group of their own, and commits on
    rank 0. An error shows at the next call on every rank.

    Args:
        store: of the run's checkpoints.
        context: of this rank.
        engine: whose state is saved.
        tokenizer: of the data, saved beside the weights; ``None`` where tokens stand for no text.
    """

    def __init__(
        self,
        store: CheckpointStore,
        context: Context,
        engine: Engine,
        *,
        tokenizer: FastTokenizer | None = None,
    ) -> None:
        self._store, self._context, self._engine, self._tokenizer = store, context, engine, tokenizer
        self._copies = HostCopies(pinned=engine.device.type == "cuda")
        self._group = dist.new_group(backend="gloo", timeout=group_timeout(context)) if dist.is_initialized() else None
        self._own: frozenset[tuple[str, Region]] | None = None
        self._num_bytes = 0
        self._writing: BackgroundCall | None = None
        self._pace: Pace | None = None
        self._begun_s = time.perf_counter()
        self._step, self._completed = 0, list[int]()
        self.durable_s: list[float] = []
        """Seconds from the beginning of each save until it was complete and on the disk."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let a save that is under way become complete, also when the run fails: its state was good."""
        try:
            self.wait()
        except (OSError, RuntimeError) as failed:  # RuntimeError: of Gloo, when another rank is gone
            if error is None:
                raise
            print(f"no checkpoint of step {self._step} was written: {failed}", file=sys.stderr, flush=True)

    def save(
        self,
        progress: TrainingProgress,
        *,
        now: bool = False,
        beside: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Save the state, once the checkpoint before is complete.

        Args:
            progress: where the run stands.
            beside: writes more into the folder of the checkpoint; called on every rank before this returns.
            now: return only when it is complete, as do all saves that are not asynchronous.

        Raises:
            JobError: the ranks do not share the run directory; nothing was saved that would look like a checkpoint.
            OSError: the disk is full or gone; older checkpoints are untouched.
        """
        started, step = time.perf_counter(), progress.step
        self.wait()
        self._begin(step)
        beside(self._store.pending(step))
        plan = read_json(self._context.run_dir.plan)
        manifest = describe_checkpoint(self._context.run, progress, world_size=self._context.world_size, plan=plan)
        self._step = step
        shards, scalars = self._own_shards(), self._engine.scalars()
        if not now and self._is_async(shards):
            copies = self._copies.copy(shards)
            self._pace = pace = self._pace_beside_steps(copies, plan, since_last_s=started - self._begun_s)
            self._writing = BackgroundCall(
                lambda: self._write(manifest, copies, scalars, started=started, between_blocks=pace.keep)
            )
        else:
            heartbeat = partial(self._context.heartbeat.update, "checkpoint")
            self._write(manifest, shards, scalars, started=started, heartbeat=heartbeat, between_blocks=heartbeat)
            self._completed.append(step)
        self._begun_s = started

    def _pace_beside_steps(self, shards: Sequence[Shard], plan: Mapping[str, Any], *, since_last_s: float) -> Pace:
        """Return how fast to write; steps on GPUs leave the processors free."""
        on_cpu = self._engine.device.type == "cpu"
        hosts = [placed["host"] for placed in plan["ranks"]]
        return Pace(
            num_bytes=sum(shard.num_bytes for shard in shards),
            num_writers=hosts.count(hosts[self._context.rank]),
            limit_s=_WRITING_TIME * since_last_s if on_cpu else 0.0,
        )

    def check_shared(self, step: int) -> None:
        """Raise at once, and not at the first save, if ranks do not share the run directory.

        Raises:
            JobError: they do not.
        """
        self._begin(step)
        self._begun_s = time.perf_counter()
        if self._context.is_main:
            self._store.discard(step)

    def _begin(self, step: int) -> None:
        """Make the pending folder of a checkpoint, and wait until all ranks see it."""
        if self._context.is_main:
            self._store.begin(step)
            (self._store.pending(step) / TENSOR_FOLDER).mkdir()
        barrier()
        if blind := ranks_where(not self._store.is_visible(step), device=self._engine.device):
            raise JobError(
                f"no checkpoint of step {step} was written: rank {', '.join(map(str, blind))} does not see "
                f"{self._store.pending(step)}: set run.root to a folder that all hosts share, or "
                "checkpoint.every=0 checkpoint.at_end=false"
            )

    @property
    def is_writing(self) -> bool:
        """Whether a save is under way beside the steps, on this rank."""
        return self._writing is not None and not self._writing.is_done

    def check(self) -> None:
        """Raise the error of a save that failed meanwhile; return at once otherwise."""
        if self._writing is not None and self._writing.is_done:
            self.wait()

    def wait(self) -> None:
        """Return when no save is under way; one that is goes on at full speed.

        Raises:
            OSError: it failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            assert self._pace is not None
            self._pace.hurry()
            writing.result()
            self._completed.append(self._step)

    def take_completed(self) -> list[int]:
        """Return the steps whose checkpoints became complete since the last call.

        The same on every rank after :meth:`save` and :meth:`wait`.
        """
        completed, self._completed = self._completed, []
        return completed

    def _is_async(self, shards: Sequence[Shard]) -> bool:
        run = self._context.run
        num_bytes = sum(shard.num_bytes for shard in shards)
        return run.checkpoint.is_async(num_bytes, on_nvme=run.parallel.keeps_state_on_nvme)

    def _own_shards(self) -> list[Shard]:
        """Return what this rank writes; who writes what is decided once."""
        shards = self._engine.shards()
        if self._own is None:
            own = divide_copies(shards, self._group)
            self._own = frozenset((shard.name, shard.region) for shard in own)
            self._num_bytes = self._sum_over_ranks(sum(shard.num_bytes for shard in own))
        return [shard for shard in shards if (shard.name, shard.region) in self._own]

    def _sum_over_ranks(self, num_bytes: int) -> int:
        sizes = [num_bytes]
        if self._group is not None:
            sizes = [0] * dist.get_world_size(self._group)
            dist.all_gather_object(sizes, num_bytes, group=self._group)
        return sum(sizes)

    def _write(
        self,
        manifest: CheckpointManifest,
        shards: Sequence[Shard],
        scalars: Mapping[str, float],
        *,
        started: float,
        heartbeat: Callable[[], None] = lambda: None,
        between_blocks: Callable[[], None],
    ) -> None:
        """Write this rank's share; with those of all others, rank 0 makes it a checkpoint."""
        pending = self._store.pending(manifest.step)
        name = shard_file_name(self._context.rank)
        written = self._together(lambda: {name: write_shards(pending / name, shards, between_blocks=between_blocks)})

        def commit() -> dict[str, WrittenFile]:
            if self._context.is_main:
                write_json(pending / SCALARS, dict(scalars))
                save_model_config(self._engine.model_config, pending / MODEL_FOLDER)
                if (adapter := self._engine.adapter_config) is not None:
                    write_json(pending / MODEL_FOLDER / ADAPTER_CONFIG, dict(adapter))
                if self._tokenizer is not None:
                    save_tokenizer(self._context, self._tokenizer, pending / MODEL_FOLDER, heartbeat=heartbeat)
                saved = self._store.commit(manifest, written, heartbeat=heartbeat)
                print(f"checkpoint {saved.folder}", flush=True)
            return {}

        self._together(commit)  # a rank that leaves now, with all others, leaves a whole checkpoint
        self.durable_s.append(time.perf_counter() - started)

    def _needed_room(self) -> str:
        """Return what the error of a full disk says about checkpoints."""
        run = self._context.run
        count = run.checkpoint.most_at_once(getattr(run.job, "steps", None))
        kept = "all" if count is None else f"up to {count}"
        room = f"a checkpoint takes {bytes_text(self._num_bytes)}, and the run has {kept} at a time"
        return f" ({room}: {run.checkpoint.kept_text}; the older ones are whole)"

    def _together(self, work: Callable[[], dict[str, WrittenFile]]) -> dict[str, WrittenFile]:
        """Return what every rank's ``work`` returned.

        Raises:
            OSError: that of the first rank on which it failed, on every rank.
        """
        outcome: dict[str, WrittenFile] | tuple[Any, ...]
        own: OSError | None = None
        try:
            outcome = work()
        except OSError as error:
            own, outcome = error, (error.errno, error.strerror or str(error), error.filename)
        outcomes = [outcome]
        if self._group is not None:
            outcomes = [{}] * dist.get_world_size(self._group)
            dist.all_gather_object(outcomes, outcome, group=self._group)
        merged: dict[str, WrittenFile] = {}
        for found in outcomes:
            if isinstance(found, tuple):
                code, why, *file = found
                raise OSError(code, f"{why}{self._needed_room()}" if code in DISK_FULL_ERRNOS else why, *file) from own
            merged |= found
        return merged


class HostCopies:
    """Buffers in host memory for one rank's shards.

    The first save makes them, and all others use them again.

    Args:
        pinned: page-locked, so that a GPU copies to them at full speed.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._buffers: dict[tuple[str, Region], Tensor] = {}

    def copy(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return shards of the same parts whose values no longer change."""
        copies = []
        for shard in shards:
            values = shard.read().detach()
            buffer = self._buffers.get((shard.name, shard.region))
            if buffer is None:
                buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=self._pinned)
                self._buffers[shard.name, shard.region] = buffer
            buffer.copy_(values, non_blocking=True)
            copies.append(replace(shard, read=partial(_itself, buffer)))
        if self._pinned:
            torch.cuda.synchronize()
        return copies


def _itself(buffer: Tensor) -> Tensor:
    return buffer

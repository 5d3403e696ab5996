"""The checkpoints of one run: written under a hidden name, renamed, pruned afterwards.

Whatever a crash leaves behind has a hidden name (``.step_00000010.tmp``) or is the old state; a folder
``step_00000010`` is complete from the moment it exists. Standard library only: the parent looks in here too.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.checkpoint.locks import RemovalLock
from launcher.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    WrittenFile,
    checksums,
    missing_payload,
    read_manifest,
    write_manifest,
)
from launcher.config.checkpoint import Checkpoint
from launcher.protocol.rundir import remove_unfinished_checkpoints
from launcher.utils.files import fsync_folder

Say = Callable[[str], None]

_NAME = re.compile(r"step_(\d{8,})")


def silent(line: str) -> None:
    """Print nothing: the caller reports the outcome."""


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A complete checkpoint."""

    folder: Path
    manifest: CheckpointManifest


class CheckpointStore:
    """Writes and prunes checkpoints.

    Rank 0 calls ``begin`` and ``commit``, with a barrier after the one and before the other.

    Args:
        folder: ``<run directory>/checkpoints``, on a file system that all ranks share.
        policy: how many to keep.
        say: takes one line for people.
    """

    def __init__(self, folder: Path, policy: Checkpoint, *, say: Say = print) -> None:
        self._folder, self._policy, self._say = folder, policy, say
        self._has_locks = True

    def pending(self, step: int) -> Path:
        """Return where every rank writes its part of the payload of ``step``."""
        return self._folder / f".{_name(step)}.tmp"

    def folder_of(self, step: int) -> Path:
        """Return the folder of a checkpoint once it is whole."""
        return self._folder / _name(step)

    def begin(self, step: int) -> Path:
        """Make the empty pending folder of ``step``."""
        pending = self.pending(step)
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir(parents=True)
        return pending

    def discard(self, step: int) -> None:
        """Delete the pending folder of ``step``."""
        shutil.rmtree(self.pending(step), ignore_errors=True)

    def is_visible(self, step: int) -> bool:
        """Whether the pending folder of ``step`` is there for this rank, once rank 0 has made it.

        Making the folder above asks its server: what an NFS client remembers may be half a minute old.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        return self.pending(step).is_dir()

    def commit(
        self,
        manifest: CheckpointManifest,
        written: Mapping[str, WrittenFile] | None = None,
        *,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> SavedCheckpoint:
        """Make the pending payload of ``manifest.step`` the checkpoint of that step, then prune.

        Args:
            manifest: without files.
            written: files that ranks have written and synced, by path below the folder; others are hashed here.
            heartbeat: called while they are read.

        Raises:
            OSError: the disk is full or gone, or a file is not as it was written; older checkpoints are untouched.
        """
        pending, final = self.pending(manifest.step), self._folder / _name(manifest.step)
        written, names = written or {}, _payload(pending)
        others = [name for name in names if name not in written]
        for name in others:
            _fsync_file(pending / name)
        for folder in (pending, *(entry for entry in pending.rglob("*") if entry.is_dir())):
            fsync_folder(folder)
        found = checksums(pending, others, heartbeat=heartbeat)
        found |= {name: file.checksum for name, file in written.items()}
        sizes = {name: (pending / name).stat().st_size for name in names}
        for name in sorted(sizes.keys() | written.keys()):
            if name not in found or name not in sizes or (name in written and sizes[name] != written[name].num_bytes):
                raise OSError(errno.EIO, "cannot be read back", str(pending / name))
        loss = manifest.eval_loss
        complete = replace(
            manifest,
            eval_loss=loss if loss is not None and math.isfinite(loss) else None,
            eval_metrics={name: value for name, value in manifest.eval_metrics.items() if math.isfinite(value)},
            files=sizes,
            xxh3={name: found[name] for name in names},
        )
        write_manifest(pending, complete)
        replaced = self._folder / f".{final.name}.old"
        if final.exists():  # the same step again, after a resume from an older one
            final.rename(replaced)
        pending.rename(final)
        fsync_folder(self._folder)
        self._delete(replaced)
        self.prune(keeping=final)
        return SavedCheckpoint(folder=final, manifest=complete)

    def clean(self) -> None:
        """Remove what a crash left: call it once, before the first ``begin``."""
        remove_unfinished_checkpoints(self._folder)

    def quarantine(self, saved: SavedCheckpoint) -> Path:
        """Rename a damaged checkpoint of this run, so that it counts as none; return its new name."""
        for number in itertools.count():
            renamed = self._folder / f"{saved.folder.name}.damaged{number or ''}"
            if not renamed.exists():
                break
        saved.folder.rename(renamed)
        fsync_folder(self._folder)
        return renamed

    def prune(self, *, keeping: Path | None = None) -> None:
        """Delete the checkpoints that the policy does not keep.

        It keeps the newest ``keep``, the best with ``keep_best``, and those of multiples of ``keep_every``. One that is
        being read stays until the next time.

        Args:
            keeping: a checkpoint that stays in any case: the one just written, where others claim a later step.
        """
        if self._policy.keep == 0:
            return
        for leftover in sorted(self._folder.glob(".step_*.gone")) + sorted(self._folder.glob(".step_*.old")):
            self._delete(leftover)
        saved = list(complete_checkpoints(self._folder, say=silent))
        kept = {entry.folder for entry in self._kept(saved)}
        for entry in saved:
            if entry.folder not in kept and entry.folder != keeping:
                self._remove(entry.folder)

    def _kept(self, saved: Sequence[SavedCheckpoint]) -> Iterator[SavedCheckpoint]:
        """Yield the checkpoints that the policy keeps, some of them several times."""
        policy = self._policy
        yield from saved[: policy.keep]
        if policy.keep_best:
            yield from best_first(saved, policy.best_metric)[:1]
        if policy.keep_every:
            yield from (entry for entry in saved if entry.manifest.step % policy.keep_every == 0)

    def _remove(self, folder: Path) -> None:
        """Delete a checkpoint, unless another process reads it."""
        with RemovalLock(folder) as lock:
            if not lock.acquire():
                self._say(f"checkpoint {folder} is kept for now: another process is reading it")
                return
            if lock.unsupported is not None and self._has_locks:
                self._has_locks = False
                why = f"no process can say that it reads a checkpoint ({lock.unsupported})"
                self._say(f"checkpoints in {self._folder} are removed without asking: {why}")
            gone = self._folder / f".{folder.name}.gone"
            shutil.rmtree(gone, ignore_errors=True)
            folder.rename(gone)  # first: a half deleted folder must not look like a checkpoint
            shutil.rmtree(gone, ignore_errors=True)

    def _delete(self, hidden: Path) -> None:
        """Delete a checkpoint that a newer one has replaced, unless another process reads it."""
        if (hidden / MANIFEST).exists():
            with RemovalLock(hidden) as lock:
                if not lock.acquire():
                    return
        shutil.rmtree(hidden, ignore_errors=True)

    def latest(self) -> SavedCheckpoint | None:
        """Return the newest complete checkpoint, if there is one."""
        return next(complete_checkpoints(self._folder, say=self._say), None)


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoint folders in ``folder``, complete or not, newest first."""
    if not folder.is_dir():
        return []
    numbered = [(int(found[1]), entry) for entry in folder.iterdir() if (found := _NAME.fullmatch(entry.name))]
    return [entry for _, entry in sorted(numbered, reverse=True)]


def complete_checkpoints(folder: Path, *, say: Say) -> Iterator[SavedCheckpoint]:
    """Yield the complete checkpoints in ``folder``, newest first, saying which ones are not."""
    for entry in checkpoint_folders(folder):
        try:
            yield open_checkpoint(entry)
        except ValueError as error:
            say(f"checkpoint {entry} is skipped: {error}")


def best_first(saved: Iterable[SavedCheckpoint], metric: str | None = None) -> list[SavedCheckpoint]:
    """Return those of a run's checkpoints that were evaluated, the best one first.

    Args:
        saved: newest first; of equal ones the newest is the best.
        metric: ``min:NAME`` or ``max:NAME``; by default that of the newest one's run.
    """
    saved = list(saved)
    if not saved:
        return []
    direction, _, name = (metric or saved[0].manifest.best_metric).partition(":")
    sign = -1.0 if direction == "max" else 1.0
    rated = [(sign * value, entry) for entry in saved if (value := entry.manifest.metric(name)) is not None]
    return [entry for _, entry in sorted(rated, key=lambda pair: pair[0])]


def open_checkpoint(folder: Path) -> SavedCheckpoint:
    """Return the checkpoint in ``folder``.

    Raises:
        ValueError: it is not complete; the message says what is missing.
    """
    manifest = read_manifest(folder)
    why = missing_payload(folder, manifest)
    if why:
        raise ValueError(why)
    return SavedCheckpoint(folder=folder, manifest=manifest)


def _payload(pending: Path) -> list[str]:
    """Return the files of a pending payload by their path below it."""
    return sorted(file.relative_to(pending).as_posix() for file in pending.rglob("*") if file.is_file())


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _fsync_file(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

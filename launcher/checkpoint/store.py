"""The checkpoints of one run: written beside the others, renamed when complete, pruned afterwards.

Whatever a crash leaves behind has a hidden name (``.step_00000010.tmp``) or is the old state; a folder
``step_00000010`` is complete from the moment it exists. Standard library only: the parent looks in here too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.checkpoint.manifest import Manifest, missing_payload, read_manifest, write_manifest
from launcher.checkpoint.policy import Checkpoint
from launcher.files import fsync_folder

Say = Callable[[str], None]

_NAME = re.compile(r"step_(\d{8,})")
_HIDDEN = re.compile(r"\.step_\d{8,}\.(tmp|old|gone)")


def quiet(line: str) -> None:
    """Say nothing: for looks whose outcome somebody else tells."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A complete checkpoint."""

    folder: Path
    manifest: Manifest


class CheckpointStore:
    """Writes and prunes. Rank 0 calls ``begin`` and ``commit`` with a barrier after the one and before the other.

    Args:
        folder: ``<run directory>/checkpoints``, on a file system that all ranks share.
        policy: how many to keep.
        say: takes one line for people.
    """

    def __init__(self, folder: Path, policy: Checkpoint, *, say: Say = print) -> None:
        self._folder, self._policy, self._say = folder, policy, say

    def pending(self, step: int) -> Path:
        """Return where every rank writes its part of the payload of ``step``."""
        return self._folder / f".{_name(step)}.tmp"

    def begin(self, step: int) -> Path:
        """Make the empty pending folder of ``step``."""
        pending = self.pending(step)
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir(parents=True)
        return pending

    def sees(self, step: int) -> bool:
        """Whether the pending folder of ``step`` is there for this rank, once rank 0 has made it.

        Making the folder above asks its server: what an NFS client remembers may be half a minute old.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        return self.pending(step).is_dir()

    def commit(self, manifest: Manifest) -> Saved:
        """Make the pending payload of ``manifest.step`` the checkpoint of that step, then prune.

        Raises:
            OSError: the disk is full or gone; older checkpoints are untouched.
        """
        pending, final = self.pending(manifest.step), self._folder / _name(manifest.step)
        files = sorted(file for file in pending.rglob("*") if file.is_file())
        for file in files:
            _fsync_file(file)
        for folder in (pending, *(entry for entry in pending.rglob("*") if entry.is_dir())):
            fsync_folder(folder)
        complete = replace(manifest, files={str(file.relative_to(pending)): file.stat().st_size for file in files})
        write_manifest(pending, complete)
        replaced = self._folder / f".{final.name}.old"
        if final.exists():  # the same step again, after a resume from an older one
            final.rename(replaced)
        pending.rename(final)
        fsync_folder(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)
        self.prune()
        return Saved(folder=final, manifest=complete)

    def clean(self) -> None:
        """Remove what a crash left: call it once, before the first ``begin``."""
        for leftover in sorted(self._folder.glob(".step_*")):
            if _HIDDEN.fullmatch(leftover.name):
                final = self._folder / leftover.name.split(".")[1]
                if leftover.suffix == ".old" and not final.exists():
                    leftover.rename(final)  # the crash fell between the two renames of a commit
                else:
                    shutil.rmtree(leftover, ignore_errors=True)

    def prune(self) -> None:
        """Delete what the policy does not keep: all but the newest ``keep`` and, with ``keep_best``, the best one."""
        saved = list(complete_in(self._folder, say=quiet))
        keep = self._policy.keep
        if keep == 0:
            return
        kept = {entry.folder for entry in saved[:keep]}
        losses = [(entry.manifest.eval_loss, entry.folder) for entry in saved if entry.manifest.eval_loss is not None]
        if self._policy.keep_best and losses:
            kept.add(min(losses, key=lambda pair: pair[0])[1])
        for entry in saved:
            if entry.folder not in kept:
                gone = self._folder / f".{entry.folder.name}.gone"
                entry.folder.rename(gone)  # first: a half deleted folder must not look like a checkpoint
                shutil.rmtree(gone, ignore_errors=True)

    def latest(self) -> Saved | None:
        """Return the newest complete checkpoint, if there is one."""
        return next(complete_in(self._folder, say=self._say), None)


def complete_in(folder: Path, *, say: Say) -> Iterator[Saved]:
    """Yield the complete checkpoints in ``folder``, newest first, saying which ones are not."""
    if not folder.is_dir():
        return
    numbered = [(int(found[1]), entry) for entry in folder.iterdir() if (found := _NAME.fullmatch(entry.name))]
    for _, entry in sorted(numbered, reverse=True):
        try:
            yield open_checkpoint(entry)
        except ValueError as error:
            say(f"checkpoint {entry} is skipped: {error}")


def open_checkpoint(folder: Path) -> Saved:
    """Return the checkpoint in ``folder``.

    Raises:
        ValueError: it is not complete; the message says what is missing.
    """
    manifest = read_manifest(folder)
    trouble = missing_payload(folder, manifest)
    if trouble:
        raise ValueError(trouble)
    return Saved(folder=folder, manifest=manifest)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _fsync_file(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

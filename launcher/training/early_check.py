"""Compare a checkpoint with its checksums while the model is built."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from launcher.checkpoint.foreign.plan import foreign_to_resume
from launcher.checkpoint.locks import ReadLock
from launcher.checkpoint.manifest import COMPARED_BYTES, damaged_files, files_of_part
from launcher.checkpoint.resume import resume_candidates
from launcher.checkpoint.store import silent
from launcher.errors import ConfigError
from launcher.training.background import BackgroundCall
from launcher.utils.progress import ProgressLines

if TYPE_CHECKING:
    from types import TracebackType

    from launcher.checkpoint.store import SavedCheckpoint
    from launcher.engines.context import Context


class CheckpointCheck:
    """Reads this rank's share of a checkpoint's files; of the newest one at once, on a thread.

    No run removes that one until this is closed.

    Args:
        context: of this rank.
    """

    def __init__(self, context: Context) -> None:
        self._context, self._closed = context, threading.Event()
        self._early: SavedCheckpoint | None = None
        self._found: list[str] = []
        self._locks = contextlib.ExitStack()
        self._lines = ProgressLines("comparing the checkpoint with its checksums")
        self._num_blocks = itertools.count(1)
        self._compared_bytes = 0
        with contextlib.suppress(ConfigError, OSError):  # restoring it says what is wrong
            self._early = self._locked(context.run.checkpoint.resume)
        self._reading = BackgroundCall(self._read) if self._early is not None else None

    def _locked(self, resume: str) -> SavedCheckpoint | None:
        if resume == "none" or foreign_to_resume(resume) is not None:
            return None
        saved = next(resume_candidates(resume, self._context.run_dir, say=silent), None)
        if saved is not None:
            self._locks.enter_context(ReadLock(saved.folder, say=silent))
        return saved

    def _read(self) -> None:
        assert self._early is not None
        self._found = self._damaged(self._early, heartbeat=self._stop_if_closed)

    def _damaged(self, saved: SavedCheckpoint, *, heartbeat: Callable[[], None]) -> list[str]:
        self._num_blocks, self._compared_bytes = itertools.count(1), 0

        def block_read() -> None:
            self._compared_bytes = next(self._num_blocks) * COMPARED_BYTES
            heartbeat()

        return damaged_files(saved.folder, saved.manifest, self._own_files(saved), heartbeat=block_read)

    def _own_files(self, saved: SavedCheckpoint) -> list[str]:
        """Return the files that this rank compares."""
        part, parts = self._context.rank, self._context.world_size
        return files_of_part(saved.manifest.files, part=part, parts=parts)

    def damaged(self, saved: SavedCheckpoint) -> list[str]:
        """Return which files of this rank's share are not as they were written."""
        total = sum(saved.manifest.files[name] for name in self._own_files(saved))

        def heartbeat() -> None:
            self._context.heartbeat.update("load")
            if self._context.is_main:
                self._lines.update(self._compared_bytes, total)

        if self._reading is None or saved != self._early:
            return self._damaged(saved, heartbeat=heartbeat)
        while not self._reading.is_done:
            heartbeat()
            self._reading.wait(timeout_s=1.0)
        self._reading.result()
        return self._found

    def _stop_if_closed(self) -> None:
        if self._closed.is_set():
            raise InterruptedError("the rank ends and does not load it")

    def close(self) -> None:
        """Release the lock, and stop reading."""
        self._closed.set()
        self._locks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

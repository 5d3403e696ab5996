"""Compare a checkpoint with its checksums while the model is built."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from launcher.checkpoint.foreign.plan import foreign_to_resume
from launcher.checkpoint.locks import ReadLock
from launcher.checkpoint.manifest import damaged_files, files_of_part
from launcher.checkpoint.resume import resume_candidates
from launcher.checkpoint.store import silent
from launcher.errors import ConfigError
from launcher.training.background import BackgroundCall

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
        part, parts = self._context.rank, self._context.world_size
        names = files_of_part(saved.manifest.files, part=part, parts=parts)
        return damaged_files(saved.folder, saved.manifest, names, heartbeat=heartbeat)

    def damaged(self, saved: SavedCheckpoint) -> list[str]:
        """Return which files of this rank's share are not as they were written."""
        if self._reading is None or saved != self._early:
            return self._damaged(saved, heartbeat=self._heartbeat)
        while not self._reading.is_done:
            self._heartbeat()
            self._reading.wait(timeout_s=1.0)
        self._reading.result()
        return self._found

    def _heartbeat(self) -> None:
        self._context.heartbeat.update("load")

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

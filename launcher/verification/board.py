"""Files in the run directory by which ranks tell each other where a case meets and how it went."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import JobError
from launcher.files import read_json, write_json
from launcher.ports import free_port
from launcher.verification.fork import AT, TROUBLE, Answer

_TICK_S = 0.1
_LEFT = "left"
_GRACE_S = 5.0
"""Time that a rank gets to fail by itself once another has: its own reason may say more."""


@dataclass(frozen=True)
class Board:
    """A folder that all ranks see.

    Args:
        folder: of this attempt at the run.
        rank: who looks.
        beat: called while waiting.
    """

    folder: Path
    rank: int
    beat: Callable[[], None]

    @property
    def reference(self) -> Path:
        """The final weights of one process."""
        return self.folder / "reference.safetensors"

    def answer_of(self, name: str, rank: int) -> Path:
        """Return the file with the answer of ``rank`` in case ``name``."""
        return self.folder / f"{name}.{rank}.json"

    def open_case(self, name: str, *, limit_s: float) -> int:
        """Return the port at which the ranks of a case meet; rank 0 finds one that is free, the others wait for it.

        Raises:
            JobError: rank 0 names none in time.
        """
        file = self.folder / f"{name}.port.json"
        if self.rank == 0:
            write_json(file, {"port": free_port()})
        deadline = time.monotonic() + limit_s
        while not file.exists():
            self.beat()
            if time.monotonic() > deadline:
                raise JobError(
                    f"rank {self.rank} saw no {file} in {limit_s:g} s: set run.root to a folder that all hosts share"
                )
            time.sleep(_TICK_S)
        port: int = read_json(file)["port"]
        return port

    def watch(self, name: str, *, world_size: int) -> Callable[[], str]:
        """Return what tells, once some rank has failed in case ``name`` and this one had time to do so, which."""
        others = {rank: self.answer_of(name, rank) for rank in range(world_size) if rank != self.rank}
        failed: dict[int, float] = {}

        def give_up() -> str:
            for rank in [rank for rank, file in others.items() if file.exists()]:
                if TROUBLE in read_json(others.pop(rank)):
                    failed[rank] = time.monotonic()
            first = min(failed, key=failed.__getitem__, default=None)
            late = first is not None and time.monotonic() > failed[first] + _GRACE_S
            return f"ended because rank {first} had failed" if late else ""

        return give_up

    def answers(self, name: str, *, world_size: int, limit_s: float) -> dict[int, Answer]:
        """Return what all ranks answered; those that do not within ``limit_s`` are in trouble."""
        deadline = time.monotonic() + limit_s
        found: dict[int, Answer] = {}
        while len(found) < world_size and time.monotonic() < deadline:
            self.beat()
            for rank in range(world_size):
                file = self.answer_of(name, rank)
                if rank not in found and file.exists():
                    found[rank] = read_json(file)
            time.sleep(_TICK_S)
        silent = {TROUBLE: f"did not answer within {limit_s:g} s of rank 0", AT: time.time()}
        return {rank: found.get(rank, silent) for rank in range(world_size)}

    def leave(self, *, world_size: int, limit_s: float) -> None:
        """Say that this rank is done here; rank 0 removes the folder once all are, and leaves it where one is not.

        A rank still waits for its fork when the answer of that is there already.
        """
        write_json(self.answer_of(_LEFT, self.rank), {})
        if self.rank == 0 and not any(
            TROUBLE in answer for answer in self.answers(_LEFT, world_size=world_size, limit_s=limit_s).values()
        ):
            shutil.rmtree(self.folder)
            if not any(self.folder.parent.iterdir()):
                self.folder.parent.rmdir()

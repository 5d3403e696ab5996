"""Work on the ranks of a run, each time in a fork of every rank that takes part: a process group of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING

from launcher.supervise.heartbeat import Heartbeat
from launcher.verification.board import Board
from launcher.verification.fork import Answer, in_fork

if TYPE_CHECKING:
    from launcher.config import Run
    from launcher.context import Context

SLACK_S = 60.0
"""Between ranks that wait for each other, besides the time of a case."""


@dataclass
class ForkedRanks:
    """One rank's part in them; all ranks go through the same cases in the same order.

    Args:
        context: of this rank in the run.
        folder: name of the one in the run directory by which ranks tell each other where a case meets, and its outcome.
        limit_s: time that a case gets.
        beat: called while this rank waits.
    """

    context: Context
    _: KW_ONLY
    folder: str
    limit_s: float
    beat: Callable[[], None]

    def __post_init__(self) -> None:
        folder = self.context.run_dir.path / self.folder / os.environ["MASTER_PORT"]  # another attempt has another port
        folder.mkdir(parents=True, exist_ok=True)
        self.board = Board(folder, self.context.rank, self.beat)
        self._passed_over = 0

    def take(self, name: str, work: Callable[[Context], Answer], *, run: Run, world_size: int) -> dict[int, Answer]:
        """Do ``work`` on the first ``world_size`` ranks; return what each answered on rank 0, and nothing elsewhere.

        A rank that fails, dies or is late answers with ``TROUBLE``; then so do the others.

        Args:
            name: of the case; no two have the same.
            work: done in the fork, with the context it has there.
            run: of that context.
            world_size: of that context.
        """
        if self.context.rank >= world_size:
            self._passed_over += 1
            return {}
        patience_s = (2 + self._passed_over) * (self.limit_s + SLACK_S)
        self._passed_over = 0
        port = self.board.open_case(name, limit_s=patience_s)
        context = replace(self.context, run=run, world_size=world_size, heartbeat=Heartbeat(None))  # the parent beats

        def there() -> Answer:
            from launcher.engines.distributed import meet_at

            meet_at(port, world_size=world_size)
            return work(context)

        in_fork(
            there,
            self.board.answer_of(name, self.context.rank),
            limit_s=self.limit_s,
            beat=self.beat,
            give_up=self.board.watch(name, world_size=world_size),
        )
        if not self.context.is_main:
            return {}
        return self.board.answers(name, world_size=world_size, limit_s=SLACK_S)

    def leave(self) -> None:
        """Say that this rank is done; what ranks told each other is removed once all are."""
        self.board.leave(world_size=self.context.world_size, limit_s=SLACK_S)

"""The loop of ``job=generate`` on one rank: lines into the engine, answers onto the disk."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.errors import EXIT_PREEMPTED, JobError
from launcher.generation.answer import Answer, error_line
from launcher.generation.parts import Index, PartWriter
from launcher.generation.wish import BadLine, wish_of
from launcher.serving.values import Refused, Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.generation.source import Record
    from launcher.serving.base import Generator
    from launcher.serving.values import Update
    from launcher.serving.words import Words
    from launcher.training.preemption import Preemption

_AHEAD = 4
"""Times the requests that are worked on: as many lines are in memory, for a scheduler to choose among."""
_SCAN_S = 1.0
_REFUSALS_PRINTED = 20


@dataclass(kw_only=True)
class Worker:
    """Generates what is not there yet of one rank's share."""

    records: Iterator[Record]
    usual: Mapping[str, Any]
    """Sampling of lines that say nothing else."""
    words: Words
    generator: Generator
    parts: PartWriter
    index: Index
    preemption: Preemption
    at_once: int
    """Requests that the engine works on together."""
    seed: int
    beat: Callable[[int, float], None]
    """Told how many records are done, by all ranks, and this rank's tokens a second."""

    _answers: dict[str, Answer] = field(default_factory=dict)
    _tokens: int = 0
    _refused: int = 0
    _scanned_at: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Go on until this rank's share is done.

        Raises:
            SystemExit: with the code that means "resume me", when the run was asked to make room.
        """
        exhausted = False
        while not exhausted or self._answers:
            self.leave_if_asked()
            room = _AHEAD * self.at_once - len(self._answers)
            if not exhausted:
                exhausted = self._admit(room)
            for update in self.generator.step():
                if answer := self._answers.get(update.request):
                    self._tokens += len(update.tokens)
                    if finish := answer.take(update):
                        self._write(update, answer, finish)
                        if update.finish is None:
                            self.generator.cancel(update.request)
            self.tell()

    def leave_if_asked(self) -> None:
        """End this process where it was asked to: what is on disk is kept, what is under way is done again."""
        if self.preemption.requested():
            self.parts.sync()
            raise SystemExit(EXIT_PREEMPTED)

    def tell(self) -> None:
        """Say how far the run is, as all ranks' files have it, from time to time."""
        now = time.monotonic()
        if now - self._scanned_at > _SCAN_S:
            self._scanned_at = now
            self.index.scan()
        self.beat(self.index.num_done, self._tokens / (now - self._started + 1e-9))

    def _admit(self, room: int) -> bool:
        """Hand lines to the engine; return whether none is left."""
        taken = 0
        for record in itertools.islice(self.records, max(0, room)):
            taken += 1
            try:
                wish = wish_of(record, self.usual, self.words, seed=self.seed)
                request = Request(id=str(record.number), prompt=wish.prompt, sampling=wish.sampling)
                self.generator.add(request)
            except (BadLine, Refused) as bad:
                why = f"{bad.field}: {bad}" if isinstance(bad, Refused) else str(bad)
                self._refuse(record, why)
            else:
                self._answers[request.id] = Answer(record, wish, self.words)
        return taken < room

    def _refuse(self, record: Record, why: str) -> None:
        self._refused += 1
        if self._refused <= _REFUSALS_PRINTED:
            print(f"line {record.line}: {why}", flush=True)
        elif self._refused == _REFUSALS_PRINTED + 1:
            print("more lines are bad: only the answers say which", flush=True)
        self.parts.append(record.number, error_line(record, why), is_error=True)

    def _write(self, update: Update, answer: Answer, finish: str) -> None:
        del self._answers[update.request]
        if finish in ("stop", "length"):
            line = answer.line("stop" if finish == "stop" else "length")
            self.parts.append(answer.record.number, line, tokens=answer.num_tokens)
        elif finish == "error":
            self._refuse(answer.record, f"{update.field}: {update.problem}" if update.field else update.problem)
        else:
            raise JobError(f"the engine ended line {answer.record.line} as {finish}, which nobody asked for")

"""What becomes of sequences once their scores are there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

import torch

from launcher.serving.beams import Beams
from launcher.serving.rows import Row, Task
from launcher.serving.sampling import Choice, change, pick, plain, tokens_of
from launcher.serving.scheduler import Scheduler, Step
from launcher.serving.values import Finish, Token

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step has brought one request."""

    task: Task
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    problem: str = ""


class Continuing:
    """Samples, and says which requests end.

    Args:
        scheduler: that has the rows.
        context: most tokens of a sequence.
        ends: tokens that end a sequence.
    """

    def __init__(self, scheduler: Scheduler, *, context: int, ends: Sequence[int]) -> None:
        self._scheduler, self._context, self._ends = scheduler, context, tuple(ends)
        self._choices: dict[Task, Choice] = {}
        self._beams: dict[Task, Beams] = {}

    def forget(self, task: Task) -> None:
        """Let the state of a request go."""
        self._choices.pop(task, None)
        self._beams.pop(task, None)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def go_on(self, step: Step, scores: Tensor) -> list[Outcome]:
        """Return what each request of a step comes to.

        Args:
            step: computed.
            scores: of its wanted rows; (rows, vocabulary), fp32.
        """
        rows = list(step.wanted)
        if not rows:
            return []
        # the largest is not finite where any is not a number; minus infinity alone is how models rule tokens out
        lost = {row.task for row, best in zip(rows, scores.amax(-1).tolist(), strict=True) if not isfinite(best)}
        outcomes = [Outcome(task, finish="error", problem="the model's scores are not finite") for task in lost]
        single = [i for i, row in enumerate(rows) if row.task not in lost and row.task.width == 1]
        if single:
            chosen = scores if len(single) == len(rows) else scores[single]
            outcomes += self._sampled([rows[i] for i in single], chosen)
        beams: dict[Task, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            if row.task not in lost and row.task.width > 1:
                beams[row.task].append(index)
        outcomes += filter(None, (self._searched(task, scores[places]) for task, places in beams.items()))
        return outcomes

    def _searched(self, task: Task, scores: Tensor) -> Outcome | None:
        """Go on with a beam search, whose rows are all here."""
        if task not in self._beams:
            longest = min(task.request.sampling.max_tokens, self._context - len(task.request.prompt))
            self._beams[task] = Beams(self._choice(task), ends=self._ends, longest=longest)
        search = self._beams[task]
        going = search.go_on(scores)
        if going is None:
            best = search.best
            finish: Finish = "stop" if best[-1] in search.ends else "length"
            return Outcome(task, tuple(Token(id=token) for token in best), finish)
        old = task.rows
        prompt = list(task.request.prompt)
        task.rows = [self._scheduler.fork(old[beam.parent], prompt + beam.output) for beam in going]
        for row in old:
            self._scheduler.drop(row)
        return None

    def _sampled(self, rows: Sequence[Row], scores: Tensor) -> list[Outcome]:
        choices = [self._choice(row.task) for row in rows]
        told = scores
        if not all(plain(choice.sampling) for choice in choices):
            told = scores.clone() if any(choice.sampling.logprobs is not None for choice in choices) else scores
            change(scores, choices, ends=self._ends)
        picked = pick(scores, choices)
        outcomes = []
        for row, choice, token in zip(rows, choices, tokens_of(told, picked, choices), strict=True):
            choice.output.append(token.id)
            row.tokens.append(token.id)
            outcomes.append(Outcome(row.task, (token,), self._finish(row, choice, token.id)))
        return outcomes

    def _choice(self, task: Task) -> Choice:
        if task not in self._choices:
            self._choices[task] = Choice(task.request.sampling, task.request.prompt)
        return self._choices[task]

    def _finish(self, row: Row, choice: Choice, token: int) -> Finish | None:
        way = choice.sampling
        if token in way.stop_ids or (token in self._ends and not way.ignore_end):
            return "stop"
        return "length" if len(choice.output) >= way.max_tokens or len(row.tokens) >= self._context else None

"""Sample the tokens of a step, and decide which requests finish."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

import torch

from launcher.inference.engine.base import FinishReason, GeneratedToken
from launcher.inference.engine.sampler import (
    NO_TOKEN,
    BeamSearch,
    NoCandidates,
    SamplerState,
    apply_penalties,
    is_unchanged,
    make_tokens,
    sample_tokens,
)
from launcher.inference.engine.scheduler import ScheduledStep, Scheduler
from launcher.inference.engine.sequence import Sequence as Row
from launcher.inference.engine.sequence import SequenceGroup

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step has brought one request."""

    task: SequenceGroup
    tokens: tuple[GeneratedToken, ...] = ()
    finish: FinishReason | None = None
    problem: str = ""
    field: str = ""
    """Of ``Sampling``: whose value is to blame, if one is."""


class OutputProcessor:
    """Samples, and says which requests end.

    Args:
        scheduler: that has the rows.
        context: most tokens of a sequence.
        ends: tokens that end a sequence.
    """

    def __init__(self, scheduler: Scheduler, *, context: int, ends: Sequence[int]) -> None:
        self._scheduler, self._context, self._ends = scheduler, context, tuple(ends)
        self._choices: dict[SequenceGroup, SamplerState] = {}
        self._beams: dict[SequenceGroup, BeamSearch] = {}

    def forget(self, task: SequenceGroup) -> None:
        """Let the state of a request go."""
        self._choices.pop(task, None)
        self._beams.pop(task, None)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def go_on(self, step: ScheduledStep, scores: Tensor) -> list[StepOutput]:
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
        outcomes = [StepOutput(task, finish="error", problem="the model's scores are not finite") for task in lost]
        single = [i for i, row in enumerate(rows) if row.task not in lost and row.task.width == 1]
        if single:
            chosen = scores if len(single) == len(rows) else scores[single]
            outcomes += self._sampled([rows[i] for i in single], chosen)
        beams: dict[SequenceGroup, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            if row.task not in lost and row.task.width > 1:
                beams[row.task].append(index)
        for task, places in beams.items():
            try:
                outcome = self._searched(task, scores[places])
            except NoCandidates:
                outcome = _no_candidates(task)
            except Exception as error:  # noqa: BLE001  (whatever it is, the other requests go on)
                outcome = _failed(task, error)
            outcomes += [outcome] if outcome else []
        return outcomes

    def _searched(self, task: SequenceGroup, scores: Tensor) -> StepOutput | None:
        """Go on with a beam search, whose rows are all here."""
        if task not in self._beams:
            longest = min(task.request.sampling.max_tokens, self._context - len(task.request.prompt))
            self._beams[task] = BeamSearch(self._choice(task), ends=self._ends, longest=longest)
        search = self._beams[task]
        going = search.go_on(scores)
        if going is None:
            best = search.best
            finish: FinishReason = "stop" if best[-1] in search.ends else "length"
            return StepOutput(task, tuple(GeneratedToken(id=token) for token in best), finish)
        old = task.rows
        prompt = list(task.request.prompt)
        task.rows = [self._scheduler.fork(old[beam.parent], prompt + beam.output) for beam in going]
        for row in old:
            self._scheduler.drop(row)
        return None

    def _sampled(self, rows: Sequence[Row], scores: Tensor) -> list[StepOutput]:
        """Give each sequence its next token; what cannot be done for one of them ends that one alone."""
        ways = [row.task.request.sampling for row in rows]
        told = scores  # as the model gave them
        if not all(map(is_unchanged, ways)) and any(way.logprobs is not None for way in ways):
            told = scores.clone()
        outcomes, drawn = [], []
        for index, row in enumerate(rows):
            try:
                choice = self._choice(row.task)
                if not is_unchanged(ways[index]):
                    apply_penalties(scores[index : index + 1], [choice], ends=self._ends)
                drawn.append(_Draw(index, row, choice, choice.draw() if ways[index].temperature > 0 else 0.0))
            except Exception as error:  # noqa: BLE001  (whatever it is, the other requests go on)
                outcomes.append(_failed(row.task, error))
        for each, token in self._picked(drawn, scores, told):
            if isinstance(token, Exception):
                outcomes.append(_failed(each.row.task, token))
            elif token.id == NO_TOKEN:
                outcomes.append(_no_candidates(each.row.task))
            else:
                each.choice.output.append(token.id)
                each.row.tokens.append(token.id)
                finish = self._finish(each.row, each.choice, token.id)
                outcomes.append(StepOutput(each.row.task, (token,), finish))
        return outcomes

    def _picked(
        self, drawn: Sequence[_Draw], scores: Tensor, told: Tensor
    ) -> Iterator[tuple[_Draw, GeneratedToken | Exception]]:
        """Yield each with its token, or why it has none: where all together fail, one by one."""
        if not drawn:
            return
        indexes, choices = [each.index for each in drawn], [each.choice for each in drawn]
        is_whole = len(drawn) == len(scores)
        try:
            picked = sample_tokens(scores if is_whole else scores[indexes], choices, [each.number for each in drawn])
            tokens = make_tokens(told if is_whole else told[indexes], picked, choices)
        except Exception as error:  # noqa: BLE001  (whatever it is, the other requests go on)
            if len(drawn) == 1:
                yield drawn[0], error
                return
            for each in drawn:
                yield from self._picked([each], scores, told)
        else:
            yield from zip(drawn, tokens, strict=True)

    def _choice(self, task: SequenceGroup) -> SamplerState:
        if task not in self._choices:
            self._choices[task] = SamplerState(task.request.sampling, task.request.prompt)
        return self._choices[task]

    def _finish(self, row: Row, choice: SamplerState, token: int) -> FinishReason | None:
        way = choice.sampling
        if token in way.stop_token_ids or (token in self._ends and not way.ignore_eos):
            return "stop"
        return "length" if len(choice.output) >= way.max_tokens or len(row.tokens) >= self._context else None


@dataclass(frozen=True, slots=True)
class _Draw:
    """A sequence of a step, with its random number: drawn once, however often its token is looked for."""

    index: int
    """Of its scores."""
    row: Row
    choice: SamplerState
    number: float


def _failed(task: SequenceGroup, error: Exception) -> StepOutput:
    return StepOutput(task, finish="error", problem=f"{type(error).__name__}: {error}")


def _no_candidates(task: SequenceGroup) -> StepOutput:
    """Return the end of a request that rules every token out."""
    way = task.request.sampling
    field = "no_repeat_ngram_size" if way.no_repeat_ngram_size else "min_tokens" if way.min_tokens else ""
    return StepOutput(task, finish="error", problem="no token is left that the sequence could go on with", field=field)

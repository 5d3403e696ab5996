"""Sample the tokens of a step, and decide which requests finish."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING

import torch

from launcher.inference.engine.base import FinishReason, GeneratedToken
from launcher.inference.engine.sampler import (
    NO_TOKEN,
    BeamSearch,
    DraftedToken,
    NoCandidates,
    SamplerState,
    apply_penalties,
    is_unchanged,
    make_tokens,
    sample_drafts,
    sample_tokens,
)
from launcher.inference.engine.scheduler import ScheduledStep, Scheduler
from launcher.inference.engine.sequence import Sequence, SequenceGroup

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.inference.engine.draft_lengths import Draft


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Output of one step for one request."""

    group: SequenceGroup
    tokens: tuple[GeneratedToken, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""
    param: str = ""
    """The field of ``SamplingParams`` whose value is at fault, where one is."""


class OutputProcessor:
    """Samples the tokens of a step, and finishes requests.

    Args:
        scheduler: of the sequences.
        max_model_len: longest sequence, prompt and output together.
        eos_token_ids: tokens that end a sequence.
    """

    def __init__(self, scheduler: Scheduler, *, max_model_len: int, eos_token_ids: AbstractSequence[int]) -> None:
        self._scheduler, self._max_model_len, self._eos_token_ids = scheduler, max_model_len, tuple(eos_token_ids)
        self._states: dict[SequenceGroup, SamplerState] = {}
        self._beams: dict[SequenceGroup, BeamSearch] = {}

    def release(self, group: SequenceGroup) -> None:
        """Drop the state of a request."""
        self._states.pop(group, None)
        self._beams.pop(group, None)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def process(self, step: ScheduledStep, logits: Tensor) -> list[StepOutput]:
        """Sample from the logits of a step; return the output of each request.

        A sequence with a draft gets tokens one after the other, for as long as they are those of the draft.

        Args:
            step: computed.
            logits: of its sampled sequences; (rows, vocabulary), fp32; a sequence with a draft has a row for each of
                its tokens, and one more.
        """
        rows, first = [], 0
        for sequence, draft in step.sampled:
            rows.append(_Row(sequence, first, draft))
            first += 1 if draft is None else 1 + len(draft.tokens)
        outcomes: dict[SequenceGroup, StepOutput] = {}
        while rows:
            is_whole = len(rows) == len(logits)
            found = self._process_rows(rows, logits if is_whole else logits[[row.index for row in rows]])
            for outcome in found:
                before = outcomes.get(outcome.group)
                known = before.tokens if before is not None else ()
                outcomes[outcome.group] = replace(outcome, tokens=(*known, *outcome.tokens))
            rows = [row.next for row in rows if row.is_accepted(outcomes.get(row.sequence.group))]
        return list(outcomes.values())

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def sample_drafts(
        self, sequences: AbstractSequence[Sequence], drafted: AbstractSequence[AbstractSequence[int]], logits: Tensor
    ) -> list[tuple[int, Tensor | None]]:
        """Return the next drafted token of each sequence, and what it was drawn from.

        Args:
            sequences: to continue.
            drafted: tokens of each draft so far.
            logits: of the model that drafts, (sequences, vocabulary), fp32.
        """
        states = [self._state(sequence.group) for sequence in sequences]
        return sample_drafts(logits, states, drafted, eos_token_ids=self._eos_token_ids)

    def _process_rows(self, rows: AbstractSequence[_Row], logits: Tensor) -> list[StepOutput]:
        """Sample one token of each sequence, or advance its beams."""
        sequences = [row.sequence for row in rows]
        # the maximum is NaN or infinite where any value is; minus infinity is how models mask tokens
        failed = {
            sequence.group
            for sequence, best in zip(sequences, logits.amax(-1).tolist(), strict=True)
            if not isfinite(best)
        }
        outcomes = [
            StepOutput(group, finish_reason="error", error="the model's logits are not finite") for group in failed
        ]
        single = [
            i
            for i, sequence in enumerate(sequences)
            if sequence.group not in failed and sequence.group.max_num_seqs == 1
        ]
        if single:
            selected = logits if len(single) == len(sequences) else logits[single]
            outcomes += self._sample([rows[i] for i in single], selected)
        beams: dict[SequenceGroup, list[int]] = defaultdict(list)
        for index, sequence in enumerate(sequences):
            if sequence.group not in failed and sequence.group.max_num_seqs > 1:
                beams[sequence.group].append(index)
        for group, places in beams.items():
            try:
                outcome = self._advance_beams(group, logits[places])
            except NoCandidates:
                outcome = _no_candidates(group)
            except Exception as error:  # noqa: BLE001  (any error: the other requests continue)
                outcome = _failed(group, error)
            outcomes += [outcome] if outcome else []
        return outcomes

    def _advance_beams(self, group: SequenceGroup, logits: Tensor) -> StepOutput | None:
        """Advance a beam search by one token; all of its sequences are in the step."""
        if group not in self._beams:
            longest = min(group.request.sampling.max_tokens, self._max_model_len - len(group.request.prompt))
            self._beams[group] = BeamSearch(self._state(group), eos_token_ids=self._eos_token_ids, longest=longest)
        search = self._beams[group]
        beams_left = search.advance(logits)
        if beams_left is None:
            best = search.best
            finish: FinishReason = "stop" if best[-1] in search.eos_token_ids else "length"
            return StepOutput(group, tuple(GeneratedToken(id=token) for token in best), finish)
        old = group.sequences
        prompt = list(group.request.prompt)
        group.sequences = [self._scheduler.fork(old[beam.parent], prompt + beam.output) for beam in beams_left]
        for sequence in old:
            self._scheduler.free(sequence)
        return None

    def _sample(self, rows: AbstractSequence[_Row], logits: Tensor) -> list[StepOutput]:
        """Give each sequence its next token; an error ends only the request that caused it."""
        sequences = [row.sequence for row in rows]
        params = [sequence.group.request.sampling for sequence in sequences]
        model_logits = logits  # before penalties
        if not all(map(is_unchanged, params)) and any(sampling.logprobs is not None for sampling in params):
            model_logits = logits.clone()
        outcomes, drawn = [], []
        for index, sequence in enumerate(sequences):
            try:
                state = self._state(sequence.group)
                if not is_unchanged(params[index]):
                    apply_penalties(logits[index : index + 1], [state], eos_token_ids=self._eos_token_ids)
                number = state.draw() if params[index].temperature > 0 else 0.0
                drawn.append(_Draw(index, sequence, state, number, rows[index].drafted_token(state)))
            except Exception as error:  # noqa: BLE001  (any error: the other requests continue)
                outcomes.append(_failed(sequence.group, error))
        for each, token in self._sample_isolated(drawn, logits, model_logits):
            if isinstance(token, Exception):
                outcomes.append(_failed(each.sequence.group, token))
            elif token.id == NO_TOKEN:
                outcomes.append(_no_candidates(each.sequence.group))
            else:
                each.state.output.append(token.id)
                each.sequence.tokens.append(token.id)
                finish = self._finish(each.sequence, each.state, token.id)
                outcomes.append(StepOutput(each.sequence.group, (token,), finish))
        return outcomes

    def _sample_isolated(
        self, drawn: AbstractSequence[_Draw], logits: Tensor, model_logits: Tensor
    ) -> Iterator[tuple[_Draw, GeneratedToken | Exception]]:
        """Yield each with its token or its error: where all together fail, sample one by one."""
        if not drawn:
            return
        indexes, states = [each.index for each in drawn], [each.state for each in drawn]
        is_whole = len(drawn) == len(logits)
        try:
            numbers, drafted = [each.number for each in drawn], [each.drafted for each in drawn]
            picked = sample_tokens(logits if is_whole else logits[indexes], states, numbers, drafted)
            tokens = make_tokens(model_logits if is_whole else model_logits[indexes], picked, states)
        except Exception as error:  # noqa: BLE001  (any error: the other requests continue)
            if len(drawn) == 1:
                yield drawn[0], error
                return
            for each in drawn:
                yield from self._sample_isolated([each], logits, model_logits)
        else:
            yield from zip(drawn, tokens, strict=True)

    def _state(self, group: SequenceGroup) -> SamplerState:
        if group not in self._states:
            self._states[group] = SamplerState(group.request.sampling, group.request.prompt)
        return self._states[group]

    def _finish(self, sequence: Sequence, state: SamplerState, token: int) -> FinishReason | None:
        sampling = state.sampling
        if token in sampling.stop_token_ids or (token in self._eos_token_ids and not sampling.ignore_eos):
            return "stop"
        return (
            "length"
            if len(state.output) >= sampling.max_tokens or len(sequence.tokens) >= self._max_model_len
            else None
        )


@dataclass(frozen=True, slots=True)
class _Draw:
    """A sequence of a step, with its random number: drawn once, even where it is sampled twice."""

    index: int
    """Index of its logits in the step."""
    sequence: Sequence
    state: SamplerState
    number: float
    drafted: DraftedToken | None


@dataclass(frozen=True, slots=True)
class _Row:
    """A sequence that gets a token, and the logits for it."""

    sequence: Sequence
    index: int
    """Index of the logits in the step."""
    draft: Draft | None
    place: int = 0
    """Tokens that it got before in this step, all of them drafted."""

    @property
    def next(self) -> _Row:
        """The row after the drafted token."""
        return replace(self, index=self.index + 1, place=self.place + 1)

    def is_accepted(self, outcome: StepOutput | None) -> bool:
        """Return whether the token that the sequence got is the drafted one, and it goes on."""
        return (
            self.draft is not None
            and self.place < len(self.draft.tokens)
            and outcome is not None
            and outcome.finish_reason is None
            and outcome.tokens[-1].id == self.draft.tokens[self.place]
        )

    def drafted_token(self, state: SamplerState) -> DraftedToken | None:
        """Return the drafted token, where it was drawn at random."""
        if self.draft is None or self.place >= len(self.draft.tokens):
            return None
        probabilities = self.draft.probabilities[self.place]
        if probabilities is None:
            return None
        return DraftedToken(self.draft.tokens[self.place], probabilities, state.draw())


def _failed(group: SequenceGroup, error: Exception) -> StepOutput:
    return StepOutput(group, finish_reason="error", error=f"{type(error).__name__}: {error}")


def _no_candidates(group: SequenceGroup) -> StepOutput:
    """Return the end of a request that masks every token."""
    sampling = group.request.sampling
    param = "no_repeat_ngram_size" if sampling.no_repeat_ngram_size else "min_tokens" if sampling.min_tokens else ""
    return StepOutput(group, finish_reason="error", error="no token can continue the sequence", param=param)

"""From logits to tokens: penalties, filters, sampling and beam search.

Formulas and order are those of Transformers' ``generate``; tests compare with its logits processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING

import torch

from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import GeneratedToken

if TYPE_CHECKING:
    from torch import Tensor


_MASKED = float("-inf")


@dataclass(eq=False, slots=True)
class SamplerState:
    """Sampling state of one sequence: parameters, tokens so far and random numbers."""

    sampling: SamplingParams
    prompt: Sequence[int]
    output: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None
    _grams: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    _seen: int = 0
    _ahead: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed)

    def draw(self) -> float:
        """Return the next of its random numbers, in [0, 1)."""
        return self._ahead.pop(0) if self._ahead else self._number()

    def peek(self, place: int) -> float:
        """Return the number that ``draw`` will return after ``place`` others."""
        while len(self._ahead) <= place:
            self._ahead.append(self._number())
        return self._ahead[place]

    def _number(self) -> float:
        assert self.generator is not None
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def banned_tokens(self) -> Sequence[int]:
        """Return the tokens that would repeat a sequence of ``no_repeat_ngram_size`` tokens."""
        size = self.sampling.no_repeat_ngram_size
        past = [*self.prompt, *self.output]
        for end in range(max(self._seen, size - 1), len(past)):
            self._grams.setdefault(tuple(past[end - size + 1 : end]), []).append(past[end])
        self._seen = len(past)
        return self._grams.get(tuple(past[len(past) - size + 1 :]), ()) if len(past) >= size - 1 else ()


def apply_penalties(logits: Tensor, states: Sequence[SamplerState], *, eos_token_ids: Sequence[int]) -> Tensor:
    """Return logits after biases, penalties and bans.

    Args:
        logits: (sequences, vocabulary), fp32; changed in place.
        states: one for each.
        eos_token_ids: the model's own end-of-sequence tokens.
    """
    for row, state in enumerate(states):
        sampling = state.sampling
        if sampling.logit_bias:
            ids, added = zip(*sampling.logit_bias, strict=True)
            logits[row, list(ids)] += torch.tensor(added, dtype=logits.dtype, device=logits.device)
        if sampling.repetition_penalty != 1.0:
            ids = torch.tensor(sorted({*state.prompt, *state.output}), device=logits.device)
            old = logits[row, ids]
            logits[row, ids] = torch.where(
                old < 0, old * sampling.repetition_penalty, old / sampling.repetition_penalty
            )
        if (sampling.presence_penalty or sampling.frequency_penalty) and state.output:
            ids, counts = torch.tensor(state.output, device=logits.device).unique(return_counts=True)
            logits[row, ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts.to(logits.dtype)
        if sampling.no_repeat_ngram_size:
            banned = state.banned_tokens()
            if banned:
                logits[row, list(banned)] = _MASKED
        if len(state.output) < sampling.min_tokens:
            never = [*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)]
            if never:
                logits[row, never] = _MASKED
    return logits


def is_unchanged(sampling: SamplingParams) -> bool:
    """Whether no parameter changes the logits before temperature and filters."""
    return (
        not sampling.logit_bias
        and sampling.repetition_penalty == 1.0
        and not sampling.presence_penalty
        and not sampling.frequency_penalty
        and not sampling.no_repeat_ngram_size
        and not sampling.min_tokens
    )


def filter_logits(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return logits after temperature, top-k, top-p and min-p; ruled out ones are -inf.

    Args:
        logits: (sequences, vocabulary), fp32.
        params: one for each, all with a temperature.
    """
    device = logits.device
    logits = logits / torch.tensor([sampling.temperature for sampling in params], device=device)[:, None]
    size = logits.shape[-1]
    kept = [min(sampling.top_k or size, size) for sampling in params]
    if min(kept) < size:
        most = max(count for count in kept if count < size)
        best = torch.topk(logits, most, dim=-1).values
        least = best.gather(1, torch.tensor([min(count, most) for count in kept], device=device)[:, None] - 1)
        limited = torch.tensor([count < size for count in kept], device=device)[:, None]
        logits = logits.masked_fill(limited & (logits < least), _MASKED)
    rows = [index for index, sampling in enumerate(params) if sampling.top_p < 1.0]
    if rows:
        logits[rows] = _top_p(logits[rows], torch.tensor([params[index].top_p for index in rows], device=device))
    rows = [index for index, sampling in enumerate(params) if sampling.min_p > 0.0]
    if rows:
        probabilities = logits[rows].softmax(-1)
        least = torch.tensor([params[index].min_p for index in rows], device=device)[:, None]
        few = probabilities < least * probabilities.amax(-1, keepdim=True)
        logits[rows] = logits[rows].masked_fill(few, _MASKED)
    return logits


_HEAD = 1024
_BELOW_ONE = 1 - 1e-15
"""Keeps a number just below 1 from being rounded to the end of the cumulated probabilities."""


def _top_p(logits: Tensor, shares: Tensor) -> Tensor:
    """Keep the fewest tokens whose probabilities add up to ``shares`` (arXiv:1904.09751).

    The likeliest thousand mostly do; only where they do not is all of the vocabulary sorted.
    """
    size = logits.shape[-1]
    probabilities = logits.softmax(-1)
    for most in (min(_HEAD, size), size):
        best, ids = torch.topk(probabilities, most, dim=-1)
        before = best.cumsum(-1) - best
        if most == size or bool((before[:, -1] + best[:, -1] >= shares + 1e-4).all()):
            break
    drop = before >= shares[:, None]
    drop[:, 0] = False
    kept = torch.full_like(logits, _MASKED)
    return kept.scatter(1, ids, logits.gather(1, ids).masked_fill(drop, _MASKED))


NO_TOKEN = -1
"""Stands for no token: no score is a comparable number, or all are ruled out."""


@dataclass(frozen=True, slots=True)
class DraftedToken:
    """A token that was drawn at random from other probabilities than the model's."""

    id: int
    probabilities: Tensor
    """fp64 of shape (vocabulary,)."""
    number: float
    """Random number for the token that replaces it."""


def sample_tokens(
    logits: Tensor,
    states: Sequence[SamplerState],
    numbers: Sequence[float] | None = None,
    drafted: Sequence[DraftedToken | None] = (),
) -> list[int]:
    """Return the next token of each sequence, or ``NO_TOKEN``.

    A random choice takes one number of the sequence's own and looks it up in the cumulated probabilities: what is
    chosen depends on nothing but the logits of this sequence.

    Args:
        logits: (sequences, vocabulary), fp32, already changed.
        states: one for each.
        numbers: one of each, from ``SamplerState.draw``; drawn here where they are left out.
        drafted: of each, to be accepted with the probability that keeps the distribution; empty: of none.
    """
    best = logits.argmax(-1)
    finite = logits.gather(1, best[:, None])[:, 0].isfinite()
    chosen: list[int] = best.where(finite, NO_TOKEN).tolist()
    rows = [index for index, state in enumerate(states) if state.sampling.temperature > 0]
    if rows:
        left = filter_logits(logits if len(rows) == len(states) else logits[rows], [states[i].sampling for i in rows])
        sums = left.softmax(-1, dtype=torch.float64).cumsum(-1)
        drawn = [states[i].draw() for i in rows] if numbers is None else [numbers[i] for i in rows]
        places = torch.tensor(drawn, dtype=torch.float64, device=logits.device)[:, None]
        found = torch.searchsorted(sums, places * sums[:, -1:] * _BELOW_ONE, right=True)[:, 0]
        found = found.clamp(max=logits.shape[-1] - 1).where(sums[:, -1].isfinite(), NO_TOKEN)
        for row, token in zip(rows, found.tolist(), strict=True):
            chosen[row] = token
        for at, row in enumerate(rows):
            draft = drafted[row] if drafted else None
            if draft is not None and chosen[row] != NO_TOKEN:
                chosen[row] = accept_or_replace(left[at].softmax(-1, dtype=torch.float64), draft, drawn[at])
    return chosen


def accept_or_replace(probabilities: Tensor, draft: DraftedToken, number: float) -> int:
    """Return a drafted token with probability p/q, else one drawn from the rest of p.

    The result (arXiv:2211.17192) has the distribution ``probabilities``, whatever the draft was drawn from.

    Args:
        probabilities: p, the model's, fp64 of shape (vocabulary,).
        draft: drawn from q.
        number: random, decides about the draft.
    """
    if number * float(draft.probabilities[draft.id]) < float(probabilities[draft.id]):
        return draft.id
    sums = (probabilities - draft.probabilities).clamp(min=0).cumsum(-1)
    return _look_up(sums, draft.number)


def _look_up(sums: Tensor, number: float) -> int:
    """Return the token at a number from 0 to 1 in cumulated probabilities, (vocabulary,)."""
    place = number * sums[-1:] * _BELOW_ONE
    return int(torch.searchsorted(sums, place, right=True)[0].clamp(max=len(sums) - 1))


def sample_drafts(
    logits: Tensor, states: Sequence[SamplerState], drafted: Sequence[Sequence[int]], *, eos_token_ids: Sequence[int]
) -> list[tuple[int, Tensor | None]]:
    """Return the next drafted token of each sequence, and what it was drawn from.

    A request with a seed drafts with the numbers that will choose its tokens: nothing is drawn, so ``None``.

    Args:
        logits: (sequences, vocabulary), fp32, of the model that drafts; changed in place.
        states: one for each.
        drafted: tokens of each draft so far.
        eos_token_ids: the model's own end-of-sequence tokens.
    """
    for row, (state, tokens) in enumerate(zip(states, drafted, strict=True)):
        if not is_unchanged(state.sampling):
            greedy = replace(state.sampling, temperature=0.0)  # which draws no numbers
            ahead = SamplerState(greedy, state.prompt, [*state.output, *tokens])
            apply_penalties(logits[row : row + 1], [ahead], eos_token_ids=eos_token_ids)
    chosen: list[tuple[int, Tensor | None]] = [(token, None) for token in logits.argmax(-1).tolist()]
    for row, (state, tokens) in enumerate(zip(states, drafted, strict=True)):
        sampling = state.sampling
        if sampling.temperature > 0:
            is_seeded = sampling.seed is not None
            probabilities = filter_logits(logits[row : row + 1], [sampling])[0].softmax(-1, dtype=torch.float64)
            number = state.peek(len(tokens)) if is_seeded else state.draw()
            sums = probabilities.cumsum(-1)
            if sums[-1].isfinite():
                chosen[row] = (_look_up(sums, number), None if is_seeded else probabilities)
    return chosen


MIN_LOGPROB = -9999.0
"""Least log-probability shown, OpenAI's number: JSON cannot write minus infinity."""


def make_tokens(logits: Tensor, chosen: Sequence[int], states: Sequence[SamplerState]) -> list[GeneratedToken]:
    """Return tokens with what ``SamplingParams.logprobs`` asks for.

    Args:
        logits: (sequences, vocabulary), fp32, as the model gave them.
        chosen: one for each.
        states: one for each.
    """
    tokens = [GeneratedToken(id=token) for token in chosen]
    rows = [index for index, state in enumerate(states) if state.sampling.logprobs is not None]
    if not rows:
        return tokens
    logs = logits[rows].log_softmax(-1).clamp(min=MIN_LOGPROB)
    most = max(states[row].sampling.logprobs or 0 for row in rows)
    values, ids = torch.topk(logs, min(most, logs.shape[-1]), dim=-1)
    for place, row in enumerate(rows):
        count = states[row].sampling.logprobs or 0
        top = tuple(zip(ids[place, :count].tolist(), values[place, :count].tolist(), strict=True))
        tokens[row] = GeneratedToken(id=chosen[row], logprob=float(logs[place, chosen[row]]), top=top)
    return tokens


@dataclass(frozen=True, slots=True)
class Beam:
    """One of the sequences that are kept."""

    parent: int
    """Index of the sequence that it continues."""
    output: list[int]
    score: float
    """Sum of log-probabilities."""


class NoCandidates(Exception):
    """No token can continue any sequence."""


class BeamSearch:
    """The search of one request.

    Args:
        state: sampling parameters and prompt.
        eos_token_ids: tokens that end a sequence.
        longest: most tokens of an output.

    Attributes:
        eos_token_ids: tokens that end a sequence of this request.
    """

    def __init__(self, state: SamplerState, *, eos_token_ids: Sequence[int], longest: int) -> None:
        self._state, self._longest = state, longest
        sampling = state.sampling
        self.eos_token_ids = frozenset((*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)))
        self._model_eos_token_ids = tuple(eos_token_ids)
        self._beams = [Beam(0, [], 0.0)]
        self._finished: list[tuple[float, list[int]]] = []

    def advance(self, logits: Tensor) -> list[Beam] | None:
        """Return the sequences to continue, best first; ``None`` where the search has ended.

        Args:
            logits: of the rows that the last call returned, in order; (rows, vocabulary), fp32.

        Raises:
            NoCandidates: no sequence can be continued, and none has ended.
        """
        sampling = self._state.sampling
        logs = logits.log_softmax(-1)
        if not is_unchanged(sampling):
            pasts = [SamplerState(sampling, self._state.prompt, beam.output) for beam in self._beams]
            logs = apply_penalties(logs, pasts, eos_token_ids=self._model_eos_token_ids)
        sums = logs + torch.tensor([beam.score for beam in self._beams], device=logs.device)[:, None]
        # enough that as many as are kept remain where all others end
        count = min(max(2, 1 + len(self.eos_token_ids)) * sampling.num_beams, sums.numel())
        best, places = sums.view(-1).topk(count)
        if not isfinite(float(best[0])):
            if self._finished:
                return None
            raise NoCandidates
        beams: list[Beam] = []
        for rank, (score, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            parent, token = divmod(place, sums.shape[-1])
            output = [*self._beams[parent].output, token]
            # those that end count only among the first, as in Transformers
            if not isfinite(score):
                break  # ruled out, and so is all that comes after it
            if rank < sampling.num_beams and (token in self.eos_token_ids or len(output) >= self._longest):
                self._finish(score, output)
            if token not in self.eos_token_ids and len(beams) < sampling.num_beams:
                beams.append(Beam(parent, output, score))
        self._beams = beams
        return None if self._is_done() else beams

    @property
    def best(self) -> list[int]:
        """The best sequence that has ended."""
        return max(self._finished, key=lambda entry: entry[0])[1]

    def _finish(self, score: float, output: list[int]) -> None:
        self._finished.append((score / len(output) ** self._state.sampling.length_penalty, output))
        self._finished.sort(key=lambda entry: -entry[0])
        del self._finished[self._state.sampling.num_beams :]

    def _is_done(self) -> bool:
        """Whether nothing can come that is better than what has ended (``early_stopping=False``)."""
        sampling = self._state.sampling
        if not self._beams or len(self._beams[0].output) >= self._longest:
            return True
        if len(self._finished) < sampling.num_beams:
            return False
        hoped: float = self._beams[0].score / len(self._beams[0].output) ** sampling.length_penalty
        return hoped <= self._finished[-1][0]

"""From scores to tokens: penalties, filters, sampling and beam search.

Formulas and order are those of Transformers' ``generate``; tests compare with its logits processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    """How one sequence goes on: its way of sampling, its past, and its own random numbers."""

    sampling: SamplingParams
    prompt: Sequence[int]
    output: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None
    _grams: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    _seen: int = 0

    def __post_init__(self) -> None:
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed)

    def draw(self) -> float:
        """Return the next of its random numbers, in [0, 1)."""
        assert self.generator is not None
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def banned(self) -> Sequence[int]:
        """Return the tokens that would repeat a sequence of ``no_repeat_ngram_size`` tokens."""
        size = self.sampling.no_repeat_ngram_size
        past = [*self.prompt, *self.output]
        for end in range(max(self._seen, size - 1), len(past)):
            self._grams.setdefault(tuple(past[end - size + 1 : end]), []).append(past[end])
        self._seen = len(past)
        return self._grams.get(tuple(past[len(past) - size + 1 :]), ()) if len(past) >= size - 1 else ()


def apply_penalties(scores: Tensor, choices: Sequence[SamplerState], *, ends: Sequence[int]) -> Tensor:
    """Return scores after biases, penalties and bans.

    Args:
        scores: (sequences, vocabulary), fp32; changed in place.
        choices: one for each.
        ends: the model's own end-of-sequence tokens.
    """
    for row, choice in enumerate(choices):
        way = choice.sampling
        if way.logit_bias:
            ids, added = zip(*way.logit_bias, strict=True)
            scores[row, list(ids)] += torch.tensor(added, dtype=scores.dtype, device=scores.device)
        if way.repetition_penalty != 1.0:
            ids = torch.tensor(sorted({*choice.prompt, *choice.output}), device=scores.device)
            old = scores[row, ids]
            scores[row, ids] = torch.where(old < 0, old * way.repetition_penalty, old / way.repetition_penalty)
        if (way.presence_penalty or way.frequency_penalty) and choice.output:
            ids, counts = torch.tensor(choice.output, device=scores.device).unique(return_counts=True)
            scores[row, ids] -= way.presence_penalty + way.frequency_penalty * counts.to(scores.dtype)
        if way.no_repeat_ngram_size:
            banned = choice.banned()
            if banned:
                scores[row, list(banned)] = _MASKED
        if len(choice.output) < way.min_tokens:
            never = [*way.stop_token_ids, *(() if way.ignore_eos else ends)]
            if never:
                scores[row, never] = _MASKED
    return scores


def is_unchanged(way: SamplingParams) -> bool:
    """Whether scores stay as the model gives them, but for what sampling itself does."""
    return (
        not way.logit_bias
        and way.repetition_penalty == 1.0
        and not way.presence_penalty
        and not way.frequency_penalty
        and not way.no_repeat_ngram_size
        and not way.min_tokens
    )


def filter_logits(scores: Tensor, ways: Sequence[SamplingParams]) -> Tensor:
    """Return scores after temperature, top-k, top-p and min-p, what is ruled out being minus infinity.

    Args:
        scores: (sequences, vocabulary), fp32.
        ways: one for each, all with a temperature.
    """
    device = scores.device
    scores = scores / torch.tensor([way.temperature for way in ways], device=device)[:, None]
    size = scores.shape[-1]
    kept = [min(way.top_k or size, size) for way in ways]
    if min(kept) < size:
        most = max(count for count in kept if count < size)
        best = torch.topk(scores, most, dim=-1).values
        least = best.gather(1, torch.tensor([min(count, most) for count in kept], device=device)[:, None] - 1)
        limited = torch.tensor([count < size for count in kept], device=device)[:, None]
        scores = scores.masked_fill(limited & (scores < least), _MASKED)
    rows = [index for index, way in enumerate(ways) if way.top_p < 1.0]
    if rows:
        scores[rows] = _top_p(scores[rows], torch.tensor([ways[index].top_p for index in rows], device=device))
    rows = [index for index, way in enumerate(ways) if way.min_p > 0.0]
    if rows:
        probabilities = scores[rows].softmax(-1)
        least = torch.tensor([ways[index].min_p for index in rows], device=device)[:, None]
        few = probabilities < least * probabilities.amax(-1, keepdim=True)
        scores[rows] = scores[rows].masked_fill(few, _MASKED)
    return scores


_HEAD = 1024
_BELOW_ONE = 1 - 1e-15
"""Keeps a number just below 1 from being rounded to the end of the cumulated probabilities."""


def _top_p(scores: Tensor, shares: Tensor) -> Tensor:
    """Keep the fewest tokens whose probabilities add up to ``shares`` (Holtzman et al., 2019, arXiv:1904.09751).

    The likeliest thousand mostly do; only where they do not is all of the vocabulary sorted.
    """
    size = scores.shape[-1]
    probabilities = scores.softmax(-1)
    for most in (min(_HEAD, size), size):
        best, ids = torch.topk(probabilities, most, dim=-1)
        before = best.cumsum(-1) - best
        if most == size or bool((before[:, -1] + best[:, -1] >= shares + 1e-4).all()):
            break
    drop = before >= shares[:, None]
    drop[:, 0] = False
    kept = torch.full_like(scores, _MASKED)
    return kept.scatter(1, ids, scores.gather(1, ids).masked_fill(drop, _MASKED))


NO_TOKEN = -1
"""In place of a token: no score of its row is a number that can be compared, or all are ruled out."""


def sample_tokens(scores: Tensor, choices: Sequence[SamplerState], numbers: Sequence[float] | None = None) -> list[int]:
    """Return the next token of each sequence, ``NOTHING_LEFT`` where there is none.

    A random choice takes one number of the sequence's own and looks it up in the cumulated probabilities: what is
    chosen depends on nothing but the scores of this sequence.

    Args:
        scores: (sequences, vocabulary), fp32, already changed.
        choices: one for each.
        numbers: one of each, from ``Choice.draw``; drawn here where they are left out.
    """
    best = scores.argmax(-1)
    finite = scores.gather(1, best[:, None])[:, 0].isfinite()
    chosen: list[int] = best.where(finite, NO_TOKEN).tolist()
    rows = [index for index, choice in enumerate(choices) if choice.sampling.temperature > 0]
    if rows:
        left = filter_logits(scores if len(rows) == len(choices) else scores[rows], [choices[i].sampling for i in rows])
        sums = left.softmax(-1, dtype=torch.float64).cumsum(-1)
        drawn = [choices[i].draw() for i in rows] if numbers is None else [numbers[i] for i in rows]
        places = torch.tensor(drawn, dtype=torch.float64, device=scores.device)[:, None]
        found = torch.searchsorted(sums, places * sums[:, -1:] * _BELOW_ONE, right=True)[:, 0]
        found = found.clamp(max=scores.shape[-1] - 1).where(sums[:, -1].isfinite(), NO_TOKEN)
        for row, token in zip(rows, found.tolist(), strict=True):
            chosen[row] = token
    return chosen


MIN_LOGPROB = -9999.0
"""Shown instead of less, minus infinity above all, which JSON cannot write; OpenAI's number for it."""


def make_tokens(scores: Tensor, chosen: Sequence[int], choices: Sequence[SamplerState]) -> list[GeneratedToken]:
    """Return tokens with what ``Sampling.logprobs`` asks for.

    Args:
        scores: (sequences, vocabulary), fp32, as the model gave them.
        chosen: one for each.
        choices: one for each.
    """
    tokens = [GeneratedToken(id=token) for token in chosen]
    rows = [index for index, choice in enumerate(choices) if choice.sampling.logprobs is not None]
    if not rows:
        return tokens
    logs = scores[rows].log_softmax(-1).clamp(min=MIN_LOGPROB)
    most = max(choices[row].sampling.logprobs or 0 for row in rows)
    values, ids = torch.topk(logs, min(most, logs.shape[-1]), dim=-1)
    for place, row in enumerate(rows):
        count = choices[row].sampling.logprobs or 0
        top = tuple(zip(ids[place, :count].tolist(), values[place, :count].tolist(), strict=True))
        tokens[row] = GeneratedToken(id=chosen[row], logprob=float(logs[place, chosen[row]]), top=top)
    return tokens


@dataclass(frozen=True, slots=True)
class Beam:
    """One of the sequences that are kept."""

    parent: int
    """Which row it goes on from."""
    output: list[int]
    score: float
    """Sum of log-probabilities."""


class NoCandidates(Exception):
    """Every sequence that could go on is ruled out."""


class BeamSearch:
    """The search of one request.

    Args:
        choice: its way of sampling and its prompt.
        ends: tokens that end a sequence.
        longest: most tokens of an output.

    Attributes:
        ends: tokens that end a sequence of this request.
    """

    def __init__(self, choice: SamplerState, *, ends: Sequence[int], longest: int) -> None:
        self._choice, self._longest = choice, longest
        way = choice.sampling
        self.ends = frozenset((*way.stop_token_ids, *(() if way.ignore_eos else ends)))
        self._model_ends = tuple(ends)
        self._beams = [Beam(0, [], 0.0)]
        self._finished: list[tuple[float, list[int]]] = []

    def go_on(self, scores: Tensor) -> list[Beam] | None:
        """Return the sequences to go on with, best first; ``None`` where the search has ended.

        Args:
            scores: of the rows that the last call returned, in order; (rows, vocabulary), fp32.

        Raises:
            NothingLeft: nor has any ended.
        """
        way = self._choice.sampling
        logs = scores.log_softmax(-1)
        if not is_unchanged(way):
            pasts = [SamplerState(way, self._choice.prompt, beam.output) for beam in self._beams]
            logs = apply_penalties(logs, pasts, ends=self._model_ends)
        sums = logs + torch.tensor([beam.score for beam in self._beams], device=logs.device)[:, None]
        # enough that as many as are kept remain where all others end
        count = min(max(2, 1 + len(self.ends)) * way.num_beams, sums.numel())
        best, places = sums.view(-1).topk(count)
        if not isfinite(float(best[0])):
            if self._finished:
                return None
            raise NoCandidates
        going: list[Beam] = []
        for rank, (score, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            parent, token = divmod(place, sums.shape[-1])
            output = [*self._beams[parent].output, token]
            # those that end count only among the first, as in Transformers
            if not isfinite(score):
                break  # ruled out, and so is all that comes after it
            if rank < way.num_beams and (token in self.ends or len(output) >= self._longest):
                self._finish(score, output)
            if token not in self.ends and len(going) < way.num_beams:
                going.append(Beam(parent, output, score))
        self._beams = going
        return None if self._over() else going

    @property
    def best(self) -> list[int]:
        """The best sequence that has ended."""
        return max(self._finished, key=lambda entry: entry[0])[1]

    def _finish(self, score: float, output: list[int]) -> None:
        self._finished.append((score / len(output) ** self._choice.sampling.length_penalty, output))
        self._finished.sort(key=lambda entry: -entry[0])
        del self._finished[self._choice.sampling.num_beams :]

    def _over(self) -> bool:
        """Whether nothing can come that is better than what has ended (``early_stopping=False``)."""
        way = self._choice.sampling
        if not self._beams or len(self._beams[0].output) >= self._longest:
            return True
        if len(self._finished) < way.num_beams:
            return False
        hoped: float = self._beams[0].score / len(self._beams[0].output) ** way.length_penalty
        return hoped <= self._finished[-1][0]

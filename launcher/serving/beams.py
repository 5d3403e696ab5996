"""Beam search over the rows of one request, as Transformers' ``generate(num_beams=…)`` does it with its defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

import torch

from launcher.serving.sampling import Choice, change, plain

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Beam:
    """One of the sequences that are kept."""

    parent: int
    """Which row it goes on from."""
    output: list[int]
    score: float
    """Sum of log-probabilities."""


class NothingLeft(Exception):
    """Every sequence that could go on is ruled out."""


class Beams:
    """The search of one request.

    Args:
        choice: its way of sampling and its prompt.
        ends: tokens that end a sequence.
        longest: most tokens of an output.

    Attributes:
        ends: tokens that end a sequence of this request.
    """

    def __init__(self, choice: Choice, *, ends: Sequence[int], longest: int) -> None:
        self._choice, self._longest = choice, longest
        way = choice.sampling
        self.ends = frozenset((*way.stop_ids, *(() if way.ignore_end else ends)))
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
        if not plain(way):
            pasts = [Choice(way, self._choice.prompt, beam.output) for beam in self._beams]
            logs = change(logs, pasts, ends=self._model_ends)
        sums = logs + torch.tensor([beam.score for beam in self._beams], device=logs.device)[:, None]
        # enough that as many as are kept remain where all others end
        count = min(max(2, 1 + len(self.ends)) * way.beams, sums.numel())
        best, places = sums.view(-1).topk(count)
        if not isfinite(float(best[0])):
            if self._finished:
                return None
            raise NothingLeft
        going: list[Beam] = []
        for rank, (score, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            parent, token = divmod(place, sums.shape[-1])
            output = [*self._beams[parent].output, token]
            # those that end count only among the first, as in Transformers
            if not isfinite(score):
                break  # ruled out, and so is all that comes after it
            if rank < way.beams and (token in self.ends or len(output) >= self._longest):
                self._finish(score, output)
            if token not in self.ends and len(going) < way.beams:
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
        del self._finished[self._choice.sampling.beams :]

    def _over(self) -> bool:
        """Whether nothing can come that is better than what has ended (``early_stopping=False``)."""
        way = self._choice.sampling
        if not self._beams or len(self._beams[0].output) >= self._longest:
            return True
        if len(self._finished) < way.beams:
            return False
        hoped: float = self._beams[0].score / len(self._beams[0].output) ** way.length_penalty
        return hoped <= self._finished[-1][0]

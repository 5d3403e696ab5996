"""Drafts of speculative decoding: how long they are, and whether they are worth their time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.inference.engine.sequence import Sequence, SequenceGroup


@dataclass(frozen=True, slots=True)
class Draft:
    """Drafted tokens of one sequence."""

    tokens: list[int]
    probabilities: list[Tensor | None]
    """Of fp64 and shape (vocabulary,), from which each was drawn; ``None`` if not at random."""


@dataclass(slots=True)
class DraftCounts:
    """Totals since the start, of sequences that are decoding."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    tokens: int = 0
    """Tokens that decoding sequences got, with and without drafts."""
    passes: float = 0.0
    """Passes through all layers, one after the other, for them; without drafts 1 each."""


_TRIAL_STEPS = 12
"""Steps after which the speeds with and without drafts are compared."""
_FIRST_RUN_STEPS, _LONGEST_RUN_STEPS = 96, 3072
"""Steps that the faster way has before the other is tried again; twice as many each time."""


class SpeedTrial:
    """Decides whether batches of one size draft.

    Both ways are timed in turn, and the faster one has most steps.
    """

    def __init__(self) -> None:
        self.drafts = False
        self._steps_left, self._run_steps = _TRIAL_STEPS, _FIRST_RUN_STEPS
        self._is_trial = True
        self._tokens, self._seconds = 0, 0.0
        self._speeds: dict[bool, float] = {}

    def record(self, *, tokens: int, seconds: float) -> None:
        """Take in the tokens and the time of a step."""
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        self._steps_left -= 1
        if self._steps_left > 0:
            return
        self._speeds[self.drafts] = self._tokens / max(self._seconds, 1e-9)
        self._tokens, self._seconds = 0, 0.0
        if not self._is_trial or len(self._speeds) == 1:  # now the other way
            self.drafts, self._is_trial, self._steps_left = not self.drafts, True, _TRIAL_STEPS
            return
        faster = self._speeds[True] > self._speeds[False]
        self._run_steps = _FIRST_RUN_STEPS if faster == self.drafts else min(2 * self._run_steps, _LONGEST_RUN_STEPS)
        self.drafts, self._is_trial, self._steps_left = faster, False, self._run_steps


class DraftLengths:
    """How many tokens are drafted for each sequence, and whether any are.

    Args:
        most: tokens of a draft.
        max_model_len: longest sequence, prompt and output together.
        adaptive: whether lengths follow what is accepted, and drafting stops where it is slower; otherwise all drafts
            are of ``most`` tokens.
        clock: seconds.
    """

    def __init__(
        self, most: int, *, max_model_len: int, adaptive: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._max_model_len, self._adaptive, self._clock = most, max_model_len, adaptive, clock
        self._lengths: dict[SequenceGroup, int] = {}
        self._trials: dict[int, SpeedTrial] = {}
        self._trial = SpeedTrial()
        self._started_s = 0.0

    def begin(self, num_decoding: int) -> bool:
        """Return whether a step with so many decoding sequences drafts; its time begins."""
        self._started_s = self._clock()
        self._trial = self._trials.setdefault(num_decoding.bit_length(), SpeedTrial())
        return not self._adaptive or self._trial.drafts

    def length(self, sequence: Sequence) -> int:
        """Return the most tokens to draft for a sequence; one more than is drafted may be accepted."""
        request = sequence.group.request
        left = request.sampling.max_tokens - (len(sequence.tokens) - len(request.prompt))
        left = min(left, self._max_model_len - len(sequence.tokens))
        return min(left - 1, self._lengths.get(sequence.group, self._most))

    def record(self, accepted: Mapping[SequenceGroup, tuple[int, int]], *, tokens: int, is_timed: bool) -> None:
        """Take in the results of the step.

        Args:
            accepted: drafted and accepted tokens by request.
            tokens: that all its sequences got.
            is_timed: whether all of them are decoding, so that its time is comparable.
        """
        if not self._adaptive:
            return
        if is_timed:
            self._trial.record(tokens=tokens, seconds=self._clock() - self._started_s)
        for group, (drafted, taken) in accepted.items():
            known = self._lengths.get(group, self._most)
            self._lengths[group] = min(known + 1, self._most) if taken == drafted else max(1, min(known - 1, taken + 1))

    def release(self, group: SequenceGroup) -> None:
        """Forget a request."""
        self._lengths.pop(group, None)

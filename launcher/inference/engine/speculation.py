"""Speculative decoding: tokens are drafted cheaply, and verified by one pass of the model.

Greedy answers, and those to requests with a seed, are token for token what they are without drafts: the model's own
choice at each place is computed in any case, with the same random number, and a draft is accepted where it is that
choice. Without a seed a draft is accepted with probability p/q, and rejected ones are replaced by a token drawn from
the rest of p (arXiv:2211.17192): the distribution is the model's own, and more drafts are accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.inference.engine.draft_lengths import Draft
    from launcher.inference.engine.scheduler import ScheduledStep
    from launcher.inference.engine.sequence import Sequence as TokenSequence


class DraftSampler(Protocol):
    """Chooses drafted tokens as the model's own are chosen."""

    def sample_drafts(
        self, sequences: Sequence[TokenSequence], drafted: Sequence[Sequence[int]], logits: Tensor
    ) -> list[tuple[int, Tensor | None]]:
        """Return the next drafted token of each sequence, and what it was drawn from.

        Args:
            sequences: to continue.
            drafted: tokens of each draft so far.
            logits: (sequences, vocabulary), fp32.
        """


class Drafter(Protocol):
    """Drafts tokens of sequences that are decoding."""

    first_layer: int
    """First layer of the verifying pass; drafting has run those before, for the whole step."""
    cost: float
    """Share of the model's layers that run for one drafted token."""

    def draft(self, step: ScheduledStep) -> list[Draft | None]:
        """Return a draft for each segment of a step, as long as ``step.draft_lengths`` says at most."""

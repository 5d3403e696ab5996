"""How close a model stays to the one that it was made from: perplexity, divergence, agreement, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from launcher.data.loader import MicroBatch

_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What two models make of the same tokens."""

    tokens: int
    perplexity_before: float
    perplexity_after: float
    divergence: float
    """Mean KL divergence of the later distribution from the earlier one, in nats a token."""
    agreement: float
    """Share of tokens at which both find the same one the most likely."""

    @property
    def growth(self) -> float:
        """By how much perplexity has grown: 0.01 is one percent."""
        return self.perplexity_after / self.perplexity_before - 1


def compare_models(
    before: PreTrainedModel,
    after: PreTrainedModel,
    batches: Iterable[MicroBatch],
    *,
    beat: Callable[[], None],
) -> Fidelity:
    """Run both over the same batches; sums are of fp64, distributions of fp32."""
    loss_before = loss_after = divergence = 0.0
    tokens = agreed = 0
    with torch.inference_mode():
        for batch in batches:
            wanted = batch.labels.flatten() != _IGNORED
            labels = batch.labels.flatten()[wanted].to(before.device)
            one = _logits(before, batch, wanted)
            beat()
            other = _logits(after, batch, wanted)
            beat()
            loss_before += float(cross_entropy(one, labels, reduction="none").double().sum())
            loss_after += float(cross_entropy(other, labels, reduction="none").double().sum())
            apart = kl_div(log_softmax(other, -1), log_softmax(one, -1), reduction="none", log_target=True)
            divergence += float(apart.sum(dim=-1).double().sum())
            agreed += int((one.argmax(-1) == other.argmax(-1)).sum())
            tokens += len(labels)
    return Fidelity(
        tokens=tokens,
        perplexity_before=math.exp(loss_before / tokens),
        perplexity_after=math.exp(loss_after / tokens),
        divergence=divergence / tokens,
        agreement=agreed / tokens,
    )


def _logits(model: PreTrainedModel, batch: MicroBatch, wanted: Tensor) -> Tensor:
    logits = model(input_ids=batch.input_ids.to(model.device), use_cache=False).logits
    return logits.flatten(0, 1)[wanted.to(logits.device)].float()

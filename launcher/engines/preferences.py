"""Direct preference optimization (Rafailov et al., 2023, arXiv:2305.18290)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from launcher.config.job.train import DPO_METRICS
from launcher.data.rows import IGNORE_INDEX
from launcher.engines.distributed import sum_over_ranks

if TYPE_CHECKING:
    from launcher.config.run import BatchedJob


AddLosses = Callable[[Tensor, Tensor], None]
"""Takes the loss of each pair, and whether it counts, both of shape (pairs,)."""


@dataclass(frozen=True, kw_only=True)
class PairMetrics:
    """What was measured of pairs, over all ranks."""

    rewards: dict[str, float]
    """Means over the pairs; empty without any."""
    labels_per_pair: float
    """Mean labels of both answers together."""


class DpoLoss:
    """Loss of preferences: minus log sigmoid(beta * margin).

    The margin is how much more the model prefers the chosen answer, in log-probability, than its reference does.

    Args:
        beta: the larger, the closer the model stays to its reference.
        label_smoothing: probability that a preference is the wrong way round (arXiv:2403.00409).
        device: of the losses.
    """

    def __init__(self, *, beta: float, label_smoothing: float, device: torch.device) -> None:
        self._beta, self._smoothing, self._device = beta, label_smoothing, device
        self._sums = self._no_sums()
        self._collected: list[Tensor] | None = None

    @contextmanager
    def collecting(self) -> Iterator[list[Tensor]]:
        """In this context, append the log-probabilities of every batch to the list; losses are 0.

        Batches need no reference.
        """
        self._collected = []
        try:
            yield self._collected
        finally:
            self._collected = None

    def _no_sums(self) -> Tensor:
        return torch.zeros(len(DPO_METRICS) + 2, dtype=torch.float64, device=self._device)

    def __call__(
        self, log_probs: Tensor, reference: Tensor | None, labels: Tensor, add: AddLosses | None = None
    ) -> Tensor:
        """Return the loss summed over the pairs, an fp32 scalar.

        Args:
            log_probs: of the chosen answers, then of the rejected ones, (2 * pairs,).
            reference: the same in the reference model, on any device.
            labels: (2 * pairs, tokens); pairs without any do not count.
            add: gets the loss of each pair, and whether it counts.
        """
        if self._collected is not None:
            self._collected.append(log_probs)
            return log_probs.new_zeros(())
        assert reference is not None, "the reference model has been evaluated"
        chosen, rejected = (log_probs - reference.to(log_probs.device, non_blocking=True)).chunk(2)
        counted = labels != IGNORE_INDEX
        counts = counted.any(dim=1).chunk(2)[0]
        margin = self._beta * (chosen - rejected)
        losses = -logsigmoid(margin) * (1 - self._smoothing) - logsigmoid(-margin) * self._smoothing
        self._add(self._beta * chosen.detach(), self._beta * rejected.detach(), counts, num_labels=counted.sum())
        if add is not None:
            add(losses, counts)
        return (losses * counts).sum()

    def _add(self, chosen: Tensor, rejected: Tensor, counts: Tensor, *, num_labels: Tensor) -> None:
        values = [chosen, rejected, chosen > rejected, chosen - rejected, torch.ones_like(chosen)]
        self._sums += torch.stack([*((value.double() * counts).sum() for value in values), num_labels.double()])

    def take_metrics(self) -> PairMetrics:
        """Return the means over all pairs since the last call; all ranks call it together."""
        *sums, count, num_labels = sum_over_ranks(self._sums.tolist(), device=self._device)
        self._sums = self._no_sums()
        if not count:
            return PairMetrics(rewards={}, labels_per_pair=0.0)
        rewards = {name: total / count for name, total in zip(DPO_METRICS, sums, strict=True)}
        return PairMetrics(rewards=rewards, labels_per_pair=num_labels / count)


def preference_loss(job: BatchedJob, *, device: torch.device) -> DpoLoss | None:
    """Return the loss of a job that trains on pairs; ``None`` for other jobs.

    Args:
        job: whose objective is no longer ``auto`` if it trains on pairs.
        device: where this rank computes.
    """
    if getattr(job, "objective", "") != "dpo":
        return None
    beta, smoothing = getattr(job, "dpo_beta"), getattr(job, "dpo_label_smoothing")  # noqa: B009
    return DpoLoss(beta=beta, label_smoothing=smoothing, device=device)


@contextmanager
def without_adapter(module: nn.Module) -> Iterator[None]:
    """In this context ``module`` computes as if its adapter were not there.

    PEFT's own switch makes the adapter's parameters untrainable meanwhile, which DDP and ZeRO do not expect.
    """
    layers = [layer for layer in module.modules() if hasattr(layer, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True  # noqa: SLF001
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False  # noqa: SLF001

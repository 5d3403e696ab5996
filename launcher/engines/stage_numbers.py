"""What a stage of DeepSpeed's pipeline adds up itself: the loss, and the gradient's norm where no ZeRO does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import cross_entropy

from launcher.data.loader import IGNORED


class SummedLoss:
    """The loss summed over labelled tokens: weighed for the backward pass, added up as it is for the report.

    Args:
        device: of the sum.
    """

    def __init__(self, *, device: torch.device) -> None:
        self._device = device
        self.begin(weight=torch.ones((), device=device))

    def begin(self, *, weight: Tensor) -> None:
        """Start a sum anew; ``weight`` makes the mean of micro-batches the mean over all tokens of the global batch."""
        self._weight = weight
        self.total = torch.zeros((), dtype=torch.float64, device=self._device)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighed loss of a micro-batch, an fp32 scalar; logits (sequences, tokens, vocabulary)."""
        loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        self.total += loss.detach()
        return loss * self._weight


class Clipping:
    """Norm and clipping over all stages, where DeepSpeed wraps no optimiser and would count the first stage alone.

    Args:
        parameters: of this stage.
        counted: those that no earlier stage holds too.
        stages: the ranks of this pipeline.
        largest: norm that gradients are clipped to; 0 leaves them as they are.
    """

    def __init__(
        self, parameters: list[nn.Parameter], *, counted: list[nn.Parameter], stages: Any, largest: float
    ) -> None:
        self._parameters, self._counted, self._stages, self._largest = parameters, counted, stages, largest
        self.norm: float | None = None

    def __call__(self, *step: object) -> None:
        """Take the norm of the whole gradient, already reduced, and clip this stage's share of it."""
        norm = nn.utils.get_total_norm([p.grad for p in self._counted if p.grad is not None]).double()
        square = norm.to(self._parameters[0].device) ** 2
        dist.all_reduce(square, group=self._stages)
        self.norm = square.sqrt().item()
        if self._largest and self.norm > self._largest:
            factor = self._largest / (self.norm + 1e-6)
            torch._foreach_mul_([p.grad for p in self._parameters if p.grad is not None], factor)

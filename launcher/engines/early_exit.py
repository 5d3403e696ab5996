"""Train exits after early layers: LayerSkip's loss and layer dropout.

Formulas are those of arXiv:2404.16710, sections 4.1 and 4.2. All is done by hooks of the stock model, which stay for
the whole run, so that activation checkpointing recomputes what the forward pass did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from launcher.config.job.train import Train
from launcher.engines.loss import linear_cross_entropy, plain_head, replaced_forward
from launcher.engines.pipeline.partition import child_names_of
from launcher.models.layers import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.config.run import BatchedJob
    from launcher.data.dataloader import MicroBatch
    from launcher.engines.source_losses import TokenSources


def early_exit_loss(job: BatchedJob, module: nn.Module) -> EarlyExitLoss | None:
    """Return the loss of a job that trains exits or drops layers; ``None`` for others.

    Args:
        job: of the run.
        module: the model, as the strategy has laid it out.
    """
    if not isinstance(job, Train) or not (job.early_exit_loss or job.layer_dropout):
        return None
    return EarlyExitLoss(job, cast("PreTrainedModel", module))


class EarlyExitLoss:
    """The weighted mean of the losses after some layers, and after the last one.

    Args:
        job: its options.
        model: gets hooks.
    """

    def __init__(self, job: Train, model: PreTrainedModel) -> None:
        layers = blocks(model)
        self._job, self._head = job, plain_head(model)
        assert self._head is not None, "other heads are refused in the plan"
        self._num_layers = len(layers)
        self._drop = [
            job.layer_dropout * (math.exp(number * math.log(2) / max(1, len(layers) - 1)) - 1)
            for number in range(len(layers))
        ]
        self._keep: Tensor | None = None
        self._exits: list[int] = []
        self._states: dict[int, Tensor] | None = None
        for number, block in enumerate(layers):
            block.register_forward_hook(self._after_block(number))
        norm = getattr(model.base_model, child_names_of(model).norm)
        norm.register_forward_pre_hook(self._before_norm)

    @contextmanager
    def at_head(
        self, micro_batch: MicroBatch, labels: Tensor, places: Tensor | None, of_sources: TokenSources | None
    ) -> Iterator[None]:
        """In this context, make a forward pass return the loss, summed over labelled tokens.

        Args:
            micro_batch: that is passed.
            labels: of it, on the model's device.
            places: of the labels that count; ``None`` if all do.
            of_sources: of all tokens; gets the loss after the last layer.
        """
        self._keep = self._kept(micro_batch, labels.device)
        weights = exit_weights(self._job, micro_batch.step, self._num_layers)
        *self._exits, last = sorted(weights)
        self._states = {}
        head = self._head
        assert head is not None

        def forward(hidden: Tensor) -> Tensor:
            count, rows = len(weights) - 1, len(labels)
            loss = weights[last] * linear_cross_entropy(hidden[count * rows :], head.weight, labels, places, of_sources)
            if not count:
                return loss
            # all exits as one: each product of the head needs a gradient of the size of its weight
            factors = torch.tensor([weights[number] for number in self._exits], device=labels.device)
            chosen = places
            if places is not None:
                chosen = torch.cat([places + number * labels.numel() for number in range(count)])
            return loss + linear_cross_entropy(
                hidden[: count * rows],
                head.weight,
                labels.repeat(count, 1),
                chosen,
                token_weights=factors.repeat_interleave(labels.numel()),
            )

        try:
            with replaced_forward(head, forward):
                yield
        finally:
            self._states = None

    def _kept(self, micro_batch: MicroBatch, device: torch.device) -> Tensor | None:
        """Return which layers each sequence runs; ``None`` if all run all.

        It is bool of shape (sequences, layers), and depends on the seed and on the place of the sequence among those of
        the run, so not on the ranks.
        """
        if not self._job.layer_dropout:
            return None
        assert micro_batch.drawn is not None, "training draws sequences"
        rows = [
            np.random.Generator(np.random.Philox(key=[self._job.seed, place])).random(self._num_layers)
            for place in micro_batch.drawn.tolist()
        ]
        return torch.from_numpy(np.stack(rows) >= np.array(self._drop)).to(device, non_blocking=True)

    def _after_block(self, number: int) -> Any:
        """Return the hook that undoes a block for sequences that skip it, and keeps the state."""

        def hook(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not block.training:
                return output
            if self._keep is not None and self._drop[number]:
                output = torch.where(self._keep[:, number, None, None], output, inputs[0])
            if self._states is not None and number in self._exits:
                self._states[number] = output
            return output

        return hook

    def _before_norm(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Put the states at the exits in front, as further sequences for norm and head."""
        if not norm.training or not self._states:
            return inputs
        states, self._states = self._states, None
        return (torch.cat([*(states[number] for number in self._exits), inputs[0]]), *inputs[1:])


def exit_weights(job: Train, step: int, num_layers: int) -> Mapping[int, float]:
    """Return the weight of the loss after each layer that counts in a step, by number.

    They add up to 1.

    Args:
        job: its options.
        step: of the optimizer, from 0.
        num_layers: of the model.
    """
    last = num_layers - 1
    if job.early_exit_curriculum == "rotational":
        exits = [number for number in range(last) if number % job.early_exit_rotation == step % job.early_exit_rotation]
    elif job.early_exit_curriculum == "gradual":  # one more, from the last on, until half of the steps are done
        exits = list(range(max(0, last - 2 * num_layers * step // max(1, job.steps)), last))
    else:
        exits = list(range(last))
    scale = job.early_exit_loss
    weights = {number: scale * number * (number + 1) / 2 for number in exits if scale and number}
    weights[last] = last + scale * (last - 1) * last / 2 if last else 1.0
    total = sum(weights.values())
    return {number: weight / total for number, weight in weights.items()}

"""Next-token loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.engines.head import labels_at_head, loss_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from launcher.data.loader import MicroBatch


def token_loss_sum(module: nn.Module, micro_batch: MicroBatch, *, device: torch.device) -> Tensor:
    """Return the loss summed over the labelled tokens, an fp32 scalar on ``device``.

    Args:
        module: a causal language model of Transformers, or what wraps it.
        micro_batch: on any device.
        device: of the module.
    """
    input_ids = micro_batch.input_ids.to(device, non_blocking=True)
    labels = micro_batch.labels.to(device, non_blocking=True)
    where = micro_batch.position_ids
    positions = {} if where is None else {"position_ids": where.to(device, non_blocking=True)}
    with labels_at_head(module, labels):
        output = module(input_ids=input_ids, use_cache=False, **positions).logits
    return loss_of(output, labels)

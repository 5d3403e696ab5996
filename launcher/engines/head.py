"""The output head of a model, made to return the loss instead of the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from launcher.engines.cross_entropy import cross_entropy, linear_cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

PLAIN_HEADS = frozenset({"gpt2", "llama", "mistral", "qwen2", "qwen3"})
"""Model types whose logits are the output head of the last hidden state and nothing else: no cap, no scale."""


@contextmanager
def labels_at_head(module: nn.Module, labels: Tensor) -> Iterator[None]:
    """Make the output head of ``module`` return the summed loss while this context lasts, where the family allows it.

    The head's own ``forward`` does it, so that whatever gathers its weight around a forward pass (ZeRO-3, FSDP2) does.
    Everything in between hands the scalar on as if it were logits; :func:`loss_of` takes it, and logits all the same.

    Args:
        module: a causal language model of Transformers, a pipeline stage made of one, or what wraps either.
        labels: (sequences, tokens) of the forward pass taken in this context.
    """
    head = _plain_head(module)
    if head is None:
        yield
        return
    assert "forward" not in vars(head), "the head has been replaced already"
    head.forward = lambda hidden: linear_cross_entropy(hidden, head.weight, labels)
    try:
        yield
    finally:
        del head.forward


def loss_of(output: Tensor, labels: Tensor) -> Tensor:
    """Return the summed loss, an fp32 scalar, from what a model returned in :func:`labels_at_head`."""
    return output if output.ndim == 0 else cross_entropy(output, labels)


def _plain_head(module: nn.Module) -> nn.Linear | None:
    """Return the output head if logits are just its product with the hidden state, else ``None``."""
    while not isinstance(module, PreTrainedModel):  # DistributedDataParallel, DeepSpeed's engine
        module = module.module
    head = module.get_output_embeddings()
    plain = module.config.model_type in PLAIN_HEADS and type(head) is nn.Linear and head.bias is None
    return head if plain else None

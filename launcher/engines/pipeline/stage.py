"""One chunk of a model as the module that a pipeline schedule calls, and its KV cache."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from launcher.engines.loss import labels_at_head, loss_of
from launcher.engines.source_losses import sources_of_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from launcher.engines.source_losses import SourceLosses


class ModelChunk(nn.Module):  # type: ignore[misc]
    """Tokens or hidden states in; hidden states, a loss or the next token's logits out.

    Between chunks everything is fp32, as the residual stream is under autocast: nothing is rounded on the way.

    Args:
        model: cut to this chunk, with its weights.
        number: of this chunk among all, from 0.
        count: of all chunks.
        autocast: what blocks compute in; fp32 turns autocast off.
        splits_backward: whether gradients of inputs and of weights are taken one after the other: the loss that the
            output head makes, gradients and all, can go backward only once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        number: int,
        count: int,
        autocast: torch.dtype,
        splits_backward: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.number, self._autocast, self._splits_backward = model, number, autocast, splits_backward
        self.first, self.last = number == 0, number == count - 1
        self.by_source: SourceLosses | None = None
        self._cache_argument = _cache_argument(model)

    def forward(
        self,
        inputs: Tensor,
        *,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        places: Tensor | None = None,
        sources: Tensor | None = None,
        cache: ChunkCache | None = None,
    ) -> Tensor:
        """Pass one micro-batch through.

        Args:
            inputs: tokens, int64 of shape (sequences, tokens), for the first chunk; hidden states, fp32 of shape
                (sequences, tokens, hidden size), for others.
            labels: int64 of shape (sequences, tokens); the last chunk returns the loss for them.
            position_ids: int64 of shape (sequences, tokens), restarting at 0 where a document begins; by default rows
                are one document each.
            places: of the labels that count, int64 of shape (1, places), a row of :func:`places_of_all`; by default
                all do.
            sources: of each row of a mixture, int64 of shape (sequences,).
            cache: keys and values of earlier tokens of the same sequences; the last chunk returns logits.

        Returns:
            Hidden states; of the last chunk the loss summed over labelled tokens, of shape (1,), or the logits that
            follow the last token, of shape (sequences, vocabulary).
        """
        given = {"input_ids" if self.first else "inputs_embeds": inputs, "use_cache": cache is not None}
        if position_ids is not None:
            given["position_ids"] = position_ids
        if cache is not None:
            given[self._cache_argument] = cache
        with torch.autocast(inputs.device.type, dtype=self._autocast, enabled=self._autocast != torch.float32):
            if not self.last:
                hidden: Tensor = self.model.base_model(**given).last_hidden_state.float()
                # zero bubble schedules cut the graph at what a stage returns, which torch cannot do to a view
                return hidden.clone() if hidden._is_view() else hidden  # noqa: SLF001  (no public way to ask)
            if cache is not None:
                logits: Tensor = self.model(**given, logits_to_keep=1).logits
                return logits[:, -1].float()
            assert labels is not None, "the last chunk needs labels"
            of_sources = sources_of_tokens(self.by_source, sources, labels)
            counted = None if places is None else places[0]
            at_head = labels_at_head(self.model, labels, counted, of_sources)
            with nullcontext() if self._splits_backward else at_head:
                output = self.model(**given).logits
            return torch.stack(
                [loss_of(output, labels, of_sources)]
            )  # not a view: FSDP and schedules hook what a stage returns


def _cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the cache argument in this version of Transformers."""
    names = inspect.signature(type(model.base_model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


class ChunkCache(DynamicCache):  # type: ignore[misc]
    """A cache for a chunk, whose first layer has the first block's number in the whole model.

    Args:
        config: of the chunk.
        first_block: number of its first block in the whole model.
    """

    def __init__(self, config: PreTrainedConfig, *, first_block: int) -> None:
        super().__init__(config=config)
        self._first_block = first_block

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens' states in block ``layer_idx`` of the whole model; return all tokens'."""
        number = layer_idx - self._first_block
        both: tuple[Tensor, Tensor] = super().update(key_states, value_states, number, *args, **options)
        return both

"""The paged KV cache behind Transformers' ``Cache``, attention over it, and its capacity."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launcher.inference.engine.block_manager import BLOCK_SIZE
from launcher.inference.kernels.native import StepTable

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from launcher.config.inference import EngineLimits
    from launcher.inference.engine.step_plan import StepPlan
    from launcher.inference.kernels.native import NativeAttention, TokensStruct


@dataclass(frozen=True, kw_only=True)
class KVShapes:
    """Shapes of the keys and values of a token, for each layer."""

    keys: tuple[tuple[int, int], ...]
    """Number of heads and their size."""
    values: tuple[tuple[int, int], ...]
    item_bytes: int
    first_layer: int = 0
    """Number of the first of these layers in the model."""

    @property
    def token_bytes(self) -> int:
        """Of one token in all layers."""
        return sum(heads * width for heads, width in (*self.keys, *self.values)) * self.item_bytes


class GatherIndices:
    """Indices into the tokens of all blocks.

    Args:
        plan: of the step.
        device: of the model.

    Attributes:
        single: tokens that are the only ones of their sequence in this step.
        past: what each of them attends to, (those, longest).
        seen: which of these there are, (those, 1, 1, longest).
        long: other segments: first token, number of tokens, what the last of them attends to.
    """

    def __init__(self, plan: StepPlan, *, device: torch.device) -> None:
        single: list[int] = []
        pasts: list[torch.Tensor] = []
        self.long: list[tuple[int, int, torch.Tensor]] = []
        first = 0
        for part in plan.segments:
            count = len(part.tokens)
            blocks = torch.tensor(part.block_table)[:, None] * BLOCK_SIZE
            past = (blocks + torch.arange(BLOCK_SIZE)).view(-1)[: part.start + count].to(device)
            if count == 1:
                single.append(first)
                pasts.append(past)
            else:
                self.long.append((first, count, past))
            first += count
        self.single = torch.tensor(single, dtype=torch.long, device=device)
        if single:
            self.past = torch.nn.utils.rnn.pad_sequence(pasts, batch_first=True)
            sizes = torch.tensor([len(past) for past in pasts], device=device)
            longest = torch.arange(self.past.shape[1], device=device)
            self.seen = (longest < sizes[:, None])[:, None, None]


def gathered_attention(
    places: GatherIndices, query: Tensor, keys: Tensor, values: Tensor, *, scale: float | None
) -> Tensor:
    """Return attention of each token over its own sequence, (1, tokens, heads, width).

    Args:
        places: of keys and values.
        query: (1, heads, tokens, width).
        keys: (tokens of all blocks, heads, width).
        values: likewise.
        scale: of scores.
    """
    _, heads, num_tokens, width = query.shape
    groups = heads // keys.shape[1]
    out = query.new_zeros((num_tokens, heads, values.shape[-1]))
    if len(places.single):
        # heads that share keys are queries of one head
        asked = query[0][:, places.single].transpose(0, 1).reshape(-1, keys.shape[1], groups, width)
        key, value = (arena[places.past].transpose(1, 2) for arena in (keys, values))
        found = scaled_dot_product_attention(asked, key, value, attn_mask=places.seen, scale=scale)
        out[places.single] = found.reshape(len(places.single), heads, -1)
    for first, count, where in places.long:
        key, value = (arena[where].transpose(0, 1)[None].repeat_interleave(groups, 1) for arena in (keys, values))
        start = len(where) - count
        mask = None
        if start:
            ahead = torch.arange(len(where), device=query.device)
            mask = ahead <= ahead[start:, None]
        asked = query[:, :, first : first + count]
        found = scaled_dot_product_attention(asked, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
        out[first : first + count] = found[0].transpose(0, 1)
    return out[None]


ATTENTION_NAME = "launcher_paged"
"""Name by which models find this module's attention; no mask is made for it."""


class PagedCache(Cache):  # type: ignore[misc]
    """Keys and values of all sequences, by layer: (tokens of all blocks, heads, width).

    Compiled kernels order numbers within a block in their own way.

    Args:
        shapes: of what each layer keeps of a token.
        num_blocks: besides one that takes padding tokens.
        dtype: of keys and values.
        device: where they are.
    """

    def __init__(self, shapes: KVShapes, *, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        size = (num_blocks + 1) * BLOCK_SIZE

        def room(sizes: tuple[tuple[int, int], ...]) -> dict[int, Tensor]:
            numbered = enumerate(sizes, shapes.first_layer)
            return {layer: torch.zeros((size, *shape), dtype=dtype, device=device) for layer, shape in numbered}

        self.keys, self.values = room(shapes.keys), room(shapes.values)
        self.scratch = num_blocks
        self.step: AttentionMetadata | None = None
        self.kernels: NativeAttention | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write those of this step; (1, heads, tokens, width) each."""
        assert self.step is not None
        if self.kernels is not None:  # they write themselves
            return key_states, value_states
        self.keys[layer_idx].index_copy_(0, self.step.slot_mapping, key_states[0].transpose(0, 1))
        self.values[layer_idx].index_copy_(0, self.step.slot_mapping, value_states[0].transpose(0, 1))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are given with every step."""
        return 0

    def copy(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy blocks: target, source."""
        for target, source in pairs:
            for arena in (*self.keys.values(), *self.values.values()):
                arena[target * BLOCK_SIZE : (target + 1) * BLOCK_SIZE] = arena[
                    source * BLOCK_SIZE : (source + 1) * BLOCK_SIZE
                ]


class AttentionMetadata:
    """Where the tokens of one step are, as tensors.

    Args:
        plan: of the step.
        cache: that it goes to.
        device: of the model.
    """

    def __init__(self, plan: StepPlan, cache: PagedCache, *, device: torch.device) -> None:
        self.cache, self._plan, self._device = cache, plan, device
        self.first_layer, self.exit_layer = plan.first_layer, plan.exit_layer
        tokens: list[int] = []
        positions: list[int] = []
        logits_indices: list[int] = []
        slot_mapping: list[int] = []
        for part in plan.segments:
            span = range(part.start, part.start + len(part.tokens))
            tokens += part.tokens
            positions += span
            slot_mapping += [part.block_table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in span]
            logits_indices += range(len(tokens) - part.num_logits, len(tokens))
        for numbers, filler in ((tokens, 0), (positions, 0), (slot_mapping, cache.scratch * BLOCK_SIZE)):
            numbers += [filler] * plan.padding
        self.input_ids = torch.tensor([tokens], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.slot_mapping = torch.tensor(slot_mapping, device=device)
        self.logits_indices = torch.tensor(logits_indices, dtype=torch.long, device=device)

    @cached_property
    def _places(self) -> GatherIndices:
        return GatherIndices(self._plan, device=self._device)

    @cached_property
    def _table(self) -> StepTable:
        return StepTable(self._plan, slot_mapping=self.slot_mapping)

    def native(self, rotary: tuple[Tensor, Tensor] | None = None) -> TokensStruct:
        """Return the step as compiled kernels take it.

        Args:
            rotary: cosines and sines, (1, tokens, width) each, of the model's format.
        """
        return self._table.with_rotary(rotary)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        """Return attention of each token over its own sequence, (1, tokens, heads, width).

        Args:
            layer: which.
            query: (1, heads, tokens, width).
            key: of this step, likewise.
            value: likewise.
            scale: of scores.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.cache.kernels is not None:
            return self.cache.kernels.attend(self.native(), (query, key, value), (keys, values), scale=scale)
        return gathered_attention(self._places, query, keys, values, scale=scale)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    launcher_step: AttentionMetadata,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Compute attention as Transformers' ``sdpa`` does, over blocks.

    Args:
        module: the attention layer.
        query: (1, heads, tokens of all sequences, head width).
        key: of this step alone.
        value: like ``key``.
        attention_mask: none is made for this kernel.
        scaling: of scores.
        launcher_step: where the tokens are.
        rest: what the layer says besides.

    Raises:
        NotImplementedError: the layer asks for more than plain causal attention.
    """
    strange = [name for name in ("softcap", "s_aux", "position_bias", "sliding_window") if rest.get(name) is not None]
    if strange or attention_mask is not None:
        raise NotImplementedError(f"attention with {', '.join(strange) or 'a mask of its own'}")
    return launcher_step.attend(module.layer_idx, query, key, value, scale=scaling), None


def register_attention() -> None:
    """Register this attention with Transformers."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)


_FREE_MEMORY_DIVISOR = 4
"""Divisor of the free memory at start: keys and values take at most this part by default."""


def num_kv_blocks(
    limits: EngineLimits, shapes: KVShapes, model: PreTrainedModel, *, block_size: int = BLOCK_SIZE
) -> int:
    """Return the number of blocks of an engine's KV cache.

    Args:
        limits: of the engine.
        shapes: of what a layer keeps of a token.
        model: on its device.
        block_size: tokens of a block.
    """
    if limits.kv_cache_tokens is not None:
        return max(1, limits.kv_cache_tokens // block_size)
    device = model.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    affordable = free // _FREE_MEMORY_DIVISOR // (shapes.token_bytes * block_size)
    needed = limits.max_num_seqs * -(-model.config.get_text_config().max_position_embeddings // block_size)
    return int(max(1, min(needed, affordable)))

"""Keys and values in pages, behind Transformers' ``Cache``, and attention over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launcher.serving.pages import PAGE

if TYPE_CHECKING:
    from torch import Tensor, nn

    from launcher.serving.plan import StepPlan
    from launcher.serving.shapes import Shapes

ATTENTION = "launcher_pages"
"""The name under which models find the attention of this module; one that has no mask made for it."""


class PagedCache(Cache):  # type: ignore[misc]
    """Keys and values of all sequences, a tensor of each per layer: (tokens of all pages, heads, width).

    Args:
        shapes: of what each layer keeps of a token.
        num_pages: besides one that takes what is computed for no sequence.
        dtype: of keys and values.
        device: where they are.
    """

    def __init__(self, shapes: Shapes, *, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        size = (num_pages + 1) * PAGE
        self.keys = [torch.zeros((size, *shape), dtype=dtype, device=device) for shape in shapes.keys]
        self.values = [torch.zeros((size, *shape), dtype=dtype, device=device) for shape in shapes.values]
        self.scratch = num_pages
        self.step: Step | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write those of this step; (1, heads, tokens, width) each."""
        assert self.step is not None
        self.keys[layer_idx].index_copy_(0, self.step.slots, key_states[0].transpose(0, 1))
        self.values[layer_idx].index_copy_(0, self.step.slots, value_states[0].transpose(0, 1))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are given with every step."""
        return 0

    def copy(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy pages: to, from."""
        for target, source in pairs:
            for arena in (*self.keys, *self.values):
                arena[target * PAGE : (target + 1) * PAGE] = arena[source * PAGE : (source + 1) * PAGE]


class Step:
    """Where the tokens of one step are, as tensors.

    Args:
        plan: of the step.
        cache: that it goes to.
        device: of the model.
    """

    def __init__(self, plan: StepPlan, cache: PagedCache, *, device: torch.device) -> None:
        self.cache = cache
        tokens: list[int] = []
        positions: list[int] = []
        places: list[Tensor] = []
        wanted: list[int] = []
        single: list[int] = []
        self._long: list[tuple[int, int, Tensor]] = []
        lengths: list[int] = []
        for part in plan.segments:
            place = _places(part.pages, part.start + len(part.tokens))
            if len(part.tokens) == 1:
                single.append(len(tokens))
                lengths.append(len(places))
            else:
                self._long.append((len(tokens), len(part.tokens), place.to(device)))
            places.append(place)
            tokens += part.tokens
            positions += range(part.start, part.start + len(part.tokens))
            if part.wanted:
                wanted.append(len(tokens) - 1)
        parts = zip(plan.segments, places, strict=True)
        ends = [place[part.start :] for part, place in parts]
        if plan.padding:
            tokens += [0] * plan.padding
            positions += [0] * plan.padding
            ends.append(torch.full((plan.padding,), cache.scratch * PAGE))
        self.input_ids = torch.tensor([tokens], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.slots = torch.cat(ends).to(device)
        self.wanted = torch.tensor(wanted, dtype=torch.long, device=device)
        self._single = torch.tensor(single, device=device)
        if single:
            past = torch.nn.utils.rnn.pad_sequence([places[index] for index in lengths], batch_first=True)
            sizes = torch.tensor([len(places[index]) for index in lengths])
            self._past = past.to(device)
            self._seen = (torch.arange(past.shape[1]) < sizes[:, None])[:, None, None].to(device)

    def attend(self, layer: int, query: Tensor, *, scale: float | None) -> Tensor:
        """Return attention of each token over its own sequence, (1, tokens, heads, width).

        Args:
            layer: which.
            query: (1, heads, tokens, width).
            scale: of scores.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        _, heads, num_tokens, width = query.shape
        groups = heads // keys.shape[1]
        out = query.new_zeros((num_tokens, heads, values.shape[-1]))
        if len(self._single):
            # heads that share keys are queries of one head
            asked = query[0][:, self._single].transpose(0, 1).reshape(-1, keys.shape[1], groups, width)
            found = scaled_dot_product_attention(
                asked,
                keys[self._past].transpose(1, 2),
                values[self._past].transpose(1, 2),
                attn_mask=self._seen,
                scale=scale,
            )
            out[self._single] = found.reshape(len(self._single), heads, -1)
        for first, count, places in self._long:
            key, value = (arena[places].transpose(0, 1)[None].repeat_interleave(groups, 1) for arena in (keys, values))
            start = len(places) - count
            mask = None
            if start:
                ahead = torch.arange(len(places), device=query.device)
                mask = ahead <= ahead[start:, None]
            found = scaled_dot_product_attention(
                query[:, :, first : first + count], key, value, attn_mask=mask, is_causal=mask is None, scale=scale
            )
            out[first : first + count] = found[0].transpose(0, 1)
        return out[None]


def _places(pages: tuple[int, ...], length: int) -> Tensor:
    """Return where each token of a sequence is."""
    return (torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).view(-1)[:length]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    launcher_step: Step,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Compute attention as Transformers' ``sdpa`` does, over pages.

    Args:
        module: the attention layer.
        query: (1, heads, tokens of all sequences, head width).
        key: of this step alone; already written.
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
    return launcher_step.attend(module.layer_idx, query, scale=scaling), None


def register() -> None:
    """Tell Transformers of this attention."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)

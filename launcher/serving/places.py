"""Where the keys and values of each sequence are, for torch's attention: gathered, those of one token each together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from launcher.serving.pages import PAGE

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.serving.plan import StepPlan


class Places:
    """Indexes into the tokens of all pages.

    Args:
        plan: of the step.
        device: of the model.

    Attributes:
        single: tokens that are the only ones of their sequence in this step.
        past: what each of them attends to, (those, longest).
        seen: which of these there are, (those, 1, 1, longest).
        long: other stretches: first token, number of tokens, what the last of them attends to.
    """

    def __init__(self, plan: StepPlan, *, device: torch.device) -> None:
        single: list[int] = []
        pasts: list[torch.Tensor] = []
        self.long: list[tuple[int, int, torch.Tensor]] = []
        first = 0
        for part in plan.segments:
            count = len(part.tokens)
            pages = torch.tensor(part.pages)[:, None] * PAGE
            past = (pages + torch.arange(PAGE)).view(-1)[: part.start + count].to(device)
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


def gathered(places: Places, query: Tensor, keys: Tensor, values: Tensor, *, scale: float | None) -> Tensor:
    """Return attention of each token over its own sequence, (1, tokens, heads, width).

    Args:
        places: of keys and values.
        query: (1, heads, tokens, width).
        keys: (tokens of all pages, heads, width).
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

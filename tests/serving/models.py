"""Two tiny models in fp32, what they generate alone, and engines around copies of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from launcher.serving.engine import Slots
from launcher.serving.limits import Limits
from launcher.serving.make import slots_of
from launcher.serving.values import Request, Update

VOCABULARY, CONTEXT, END = 97, 128, 3
FAMILIES = ("llama", "gpt2")


@cache
def stock(family: str) -> PreTrainedModel:
    """The model as Transformers has it; weights are large enough that scores are far apart."""
    common = {"vocab_size": VOCABULARY, "eos_token_id": END, "initializer_range": 0.3}
    configs = {
        "llama": lambda: LlamaConfig(
            num_hidden_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=64,
            max_position_embeddings=CONTEXT,
            **common,
        ),
        "gpt2": lambda: GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=CONTEXT, bos_token_id=END, **common),
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configs[family]()).eval().requires_grad_(False)


def engine(family: str, *, kernels: bool = False, **limits: object) -> Slots:
    return slots_of(copy.deepcopy(stock(family)), limits=Limits(**limits), ends=(END,), kernels=kernels)


@cache
def alone(family: str, prompt: tuple[int, ...], max_tokens: int, **options: object) -> list[int]:
    """What ``generate`` makes of a prompt."""
    ids = torch.tensor([prompt])
    found = stock(family).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(max_tokens, CONTEXT - len(prompt)),
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return found[0, len(prompt) :].tolist()


def tokens(updates: Sequence[Update]) -> list[int]:
    return [token.id for update in updates for token in update.tokens]


def finish(slots: Slots, requests: Sequence[Request], *, steps: int = 4000) -> dict[str, list[Update]]:
    """Have requests served together; each must end exactly once."""
    for request in requests:
        slots.add(request)
    updates: dict[str, list[Update]] = {request.id: [] for request in requests}
    while not slots.idle and steps:
        steps -= 1
        for update in slots.step():
            updates[update.request].append(update)
    assert slots.idle, slots.stats()
    for all_of_it in updates.values():
        assert [bool(update.finish) for update in all_of_it].count(True) == 1
        assert all_of_it[-1].finish
    return updates

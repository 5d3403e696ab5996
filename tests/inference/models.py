"""Two tiny models in fp32, what they generate alone, and engines around copies of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from launcher.config.inference import EngineLimits
from launcher.inference.engine.base import EngineOutput, EngineRequest
from launcher.inference.engine.paged_engine import PagedEngine, paged_engine_for

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


def engine(family: str, *, kernels: bool = False, **limits: object) -> PagedEngine:
    return paged_engine_for(
        copy.deepcopy(stock(family)), limits=EngineLimits(**limits), eos_token_ids=(END,), kernels=kernels
    )


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


def tokens(updates: Sequence[EngineOutput]) -> list[int]:
    return [token.id for update in updates for token in update.tokens]


def finish(
    paged: PagedEngine, requests: Sequence[EngineRequest], *, steps: int = 4000
) -> dict[str, list[EngineOutput]]:
    """Have requests served together; each must end exactly once."""
    for request in requests:
        paged.add(request)
    updates: dict[str, list[EngineOutput]] = {request.id: [] for request in requests}
    while not paged.idle and steps:
        steps -= 1
        for update in paged.step():
            updates[update.request_id].append(update)
    assert paged.idle, paged.stats()
    for all_of_it in updates.values():
        assert [bool(update.finish_reason) for update in all_of_it].count(True) == 1
        assert all_of_it[-1].finish_reason
    return updates

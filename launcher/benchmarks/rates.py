"""Tokens a second that a model reads and writes, by its own forward passes and by the launcher's engine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from launcher.serving.limits import Limits
from launcher.serving.make import slots_of
from launcher.serving.runner import cache_name
from launcher.serving.values import Request, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.serving.engine import Slots

Rates = dict[str, float]
"""``prefill_per_s`` and ``decode_per_s``, in tokens of all sequences together."""


def forward_rates(model: PreTrainedModel, *, batch: int, prompt: int, new: int) -> Rates:
    """Return how fast plain forward passes are: one over the prompts, then one for each further token.

    Args:
        model: in inference mode.
        batch: sequences at a time.
        prompt: tokens that each begins with.
        new: tokens that each is continued by.
    """
    ids = _prompts(model, batch=batch, prompt=prompt)
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        started = _now(model)
        kept: dict[str, Any] = {cache_name(model): cache, "use_cache": True, "logits_to_keep": 1}
        last = model(ids, **kept).logits[:, -1:].argmax(-1)
        read = _now(model)
        for _ in range(new):
            last = model(last, **kept).logits[:, -1:].argmax(-1)
        ended = _now(model)
    return {"prefill_per_s": batch * prompt / (read - started), "decode_per_s": batch * new / (ended - read)}


def engine_of(model: PreTrainedModel, *, batch: int, prompt: int, new: int) -> Slots:
    """Return the launcher's engine around a model, whose layers it may replace."""
    limits = Limits(
        max_requests=batch, prefix_cache=False, kv_tokens=batch * (prompt + new + 64), prefill_chunk=batch * prompt
    )
    return slots_of(model, limits=limits, ends=())


def engine_rates(engine: Slots, model: PreTrainedModel, *, batch: int, prompt: int, new: int) -> Rates:
    """Return how fast the engine is with as many requests as ``batch`` at a time."""
    ids = _prompts(model, batch=batch, prompt=prompt).tolist()
    sampling = Sampling(max_tokens=new + 1, ignore_end=True)
    for number, row in enumerate(ids):
        engine.add(Request(id=str(number), prompt=tuple(row), sampling=sampling))
    started = _now(model)
    engine.step()
    read = _now(model)
    while not engine.idle:
        engine.step()
    ended = _now(model)
    return {"prefill_per_s": batch * prompt / (read - started), "decode_per_s": batch * new / (ended - read)}


def _prompts(model: PreTrainedModel, *, batch: int, prompt: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    numbers = torch.arange(batch * prompt).view(batch, prompt)
    return ((numbers * 7 + 11) % vocabulary).to(model.device)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()

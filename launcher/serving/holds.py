"""Whether keys and values of a model can be held in pages, exactly: told by trying, before anybody is served."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from launcher.errors import ConfigError
from launcher.serving.kv import ATTENTION, PagedCache
from launcher.serving.plan import Segment, StepPlan
from launcher.serving.runner import Runner, cache_name
from launcher.serving.shapes import Shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 7


def shapes_of(model: PreTrainedModel) -> Shapes:
    """Return what the layers keep, having compared the model over pages with the model as it stands.

    Afterwards the model's attention is that of ``launcher.serving.kv``.

    Raises:
        ConfigError: it keeps something else than keys and values of all tokens, or comes out different.
    """
    ids = torch.arange(_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    config = model.config.get_text_config()
    with torch.inference_mode():
        past = DynamicCache(config=config)
        expected = model(input_ids=ids, use_cache=True, **{cache_name(model): past}).logits[0].float()
    if any(past.is_sliding) or not all(hasattr(layer, "keys") for layer in past.layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in past.layers}))
        raise _refusal(model, f"keeps other things than keys and values of all tokens ({kinds})")
    if not model._supports_attention_backend:  # noqa: SLF001  (Transformers' mark of models that take any attention)
        raise _refusal(model, "computes attention in its own code")
    shapes = Shapes(
        keys=tuple((layer.keys.shape[1], layer.keys.shape[3]) for layer in past.layers),
        values=tuple((layer.values.shape[1], layer.values.shape[3]) for layer in past.layers),
        item_bytes=model.dtype.itemsize,
    )
    model.set_attn_implementation(ATTENTION)
    runner = Runner(model, PagedCache(shapes, num_pages=1, dtype=model.dtype, device=model.device))
    try:
        found = torch.cat([runner.run(_plan(ids[0].tolist(), *span)) for span in ((0, 3), (3, 6), (6, 7))])
    except NotImplementedError as error:
        raise _refusal(model, f"asks for {error}") from error
    difference = float((found - expected[[2, 5, 6]]).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not difference <= _tolerance(model.dtype):
        raise _refusal(model, f"comes out different by {difference:.2g} of its largest score")
    return shapes


def _plan(ids: list[int], start: int, end: int) -> StepPlan:
    return StepPlan((Segment(start=start, tokens=tuple(ids[start:end]), pages=(0,), wanted=True),))


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype == torch.float32 else 5e-2


def _refusal(model: PreTrainedModel, why: str) -> ConfigError:
    why = f"{model.config.model_type} {why}, which pages cannot hold exactly"
    fix = "set job.engine=transformers or job.engine=vllm on a GPU, or choose a model with plain causal attention"
    return ConfigError("job.engine", "slots", why=why, fix=fix)

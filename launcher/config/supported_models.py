"""Model families that a parallel strategy or attention kernel supports, by their files."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.config.attention import Attention, EagerAttention, FlashAttention, FlexAttention, SdpaAttention
from launcher.config.model.base import Model
from launcher.config.model.config_json import sequence_sharding_problem, stateful_layers
from launcher.config.model.transformers_support import AttentionSupport, attention_support, parallel_plans
from launcher.config.parallel.base import Parallel
from launcher.config.parallel.data_parallel import TENSOR_STYLES
from launcher.config.parallel.deepspeed_pipeline import PIPELINE_FAMILIES, unknown_family_error
from launcher.errors import ConfigError

EXIT_FAMILIES = frozenset({"gpt2", "llama", "mistral", "qwen2", "qwen3"})
"""Families whose norm and output head can follow any layer in training."""

_ALTERNATIVE = "set parallel=fsdp or parallel=zero3, which shard any model"


def validate_family(
    parallel: Parallel, model: Model, attention: Attention, *, world_size: int, length: int
) -> Iterator[ConfigError]:
    """Yield why a strategy cannot split a model, judged by its files.

    ``parallel.validate_run`` covers GPT-2 itself.

    Args:
        parallel: the strategy.
        model: what it spreads.
        attention: the kernel.
        world_size: ranks.
        length: tokens in a sequence; 0 where none is cut.
    """
    dims = parallel.dims(world_size)
    if model.image_text() is not None:
        yield from _validate_images(parallel, model, world_size=world_size)
        return
    if dims.sequence > 1:
        yield from _validate_sequences(model, attention, degree=dims.sequence, length=length)
    if dims.pipeline > 1 and parallel.kind == "pipeline":
        yield from _validate_state(model)
    family = model.family()
    plans = parallel_plans(family) if family not in (None, "gpt2") else None
    if plans is None:
        return
    strange = sorted(plans.tensor_styles - TENSOR_STYLES)
    if dims.tensor > 1 and (strange or not plans.tensor_styles):
        lacks = f"one with styles {', '.join(strange)} that the launcher does not support" if strange else "none"
        why = f"Transformers' tensor plan for {family} is {lacks}"
        yield ConfigError("parallel.tensor", dims.tensor, why=why, fix=_ALTERNATIVE)
    if dims.pipeline > 1 and parallel.kind == "pipeline" and not plans.has_stages:
        why = f"Transformers has no pipeline plan for {family}"
        yield ConfigError("parallel.stages", dims.pipeline, why=why, fix=_ALTERNATIVE)
    if parallel.kind == "deepspeed_pipeline" and model.shape() is None and family not in PIPELINE_FAMILIES:
        yield unknown_family_error(str(family))


def _validate_images(parallel: Parallel, model: Model, *, world_size: int) -> Iterator[ConfigError]:
    """Reject strategies that split layers, matrices or sequences of an image-text model."""
    dims = parallel.dims(world_size)
    instead = "set parallel=single, ddp, zero2, zero3 or fsdp"
    if parallel.kind in ("pipeline", "deepspeed_pipeline"):
        why = f"{model.name} takes images, and its image encoder is no stage of a pipeline"
        yield ConfigError("parallel", parallel.kind, why=why, fix=instead)
        return
    for option, degree in (("tensor", dims.tensor), ("sequence_parallel", dims.sequence)):
        if degree > 1:
            why = f"{model.name} takes images, whose places in the sequence and encoder are not split"
            yield ConfigError(f"parallel.{option}", degree, why=why, fix=f"set parallel.{option}=1")


def _validate_state(model: Model) -> Iterator[ConfigError]:
    config = model.stored_config()
    if config is not None:
        family = str(config.get("model_type"))
        states = stateful_layers(config, attention_support(family))
        if states is not None:
            yield stateful_model_error(family, states)


def stateful_model_error(family: str, states: str) -> ConfigError:
    """Return the error for a model that a pipeline cannot continue texts with."""
    why = f"{family} has {states}, which pipeline stages do not support"
    return ConfigError("parallel", "pipeline", why=why, fix=_ALTERNATIVE)


def packing_error(model: Model, attention: Attention) -> ConfigError | None:
    """Return why examples in one row would see each other; ``None`` if they are kept apart."""
    if attention.kind == FlashAttention.kind:
        why = "attention=flash takes no mask, which keeps the examples of a row apart"
        return ConfigError("data.packing", "true", why=why, fix="set attention=sdpa, or data.packing=false")
    if model.image_text() is not None:
        why = f"{model.name} takes images, and finds their places in rows of one example"
        return ConfigError("data.packing", "true", why=why, fix="set data.packing=false")
    config = model.stored_config()
    if config is not None:
        family = str(config.get("model_type"))
        states = stateful_layers(config, attention_support(family))
        if states is not None:
            why = f"{family} has {states}, and so from one example of a row to the next"
            return ConfigError("data.packing", "true", why=why, fix="set data.packing=false")
    return None


def _validate_sequences(model: Model, attention: Attention, *, degree: int, length: int) -> Iterator[ConfigError]:
    """Reject kernels that need whole-sequence masks, and models with other sequence layers."""
    if attention.kind not in ("sdpa", "flash"):
        why = "attention over several ranks needs a kernel that is causal without a mask"
        yield ConfigError("attention", attention.kind, why=why, fix="set attention=sdpa")
    config = model.stored_config()
    if config is None:
        return
    why_not = sequence_sharding_problem(config, attention_support(str(config.get("model_type"))), length=length)
    if why_not is not None:
        yield whole_sequence_error(degree, why_not)


def whole_sequence_error(degree: int, why: str) -> ConfigError:
    """Return the error for a model whose sequences stay whole."""
    return ConfigError("parallel.sequence_parallel", degree, why=why, fix=_ALTERNATIVE)


def unsupported_attention(attention: Attention, family: str, marks: AttentionSupport) -> ConfigError | None:
    """Return the error for a kernel that a family does not support, else ``None``."""
    supports = {
        EagerAttention.kind: True,
        SdpaAttention.kind: marks.sdpa,
        FlashAttention.kind: marks.sdpa
        and marks.attention_backend,  # others would not find a kernel that is registered
        FlexAttention.kind: marks.flex_attn,
    }
    if supports[attention.kind]:
        return None
    others = ", ".join(f"attention={kind}" for kind, supported in supports.items() if supported)
    why = f"{family} has no such attention in the installed Transformers"
    return ConfigError("attention", attention.kind, why=why, fix=f"set {others.replace(', ', ' or ')}")

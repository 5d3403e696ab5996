"""Which families of models a strategy can spread: what Transformers plans for them, and how their layers attend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from launcher.errors import ConfigError
from launcher.models.attending import carried_state, cut_problem
from launcher.models.installed import attention_marks, parallel_plans
from launcher.parallel.deepspeed_pipeline import FAMILIES, unknown_family
from launcher.parallel.fsdp import TENSOR_STYLES

if TYPE_CHECKING:
    from launcher.attention import Attention
    from launcher.models.base import Model
    from launcher.parallel.base import Parallel

_INSTEAD = "set parallel=fsdp or parallel=zero3, which shard any model"


def family_refusals(
    parallel: Parallel, model: Model, attention: Attention, *, world_size: int, length: int
) -> Iterator[ConfigError]:
    """Yield why a strategy cannot spread a model, as far as files tell; ``parallel.refusals`` knows GPT-2 itself.

    Args:
        parallel: the strategy.
        model: what it spreads.
        attention: the kernel.
        world_size: ranks.
        length: tokens in a sequence; 0 where none is cut.
    """
    degrees = parallel.degrees(world_size)
    if degrees.sequence > 1:
        yield from _sequence_refusals(model, attention, degree=degrees.sequence, length=length)
    if degrees.pipeline > 1 and parallel.kind == "pipeline":
        yield from _state_refusals(model)
    family = model.family()
    plans = parallel_plans(family) if family not in (None, "gpt2") else None
    if plans is None:
        return
    strange = sorted(plans.tensor_styles - TENSOR_STYLES)
    if degrees.tensor > 1 and (strange or not plans.tensor_styles):
        lacks = f"one with styles {', '.join(strange)} that are not carried out here" if strange else "none"
        why = f"Transformers' tensor plan for {family} is {lacks}"
        yield ConfigError("parallel.tensor", degrees.tensor, why=why, fix=_INSTEAD)
    if degrees.pipeline > 1 and parallel.kind == "pipeline" and not plans.has_stages:
        why = f"Transformers has no pipeline plan for {family}"
        yield ConfigError("parallel.stages", degrees.pipeline, why=why, fix=_INSTEAD)
    if parallel.kind == "deepspeed_pipeline" and model.shape() is None and family not in FAMILIES:
        yield unknown_family(str(family))


def _state_refusals(model: Model) -> Iterator[ConfigError]:
    config = model.stored_config()
    if config is not None:
        family = str(config.get("model_type"))
        states = carried_state(config, attention_marks(family))
        if states is not None:
            yield stateful(family, states)


def stateful(family: str, states: str) -> ConfigError:
    """Return the refusal of a model that a pipeline cannot continue texts with."""
    why = f"{family} has {states}, which stages do not keep"
    return ConfigError("parallel", "pipeline", why=why, fix=_INSTEAD)


def _sequence_refusals(model: Model, attention: Attention, *, degree: int, length: int) -> Iterator[ConfigError]:
    """Refuse kernels that want a mask of whole sequences, and models whose layers do more than attend to all of one."""
    if attention.kind not in ("sdpa", "flash"):
        why = "only kernels that are causal without a mask compute attention over ranks"
        yield ConfigError("attention", attention.kind, why=why, fix="set attention=sdpa")
    config = model.stored_config()
    if config is None:
        return
    why_not = cut_problem(config, attention_marks(str(config.get("model_type"))), length=length)
    if why_not is not None:
        yield uncut(degree, why_not)


def uncut(degree: int, why: str) -> ConfigError:
    """Return the refusal of a model whose sequences stay whole."""
    return ConfigError("parallel.sequence", degree, why=why, fix=_INSTEAD)

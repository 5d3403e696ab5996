"""Cutting a stock Transformers model into stretches of its blocks, without a change to its code.

A stretch is the whole model with what belongs to others taken out. What stays keeps its name, so weights, random or
from files, are those of the whole model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from launcher.errors import ConfigError
from launcher.models.attending import carried_state
from launcher.models.kernels import marks_of
from launcher.parallel.family import stateful

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Names of a base model's children, by where they stand."""

    embedding: str
    """Turns tokens into vectors: the first stretch alone has it."""
    blocks: str
    """The list of repeated blocks."""
    norm: str
    """Follows the last block: the last stretch alone has it."""
    positions: str | None = None
    """Added to what the embedding returns, by every stretch: only the first may add anything."""
    dropout: str | None = None
    """Follows them: the first stretch alone has it."""


_WITHOUT_PLAN = {"gpt2": Anatomy(embedding="wte", blocks="h", norm="ln_f", positions="wpe", dropout="drop")}
"""Families that Transformers has no pipeline plan for."""

_PLAN = (["inputs_embeds"], ["hidden_states"], ["hidden_states"])
"""What the three parts of a plan return, in order."""


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Return where to cut: by Transformers' own plan (``base_model_pp_plan``), or by ours for the family.

    Raises:
        ConfigError: there is neither, or the plan is not embedding, blocks, norm.
    """
    family = model.config.model_type
    if family in _WITHOUT_PLAN:
        return _WITHOUT_PLAN[family]
    plan = getattr(model.config, "base_model_pp_plan", None) or {}
    names = list(plan)
    shaped = tuple(list(outputs) for _, outputs in plan.values()) == _PLAN
    if not shaped or not isinstance(getattr(model.base_model, names[1], None), nn.ModuleList):
        why = f"Transformers' pipeline plan for {family} is {names or 'missing'}, not embedding, blocks, norm"
        raise _refusal(why)
    return Anatomy(embedding=names[0], blocks=names[1], norm=names[2])


def cut(model: PreTrainedModel, keep: range, *, first: bool, last: bool) -> None:
    """Take out of ``model``, laid out on the meta device, all that other stretches do.

    Args:
        model: whole; changed in place.
        keep: numbers of the blocks that stay.
        first: whether this stretch begins the model, and takes tokens.
        last: whether it ends the model, and has norm and output head.

    Raises:
        ConfigError: some blocks keep states, which Transformers' cache of a stretch does not find.
    """
    states = carried_state(model.config.to_dict(), marks_of(type(model)))
    if states is not None:
        raise stateful(str(model.config.model_type), states)
    anatomy, base = anatomy_of(model), model.base_model
    blocks = getattr(base, anatomy.blocks)
    for key in [key for number, key in enumerate(blocks._modules) if number not in keep]:  # noqa: SLF001
        del blocks._modules[key]  # noqa: SLF001  (ModuleList's own deletion renames the blocks behind)
    if not first:
        setattr(base, anatomy.embedding, None)
        if anatomy.positions is not None:
            setattr(base, anatomy.positions, AddsNothing())
        if anatomy.dropout is not None:
            setattr(base, anatomy.dropout, nn.Identity())
    if not last:
        setattr(base, anatomy.norm, nn.Identity())
        for name in [name for name, child in model.named_children() if child is not base]:
            setattr(model, name, None)


def count_own_blocks(model: PreTrainedModel, keep: range) -> None:
    """Let a stretch's configuration speak of its own blocks, for loops over layers and for caches.

    Only once it has its weights: some families draw them by the number of layers of the whole model.
    """
    base = model.base_model
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(keep)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[number] for number in keep]
    model.config = base.config = config


class AddsNothing(nn.Module):  # type: ignore[misc]
    """Stands in for learned positions: what it returns changes no number it is added to, not even a negative zero."""

    def forward(self, positions: Tensor) -> Tensor:
        """Return -0.0, of shape (1,)."""
        return torch.full((1,), -0.0, device=positions.device)


def check_passes_on(model: PreTrainedModel) -> None:
    """Check that ``model``, a stretch with its weights, does nothing to what it is given but apply blocks and norm.

    Some families scale embeddings before the first block wherever these come from; a later stretch would do it again.

    Raises:
        ConfigError: this is such a family.
    """
    anatomy, base = anatomy_of(model), model.base_model
    held = {name: getattr(base, name) for name in (anatomy.blocks, anatomy.norm)}
    config, training = base.config, base.training
    hidden = torch.linspace(-2, 2, 2 * config.hidden_size).view(1, 2, -1)
    try:
        setattr(base, anatomy.blocks, nn.ModuleList())
        setattr(base, anatomy.norm, nn.Identity())
        base.config = copy.copy(config)
        base.config.num_hidden_layers = 0
        with torch.no_grad():
            passed = base.eval()(inputs_embeds=hidden, use_cache=False).last_hidden_state
    finally:
        base.config = config
        for name, module in held.items():
            setattr(base, name, module)
        base.train(training)
    if not torch.equal(passed, hidden):
        raise _refusal(f"{config.model_type} changes what enters its first block, and every stage would do it again")


def _refusal(why: str) -> ConfigError:
    return ConfigError("parallel", "pipeline", why=why, fix="set parallel=fsdp, or choose a model of the Llama family")

"""Partition a stock Transformers model into chunks of blocks, balanced by size or by time.

A chunk is the whole model with what belongs to others taken out. What stays keeps its name, so weights, random or from
files, are those of the whole model. No rank ever holds more than its own chunks.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from launcher.config.adapter_folder import ADAPTER_ATTRIBUTE
from launcher.config.model.config_json import stateful_layers
from launcher.config.model.transformers_support import stage_names
from launcher.config.parallel.pipeline import Pipeline, partition_layers
from launcher.config.supported_models import stateful_model_error
from launcher.engines.distributed import DTYPES
from launcher.engines.model import prepare_model, weights_progress
from launcher.engines.pipeline.stage import ModelChunk
from launcher.errors import ConfigError
from launcher.models.attention import class_attention_support
from launcher.models.build import build_deferred
from launcher.models.transforms import apply_activation_checkpointing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from launcher.engines.context import Context


@dataclass(frozen=True, kw_only=True)
class ModelPartition:
    """How the whole model is cut, the same on every rank."""

    blocks: list[range]
    """Numbers of the blocks of each chunk."""
    tied: dict[str, str]
    """Further names of tied parameters, each with the first name."""
    config: PreTrainedConfig
    """Of the whole model."""
    adapter_config: Mapping[str, Any] | None = None
    """PEFT's config of the adapter that is trained."""


def choose_partition(context: Context, *, count: int, by_time: bool, device: torch.device) -> ModelPartition:
    """Return where to cut the run's model into ``count`` chunks, alike in time or in parameters.

    Raises:
        ConfigError: the model cannot be cut, or has fewer blocks than chunks.
    """
    run = context.run
    model, _ = build_deferred(
        run.model, seed=run.job.seed, attention=run.attention, adapter=run.lora, heartbeat=_heartbeat(context)
    )
    blocks = partition_by_parameters(model, count, stages=context.dims.pipeline)
    if by_time:
        costs = _costs_from_rank_0(context, num_blocks=blocks[-1].stop, device=device)
        blocks = partition_layers(costs.blocks, count, first=costs.first, last=costs.last)
    adapter = getattr(model, ADAPTER_ATTRIBUTE, None)
    return ModelPartition(blocks=blocks, tied=tied_names(model), config=model.config, adapter_config=adapter)


def partition_by_parameters(model: PreTrainedModel, count: int, *, stages: int) -> list[range]:
    """Return the blocks of each of ``count`` chunks, so that chunks have like parameter counts.

    Raises:
        ConfigError: the model cannot be cut, or has fewer blocks than chunks.
    """
    costs = _parameter_costs(model)
    num_blocks = len(costs.blocks)
    if count > num_blocks:
        why = f"{count} chunks, and the model has {num_blocks} layers"
        raise ConfigError("parallel.stages", stages, why=why, fix=f"set parallel.stages={num_blocks}")
    return partition_layers(costs.blocks, count, first=costs.first, last=costs.last)


def build_chunk(context: Context, where: ModelPartition, number: int, *, device: torch.device) -> ModelChunk:
    """Return one chunk with its weights, on ``device``, in training mode."""
    run, count = context.run, len(where.blocks)
    model, builder = build_deferred(
        run.model,
        seed=run.job.seed,
        attention=run.attention,
        adapter=run.lora,
        heartbeat=_heartbeat(context),
        on_progress=weights_progress(context),
    )
    keep_chunk(model, where.blocks[number], first=number == 0, last=number == count - 1)
    apply_activation_checkpointing(model, run.activation)
    prepare_model(model, run, device=device)

    def heartbeat(name: str, part: nn.Module) -> None:
        context.heartbeat.update("load")

    builder.build_all(heartbeat)
    set_chunk_config(model, where.blocks[number])
    if number > 0:
        check_passthrough(model)
    assert isinstance(run.parallel, Pipeline), "the strategy that has chunks"
    return ModelChunk(
        model.train().to(device),
        number=number,
        count=count,
        autocast=DTYPES[run.precision.compute],
        splits_backward=run.parallel.splits_backward,
    )


def _parameter_costs(model: PreTrainedModel) -> LayerCosts:
    anatomy, base = child_names_of(model), model.base_model
    ends = {name for name, child in model.named_children() if child is not base}
    before = [anatomy.embedding, *([anatomy.positions] if anatomy.positions else [])]
    return LayerCosts(
        blocks=[_size(block) for block in getattr(base, anatomy.blocks)],
        first=sum(_size(getattr(base, name)) for name in before),
        last=_size(getattr(base, anatomy.norm)) + sum(_size(getattr(model, name)) for name in ends),
    )


def _size(module: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in module.parameters()))


def _costs_from_rank_0(context: Context, *, num_blocks: int, device: torch.device) -> LayerCosts:
    """Return rank 0's measurement."""
    costs = torch.zeros(3, dtype=torch.float64, device=device)
    if context.is_main:
        costs.copy_(torch.tensor(measure_costs(context, device=device)))
    dist.broadcast(costs, src=0)
    block, first, last = costs.tolist()
    if context.is_main:
        print(f"balance: a block takes {block:.4f} s, embeddings {first:.4f} s, output head {last:.4f} s", flush=True)
    return LayerCosts(blocks=[block] * num_blocks, first=first, last=last)


def _heartbeat(context: Context) -> Callable[[], None]:
    return lambda: context.heartbeat.update("load")


@dataclass(frozen=True, kw_only=True)
class ChildNames:
    """Names of a base model's children, by position."""

    embedding: str
    """Turns tokens into vectors: the first chunk alone has it."""
    blocks: str
    """The list of repeated blocks."""
    norm: str
    """Follows the last block: the last chunk alone has it."""
    positions: str | None = None
    """Added to what the embedding returns, by every chunk: only the first may add anything."""
    dropout: str | None = None
    """Follows them: the first chunk alone has it."""


_FAMILIES_WITHOUT_PLAN = {"gpt2": ChildNames(embedding="wte", blocks="h", norm="ln_f", positions="wpe", dropout="drop")}
"""Families that Transformers has no pipeline plan for."""


def child_names_of(model: PreTrainedModel) -> ChildNames:
    """Return where to cut: by Transformers' ``base_model_pp_plan`` or by ours for the family.

    Raises:
        ConfigError: there is neither, or the plan is not embedding, blocks, norm.
    """
    family = model.config.model_type
    if family in _FAMILIES_WITHOUT_PLAN:
        return _FAMILIES_WITHOUT_PLAN[family]
    plan = getattr(model.config, "base_model_pp_plan", None) or {}
    names, base = stage_names(plan), model.base_model
    is_blocks = names is not None and isinstance(getattr(base, names.blocks, None), nn.ModuleList)
    is_dropout = names is not None and (
        names.dropout is None or isinstance(getattr(base, names.dropout), nn.Dropout | nn.Identity)
    )
    if names is None or not is_blocks or not is_dropout:
        why = f"Transformers' pipeline plan for {family} is {list(plan) or 'missing'}, not embedding, blocks, norm"
        raise _error(why)
    return ChildNames(embedding=names.embedding, blocks=names.blocks, norm=names.norm, dropout=names.dropout)


def keep_chunk(model: PreTrainedModel, keep: range, *, first: bool, last: bool) -> None:
    """Take out of ``model``, laid out on the meta device, all that other chunks do.

    Args:
        model: whole; changed in place.
        keep: numbers of the blocks that stay.
        first: whether this chunk begins the model, and takes tokens.
        last: whether it ends the model, and has norm and output head.

    Raises:
        ConfigError: some blocks keep states, which Transformers' cache of a chunk does not find.
    """
    states = stateful_layers(model.config.to_dict(), class_attention_support(type(model)))
    if states is not None:
        raise stateful_model_error(str(model.config.model_type), states)
    anatomy, base = child_names_of(model), model.base_model
    blocks = getattr(base, anatomy.blocks)
    for key in [key for number, key in enumerate(blocks._modules) if number not in keep]:  # noqa: SLF001
        del blocks._modules[key]  # noqa: SLF001  (ModuleList's own deletion renames the blocks behind)
    if not first:
        setattr(base, anatomy.embedding, None)
        if anatomy.positions is not None:
            setattr(base, anatomy.positions, ZeroPositions())
        if anatomy.dropout is not None:
            setattr(base, anatomy.dropout, nn.Identity())
    if not last:
        setattr(base, anatomy.norm, nn.Identity())
        for name in [name for name, child in model.named_children() if child is not base]:
            setattr(model, name, None)


def set_chunk_config(model: PreTrainedModel, keep: range) -> None:
    """Let a chunk's configuration speak of its own blocks, for loops over layers and for caches.

    Only once it has its weights: some families draw them by the number of layers of the whole model.
    """
    base = model.base_model
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(keep)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[number] for number in keep]
    model.config = base.config = config


class ZeroPositions(nn.Module):  # type: ignore[misc]
    """Replaces learned positions: its output changes no number, not even a negative zero."""

    def forward(self, positions: Tensor) -> Tensor:
        """Return -0.0, of shape (1,)."""
        return torch.full((1,), -0.0, device=positions.device)


def check_passthrough(model: PreTrainedModel) -> None:
    """Check that ``model``, a chunk with its weights, applies blocks and norm and nothing else.

    Some families scale embeddings before the first block wherever these come from; a later chunk would do it again.

    Raises:
        ConfigError: this is such a family.
    """
    anatomy, base = child_names_of(model), model.base_model
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
        raise _error(f"{config.model_type} changes what enters its first block, and every stage would do it again")


def _error(why: str) -> ConfigError:
    return ConfigError("parallel", "pipeline", why=why, fix="set parallel=fsdp, or choose a model of the Llama family")


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Return each further name of a parameter of a whole model, with its first name.

    Raises:
        ConfigError: blocks share parameters, which may come to lie on any stages.
    """
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    inside = f"{model.base_model_prefix}.{child_names_of(model).blocks}."
    for names in found.items():
        if any(name.startswith(inside) for name in names):
            why = f"{' and '.join(names)} are one parameter, and their blocks are on different stages"
            raise ConfigError("parallel", "pipeline", why=why, fix="set parallel=fsdp")
    return found


_WARM_UP, _TIMES = 2, 5


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Costs of a model's parts, in parameters or in seconds."""

    blocks: Sequence[float]
    """Each block, in order."""
    first: float
    """Cost of the parts before the first block."""
    last: float
    """Cost of the parts after the last block."""


def measure_costs(context: Context, *, device: torch.device) -> tuple[float, float, float]:
    """Return the seconds of one block, of what precedes the first and of what follows the last.

    Blocks are taken to be alike: one is measured. No more than one of the three is in memory at a time.
    """
    empty, one = (_chunk_seconds(context, range(num), number=1, device=device) for num in (0, 1))
    first, last = (_chunk_seconds(context, range(0), number=number, device=device) for number in (0, 2))
    return max(one - empty, 0.0), first, last


def _chunk_seconds(context: Context, keep: range, *, number: int, device: torch.device) -> float:
    """Return the median seconds of a chunk with blocks ``keep``: first 0, middle 1 or last 2."""
    run = context.run
    model, builder = build_deferred(run.model, seed=run.job.seed, attention=run.attention, adapter=run.lora)
    keep_chunk(model, keep, first=number == 0, last=number == 2)
    builder.build_all()
    set_chunk_config(model, keep)
    chunk = ModelChunk(model.to(device), number=number, count=3, autocast=DTYPES[run.precision.compute])
    shape = (run.batched_job.micro_batch, run.batched_job.sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    hidden = torch.zeros(*shape, model.config.hidden_size, device=device, requires_grad=True)
    times = []
    for _ in range(_WARM_UP + _TIMES):
        context.heartbeat.update("load")
        started = _now(device)
        out = chunk(hidden if number else tokens, labels=tokens)
        if out.requires_grad:
            out.sum().backward()
        times.append(_now(device) - started)
    return statistics.median(times[_WARM_UP:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

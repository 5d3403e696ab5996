"""This rank's stretches of the run's model: nobody ever holds more than its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from launcher.engines.distributed import DTYPES
from launcher.engines.model import prepare_model
from launcher.engines.pipelining.cut import anatomy_of, check_passes_on, count_own_blocks, cut
from launcher.engines.pipelining.stage import Stretch
from launcher.engines.pipelining.tied import tied_names
from launcher.engines.pipelining.timing import Costs, measured
from launcher.errors import ConfigError
from launcher.models.build import lay_out
from launcher.models.recompute import apply_activation
from launcher.parallel.balance import stretches
from launcher.parallel.pipeline import Pipeline

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from launcher.context import Context


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the whole model is cut, the same on every rank."""

    blocks: list[range]
    """Numbers of the blocks of each stretch."""
    tied: dict[str, str]
    """Further names of tied parameters, each with the first name."""
    width: int
    """Size of the hidden states."""


def choose_cut(context: Context, *, count: int, by_time: bool, device: torch.device) -> Cut:
    """Return where to cut the run's model into ``count`` stretches, alike in time or in parameters.

    Raises:
        ConfigError: the model cannot be cut, or has fewer blocks than stretches.
    """
    run = context.run
    model, _ = lay_out(run.model, seed=run.job.seed, attention=run.attention, beat=_beat(context))
    blocks = cut_by_parameters(model, count, stages=context.degrees.pipeline)
    if by_time:
        costs = _told_by_rank_0(context, num_blocks=blocks[-1].stop, device=device)
        blocks = stretches(costs.blocks, count, first=costs.first, last=costs.last)
    return Cut(blocks=blocks, tied=tied_names(model), width=model.config.hidden_size)


def cut_by_parameters(model: PreTrainedModel, count: int, *, stages: int) -> list[range]:
    """Return the blocks of ``count`` stretches, on ``stages`` ranks, of a model that are alike in parameters.

    Raises:
        ConfigError: the model cannot be cut, or has fewer blocks than stretches.
    """
    costs = _parameters(model)
    num_blocks = len(costs.blocks)
    if count > num_blocks:
        why = f"{count} stretches, and the model has {num_blocks} layers"
        raise ConfigError("parallel.stages", stages, why=why, fix=f"set parallel.stages={num_blocks}")
    return stretches(costs.blocks, count, first=costs.first, last=costs.last)


def build_stretch(context: Context, where: Cut, number: int, *, device: torch.device) -> Stretch:
    """Return one stretch with its weights, on ``device``, in training mode."""
    run, count = context.run, len(where.blocks)
    model, builder = lay_out(run.model, seed=run.job.seed, attention=run.attention, beat=_beat(context))
    cut(model, where.blocks[number], first=number == 0, last=number == count - 1)
    apply_activation(model, run.activation)
    prepare_model(model, run, device=device)

    def beat(name: str, part: nn.Module) -> None:
        context.heartbeat.beat("load")

    builder.build_all(beat)
    count_own_blocks(model, where.blocks[number])
    if number > 0:
        check_passes_on(model)
    assert isinstance(run.parallel, Pipeline), "the strategy that has stretches"
    return Stretch(
        model.train().to(device),
        number=number,
        count=count,
        autocast=DTYPES[run.precision.compute],
        splits_backward=run.parallel.splits_backward,
    )


def _parameters(model: PreTrainedModel) -> Costs:
    anatomy, base = anatomy_of(model), model.base_model
    ends = {name for name, child in model.named_children() if child is not base}
    before = [anatomy.embedding, *([anatomy.positions] if anatomy.positions else [])]
    return Costs(
        blocks=[_size(block) for block in getattr(base, anatomy.blocks)],
        first=sum(_size(getattr(base, name)) for name in before),
        last=_size(getattr(base, anatomy.norm)) + sum(_size(getattr(model, name)) for name in ends),
    )


def _size(module: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in module.parameters()))


def _told_by_rank_0(context: Context, *, num_blocks: int, device: torch.device) -> Costs:
    """Return what rank 0 measured."""
    told = torch.zeros(3, dtype=torch.float64, device=device)
    if context.is_main:
        told.copy_(torch.tensor(measured(context, device=device)))
    dist.broadcast(told, src=0)
    block, first, last = told.tolist()
    if context.is_main:
        print(f"balance: a block takes {block:.4f} s, embeddings {first:.4f} s, output head {last:.4f} s", flush=True)
    return Costs(blocks=[block] * num_blocks, first=first, last=last)


def _beat(context: Context) -> Callable[[], None]:
    return lambda: context.heartbeat.beat("load")

"""From a run to its generation engine, on a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from launcher.engines.distributed import choose_device
from launcher.profiling.base import NO_PROFILER, Profiler
from launcher.serving.base import Generator
from launcher.serving.engine import Runs, Slots
from launcher.serving.holds import Sample
from launcher.serving.kernels.apply import apply_native
from launcher.serving.kv import PagedCache
from launcher.serving.lockstep import Leading, follow_plans
from launcher.serving.model import ends_of, own_part
from launcher.serving.room import num_pages
from launcher.serving.runner import Runner
from launcher.serving.stage import WHOLE, Stage
from launcher.serving.staged import Staged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.config import Run
    from launcher.serving.limits import Limits


def make_generator(
    run: Run, *, limits: Limits, rank: int, world_size: int, beat: Callable[[], None], local_rank: int = 0
) -> Generator:
    """Return the engine of the first rank, with its model built and checked; the others call ``follow`` meanwhile.

    Args:
        run: what to build, and how it is computed.
        limits: how much at a time.
        rank: of this process among those that hold the model, 0.
        world_size: processes that hold the model between them; 1 where each holds it whole. They have joined torch's
            process group, and are all of it.
        beat: called while the model is built.
        local_rank: index of its device on this machine.

    Raises:
        ConfigError: the engine cannot hold this model exactly, or cannot serve it with the rest of the run.
        EnvironmentProblem: weights cannot be fetched.
    """
    assert rank == 0, "the other ranks follow"
    model, stage = own_part(run, rank=0, world_size=world_size, device=choose_device(local_rank), beat=beat)
    ends = ends_of(run, model, beat=beat)
    return slots_of(model, limits=limits, ends=ends, stage=stage, world_size=world_size, beat=beat)


def follow(
    run: Run,
    *,
    limits: Limits,
    rank: int,
    world_size: int,
    beat: Callable[[], None],
    local_rank: int = 0,
    profiler: Profiler = NO_PROFILER,
) -> None:
    """Compute on a rank other than the first what its engine plans, until that is closed; arguments as above."""
    assert rank > 0, "the first rank leads"
    model, stage = own_part(run, rank=rank, world_size=world_size, device=choose_device(local_rank), beat=beat)
    runner, _ = _paged(model, stage, limits=limits, world_size=world_size, kernels=True, beat=beat)
    group = dist.new_group(backend="gloo")
    follow_plans(Staged(runner, group) if stage.count > 1 else runner, group, beat=beat, profiler=profiler)


def slots_of(
    model: PreTrainedModel,
    *,
    limits: Limits,
    ends: tuple[int, ...],
    stage: Stage = WHOLE,
    world_size: int = 1,
    kernels: bool = True,
    beat: Callable[[], None] = lambda: None,
) -> Slots:
    """Return the launcher's own engine around a model.

    Args:
        model: in inference mode; its layers may be replaced.
        limits: how much at a time.
        ends: tokens that end a sequence.
        stage: which one it is.
        world_size: ranks that hold slices or stages of it.
        kernels: whether layers are replaced by compiled ones where there are any.
        beat: called meanwhile.

    Raises:
        ConfigError: it cannot hold the model exactly.
    """
    runner, pages = _paged(model, stage, limits=limits, world_size=world_size, kernels=kernels, beat=beat)
    config = model.config.get_text_config()
    runs: Runs = runner
    if world_size > 1:
        group = dist.new_group(backend="gloo")
        runs = Leading(Staged(runner, group) if stage.count > 1 else runner, group)
    return Slots(
        runs,
        limits=limits,
        num_pages=pages,
        context=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        ends=ends,
    )


def _paged(
    model: PreTrainedModel,
    stage: Stage,
    *,
    limits: Limits,
    world_size: int,
    kernels: bool,
    beat: Callable[[], None],
) -> tuple[Runner, int]:
    """Return what computes plans on this rank, and how many pages all ranks have room for."""
    sample = Sample(model, stage)
    sample.use_pages(model)
    pages = num_pages(limits, sample.shapes, model)
    if world_size > 1:
        least = torch.tensor([pages], device=model.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        pages = int(least)
    cache = PagedCache(sample.shapes, num_pages=pages, dtype=model.dtype, device=model.device)
    runner = Runner(model, cache, stage)
    if kernels and world_size == stage.count:  # slices of matrices are computed by torch
        swapped = apply_native(model, cache, beat=beat)
        difference = sample.difference(runner)
        if not difference <= sample.tolerance(model):
            swapped.undo()
            cache.kernels = None
            swapped.what = f"the model's own layers: compiled ones differ by {difference:.2g} of its scores"
        print(f"engine: {swapped.what}", flush=True)
    return runner, pages

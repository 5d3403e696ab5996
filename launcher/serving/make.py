"""From a run to its generation engine, on a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import GenerationConfig

from launcher.activation import Keep
from launcher.engines.distributed import DTYPES, choose_device
from launcher.engines.formats import prepare_formats
from launcher.engines.tensor_plan import TensorPlan
from launcher.errors import ConfigErrors
from launcher.models.build import build_model
from launcher.serving.base import Generator
from launcher.serving.engine import Slots
from launcher.serving.holds import Sample
from launcher.serving.kernels.apply import apply_native
from launcher.serving.kv import PagedCache
from launcher.serving.lockstep import Leading, follow_plans
from launcher.serving.pages import PAGE
from launcher.serving.refusals import refusals
from launcher.serving.runner import Runner
from launcher.serving.shapes import Shapes

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from launcher.config import Run
    from launcher.serving.limits import Limits

_SHARE_OF_FREE = 4
"""Keys and values take at most one part in this many of the memory that is free at the start, unless told otherwise."""


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
    model = inference_model(run, world_size=world_size, device=choose_device(local_rank), beat=beat)
    return slots_of(model, limits=limits, ends=ends_of(run, model, beat=beat), world_size=world_size, beat=beat)


def follow(
    run: Run, *, limits: Limits, rank: int, world_size: int, beat: Callable[[], None], local_rank: int = 0
) -> None:
    """Compute on a rank other than the first what its engine plans, until that is closed; arguments as above."""
    assert rank > 0, "the first rank leads"
    model = inference_model(run, world_size=world_size, device=choose_device(local_rank), beat=beat)
    runner, _ = _paged(model, limits=limits, world_size=world_size, kernels=False, beat=beat)
    follow_plans(runner, dist.new_group(backend="gloo"), beat=beat)


def inference_model(
    run: Run, *, device: torch.device, world_size: int = 1, beat: Callable[[], None] = lambda: None
) -> PreTrainedModel:
    """Return the model of a run in inference mode and in the format of the run: whole, or this rank's slices of it.

    Raises:
        ConfigErrors: this engine computes nothing the way that the run says.
    """
    problems = list(refusals(run, world_size=world_size))
    if problems:
        raise ConfigErrors(problems)
    prepare_formats(run.precision, device=device)
    plan: list[TensorPlan] = []

    def laid_out(model: PreTrainedModel) -> None:
        if world_size > 1:
            plan.append(TensorPlan(model, init_device_mesh(device.type, (world_size,))))

    def after(name: str, part: nn.Module) -> None:
        part.to(device)
        for each in plan:
            each.slice(name, part)

    model = build_model(
        run.model,
        seed=run.job.seed,
        attention=run.attention,
        activation=Keep(),
        dtype=DTYPES[run.precision.compute],
        after=after,
        laid_out=laid_out,
        beat=beat,
    )
    return model.eval().requires_grad_(False).to(device)


def ends_of(run: Run, model: PreTrainedModel, *, beat: Callable[[], None] = lambda: None) -> tuple[int, ...]:
    """Return the end-of-sequence tokens: those of the weights' own generation config, else of the model's config."""
    folder = run.model.weights_folder(beat=beat)
    config = model.generation_config
    if folder is not None and (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder)
    ends = config.eos_token_id
    return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)


def slots_of(
    model: PreTrainedModel,
    *,
    limits: Limits,
    ends: tuple[int, ...],
    world_size: int = 1,
    kernels: bool = True,
    beat: Callable[[], None] = lambda: None,
) -> Slots:
    """Return the launcher's own engine around a model.

    Args:
        model: in inference mode; its layers may be replaced.
        limits: how much at a time.
        ends: tokens that end a sequence.
        world_size: ranks that hold slices of it.
        kernels: whether layers are replaced by compiled ones where there are any.
        beat: called meanwhile.

    Raises:
        ConfigError: it cannot hold the model exactly.
    """
    runner, num_pages = _paged(model, limits=limits, world_size=world_size, kernels=kernels, beat=beat)
    config = model.config.get_text_config()
    return Slots(
        Leading(runner, dist.new_group(backend="gloo")) if world_size > 1 else runner,
        limits=limits,
        num_pages=num_pages,
        context=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        ends=ends,
    )


def _paged(
    model: PreTrainedModel, *, limits: Limits, world_size: int, kernels: bool, beat: Callable[[], None]
) -> tuple[Runner, int]:
    """Return what computes plans on this rank, and how many pages all ranks have room for."""
    sample = Sample(model)
    sample.use_pages(model)
    num_pages = _num_pages(limits, sample.shapes, model)
    if world_size > 1:
        least = torch.tensor([num_pages], device=model.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        num_pages = int(least)
    cache = PagedCache(sample.shapes, num_pages=num_pages, dtype=model.dtype, device=model.device)
    runner = Runner(model, cache)
    if kernels and world_size == 1:
        swapped = apply_native(model, cache, beat=beat)
        difference = sample.difference(runner)
        if not difference <= sample.tolerance(model):
            swapped.undo()
            cache.kernels = None
            swapped.what = f"the model's own layers: compiled ones differ by {difference:.2g} of its scores"
        print(f"engine: {swapped.what}", flush=True)
    return runner, num_pages


def _num_pages(limits: Limits, shapes: Shapes, model: PreTrainedModel) -> int:
    if limits.kv_tokens is not None:
        return max(1, limits.kv_tokens // PAGE)
    device = model.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    affordable = free // _SHARE_OF_FREE // (shapes.token_bytes * PAGE)
    wanted = limits.max_requests * -(-model.config.get_text_config().max_position_embeddings // PAGE)
    return int(max(1, min(wanted, affordable)))

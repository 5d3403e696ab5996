"""Load the model of a run for inference: whole, its slices, or a pipeline stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.distributed.device_mesh import init_device_mesh
from transformers import GenerationConfig

from launcher.config.activation import NoCheckpointing
from launcher.config.inference import validate_engine
from launcher.engines.distributed import DTYPES
from launcher.engines.model import prepare_precision
from launcher.engines.pipeline.partition import check_passthrough, keep_chunk, partition_by_parameters, set_chunk_config
from launcher.engines.tensor_parallel import TensorPlan
from launcher.errors import ConfigErrors
from launcher.inference.engine.model_runner import WHOLE_MODEL, ModelStage
from launcher.models.build import build_deferred, build_model
from launcher.models.pretrained import weights_folder
from launcher.utils.progress import OnProgress, ProgressLines, no_progress

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from launcher.config.run import Run


def load_stage(
    run: Run, *, number: int, count: int, after: Callable[[str, nn.Module], None], heartbeat: Callable[[], None]
) -> tuple[PreTrainedModel, ModelStage]:
    """Return one stage of a run's model with weights; stages have similar parameter counts.

    Args:
        run: whose model.
        number: of the stage.
        count: of all stages.
        after: called with each part, and its name, as soon as it is there.
        heartbeat: called while weights are fetched or drawn.

    Raises:
        ConfigError: the model cannot be cut, or has fewer blocks than stages.
        EnvironmentProblem: weights cannot be fetched.
    """
    compute = DTYPES[run.precision.compute]
    model, builder = build_deferred(
        run.model,
        seed=run.job.seed,
        attention=run.attention,
        dtype=compute,
        heartbeat=heartbeat,
        on_progress=_progress(is_first=number == 0, share=count > 1),
    )
    blocks = partition_by_parameters(model, count, stages=count)[number]
    stage = ModelStage(number=number, count=count, first_block=blocks.start)
    keep_chunk(model, blocks, first=stage.first, last=stage.last)

    def then(name: str, part: nn.Module) -> None:
        after(name, part)
        heartbeat()

    builder.build_all(then)
    set_chunk_config(model, blocks)
    if not stage.first:
        check_passthrough(model)
    return model, stage


def load_model_part(
    run: Run, *, rank: int, world_size: int, device: torch.device, heartbeat: Callable[[], None]
) -> tuple[PreTrainedModel, ModelStage]:
    """Return this rank's part of a run's model: all of it, its slices, or its stage.

    Raises:
        ConfigErrors: the engine ``paged`` computes nothing the way that the run says.
        EnvironmentProblem: weights cannot be fetched.
    """
    stages = run.parallel.dims(world_size).pipeline
    if stages == 1:
        return load_model(
            run, world_size=world_size, device=device, heartbeat=heartbeat, is_first=rank == 0
        ), WHOLE_MODEL
    _check(run, world_size=world_size, device=device)
    model, stage = load_stage(
        run, number=rank, count=stages, after=lambda _, part: part.to(device), heartbeat=heartbeat
    )
    return model.eval().requires_grad_(False).to(device), stage


def load_model(
    run: Run,
    *,
    device: torch.device,
    world_size: int = 1,
    engine: str = "paged",
    heartbeat: Callable[[], None] = lambda: None,
    is_first: bool = True,
) -> PreTrainedModel:
    """Return the run's model for inference, in its format: whole, or this rank's slices.

    Args:
        run: whose model.
        device: of the model.
        world_size: ranks that hold slices of it.
        engine: that computes with it.
        heartbeat: called meanwhile.
        is_first: whether this rank prints how much is loaded.

    Raises:
        ConfigErrors: the engine computes nothing the way that the run says.
    """
    _check(run, world_size=world_size, device=device, engine=engine)
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
        activation=NoCheckpointing(),
        dtype=DTYPES[run.precision.compute],
        after=after,
        laid_out=laid_out,
        heartbeat=heartbeat,
        on_progress=_progress(is_first=is_first, share=False),
    )
    return model.eval().requires_grad_(False).to(device)


def _progress(*, is_first: bool, share: bool) -> OnProgress:
    lines = ProgressLines("loading the weights" + (" (share of rank 0)" if share else ""))
    return lines.update if is_first else no_progress


def _check(run: Run, *, world_size: int, device: torch.device, engine: str = "paged") -> None:
    errors = list(validate_engine(run, world_size=world_size, engine=engine))
    if errors:
        raise ConfigErrors(errors)
    prepare_precision(run.precision, device=device)


def load_eos_token_ids(
    run: Run, model: PreTrainedModel, *, heartbeat: Callable[[], None] = lambda: None
) -> tuple[int, ...]:
    """Return the end-of-sequence tokens, from the generation config or the model's config."""
    folder = weights_folder(run.model, heartbeat=heartbeat)
    config = model.generation_config
    if folder is not None and (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder)
    ids = config.eos_token_id
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)

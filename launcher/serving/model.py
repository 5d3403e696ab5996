"""What a rank holds of a run's model, in inference mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.distributed.device_mesh import init_device_mesh
from transformers import GenerationConfig

from launcher.activation import Keep
from launcher.engines.distributed import DTYPES
from launcher.engines.formats import prepare_formats
from launcher.engines.tensor_plan import TensorPlan
from launcher.errors import ConfigErrors
from launcher.models.build import build_model
from launcher.serving.refusals import refusals
from launcher.serving.stage import WHOLE, Stage
from launcher.serving.staged import stage_model

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from launcher.config import Run


def own_part(
    run: Run, *, rank: int, world_size: int, device: torch.device, beat: Callable[[], None]
) -> tuple[PreTrainedModel, Stage]:
    """Return what a rank holds of a run's model: all of it, its slices, or its stage.

    Raises:
        ConfigErrors: the engine ``slots`` computes nothing the way that the run says.
        EnvironmentProblem: weights cannot be fetched.
    """
    stages = run.parallel.degrees(world_size).pipeline
    if stages == 1:
        return inference_model(run, world_size=world_size, device=device, beat=beat), WHOLE
    _check(run, world_size=world_size, device=device)
    model, stage = stage_model(run, number=rank, count=stages, after=lambda _, part: part.to(device), beat=beat)
    return model.eval().requires_grad_(False).to(device), stage


def inference_model(
    run: Run,
    *,
    device: torch.device,
    world_size: int = 1,
    engine: str = "slots",
    beat: Callable[[], None] = lambda: None,
) -> PreTrainedModel:
    """Return the model of a run in inference mode and in the format of the run: whole, or this rank's slices of it.

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
        activation=Keep(),
        dtype=DTYPES[run.precision.compute],
        after=after,
        laid_out=laid_out,
        beat=beat,
    )
    return model.eval().requires_grad_(False).to(device)


def _check(run: Run, *, world_size: int, device: torch.device, engine: str = "slots") -> None:
    problems = list(refusals(run, world_size=world_size, engine=engine))
    if problems:
        raise ConfigErrors(problems)
    prepare_formats(run.precision, device=device)


def ends_of(run: Run, model: PreTrainedModel, *, beat: Callable[[], None] = lambda: None) -> tuple[int, ...]:
    """Return the end-of-sequence tokens: those of the weights' own generation config, else of the model's config."""
    folder = run.model.weights_folder(beat=beat)
    config = model.generation_config
    if folder is not None and (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder)
    ends = config.eos_token_id
    return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)

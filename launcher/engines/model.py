"""The model of a run, built on this rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.engines.formats import prepare_formats
from launcher.models.build import build_model
from launcher.models.compiled import apply_compile
from launcher.models.float8 import apply_float8
from launcher.models.lazy import After, leave

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from launcher.config import Run
    from launcher.context import Context


def model_of(
    context: Context,
    *,
    device: torch.device,
    after: After = leave,
    laid_out: Callable[[PreTrainedModel], None] = lambda model: None,
) -> PreTrainedModel:
    """Return the run's model with fp32 weights; fetching, converting and drawing them counts as progress.

    Args:
        context: of this rank.
        device: where the model will run; it is not moved there.
        after: takes each part of the model as soon as it is there.
        laid_out: takes the model before any of it is.

    Raises:
        ConfigError: the device, or the model's family, cannot do what the run asks for.
    """
    run = context.run

    def prepare(model: PreTrainedModel) -> None:
        prepare_model(model, run, device=device)
        laid_out(model)

    return build_model(
        run.model,
        seed=run.job.seed,
        attention=run.attention,
        activation=run.activation,
        after=after,
        laid_out=prepare,
        beat=lambda: context.heartbeat.beat("load"),
    )


def prepare_model(model: PreTrainedModel, run: Run, *, device: torch.device) -> None:
    """Make a model that is laid out, or a stage of one, compute in the formats of the run, compiled or not.

    Raises:
        ConfigError: the device, or the model's family, cannot do that.
    """
    prepare_formats(run.precision, device=device)
    apply_float8(model, run.precision)
    apply_compile(model, run.compile, device=device)  # after whatever changes what a block does

"""The model of a run, built on this rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.models.build import build_model
from launcher.models.lazy import After, leave

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.context import Context


def model_of(
    context: Context, *, after: After = leave, laid_out: Callable[[PreTrainedModel], None] | None = None
) -> PreTrainedModel:
    """Return the run's model with fp32 weights; fetching, converting and drawing them counts as progress.

    Args:
        context: of this rank.
        after: takes each part of the model as soon as it is there.
        laid_out: takes the model before any of it is.
    """
    run = context.run
    return build_model(
        run.model,
        seed=run.job.seed,
        attention=run.attention,
        activation=run.activation,
        after=after,
        laid_out=laid_out,
        beat=lambda: context.heartbeat.beat("load"),
    )

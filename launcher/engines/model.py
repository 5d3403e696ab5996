"""The model of a run, built on this rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.models.build import build_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from launcher.context import Context


def model_of(context: Context) -> PreTrainedModel:
    """Return the run's model with fp32 weights; fetching and converting count as progress."""
    run = context.run
    return build_model(
        run.model,
        seed=run.job.seed,
        attention=run.attention,
        activation=run.activation,
        beat=lambda: context.heartbeat.beat("load"),
    )

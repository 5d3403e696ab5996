"""Draft with the first layers of the model itself, and verify with the others.

This is the self-speculation of LayerSkip (arXiv:2404.16710). The model's own norm and output head follow the exit. Keys
and values that the first layers write while they draft stay, and so do hidden states at the exit, so that a verified
token has run each layer exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.errors import ConfigError
from launcher.inference.engine.draft_lengths import Draft
from launcher.inference.engine.step_plan import Segment, StepPlan

if TYPE_CHECKING:
    from torch import Tensor

    from launcher.inference.engine.distributed import PlanRunner
    from launcher.inference.engine.scheduler import ScheduledStep
    from launcher.inference.engine.speculation import DraftSampler


class EarlyExitDrafter:
    """Drafts with the first layers.

    Prompts of the same step go through them with the first draft.

    Args:
        runner: of the model.
        sampler: chooses drafted tokens.
        exit_layer: layers that draft.
        num_layers: of the model.
    """

    def __init__(self, runner: PlanRunner, sampler: DraftSampler, *, exit_layer: int, num_layers: int) -> None:
        self._runner, self._sampler, self.first_layer = runner, sampler, exit_layer
        self.cost = exit_layer / num_layers

    def draft(self, step: ScheduledStep) -> list[Draft | None]:
        """Return a draft for each segment of a step that is to have one."""
        plan, lengths = step.plan, step.draft_lengths
        active = [index for index, length in enumerate(lengths) if length]
        segments = [replace(part, needs_logits=bool(lengths[i])) for i, part in enumerate(plan.segments)]
        logits = self._run(replace(plan, segments=tuple(segments)))
        drafts = {index: Draft([], []) for index in active}
        while active:
            chosen = self._sampler.sample_drafts(
                [step.sequences[index] for index in active], [drafts[index].tokens for index in active], logits
            )
            for index, (token, probabilities) in zip(active, chosen, strict=True):
                drafts[index].tokens.append(token)
                drafts[index].probabilities.append(probabilities)
            following = [
                _next_token(step, index, drafts[index].tokens, needs_logits=len(drafts[index].tokens) < lengths[index])
                for index in active
            ]
            logits = self._run(StepPlan(tuple(following)))
            active = [index for index in active if len(drafts[index].tokens) < lengths[index]]
        return [drafts.get(index) for index in range(len(lengths))]

    def _run(self, plan: StepPlan) -> Tensor:
        return self._runner.run(replace(plan, exit_layer=self.first_layer))


def _next_token(step: ScheduledStep, index: int, drafted: Sequence[int], *, needs_logits: bool) -> Segment:
    """Return the segment of the last drafted token."""
    part = step.plan.segments[index]
    return step.segment(index, start=part.start + len(drafted), tokens=tuple(drafted[-1:]), needs_logits=needs_logits)


_TOKENS = 8


def check_early_exit(runner: PlanRunner, *, exit_layer: int, family: str, vocab_size: int, tolerance: float) -> None:
    """Check that first and other layers together give the logits of the model.

    It overwrites the first block.

    Raises:
        ConfigError: they do not.
    """
    tokens = tuple((at * 7 + 1) % vocab_size for at in range(_TOKENS))
    whole = StepPlan((Segment(start=0, tokens=tokens, block_table=(0,), needs_logits=True),))
    expected = runner.run(whole)
    runner.run(replace(whole, exit_layer=exit_layer))
    found = runner.run(replace(whole, first_layer=exit_layer))
    if not float((found - expected).norm() / expected.norm().clamp(min=1e-6)) <= tolerance:
        why = f"{family} passes more than hidden states from layer to layer, so its first layers alone cannot draft"
        raise ConfigError("job.speculation", "early_exit", why=why, fix="set job.speculation=none")

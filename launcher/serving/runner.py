"""Forward passes of a stock model over pages."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch

from launcher.serving.kv import Step
from launcher.serving.stage import WHOLE, Stage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from launcher.serving.kv import PagedCache
    from launcher.serving.plan import StepPlan


def cache_name(model: PreTrainedModel) -> str:
    """Return the argument that a model takes its cache as; Transformers has renamed it in between."""
    parameters = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "past_key_values") if name in parameters)


class Runner:
    """Computes what plans say.

    Args:
        model: in inference mode, with the attention of ``launcher.serving.kv``.
        cache: of this rank.
        stage: which one the model is.
    """

    isolates = True
    """After a step that failed another one may be tried."""

    def __init__(self, model: PreTrainedModel, cache: PagedCache, stage: Stage = WHOLE) -> None:
        self.model, self.cache, self.stage = model, cache, stage
        self._cache_name = cache_name(model)

    def run(self, plan: StepPlan, hidden: Tensor | None = None) -> Tensor:
        """Compute one plan.

        Args:
            plan: of the step.
            hidden: what the stage before gives, (1, tokens, width).

        Returns:
            The scores that are asked for, in order; (wanted, vocabulary), fp32. Of a stage that is not the last one,
            hidden states like those that it was given.
        """
        with torch.inference_mode():
            self.cache.copy(plan.copies)
            step = self.cache.step = Step(plan, self.cache, device=self.model.device)
            given = {
                **({"input_ids": step.input_ids} if hidden is None else {"inputs_embeds": hidden}),
                "position_ids": step.position_ids,
                "use_cache": True,
                "launcher_step": step,
                self._cache_name: self.cache,
            }
            if not self.stage.last:
                passed: Tensor = self.model.base_model(**given).last_hidden_state
                return passed
            scores: Tensor = self.model(**given, logits_to_keep=step.wanted).logits[0].float()
            return scores

    def close(self) -> None:
        """Let model, keys and values go."""
        del self.model, self.cache

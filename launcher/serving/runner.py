"""Forward passes of a stock model over pages."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch

from launcher.serving.kv import Step

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
    """

    isolates = True
    """After a step that failed another one may be tried."""

    def __init__(self, model: PreTrainedModel, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self._cache_name = cache_name(model)

    def run(self, plan: StepPlan) -> Tensor:
        """Return the scores that are asked for, in order; (wanted, vocabulary), fp32."""
        with torch.inference_mode():
            self.cache.copy(plan.copies)
            step = self.cache.step = Step(plan, self.cache, device=self.model.device)
            answer = self.model(
                input_ids=step.input_ids,
                position_ids=step.position_ids,
                logits_to_keep=step.wanted,
                use_cache=True,
                launcher_step=step,
                **{self._cache_name: self.cache},
            )
            scores: Tensor = answer.logits[0].float()
            return scores

    def close(self) -> None:
        """Let model, keys and values go."""
        del self.model, self.cache

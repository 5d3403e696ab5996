"""Whether keys and values of a model can be held in pages, exactly: told by trying, before anybody is served."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from launcher.engines.pipelining.cache import StretchCache
from launcher.errors import ConfigError
from launcher.quantization.codecs import rounds_activations
from launcher.serving.kv import ATTENTION, PagedCache, register
from launcher.serving.plan import Segment, StepPlan
from launcher.serving.refusals import unheld
from launcher.serving.runner import Runner, cache_name
from launcher.serving.shapes import Shapes
from launcher.serving.stage import WHOLE, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPANS = ((0, 3), (3, 6), *((at, at + 1) for at in range(6, 12)))
_SMALL = 0.02
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}
"""Half precision rounds at each of many layers (for SmolLM2 that is 0.01 to 0.04, and 0.2 for the odd token); what a
missing part changes is far more."""


_ROUNDED = 0.1
"""Where activations are rounded to 8 bits, the last bit of a float decides now and then which way: 0.03 for SmolLM2."""


class Sample:
    """A few tokens, and what the stock model makes of them: scores or, of a stage of a pipeline, hidden states.

    Args:
        model: as Transformers has it.
        stage: which one it is.

    Raises:
        ConfigError: it keeps something else than keys and values of all tokens.
    """

    def __init__(self, model: PreTrainedModel, stage: Stage = WHOLE) -> None:
        config = model.config.get_text_config()
        self._stage = stage
        self._rounds = any(rounds_activations(layer) for layer in model.modules())
        self._ids = (torch.arange(_SPANS[-1][1], device=model.device) * 7 + 1)[None] % config.vocab_size
        self._hidden = None
        given = {"input_ids": self._ids}
        if not stage.first:  # small beside what blocks add to it
            size = (1, _SPANS[-1][1], config.hidden_size)
            drawn = _SMALL * torch.randn(size, generator=torch.Generator().manual_seed(0))
            self._hidden = drawn.to(model.device, model.dtype)
            given = {"inputs_embeds": self._hidden}
        past = StretchCache(config, first_block=stage.first_block)
        with torch.inference_mode():
            how = {"use_cache": True, cache_name(model): past}
            answer = model(**given, **how).logits if stage.last else model.base_model(**given, **how).last_hidden_state
        self._expected = answer[0, [end - 1 for _, end in _SPANS]].float()
        if any(past.is_sliding) or not all(hasattr(layer, "keys") for layer in past.layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in past.layers}))
            raise refusal(model, f"keeps other things than keys and values of all tokens ({kinds})")
        if not model._supports_attention_backend:  # noqa: SLF001  (Transformers' mark of models that take any attention)
            raise refusal(model, "computes attention in its own code")
        self.shapes = Shapes(
            keys=tuple((layer.keys.shape[1], layer.keys.shape[3]) for layer in past.layers),
            values=tuple((layer.values.shape[1], layer.values.shape[3]) for layer in past.layers),
            item_bytes=model.dtype.itemsize,
            first_layer=stage.first_block,
        )

    def use_pages(self, model: PreTrainedModel) -> None:
        """Give the model the attention of ``launcher.serving.kv``.

        Raises:
            ConfigError: it comes out different.
        """
        register()
        model.set_attn_implementation(ATTENTION)
        for module in model.modules():
            if hasattr(module, "config"):  # blocks of a stage have that of the whole model
                module.config._attn_implementation = ATTENTION  # noqa: SLF001  (as the line above does for its own)
        cache = PagedCache(self.shapes, num_pages=1, dtype=model.dtype, device=model.device)
        try:
            difference = self.difference(Runner(model, cache, self._stage))
        except NotImplementedError as error:
            raise refusal(model, f"asks for {error}") from error
        if not difference <= self.tolerance(model):
            raise refusal(model, f"comes out different by {difference:.2g} of its scores")

    def difference(self, runner: Runner) -> float:
        """Return the share of their norm by which results differ, at the median token; the first page is written to."""
        ids = self._ids[0].tolist()
        made = []
        for start, end in _SPANS:
            plan = StepPlan((Segment(start=start, tokens=tuple(ids[start:end]), pages=(0,), wanted=True),))
            answer = runner.run(plan, None if self._hidden is None else self._hidden[:, start:end])
            made.append(answer if self._stage.last else answer[0, -1:].float())
        found = torch.cat(made)
        shares = (found - self._expected).norm(dim=-1) / self._expected.norm(dim=-1).clamp(min=1e-6)
        return float(shares.median() if found.isfinite().all() else torch.inf)

    def tolerance(self, model: PreTrainedModel) -> float:
        """Return the difference that the model's format explains."""
        return max(_TOLERANCES[model.dtype], _ROUNDED if self._rounds else 0.0)


def refusal(model: PreTrainedModel, why: str) -> ConfigError:
    """Return the refusal of a model."""
    return unheld(model.config.model_type, why)

"""Forward passes of a stock model over the paged KV cache, and the self-test of that cache.

The self-test runs at startup: paged attention must match the stock model.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from launcher.config.inference import unsupported_model
from launcher.engines.pipeline.stage import ChunkCache
from launcher.errors import ConfigError
from launcher.inference.engine.kv_cache import (
    ATTENTION_NAME,
    AttentionMetadata,
    KVShapes,
    PagedCache,
    register_attention,
)
from launcher.inference.engine.layer_skipping import ExitStates
from launcher.inference.engine.step_plan import Segment, StepPlan
from launcher.inference.kernels.low_rank import NO_ADAPTERS, AdapterSet
from launcher.quantization.codecs import rounds_activations

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from launcher.inference.engine.image_encoder import ImageEncoder


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStage:
    """Consecutive blocks, with the parts before the model's first or after its last block."""

    number: int = 0
    count: int = 1
    """Of all stages."""
    first_block: int = 0
    """Number in the model of its first block."""

    @property
    def first(self) -> bool:
        """Whether it takes tokens, not hidden states."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """Whether it returns logits, not hidden states."""
        return self.number == self.count - 1


WHOLE_MODEL = ModelStage()
"""The only one."""


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name of a model's cache argument, which Transformers has renamed."""
    parameters = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "past_key_values") if name in parameters)


class ModelRunner:
    """Computes the forward passes of step plans.

    Args:
        model: in inference mode, with the attention of ``launcher.inference.engine.kv_cache``.
        cache: of this rank.
        stage: which one the model is.
        adapters: those of its layers.
        images: features of requests' images; ``None`` for a model that takes text alone.

    Attributes:
        exits: hidden states between plans of some layers; ``None`` where every plan runs all of them.
    """

    isolates = True
    """After a step that failed, others may be computed."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        stage: ModelStage = WHOLE_MODEL,
        adapters: AdapterSet = NO_ADAPTERS,
        images: ImageEncoder | None = None,
    ) -> None:
        self.model, self.cache, self.stage, self._adapters = model, cache, stage, adapters
        self._images = images
        self._cache_name = cache_argument(model)
        self.exits: ExitStates | None = None

    def run(self, plan: StepPlan, hidden: Tensor | None = None) -> Tensor:
        """Compute one plan.

        Args:
            plan: of the step.
            hidden: output of the stage before, (1, tokens, hidden size).

        Returns:
            The logits of sampled sequences, in order; (sampled sequences, vocabulary), fp32; those of a sequence with
            drafts are one behind the other. A stage that is not the last one returns hidden states.
        """
        try:
            return self._run(plan, hidden)
        finally:
            if self.exits is not None and not plan.exit_layer:
                self.exits.clear()

    def _run(self, plan: StepPlan, hidden: Tensor | None) -> Tensor:
        with torch.inference_mode():
            self.cache.copy(plan.copies)
            self._adapters.begin(plan, device=self.model.device)
            step = self.cache.step = AttentionMetadata(plan, self.cache, device=self.model.device)
            position_ids = step.position_ids
            if self._images is not None and any(part.images for part in plan.segments):
                hidden = self._images.inputs_embeds(plan, step.input_ids)
                position_ids = self._images.position_ids(plan, position_ids)
            given = {
                **({"input_ids": step.input_ids} if hidden is None else {"inputs_embeds": hidden}),
                "position_ids": position_ids,
                "use_cache": True,
                "launcher_step": step,
                self._cache_name: self.cache,
            }
            if not self.stage.last:
                passed: Tensor = self.model.base_model(**given).last_hidden_state
                return passed
            logits: Tensor = self.model(**given, logits_to_keep=step.logits_indices).logits[0].float()
            return logits

    def close(self) -> None:
        """Free the model and the KV cache."""
        del self.model, self.cache


_SPANS = ((0, 3), (3, 6), *((at, at + 1) for at in range(6, 12)))
_HIDDEN_SCALE = 0.02

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}
"""Largest relative error of the self-test; half precision rounds at each of many layers.
For SmolLM2 rounding is 0.01 to 0.04, and 0.2 for the odd token; what a missing part changes is far more."""

_INT8_TOLERANCE = 0.1
"""The same for activations in 8 bits (0.03 for SmolLM2).
The last bit of a float decides now and then which way they are rounded."""


class KVSelfTest:
    """The stock model's output for a few tokens: logits, or hidden states of a stage.

    Args:
        model: as Transformers has it.
        stage: which one it is.

    Raises:
        ConfigError: it keeps something else than keys and values of all tokens.
    """

    def __init__(self, model: PreTrainedModel, stage: ModelStage = WHOLE_MODEL) -> None:
        config = model.config.get_text_config()
        self._stage = stage
        self._rounds = any(rounds_activations(layer) for layer in model.modules())
        self._ids = (torch.arange(_SPANS[-1][1], device=model.device) * 7 + 1)[None] % config.vocab_size
        self._hidden = None
        given = {"input_ids": self._ids}
        if not stage.first:  # small beside what blocks add to it
            size = (1, _SPANS[-1][1], config.hidden_size)
            drawn = _HIDDEN_SCALE * torch.randn(size, generator=torch.Generator().manual_seed(0))
            self._hidden = drawn.to(model.device, model.dtype)
            given = {"inputs_embeds": self._hidden}
        past = ChunkCache(config, first_block=stage.first_block)
        with torch.inference_mode():
            how = {"use_cache": True, cache_argument(model): past}
            answer = model(**given, **how).logits if stage.last else model.base_model(**given, **how).last_hidden_state
        self._expected = answer[0, [end - 1 for _, end in _SPANS]].float()
        if any(past.is_sliding) or not all(hasattr(layer, "keys") for layer in past.layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in past.layers}))
            raise unsupported(model, f"keeps state other than the keys and values of all tokens ({kinds})")
        if not model._supports_attention_backend:  # noqa: SLF001  (Transformers' mark of models that take any attention)
            raise unsupported(model, "computes attention in its own code")
        self.shapes = KVShapes(
            keys=tuple((layer.keys.shape[1], layer.keys.shape[3]) for layer in past.layers),
            values=tuple((layer.values.shape[1], layer.values.shape[3]) for layer in past.layers),
            item_bytes=model.dtype.itemsize,
            first_layer=stage.first_block,
        )

    def install(self, model: PreTrainedModel) -> None:
        """Give the model the attention of ``launcher.inference.engine.kv_cache``.

        Raises:
            ConfigError: it comes out different.
        """
        register_attention()
        model.set_attn_implementation(ATTENTION_NAME)
        for module in model.modules():
            if hasattr(module, "config"):  # blocks of a stage have that of the whole model
                module.config._attn_implementation = ATTENTION_NAME  # noqa: SLF001  (as the line above does for its own)
        cache = PagedCache(self.shapes, num_blocks=1, dtype=model.dtype, device=model.device)
        try:
            difference = self.difference(ModelRunner(model, cache, self._stage))
        except NotImplementedError as error:
            raise unsupported(model, f"asks for {error}") from error
        if not difference <= self.tolerance(model):
            raise unsupported(model, f"comes out different by {difference:.2g} of its logits")

    def difference(self, runner: ModelRunner) -> float:
        """Return the results' relative difference at the median token.

        It overwrites the first block.
        """
        ids = self._ids[0].tolist()
        made = []
        for start, end in _SPANS:
            plan = StepPlan((Segment(start=start, tokens=tuple(ids[start:end]), block_table=(0,), needs_logits=True),))
            answer = runner.run(plan, None if self._hidden is None else self._hidden[:, start:end])
            made.append(answer if self._stage.last else answer[0, -1:].float())
        found = torch.cat(made)
        shares = (found - self._expected).norm(dim=-1) / self._expected.norm(dim=-1).clamp(min=1e-6)
        return float(shares.median() if found.isfinite().all() else torch.inf)

    def tolerance(self, model: PreTrainedModel) -> float:
        """Return the difference that the model's format explains."""
        return max(_TOLERANCES[model.dtype], _INT8_TOLERANCE if self._rounds else 0.0)


def unsupported(model: PreTrainedModel, why: str) -> ConfigError:
    """Return the error for a model."""
    return unsupported_model(model.config.model_type, why)

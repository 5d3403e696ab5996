"""A causal language model of gated convolutions, as a model of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    GradientCheckpointingLayer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from launcher.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher_example.options import GatedConv


class GatedConvConfig(PreTrainedConfig):
    """Sizes of the model."""

    model_type = "gated_conv"

    def __init__(
        self,
        num_hidden_layers: int = 2,
        hidden_size: int = 64,
        kernel_size: int = 4,
        vocab_size: int = 2048,
        max_position_embeddings: int = 256,
        **rest: Any,
    ) -> None:
        self.num_hidden_layers, self.hidden_size, self.kernel_size = num_hidden_layers, hidden_size, kernel_size
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        super().__init__(**{"tie_word_embeddings": True, **rest})


class GatedConvBlock(GradientCheckpointingLayer):
    """A norm, and a causal convolution whose one half gates the other."""

    def __init__(self, config: GatedConvConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.kernel_size = config.kernel_size
        self.convolution = nn.Conv1d(config.hidden_size, 2 * config.hidden_size, config.kernel_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return a tensor of the same shape: (sequences, tokens, width)."""
        padded = nn.functional.pad(self.norm(hidden).transpose(1, 2), (self.kernel_size - 1, 0))
        return hidden + nn.functional.glu(self.convolution(padded), dim=1).transpose(1, 2)


class GatedConvForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole model."""

    config_class = GatedConvConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("GatedConvBlock",)
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "embedding.weight"}

    def __init__(self, config: GatedConvConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GatedConvBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head."""
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        """Return logits (sequences, tokens, vocabulary); no token of a sequence is padding."""
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.lm_head(self.norm(hidden)))

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return the whole sequence: the model keeps no state."""
        return {"input_ids": input_ids}


AutoConfig.register(GatedConvConfig.model_type, GatedConvConfig)
AutoModelForCausalLM.register(GatedConvConfig, GatedConvForCausalLM)


class GatedConvSource:
    """Where the model comes from: its options."""

    def __init__(self, model: GatedConv) -> None:
        self._model = model

    def config(self) -> GatedConvConfig:
        """Return the configuration of Transformers."""
        model = self._model
        return GatedConvConfig(
            num_hidden_layers=model.num_layers,
            hidden_size=model.hidden_size,
            kernel_size=model.kernel_size,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_position_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )

    def folder(self, *, with_weights: bool, heartbeat: Callable[[], None]) -> Path:
        """Fail: this model has no pretrained weights.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("model.weights", "pretrained", why="the model has none", fix="set model.weights=random")

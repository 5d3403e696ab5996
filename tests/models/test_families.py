"""The planner's arithmetic against the parameters that Transformers really makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from launcher.config.model.config_json import sizes_from_config
from launcher.config.model.gpt2 import Gpt2
from launcher.config.model.llama import Llama, SmolLm2
from launcher.errors import ConfigErrors
from launcher.models.pretrained import transformers_config

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "gpt2": transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=99),
    "llama": transformers.LlamaConfig(**SMALL),
    "llama tied": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama biased": transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama wide heads": transformers.LlamaConfig(**SMALL, head_dim=16),
    "mistral": transformers.MistralConfig(**SMALL),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen2 tied": transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SMALL),
    "qwen3 biased": transformers.Qwen3Config(**SMALL, attention_bias=True),
}


def counted(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the number of parameters and the size of the largest, without memory for any."""
    with torch.device("meta"):
        parameters = list(AutoModelForCausalLM.from_config(config).parameters())
    return sum(p.numel() for p in parameters), max(p.numel() for p in parameters)


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_read_from_a_saved_config_are_exact(name: str, tmp_path: Path) -> None:
    CONFIGS[name].save_pretrained(tmp_path)
    sizes = sizes_from_config(json.loads((tmp_path / "config.json").read_text()))
    assert sizes is not None
    assert (sizes.shape().num_params, sizes.shape().largest_param) == counted(CONFIGS[name])


@pytest.mark.parametrize("tied", [False, True])
def test_counts_of_a_llama_of_any_size_are_exact(tied: bool) -> None:
    sizes = {
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "hidden_size": 48,
        "intermediate_size": 80,
        "max_position_embeddings": 32,
        "vocab_size": 101,
    }
    model = Llama(name="small", tie_word_embeddings=tied, **sizes)
    assert (model.shape().num_params, model.shape().largest_param) == counted(transformers_config(model))


@pytest.mark.parametrize(
    "wrong", [{"num_key_value_heads": 4}, {"hidden_size": 50}, {"num_hidden_layers": 0}, {"weights": "pretrained"}]
)
def test_sizes_that_make_no_llama_are_refused(wrong: dict[str, Any]) -> None:
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "hidden_size": 48,
        "intermediate_size": 80,
    }
    with pytest.raises(ConfigErrors, match=rf"model\.{next(iter(wrong))}"):
        Llama(name="small", **{**sizes, **wrong})


@pytest.mark.parametrize(
    ("layers", "heads", "hidden_size", "num_params"),
    [(12, 12, 768, 124_439_808), (36, 20, 1280, 774_030_080), (48, 25, 1600, 1_557_611_200)],
)
def test_gpt2_has_the_published_sizes(layers: int, heads: int, hidden_size: int, num_params: int) -> None:
    model = Gpt2(name="gpt2", num_hidden_layers=layers, num_attention_heads=heads, hidden_size=hidden_size)
    assert model.shape().num_params == num_params
    assert (model.shape().num_params, model.shape().largest_param) == counted(transformers_config(model))


def test_smollm2_has_the_published_size() -> None:
    assert SmolLm2().shape().num_params == 134_515_008
    assert (134_515_008, SmolLm2().shape().largest_param) == counted(transformers_config(SmolLm2()))


def test_other_families_and_incomplete_files_are_unknown() -> None:
    assert sizes_from_config({"model_type": "rwkv"}) is None
    assert sizes_from_config({"model_type": "llama", "hidden_size": 8}) is None
    assert sizes_from_config({**CONFIGS["gpt2"].to_dict(), "n_inner": 17}) is None

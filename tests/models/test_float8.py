"""fp8: which layers multiply in 8 bits, how close they come, and what is refused. torchao also runs it on a CPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from launcher.config.activation import NoCheckpointing
from launcher.config.attention import SdpaAttention
from launcher.config.model.gpt2 import Gpt2
from launcher.config.precision import Bf16Precision, Fp8Precision
from launcher.errors import ConfigError
from launcher.models.build import build_model
from launcher.models.transforms import apply_float8

has_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
IDS = torch.arange(64).view(2, 32)


def llama(width: int = 32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=99,
        max_position_embeddings=64,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def loss_and_gradient(module: Any) -> tuple[float, torch.Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


@has_torchao
@pytest.mark.filterwarnings("ignore")
def test_the_linear_layers_of_blocks_multiply_in_8_bits() -> None:
    module, plain = llama(), llama()
    names = list(module.state_dict())
    apply_float8(module, Fp8Precision())
    converted = {name for name, layer in module.named_modules() if type(layer).__name__ == "Float8Linear"}
    assert len(converted) == 2 * 7
    assert "lm_head" not in converted
    assert list(module.state_dict()) == names
    (ours, gradient), (expected, reference) = loss_and_gradient(module), loss_and_gradient(plain)
    assert ours == pytest.approx(expected, rel=1e-2)
    assert 1e-3 < (gradient - reference).norm() / reference.norm() < 0.2  # near, and not simply bf16


@has_torchao
def test_models_that_torchao_cannot_convert_are_refused() -> None:
    sizes: dict[str, Any] = {
        "name": "s",
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "max_position_embeddings": 32,
        "vocab_size": 99,
    }
    gpt2 = build_model(Gpt2(**sizes), seed=1, attention=SdpaAttention(), activation=NoCheckpointing())
    with pytest.raises(ConfigError, match=r"precision=fp8: the blocks of GPT2LMHeadModel hold no torch\.nn\.Linear"):
        apply_float8(gpt2, Fp8Precision())
    with pytest.raises(ConfigError, match="a layer of 24 × 24 needs multiples of 16"):
        apply_float8(llama(24), Fp8Precision())


def test_without_torchao_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.config.precision.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"precision=fp8: the package torchao .*; pip install 'launcher\[fp8\]'"):
        apply_float8(llama(), Fp8Precision())


def test_other_precisions_convert_nothing() -> None:
    module = llama()
    apply_float8(module, Bf16Precision())
    assert {type(layer) for layer in module.modules() if isinstance(layer, nn.Linear)} == {nn.Linear}

"""Models come out whole, equal on every rank, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from launcher.config.activation import FullCheckpointing, NoCheckpointing
from launcher.config.attention import EagerAttention, SdpaAttention
from launcher.config.model.gpt2 import Gpt2
from launcher.config.model.hf import Hf
from launcher.errors import ConfigError
from launcher.models.build import build_model
from launcher.models.pretrained import transformers_config

SIZES: dict[str, Any] = {
    "name": "small",
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "max_position_embeddings": 32,
    "vocab_size": 99,
}
PLAIN: dict[str, Any] = {"attention": SdpaAttention(), "activation": NoCheckpointing()}
Spoil = Callable[[Callable[[dict[str, torch.Tensor]], object]], Path]


def equal(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether all parameters are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_seed_decides_random_weights() -> None:
    first = build_model(Gpt2(**SIZES), seed=1, **PLAIN)
    torch.rand(3)
    assert equal(first, build_model(Gpt2(**SIZES), seed=1, **PLAIN))
    assert not equal(first, build_model(Gpt2(**SIZES), seed=2, **PLAIN))
    assert first.training


def test_weights_come_back_as_they_were_saved(saved: Path) -> None:
    original = build_model(Gpt2(**SIZES), seed=1, **PLAIN)
    for model in (Gpt2(**SIZES, weights=str(saved)), Hf(name=str(saved))):
        assert not list(model.validate_machine())
        loaded = build_model(model, seed=2, **PLAIN)
        assert equal(original, loaded)
        assert loaded.training
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_checkpoint_without_the_family_prefix_loads(spoilt: Spoil) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        """Name tensors as the published GPT-2 files do, which also hold the causal mask as a buffer."""
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)

    loaded = build_model(Gpt2(**SIZES, weights=str(spoilt(strip))), seed=2, **PLAIN)
    assert equal(loaded, build_model(Gpt2(**SIZES), seed=1, **PLAIN))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.weight"), "lacks transformer.h.1.mlp.c_fc.weight"),
        (lambda t: t.update(stowaway=torch.zeros(2)), "also has stowaway"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(3)}), r"transformer.ln_f.bias is \(3,\) .* \(16,\)"),
    ],
)
def test_weights_that_do_not_fit_are_fatal(change: Callable[..., object], message: str, spoilt: Spoil) -> None:
    model = Gpt2(**SIZES, weights=str(spoilt(change)))
    with pytest.raises(ConfigError, match=message):
        build_model(model, seed=1, **PLAIN)


def test_attention_and_recomputation_are_as_configured() -> None:
    plain = build_model(Gpt2(**SIZES), seed=1, attention=EagerAttention(), activation=NoCheckpointing())
    recomputed = build_model(Gpt2(**SIZES), seed=1, attention=EagerAttention(), activation=FullCheckpointing())
    assert recomputed.config._attn_implementation == "eager"
    flags = [[block.gradient_checkpointing for block in model.transformer.h] for model in (plain, recomputed)]
    assert flags == [[False, False], [True, True]]
    tokens = torch.arange(12).view(1, 12)
    for model in (plain, recomputed):
        model(input_ids=tokens).logits.square().mean().backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_tiny_vocabulary_has_no_end_token_outside_it() -> None:
    model = build_model(Gpt2(**SIZES), seed=1, **PLAIN).eval()
    answer = model.generate(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2), max_new_tokens=4, do_sample=False)
    assert answer.shape == (1, 6)
    assert answer.max() < 99
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (None, None)
    whole = Gpt2(**{**SIZES, "vocab_size": 50257})
    assert transformers_config(whole).eos_token_id == 50256

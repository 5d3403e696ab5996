"""Weights depend on the seed and the part alone, whatever else is built."""

import pytest
import torch
from torch import nn

from launcher.config.attention import SdpaAttention
from launcher.config.model.gpt2 import Gpt2
from launcher.models.build import build_deferred
from launcher.models.layers import blocks, units

MODEL = Gpt2(
    name="small", num_hidden_layers=3, num_attention_heads=2, hidden_size=32, max_position_embeddings=16, vocab_size=64
)


def built(seed=0, weights="random", without=()):
    model = Gpt2(
        name="small",
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_size=32,
        max_position_embeddings=16,
        vocab_size=64,
        weights=weights,
    )
    laid_out, builder = build_deferred(model, seed=seed, attention=SdpaAttention())
    for name in without:
        parent, _, key = name.rpartition(".")
        laid_out.get_submodule(parent)._modules[key] = nn.Identity()
    builder.build_all()
    return laid_out


def equal(one, other):
    there = dict(other.named_parameters())
    return all(torch.equal(value, there[name]) for name, value in one.named_parameters() if name in there)


def test_parts_are_embeddings_blocks_norm_and_head():
    laid_out, _ = build_deferred(MODEL, seed=0, attention=SdpaAttention())
    names = [name for name, _ in units(laid_out)]
    inside = ["wte", "wpe", "drop", "h.0", "h.1", "h.2", "ln_f"]
    assert names == [*(f"transformer.{name}" for name in inside), "lm_head"]
    assert len(blocks(laid_out)) == 3
    assert all(parameter.is_meta for parameter in laid_out.parameters())


def test_the_same_seed_gives_the_same_weights_and_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = built()
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(one, built())
    assert not equal(one, built(seed=1))
    assert one.transformer.h[0].attn.c_attn.weight.detach().std().item() == pytest.approx(0.02, rel=0.05)
    assert one.transformer.h[0].mlp.c_proj.weight.detach().std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert not torch.equal(one.transformer.h[0].mlp.c_fc.weight, one.transformer.h[1].mlp.c_fc.weight)


def test_a_rank_that_builds_some_parts_gets_the_weights_of_one_that_builds_all():
    last = built(without=["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1"])
    whole = built()
    assert "transformer.wte.weight" not in dict(last.named_parameters())
    assert torch.equal(last.lm_head.weight, whole.transformer.wte.weight), "drawn as the embedding it is tied to"
    assert equal(last, whole)


def test_tied_weights_stay_one_parameter():
    whole = built()
    assert whole.lm_head.weight is whole.transformer.wte.weight


def test_weights_come_from_files_part_by_part(tmp_path):
    whole = built(seed=3)
    whole.save_pretrained(tmp_path)
    assert equal(built(weights=str(tmp_path)), whole)
    last = built(weights=str(tmp_path), without=["transformer.wte", "transformer.wpe", "transformer.h.0"])
    assert torch.equal(last.lm_head.weight, whole.lm_head.weight)
    assert equal(last, whole)

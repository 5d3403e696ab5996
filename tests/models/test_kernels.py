"""Attention kernels: flash is flash, in both directions, or the run ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from launcher.config.activation import NoCheckpointing
from launcher.config.attention import Attention, EagerAttention, FlashAttention, FlexAttention, SdpaAttention
from launcher.config.model.gpt2 import Gpt2
from launcher.engines.ulysses import check_cut
from launcher.errors import ConfigError
from launcher.models.attention import attention_implementation, flash_forward
from launcher.models.build import build_model

SIZES: dict[str, Any] = {
    "name": "small",
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "max_position_embeddings": 32,
    "vocab_size": 99,
}
IDS = torch.arange(24).view(2, 12)


def gpt2(attention: Attention, **changes: Any) -> Any:
    return build_model(Gpt2(**SIZES, **changes), seed=1, attention=attention, activation=NoCheckpointing())


def llama(attention: Attention) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        max_position_embeddings=32,
    )
    name = attention_implementation(transformers.LlamaForCausalLM, attention)
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("attention", [FlashAttention(), EagerAttention()], ids=lambda attention: attention.kind)
def test_every_kernel_computes_the_same(make: Any, attention: Attention) -> None:
    found = []
    for one in (attention, SdpaAttention()):
        module = make(one)
        module(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        found.append([parameter.grad for parameter in module.parameters()])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_flash_runs_the_flash_kernel_forward_and_backward_whatever_is_allowed_around_it(make: Any) -> None:
    module = make(FlashAttention())
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        sdpa_kernel(SDPBackend.MATH),
    ):
        module(input_ids=IDS, use_cache=False).logits.sum().backward()
    ran = {event.key: event.count for event in profile.key_averages() if "flash" in event.key}
    assert ran["aten::_scaled_dot_product_flash_attention_for_cpu"] == 2
    assert ran["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] == 2


def test_flash_generates() -> None:
    prompt = {"attention_mask": torch.ones(1, 3), "max_new_tokens": 6, "do_sample": False}
    answers = [
        gpt2(attention).eval().generate(IDS[:1, :3], **prompt) for attention in (FlashAttention(), SdpaAttention())
    ]
    assert torch.equal(*answers)


@pytest.mark.filterwarnings("ignore")  # torch says there, kernel by kernel, why not
def test_flash_never_falls_back() -> None:
    module = gpt2(FlashAttention(), dropout=0.1)
    with pytest.raises(ConfigError, match=r"attention=flash: .*no mask and dropout 0\.1 on cpu; set attention=sdpa"):
        module(input_ids=IDS, use_cache=False)


def test_other_errors_pass_through() -> None:
    wrong = [torch.zeros(1, 2, 3, 8), *[torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)] * 2]
    with pytest.raises(RuntimeError, match="same dtype"):
        flash_forward(torch.nn.Identity(), *wrong, None)


def test_a_family_without_the_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"attention=flex: GPT2LMHeadModel has no such attention .*attention=flash"):
        gpt2(FlexAttention())
    assert attention_implementation(transformers.LlamaForCausalLM, FlexAttention()) == "flex_attention"


def test_ranks_share_the_sequences_of_attention_over_all_tokens_alone() -> None:
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    with torch.device("meta"):
        windowed = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=16))
        own_code = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes))
    check_cut(windowed, degree=2, length=16)
    with pytest.raises(
        ConfigError, match=r"parallel\.sequence_parallel=2: mistral has layers that see 16 tokens .* have 32; set"
    ):
        check_cut(windowed, degree=2, length=32)
    with pytest.raises(ConfigError, match=r"parallel\.sequence_parallel=2: falcon computes attention in its own code"):
        check_cut(own_code, degree=2, length=16)

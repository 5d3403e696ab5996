"""The parts of the pipeline engine that need no second rank."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch

from launcher.config.attention import SdpaAttention
from launcher.config.model.gpt2 import Gpt2
from launcher.errors import ConfigError

GPT2 = Gpt2(
    name="tiny", num_hidden_layers=4, num_attention_heads=2, hidden_size=16, max_position_embeddings=16, vocab_size=32
)


def worst(costs, cuts, first, last) -> float:
    sums = [sum(costs[begin:end]) for begin, end in itertools.pairwise(cuts)]
    sums[0] += first
    sums[-1] += last
    return max(sums)


def test_chunks_are_the_best_there_are() -> None:
    from launcher.config.parallel.pipeline import partition_layers

    draw = random.Random(0)
    for _ in range(200):
        costs = [draw.choice([0.5, 1, 1, 2, 7]) for _ in range(draw.randint(2, 8))]
        number, first, last = draw.randint(1, len(costs)), draw.choice([0, 1, 5]), draw.choice([0, 2, 9])
        found = partition_layers(costs, number, first=first, last=last)
        cuts = [0, *(blocks.stop for blocks in found)]
        assert [blocks.start for blocks in found] == cuts[:-1]
        assert all(found)
        every = itertools.combinations(range(1, len(costs)), number - 1)
        best = min(worst(costs, (0, *middle, len(costs)), first, last) for middle in every)
        assert worst(costs, cuts, first, last) == pytest.approx(best)


@pytest.mark.parametrize(("blocks", "number", "sizes"), [(8, 3, {2, 3}), (36, 4, {9}), (7, 2, {3, 4})])
def test_equal_blocks_are_shared_out_evenly(blocks: int, number: int, sizes: set[int]) -> None:
    from launcher.config.parallel.pipeline import partition_layers

    assert set(map(len, partition_layers([1.0] * blocks, number))) == sizes


def chunk(model, keep: range, *, first: bool, last: bool):
    from launcher.engines.pipeline.partition import keep_chunk, set_chunk_config
    from launcher.models.build import build_deferred

    built, builder = build_deferred(model, seed=0, attention=SdpaAttention())
    keep_chunk(built, keep, first=first, last=last)
    builder.build_all()
    set_chunk_config(built, keep)
    return built.eval()


def test_chunks_one_after_the_other_are_the_model_to_the_bit() -> None:
    from launcher.engines.pipeline.partition import check_passthrough
    from launcher.models.build import build_deferred

    whole, builder = build_deferred(GPT2, seed=0, attention=SdpaAttention())
    builder.build_all()
    ids = torch.arange(10)[None]
    begins, goes_on, ends = (
        chunk(GPT2, keep, first=keep.start == 0, last=keep.stop == 4) for keep in (range(1), range(1, 3), range(3, 4))
    )
    assert {name.split(".")[2] for name, _ in goes_on.named_parameters()} == {"1", "2"}
    check_passthrough(goes_on)
    with torch.no_grad():
        hidden = begins.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden = goes_on.base_model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        assert torch.equal(
            ends(inputs_embeds=hidden, use_cache=False).logits, whole.eval()(input_ids=ids, use_cache=False).logits
        )


@pytest.mark.parametrize("family", ["gpt_neox", "gptj", "phi"])
def test_chunks_of_families_with_a_dropout_before_their_blocks(family: str) -> None:
    from launcher.config.model.transformers_support import parallel_plans
    from launcher.engines.pipeline.partition import check_passthrough, keep_chunk, set_chunk_config
    from tests.models.test_from_pretrained import TOKENS, config_of, random_model

    whole = random_model(config_of(family, tie_word_embeddings=False))
    chunks = []
    for number in range(2):
        part = copy.deepcopy(whole)
        keep_chunk(part, range(number, number + 1), first=number == 0, last=number == 1)
        set_chunk_config(part, range(number, number + 1))
        chunks.append(part.eval())
    check_passthrough(chunks[1])
    with torch.no_grad():
        hidden = chunks[0].base_model(input_ids=TOKENS, use_cache=False).last_hidden_state
        found = chunks[1](inputs_embeds=hidden, use_cache=False).logits
        assert torch.equal(found, whole(input_ids=TOKENS, use_cache=False).logits)
    plans = parallel_plans(family)
    assert plans is not None
    assert plans.has_stages


def test_a_family_that_scales_what_enters_its_first_block_is_refused() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    from launcher.engines.pipeline.partition import check_passthrough, keep_chunk, set_chunk_config

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    for multiplier in (1.0, 12.0):
        model = GraniteForCausalLM(GraniteConfig(**sizes, vocab_size=32, embedding_multiplier=multiplier))
        keep_chunk(model, range(1, 2), first=False, last=True)
        set_chunk_config(model, range(1, 2))
        if multiplier == 1.0:
            check_passthrough(model)
            continue
        with pytest.raises(ConfigError, match="granite changes what enters its first block"):
            check_passthrough(model)


def test_a_family_without_a_plan_is_refused_by_name() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from launcher.engines.pipeline.partition import child_names_of

    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 32}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16))
    with pytest.raises(ConfigError, match="pipeline plan for opt is missing"):
        child_names_of(model)


def test_a_family_that_keeps_states_is_refused() -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    from launcher.engines.pipeline.partition import keep_chunk

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32, "num_experts": 2}
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(
            Qwen3NextConfig(**sizes, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
        )
    with pytest.raises(
        ConfigError, match=r"parallel=pipeline: qwen3_next has layers \(linear_attention\) that carry .*; set"
    ):
        keep_chunk(model, range(1), first=True, last=False)


def test_more_chunks_than_layers_are_refused() -> None:
    from launcher.engines.pipeline.partition import partition_by_parameters
    from launcher.models.build import build_deferred

    whole, _ = build_deferred(GPT2, seed=0, attention=SdpaAttention())
    assert len(partition_by_parameters(whole, 4, stages=4)) == 4
    with pytest.raises(ConfigError, match=r"5 chunks, and the model has 4 layers; set parallel\.stages=4"):
        partition_by_parameters(whole, 5, stages=5)


def test_blocks_that_share_a_parameter_are_refused_and_a_tied_head_is_not() -> None:
    from launcher.engines.pipeline.partition import tied_names
    from launcher.models.build import build_deferred

    whole, _ = build_deferred(GPT2, seed=0, attention=SdpaAttention())
    assert tied_names(whole) == {"lm_head.weight": "transformer.wte.weight"}
    whole.transformer.h[2].ln_1 = whole.transformer.h[0].ln_1
    with pytest.raises(
        ConfigError, match=r"transformer\.h\.2\.ln_1\.weight and transformer\.h\.0\.ln_1\.weight are one"
    ):
        tied_names(whole)


def test_kinds_of_layers_are_those_of_the_chunk() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from launcher.engines.pipeline.partition import set_chunk_config

    kinds = ["full_attention", "sliding_attention", "full_attention"]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, vocab_size=32, layer_types=kinds))
    set_chunk_config(model, range(1, 3))
    assert model.config.num_hidden_layers == 2
    assert model.model.config.layer_types == kinds[1:]

"""Weights are what ``from_pretrained`` makes of a folder, to the bit, or the folder is refused.

Over thirty families, each tiny and random, in every shape that folders of weights come in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from launcher.config.activation import NoCheckpointing
from launcher.config.attention import EagerAttention, SdpaAttention
from launcher.config.model.hf import Hf
from launcher.errors import ConfigError
from launcher.models.build import build_model

LLAMA: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 67,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
GPT: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 67}
GPT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {**LLAMA, "head_dim": 16}
EXPERTS = {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT: dict[str, Any] = {
    **LLAMA,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
ROUTING = (
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": HEADS,
    "mixtral": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": LLAMA,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": HEADS,
    "qwen3_moe": EXPERTS,
    "gemma": HEADS,
    "gemma2": {**HEADS, "sliding_window": 16},
    "gemma3_text": {**HEADS, "sliding_window": 16},
    "phi": LLAMA,
    "phi3": LLAMA,
    "phimoe": {**LLAMA, "num_local_experts": 4},
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 8},
    "gpt_bigcode": GPT,
    "gpt_neox": PLAIN,
    "gpt_oss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "codegen": {**GPT, "rotary_dim": 8},
    "opt": {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "hidden_size": 32, "n_head": 2, "vocab_size": 67},
    "mpt": {"n_layers": 2, "d_model": 32, "n_heads": 2, "max_seq_len": 64, "vocab_size": 67},
    "stablelm": LLAMA,
    "starcoder2": LLAMA,
    "olmo2": LLAMA,
    "olmoe": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe": {**HEADS, **{name: LATENT[name] for name in ROUTING}},
    "diffllama": LLAMA,
    "gemma3n_text": {
        **HEADS,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 67,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "sliding_window": 16,
    },
    "xlnet": {"n_layer": 2, "d_model": 32, "n_head": 2, "d_inner": 48, "vocab_size": 67},
    "mamba2": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 1,
        "vocab_size": 67,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
TOKENS = torch.arange(12).view(1, 12) + 3
Stored = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


def config_of(family: str, **changes: object) -> PreTrainedConfig:
    return CONFIG_MAPPING[family](**FAMILIES[family], **changes)


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for tensor in model.state_dict().values():  # biases, norms and persistent buffers too, which begin alike
        torch.nn.init.normal_(tensor, std=0.05)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A model whose head is its own, and the folder that it was saved into."""
    model = random_model(config_of(request.param, tie_word_embeddings=False))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def built(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    reference = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(transformers.AutoConfig.from_pretrained(folder))]
    attention = SdpaAttention() if reference._supports_sdpa else EagerAttention()
    return build_model(
        Hf(name=str(folder)), seed=3, attention=attention, activation=NoCheckpointing(), dtype=dtype
    ).eval()


def compare(folder: Path, dtype: torch.dtype = torch.float32, *, logits: bool = False) -> PreTrainedModel:
    """Fail unless our loader makes of a folder what ``from_pretrained`` makes of it: tensors, formats, ties, logits."""
    expected, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"], "the test's own folder is incomplete"
    ours = built(folder, dtype)
    for kind in ("named_parameters", "named_buffers"):
        wanted, found = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (expected, ours))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
    assert is_tied(ours) == is_tied(expected)
    if logits:
        with torch.no_grad():
            wanted, found = (model.eval()(input_ids=TOKENS, use_cache=False).logits for model in (expected, ours))
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    return ours


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def rewritten(folder: Path, to: Path, change: Callable[[Stored], Stored], **config: object) -> Path:
    """Write a folder again, with its tensors and its configuration changed."""
    to.mkdir(exist_ok=True)
    tree = json.loads((folder / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(tree))
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, to / "model.safetensors", {"format": "pt"}
    )
    return to


def test_a_folder_in_one_file_and_in_many(made: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, folder = made
    for dtype in (torch.float32, torch.bfloat16):
        runs = dtype == torch.float32 or model.config.model_type != "xlnet"  # its own positions stay in fp32
        compare(folder, dtype, logits=runs)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    compare(tmp_path)


def test_files_without_the_prefix_in_half_precision_and_with_leftovers(
    made: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    model, folder = made
    prefix = f"{model.base_model_prefix}."

    def strip(tensors: Stored) -> Stored:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    compare(rewritten(folder, tmp_path, strip))
    for dtype in (torch.float16, torch.bfloat16):
        compare(rewritten(folder, tmp_path, lambda t, dtype=dtype: {name: x.to(dtype) for name, x in t.items()}))
    if any(name.endswith("rotary_emb.inv_freq") for name, _ in model.named_buffers()):
        old = {f"{prefix}layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
        compare(rewritten(folder, tmp_path, lambda tensors: tensors | old))
    with pytest.raises(ConfigError, match="also has stowaway"):
        built(rewritten(folder, tmp_path, lambda tensors: tensors | {"stowaway": torch.ones(2)}), torch.float32)


def test_heads_that_a_configuration_ties(made: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, folder = made
    stored = load_file(folder / "model.safetensors")
    (head,), (embedding,) = (
        [name for name, tensor in stored.items() if torch.equal(tensor, layer.weight)]
        for layer in (model.get_output_embeddings(), model.get_input_embeddings())
    )

    def both_differ(tensors: Stored) -> Stored:
        return tensors

    def both_equal(tensors: Stored) -> Stored:
        return tensors | {head: tensors[embedding].clone()}

    def without(name: str) -> Callable[[Stored], Stored]:
        return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}

    for change in (both_differ, both_equal, without(head), without(embedding)):
        loaded = compare(rewritten(folder, tmp_path, change, tie_word_embeddings=True))
        assert is_tied(loaded) == loaded.config.tie_word_embeddings == (change is not both_differ)
    with pytest.raises(ConfigError, match="lacks"):
        built(rewritten(folder, tmp_path, without(head), tie_word_embeddings=False), torch.float32)


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "qwen3_moe"])
def test_rearranged_weights_load_part_by_part_and_never_whole(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ZeRO-3 needs it, which takes the values of each part away before the next one is filled."""
    model = random_model(config_of(family, tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    taken: Stored = {}

    def take(name: str, part: torch.nn.Module) -> None:
        for key, parameter in part.named_parameters():
            taken[f"{name}.{key}"] = parameter.data
            parameter.data = torch.empty(0)

    def whole(*_: object, **__: object) -> None:
        raise AssertionError("the whole model is loaded at once")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", whole)
    build_model(Hf(name=str(tmp_path)), seed=3, attention=SdpaAttention(), activation=NoCheckpointing(), after=take)
    wanted = dict(model.named_parameters())
    assert taken.keys() == wanted.keys()
    assert all(torch.equal(taken[name], parameter) for name, parameter in wanted.items())

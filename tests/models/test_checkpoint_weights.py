"""Weights out of a checkpoint: by the model's own names, whatever ranks and cuts they were written in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, GPT2Config, LlamaConfig, PreTrainedModel

from launcher.config.activation import NoCheckpointing
from launcher.config.attention import SdpaAttention
from launcher.config.compose import compose
from launcher.config.model.folder import has_separate_head, tensor_shapes, weight_bytes
from launcher.config.model.hf import Hf
from launcher.engines.context import Context
from launcher.engines.torch import TorchEngine
from launcher.errors import ConfigError
from launcher.models.build import build_model
from launcher.models.export import ModelExport
from launcher.models.weights import differences, save_model_config
from launcher.protocol.rundir import RunDir
from launcher.protocol.state_files import MODEL_FOLDER
from tests.models.checkpoints import checkpoint

SIZES = {"bos_token_id": None, "eos_token_id": None, "vocab_size": 96}
CONFIGS = {
    "gpt2": GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, **SIZES),
    "llama": LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=False,
        **SIZES,
    ),
}


def model_of(config: GPT2Config | LlamaConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def build(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return build_model(
        Hf(name=str(folder)), seed=1, attention=SdpaAttention(), activation=NoCheckpointing(), dtype=dtype
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_is_built_from_a_checkpoint(tmp_path: Path, family: str) -> None:
    saved = model_of(CONFIGS[family])
    folder = checkpoint(tmp_path, saved)
    loaded = build(folder, dtype=torch.bfloat16)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(loaded.state_dict()[name].dtype)), name
    config = AutoConfig.from_pretrained(folder)
    assert (config.dtype, config.architectures) == (torch.float32, [type(saved).__name__])


@pytest.mark.parametrize("family", CONFIGS)
def test_the_plan_knows_its_tensors_without_torch(tmp_path: Path, family: str) -> None:
    saved = model_of(CONFIGS[family])
    folder = checkpoint(tmp_path, saved)
    assert tensor_shapes(folder) == {name: tuple(value.shape) for name, value in saved.named_parameters()}
    assert weight_bytes(folder) == 4 * saved.num_parameters()
    assert has_separate_head(folder) is (family == "llama")
    shape = Hf(name=str(folder)).shape()
    assert shape is not None
    assert shape.num_params == saved.num_parameters()
    assert not list(Hf(name=str(folder)).validate_machine())


def test_tensors_of_another_family_are_counted_and_only_a_few_named() -> None:
    names = {f"layers.{number}.weight" for number in range(40)}
    stored: Any = SimpleNamespace(missing=names, unexpected=names, unconverted={}, mismatched=dict)
    few = "layers.0.weight, layers.1.weight, layers.10.weight and 37 more"
    assert differences(stored) == f"it lacks {few}, and it also has {few}"


def test_a_head_of_its_own_stays_apart_from_the_embedding_that_the_config_ties_it_to(tmp_path: Path) -> None:
    saved = model_of(CONFIGS["gpt2"])
    saved.lm_head.weight = torch.nn.Parameter(saved.lm_head.weight + 1)
    loaded = build(checkpoint(tmp_path, saved))
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)
    assert torch.equal(loaded.transformer.wte.weight, saved.transformer.wte.weight)
    assert loaded.config.tie_word_embeddings is False


def test_another_model_is_refused_by_the_names_of_its_tensors(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, model_of(CONFIGS["gpt2"]))
    save_model_config(GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=33, **SIZES), folder)
    with pytest.raises(ConfigError) as refused:
        build(folder)
    assert "it lacks transformer.h.2.attn.c_attn.bias" in str(refused.value)
    assert "transformer.wpe.weight is (32, 16) instead of (33, 16)" in str(refused.value)


def test_persistent_buffers_are_saved_loaded_and_exported(tmp_path: Path) -> None:
    """DeepSeek's routers have a bias that is no parameter."""
    config = DeepseekV3Config(
        **SIZES, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2, n_routed_experts=4, n_group=2,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        topk_group=1,
        max_position_embeddings=32,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "config")
    words = ("model=hf", f"model.name={tmp_path / 'config'}", "model.weights=random", "parallel=single")
    run = compose((*words, "data=synthetic", "job.sequence_length=16", "job.sample_tokens=0", "backend.ranks=1")).run
    heartbeat: Any = SimpleNamespace(update=lambda *words, **numbers: None)
    context = Context(
        run=run, run_dir=RunDir(tmp_path), rank=0, local_rank=0, world_size=1, heartbeat=heartbeat, run_id="x"
    )
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    clock: Any = None
    with TorchEngine(context, clock) as engine:
        engine.module.get_buffer(name).fill_(3.0)
        (tmp_path / "step").mkdir()
        engine.save(tmp_path / "step")
        save_model_config(engine.model_config, tmp_path / "step" / MODEL_FOLDER)
    with TorchEngine(context, clock) as engine:
        engine.load(tmp_path / "step")
        assert engine.module.get_buffer(name).tolist() == [3.0] * 4
    assert build(tmp_path / "step" / MODEL_FOLDER).get_buffer(name).tolist() == [3.0] * 4
    ModelExport(tmp_path / "step" / MODEL_FOLDER, dtype=torch.float32, max_shard_bytes=10**9).write(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_buffer(name).tolist() == [3.0] * 4

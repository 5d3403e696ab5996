"""What is exported is what Transformers itself would have saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from launcher.checkpoint.manifest import CheckpointManifest, write_manifest
from launcher.config.compose import compose
from launcher.config.export import ExportOptions
from launcher.config.model.hf import Hf
from launcher.errors import JobError
from launcher.inference.server.result_cache import model_fingerprint
from launcher.models.export import ModelExport
from launcher.models.pretrained import transformers_folder
from launcher.models.weights import save_model_config
from tests.models.checkpoints import checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
CONFIGS = {
    "gpt2": transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=96),
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, head_dim=8),
    "deepseek_v3": transformers.DeepseekV3Config(
        **SIZES, **EXPERTS, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    ),
}  # fmt: skip


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[family])
    for name, buffer in model.named_buffers():
        if "bias" in name:
            buffer.normal_()
    return model


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def export(source: Path, target: Path, *, dtype: torch.dtype = torch.float32, size: str = "5GB") -> ModelExport:
    found = ModelExport(source, dtype=dtype, max_shard_bytes=ExportOptions(max_shard_size=size).max_shard_bytes)
    found.write(target)
    return found


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_those_that_transformers_saves(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = model_of(family)
    exported = export(checkpoint(tmp_path / "step", model), tmp_path / "out", dtype=dtype)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    loaded.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "stock")
    found, stock, again = (tensors_in(tmp_path / name) for name in ("out", "stock", "again"))
    assert found.keys() == stock.keys() == again.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, stock[name].to(tensor.dtype)), name
        assert tensor.dtype == again[name].dtype, name
    assert exported.num_bytes == sum(tensor.nbytes for tensor in found.values())
    assert loaded.dtype == dtype
    saved, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "out"))
    assert saved == ours


def test_large_models_are_split_and_indexed(tmp_path: Path) -> None:
    model = model_of("llama")
    found = export(checkpoint(tmp_path / "step", model), tmp_path / "out", size="8KB")
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) == found.num_files > 2
    assert max(file.stat().st_size for file in files) < 8_000 + 2_000  # a header each
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": found.num_bytes, "total_parameters": model.num_parameters()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_head_that_came_apart_from_its_embedding_stays_apart(tmp_path: Path) -> None:
    model = model_of("gpt2")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    export(checkpoint(tmp_path / "step", model), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)


def test_generation_config_tokenizer_and_template_come_along(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "step", model_of("gpt2"))
    files = {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}", "generation_config.json": "{}"}
    for name, text in files.items():
        (source / name).write_text(text)
    export(source, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "step", model_of("gpt2"))
    failing = ModelExport(source, dtype=torch.float32, max_shard_bytes=1000)

    def full(num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        failing.write(tmp_path / "out", written=full)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError):
        failing.write(tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step", "there"]
    save_model_config(transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=32, vocab_size=96), source)
    with pytest.raises(JobError, match=r"it lacks transformer\.h\.2\."):
        ModelExport(source, dtype=torch.float32, max_shard_bytes=1000)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5_000_000_000), ("1.5 mb", 1_500_000), ("300B", 300), ("x", 0)])
def test_sizes_of_files(text: str, size: int) -> None:
    options = ExportOptions(max_shard_size=text)
    assert options.max_shard_bytes == size
    assert [str(error) for error in options.validate()] == (
        [] if size else [f"max_shard_size={text}: is not a size above 0; write max_shard_size=5GB"]
    )


def test_other_programs_get_a_checkpoint_exported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM, which reads no checkpoints."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = checkpoint(tmp_path / "step", model_of("llama"))
    (tmp_path / "step" / "manifest.json").write_text("{}")
    model = Hf(name=str(source))
    folder = transformers_folder(model, dtype="bf16", heartbeat=lambda: None)
    assert folder is not None
    assert {tensor.dtype for tensor in tensors_in(folder).values()} == {torch.bfloat16}
    (folder / "mark").touch()
    assert transformers_folder(model, dtype="bf16", heartbeat=lambda: None) == folder
    assert (folder / "mark").exists()
    assert transformers_folder(model, dtype="fp32", heartbeat=lambda: None) != folder
    assert transformers_folder(Hf(name=str(folder)), dtype="fp32", heartbeat=lambda: None) == folder


def test_cached_results_are_of_these_weights(tmp_path: Path) -> None:
    """Other weights have another fingerprint, and moments are not read for it."""
    source = checkpoint(tmp_path / "step", model_of("gpt2"))
    run = compose(("job=serve", "model=hf", f"model.name={source}", "job.tokenizer=bytes")).run
    found = []
    for digest in ("0", "0", "1"):
        about = {"state/rank_00000.safetensors": digest * 32, "model/config.json": f"{len(found)}" * 32}
        manifest = CheckpointManifest(
            step=1,
            created=0,
            run_id="x",
            run_hash="x",
            architecture={},
            engine="torch",
            parallel={},
            precision="fp32",
            world_size=1,
            xxh3=about,
            files=dict.fromkeys(about, 1),
        )
        write_manifest(tmp_path / "step", manifest)
        found.append(model_fingerprint(run, tokenizer="t", heartbeat=lambda: None))
    assert found[0] == found[1] != found[2]

"""Adapters in a model: what is drawn and frozen, gradients through quantized layers, PEFT folders in and out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.pytorch_utils import Conv1D

from launcher.config.activation import NoCheckpointing
from launcher.config.adapter import Dora, Lora, RsLora
from launcher.config.adapter_folder import (
    ADAPTER_ATTRIBUTE,
    ADAPTER_NAME,
    AdapterUse,
    base_name,
    parameter_name,
    peft_key,
    read_adapter_folder,
)
from launcher.config.attention import SdpaAttention
from launcher.config.model.config_json import sizes_from_config
from launcher.config.model.gpt2 import Gpt2
from launcher.config.model.hf import Hf
from launcher.config.model.linear_layers import module_sizes, modules_of
from launcher.config.model.llama import Llama
from launcher.config.model.shape import LlamaSizes
from launcher.models.adapters import MergedModel
from launcher.models.build import build_model
from launcher.quantization.codecs import is_quantized

PLAIN: dict[str, Any] = {"attention": SdpaAttention(), "activation": NoCheckpointing()}
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64, "max_position_embeddings": 32}
GPT2 = Gpt2(name="gpt2", num_attention_heads=2, **SIZES)
LLAMA = Llama(name="llama", num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, **SIZES)
IDS = torch.arange(12)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def disturb(model: Any) -> None:
    """Give the adapter values as training would: B is zero at first."""
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_A." not in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    "lora",
    [
        Lora(r=4),
        Dora(r=4),
        Lora(r=4, bias="all", targets="*.1.*"),
        Lora(r=4, bias="lora_only", targets=("c_attn", "q_proj")[:1]),
    ],
    ids=["lora", "dora", "biases", "one"],
)
def test_the_model_is_as_without_it_and_the_plan_counts_what_is_trained(model: Any, lora: Lora) -> None:
    if model is LLAMA and lora.targets == ("c_attn",):
        lora = replace(lora, targets=("q_proj",))
    plain, adapted = build_model(model, seed=1, **PLAIN), build_model(model, seed=1, adapter=lora, **PLAIN)
    own = {base_name(name): value for name, value in adapted.named_parameters() if ".lora_" not in name}
    assert all(torch.equal(value, own[name]) for name, value in plain.named_parameters())
    assert torch.allclose(logits(plain), logits(adapted), atol=1e-6)
    sizes = module_sizes(model)
    assert sizes is not None
    assert set(sizes.parameter_names) == {name for name, _ in plain.named_parameters()}
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == lora.num_trained(sizes)
    assert set(lora.trained_names(sizes, adapter=ADAPTER_NAME)) == trained(adapted)


def test_norms_of_queries_and_keys_are_modules() -> None:
    """Qwen 3 has them: they can be trained whole, and optimizer.groups can name them."""
    sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2)
    widths = {"head_dim": 16, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    config = Qwen3Config(**sizes, **widths, max_position_embeddings=32, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    read = sizes_from_config(config.to_dict())
    assert isinstance(read, LlamaSizes)
    assert set(modules_of(read).parameter_names) == {name for name, _ in model.named_parameters()}


def test_matrices_depend_on_seed_and_name_alone() -> None:
    few, many = (
        build_model(LLAMA, seed=3, adapter=Lora(r=4, targets=targets), **PLAIN) for targets in ("q_proj", "all-linear")
    )
    other = build_model(LLAMA, seed=4, adapter=Lora(r=4, targets="q_proj"), **PLAIN)
    name = "model.layers.1.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(few.get_parameter(name), many.get_parameter(name))
    assert not torch.equal(few.get_parameter(name), other.get_parameter(name))
    assert not few.get_parameter(name.replace("lora_A", "lora_B")).any()


def test_modules_trained_whole_begin_as_the_models_own() -> None:
    lora = Lora(r=4, modules_to_save=("model.norm", "lm_head"))
    plain, adapted = build_model(LLAMA, seed=1, **PLAIN), build_model(LLAMA, seed=1, adapter=lora, **PLAIN)
    assert torch.equal(logits(plain), logits(adapted))
    sizes = module_sizes(LLAMA)
    assert sizes is not None
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == lora.num_trained(sizes)
    assert set(lora.trained_names(sizes, adapter=ADAPTER_NAME)) == trained(adapted)
    whole = adapted.get_parameter("lm_head.modules_to_save.default.weight")
    assert whole.requires_grad
    assert torch.equal(whole, plain.lm_head.weight)


def gradients(model: Any) -> dict[str, Tensor]:
    model.train().zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("method", ["nf4", "int8_weight", "int4_weight", "fp8"])
def test_gradients_on_quantized_weights_are_those_on_dequantized_ones(model: Any, method: str) -> None:
    quantized = build_model(replace(model, quantization=method), seed=1, adapter=Lora(r=4), **PLAIN)
    plain = build_model(model, seed=1, adapter=Lora(r=4), **PLAIN)
    disturb(quantized)
    disturb(plain)
    layers = dict(plain.named_modules())
    count = 0
    for name, layer in quantized.named_modules():
        if name.endswith(".base_layer") and is_quantized(layer):
            with torch.no_grad():
                rows = layer(torch.eye(layer.in_features)) - (0 if layer.bias is None else layer.bias)
            same = layers[name]
            same.weight.data.copy_(rows if isinstance(same, Conv1D) else rows.T)
            count += 1
    assert count == len(module_sizes(model).linear)  # type: ignore[union-attr]
    logits(quantized)  # an evaluation between steps must not change what the next step computes
    found, wanted = gradients(quantized), gradients(plain)
    assert found.keys() == wanted.keys()
    assert all(".lora_" in name for name in found)
    for name, gradient in wanted.items():  # int8 scales after the product: sums round differently
        assert torch.linalg.norm(found[name] - gradient) <= 1e-5 * torch.linalg.norm(gradient), name


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of weights, which adapters belong to."""
    folders = {"gpt2": tmp_path_factory.mktemp("gpt2"), "llama": tmp_path_factory.mktemp("llama")}
    for name, model in (("gpt2", GPT2), ("llama", LLAMA)):
        build_model(model, seed=1, **PLAIN).save_pretrained(folders[name])
    return folders


KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "biases": {"bias": "all"}}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_of_peft_gives_equal_logits_merged_and_trained_on(
    bases: dict[str, Path], tmp_path: Path, family: str, kind: str
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = ["c_attn", "mlp.c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
    saved = [] if family == "gpt2" else ["norm"]
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": targets, **KINDS[kind]}
    config = LoraConfig(fan_in_fan_out=family == "gpt2", modules_to_save=saved or None, **options)
    of_peft = get_peft_model(AutoModelForCausalLM.from_pretrained(bases[family]), config)
    disturb(of_peft)
    of_peft.save_pretrained(tmp_path)
    found = read_adapter_folder("model.adapter", str(tmp_path), use=AdapterUse.MODEL)
    assert len(found.layers) == 4
    model = replace(GPT2 if family == "gpt2" else LLAMA, weights=str(bases[family]), adapter=str(tmp_path))
    for adapter in (None, found.lora):
        ours = build_model(model, seed=0, adapter=adapter, **PLAIN)
        assert torch.allclose(logits(ours), logits(of_peft), atol=2e-6), adapter
    assert not torch.allclose(
        logits(build_model(replace(model, adapter=None), seed=0, **PLAIN)), logits(of_peft), atol=1e-3
    )


@pytest.mark.parametrize(
    ("lora", "method"),
    [
        (Lora(r=4), "none"),
        (RsLora(r=4), "none"),
        (Dora(r=4), "none"),
        (Lora(r=4), "nf4"),
        (Lora(r=4, targets="*.1.*"), "int8_weight"),
    ],
    ids=["lora", "rslora", "dora", "nf4", "int8"],
)
def test_a_merged_model_has_the_logits_of_the_adapter(lora: Lora, method: str) -> None:
    for model in (GPT2, LLAMA):
        adapted = build_model(replace(model, quantization=method), seed=1, adapter=lora, **PLAIN)
        disturb(adapted)
        merged = MergedModel(adapted, lora)
        whole = build_model(model, seed=2, **PLAIN)
        for name, parameter in whole.named_parameters():
            value = merged.read([name])
            assert value is not None
            parameter.data.copy_(value)
        assert merged.num_dequantized == (0 if method == "none" else len(module_sizes(model).linear))  # type: ignore[union-attr]
        assert torch.allclose(logits(whole), logits(adapted), atol=2e-6)


def test_names_of_peft_and_of_parameters_are_each_others_reverse() -> None:
    adapted = build_model(LLAMA, seed=1, adapter=Dora(r=2, modules_to_save=("model.norm",)), **PLAIN)
    names = [name for name, value in adapted.named_parameters() if value.requires_grad]
    keys = [peft_key(name) for name in names]
    assert [parameter_name(key, ("model.norm",)) for key in keys] == names
    assert "base_model.model.model.norm.weight" in keys
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector" in keys


def test_peft_is_given_the_whole_path_of_a_folder_and_loading_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT takes a bare name for one on the hub; every byte of the weights is counted once."""
    build_model(LLAMA, seed=0, **PLAIN).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for model in (replace(LLAMA, weights="base"), Hf(name="base", weights="pretrained")):
        reports: list[tuple[int, int]] = []

        def report(done: int, total: int, reports: list[tuple[int, int]] = reports) -> None:
            reports.append((done, total))

        built = build_model(model, seed=0, adapter=Lora(), on_progress=report, **PLAIN)
        assert getattr(built, ADAPTER_ATTRIBUTE)["base_model_name_or_path"] == str(tmp_path / "base")
        num_bytes = sum(each.numel() * 4 for each in build_model(LLAMA, seed=0, **PLAIN).parameters())
        assert reports[-1] == (num_bytes, num_bytes)
        assert [done for done, _ in reports] == sorted(done for done, _ in reports)
        assert {total for _, total in reports} == {num_bytes}

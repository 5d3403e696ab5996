"""Every method on both families: which layers, how close, kept and restored bit for bit in another process."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from launcher.config.activation import NoCheckpointing
from launcher.config.attention import SdpaAttention
from launcher.config.model.hf import Hf
from launcher.config.quantization import METHODS, Int4Weight, Int8Weight, Quantization
from launcher.errors import ConfigError, ConfigErrors
from launcher.models.build import build_model
from launcher.quantization.codecs import Int4Codec, codec_of, is_quantized, quantized_layers
from launcher.quantization.folder import save_quantized
from launcher.quantization.int4 import Int4Linear
from launcher.quantization.layers import LAYERS, bf16_bytes, bytes_by_group, matrices
from tests.conftest import RunProgram

from .reload import digest_of

FAMILIES = ("gpt2", "llama")
PER_BLOCK = {"gpt2": 4, "llama": 7}
SHARE_OF_BF16 = {"int8_dynamic": 0.53, "int8_weight": 0.53, "int4_weight": 0.31, "fp8": 0.54, "nf4": 0.31}
"""Most bytes of a layer beside its matrix in bf16; these layers are small, so that scales weigh more than they do."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "initializer_range": 0.05}
    configs = {
        "gpt2": GPT2Config(n_layer=2, n_embd=192, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0, **sizes),
        "llama": LlamaConfig(
            num_hidden_layers=2,
            hidden_size=192,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=256,
            max_position_embeddings=64,
            **sizes,
        ),
    }
    made = {name: tmp_path_factory.mktemp(name) for name in configs}
    for name, config in configs.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


def load(folder: Path, method: Quantization | None = None) -> nn.Module:
    model = build_model(
        Hf(name=str(folder)), seed=0, attention=SdpaAttention(), activation=NoCheckpointing(), quantization=method
    )
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", METHODS)
def test_all_matrices_of_blocks_are_quantized(kind: str, family: str, folders: dict[str, Path]) -> None:
    method = METHODS[kind]()
    stock, model = load(folders[family]), load(folders[family], method)
    names = {name for name, _ in quantized_layers(model)}
    assert names == set(matrices(stock))
    assert len(names) == 2 * PER_BLOCK[family]
    left = [layer for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D) and not is_quantized(layer)]
    assert left == [model.lm_head]

    assert bytes_by_group(model, names)[LAYERS] <= SHARE_OF_BF16[kind] * bf16_bytes(stock, names)
    ids = torch.arange(48).view(2, 24) % 50
    with torch.inference_mode():
        expected, found = (one(input_ids=ids, use_cache=False).logits for one in (stock, model))
    error = ((found - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < {"int8_weight": 0.03, "int8_dynamic": 0.1, "fp8": 0.1}.get(kind, 0.3)


def test_all_come_back_bit_for_bit_in_another_process_and_in_transformers_where_it_knows_the_format(
    folders: dict[str, Path], tmp_path: Path, run_forked_program: RunProgram
) -> None:
    expected, asked = [], []
    for kind, family in itertools.product(METHODS, FAMILIES):
        method, folder = METHODS[kind](), tmp_path / f"{kind}-{family}"
        model = load(folders[family], method)
        save_quantized(model, method, folder)
        ways = ["launcher", "transformers"] if family == "llama" and kind != "int4_weight" else ["launcher"]
        digest = digest_of(model)
        expected += [(way, folder.name, digest) for way in ways]
        asked += [word for way in ways for word in (way, str(folder))]
    printed = run_forked_program(Path(__file__).with_name("reload.py"), *asked)
    assert [tuple(line.split()) for line in printed.splitlines()] == expected
    assert len({digest for _, _, digest in expected}) == 2 * len(METHODS)


def test_a_width_that_groups_do_not_fill_is_refused_by_name(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError) as refused:
        load(folders["gpt2"], Int4Weight(group_size=128))
    assert "transformer.h.0.attn.c_attn has 192 inputs, which groups of 128 do not divide" in str(refused.value)
    assert "set quantization.group_size=64" in str(refused.value)


def test_skipped_layers_stay_and_patterns_that_match_nothing_are_refused(folders: dict[str, Path]) -> None:
    model = load(folders["llama"], Int8Weight(skip=("*.mlp.down_proj", "model.layers.0.*")))
    assert {name.partition("layers.")[2] for name, _ in quantized_layers(model)} == {
        *(f"1.self_attn.{name}_proj" for name in "qkvo"),
        *("1.mlp.gate_proj", "1.mlp.up_proj"),
    }
    with pytest.raises(ConfigError, match="did you mean"):
        load(folders["llama"], Int8Weight(skip=("model.layers.0.mlp.down",)))
    with pytest.raises(ConfigError, match="match every layer"):
        load(folders["llama"], Int8Weight(skip=("*",)))


def test_a_folder_says_how_it_is_quantized_and_another_method_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    method = Int4Weight(group_size=64, skip=("*.down_proj",))
    folder = tmp_path / "kept"
    save_quantized(load(folders["llama"], method), method, folder)
    model = load(folder)
    assert {layer.group_size for _, layer in quantized_layers(model)} == {64}
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    with pytest.raises(ConfigError, match="are int4_weight already"):
        load(folder, Int8Weight())
    (folder / "quantization.json").write_text('{"kind": "int3", "layers": []}')
    with pytest.raises((ConfigError, ConfigErrors), match="cannot be read"):
        load(folder)


def test_a_folder_that_lacks_a_part_of_a_layer_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    method, folder = Int4Weight(), tmp_path / "kept"
    save_quantized(load(folders["llama"], method), method, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"does not hold model\.layers\.1\.mlp\.up_proj\.scale"):
        load(folder)


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e3])
def test_4_bit_weights_are_within_a_step_of_what_they_were(spread: float) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(64, 24).requires_grad_(False)
    layer.weight.mul_(spread)
    layer.weight[0] = 0.25 * spread  # all of one sign
    layer.weight[1] = 0.0
    made = Int4Codec(Int4Weight(group_size=32)).quantize(layer)
    assert isinstance(made, Int4Linear)
    groups = layer.weight.view(24, 2, 32)
    steps = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
    error = (made.dequantized() - layer.weight).view(24, 2, 32)
    floor = torch.finfo(torch.float16).smallest_normal  # the smallest step there is
    assert (error.norm(dim=-1) <= 0.6 * 32**0.5 * steps.clamp(min=floor)).all()
    assert made.dequantized()[1].abs().max() == 0


def test_4_bit_weights_that_were_on_such_a_grid_before_hardly_move() -> None:
    """As those of SmolLM2 are: from a 4-bit file with a scale and a least value for each 32."""
    torch.manual_seed(2)
    scale, least = torch.rand(24, 1) * 0.02 + 0.001, -torch.rand(24, 1) * 0.2
    levels = torch.randint(0, 16, (24, 32))
    levels[:, 0], levels[:, 1] = 0, 15
    layer = nn.Linear(32, 24, bias=False).requires_grad_(False)
    layer.weight.copy_(levels * scale.half().float() + least.clamp(min=-14 * scale))
    made = codec_of(Int4Weight()).quantize(layer)
    assert ((made.dequantized() - layer.weight).abs() <= 0.05 * scale).all()

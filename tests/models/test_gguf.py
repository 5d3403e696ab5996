"""GGUF files: what is written is read back, and llama.cpp runs it with the model's own answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from launcher.config.activation import NoCheckpointing
from launcher.config.attention import SdpaAttention
from launcher.config.export import FORMATS, ExportOptions
from launcher.config.model.hf import Hf
from launcher.config.quantization import Int4Weight
from launcher.errors import JobError
from launcher.jobs.export import _dequantized
from launcher.models import gguf_export
from launcher.models.build import build_model
from launcher.models.export import ModelExport
from launcher.models.gguf import convert_gguf
from launcher.models.gguf_export import GgufExport
from launcher.models.gguf_tokenizer import read_tokenizer, tokenizer_json
from launcher.models.tokenizer import copy_tokenizer
from launcher.quantization.folder import save_quantized
from launcher.quantization.ggml import quantized
from launcher.verification import exported
from launcher.verification.exported import PROMPTS, TEXT, check_export, compare
from launcher.verification.exported import run_runtime as RUN  # noqa: N812  (kept where tests replace it)

WORDS = "The capital of France is Paris. It's 1234 and 5678, isn't it? café naïve … 你好\n\n\tend  of   line. " * 20
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
ROWS = 320
DIGITS = pre_tokenizers.Digits(individual_digits=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
# GPT-2 keeps rows of 64, which 256 does not divide, so that q4_k falls back there.
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=ROWS, max_position_embeddings=128, tie_word_embeddings=False, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0}, bos_token_id=None, eos_token_id=0,
    ),
    "gpt2": GPT2Config(
        n_layer=2, n_embd=64, n_head=2, n_positions=128, vocab_size=ROWS, eos_token_id=0, bos_token_id=0
    ),
}  # fmt: skip
SPREAD = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254, "q4_0": 1 / 8, "q4_1": 1 / 15, "q4_k": 1 / 14}
"""Half a step of each format, as a share of the greatest weight of a block; of bf16 and fp16, of the weight itself."""
LOGITS = {"fp32": 0.0, "fp16": 0.01, "bf16": 0.1, "q8_0": 0.3}
"""Greatest difference of logits, in standard deviations; seen is less than half of it."""


def trained(cutting: Any) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = cutting
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([WORDS], trainer)
    return inner


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family, with weights large enough that tokens differ, and a tokenizer."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained(BYTES), eos_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    found = {}
    for family, config in CONFIGS.items():
        torch.manual_seed(1)
        folder = found[family] = tmp_path_factory.mktemp(family)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return found


def gguf_of(folder: Path, file: Path, dtype: str) -> ModelExport:
    export = ModelExport(folder, dtype=torch.float32, max_shard_bytes=1 << 40)
    GgufExport(export, dtype=dtype).write(file)
    return export


@pytest.mark.parametrize(
    ("family", "dtype"), [*(("llama", dtype) for dtype in FORMATS["gguf"].dtypes), ("gpt2", "fp32"), ("gpt2", "q4_k")]
)
def test_every_type_is_read_back_and_run_by_llama_cpp(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str
) -> None:
    pytest.importorskip("xllamacpp")
    folder, file, again = folders[family], tmp_path / "my.gguf", tmp_path / "again"
    export = gguf_of(folder, file, dtype)
    again.mkdir()
    convert_gguf(file, again)
    model, back = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (folder, again))
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        found = back.state_dict()[name]
        # a block of fp32 weights never strays further than half a step, and a scale in fp16 by 1/1000 more
        most = weight.abs().amax() * (1 if dtype.startswith("q") else 1.001)
        assert (found - weight).abs().amax() <= SPREAD[dtype] * most * 1.02, name
        assert weight.ndim > 1 or torch.equal(found, weight), name
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("The capital of France is 1234").input_ids])
    with torch.no_grad():
        logits, other = model(ids).logits, back(ids).logits
    if dtype in LOGITS:
        assert (logits - other).abs().max() <= LOGITS[dtype] * logits.std()
    answered = []
    monkeypatch.setattr(exported, "run_runtime", lambda request: answered.append(RUN(request)) or answered[-1])
    said = check_export(file, export, ExportOptions(format="gguf", dtype=dtype))  # type: ignore[arg-type]
    assert said.startswith("checked by llama.cpp"), said
    assert dtype != "fp32" or "48 of 48 greedy tokens" in said, said
    # what is read back is what llama.cpp computes with, but that it rounds the inputs of 4-bit and 8-bit products
    prompts = [AutoTokenizer.from_pretrained(folder)(prompt).input_ids for prompt in PROMPTS]
    assert compare(back, prompts, answered[0]["answers"]).kl < (2e-5 if dtype == "fp32" else 2e-2)


def test_tokenizer_and_chat_template_come_back(folders: dict[str, Path], tmp_path: Path) -> None:
    gguf_of(folders["llama"], tmp_path / "my.gguf", "fp16")
    (tmp_path / "again").mkdir()
    convert_gguf(tmp_path / "my.gguf", tmp_path / "again")
    own, back = (AutoTokenizer.from_pretrained(each) for each in (folders["llama"], tmp_path / "again"))
    assert own(TEXT).input_ids == back(TEXT).input_ids
    assert back.chat_template == TEMPLATE
    assert (back.eos_token, back.eos_token_id) == ("<|endoftext|>", 0)
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "my.gguf").fields.items()}
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.tokens"][300:302] == ["[PAD300]", "[PAD301]"]
    assert [fields["tokenizer.ggml.token_type"][number] for number in (0, 5, 300)] == [3, 1, 5]


LLAMA_3 = json.loads(tokenizer_json(tokens=[], kinds=[], merges=[], rule="llama-bpe", bos=None))["pre_tokenizer"]


@pytest.mark.parametrize(
    ("rule", "cutting"),
    {
        "gpt-2": BYTES,
        "smollm": pre_tokenizers.Sequence([DIGITS, BYTES]),
        "llama-bpe": Tokenizer.from_str(
            json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": LLAMA_3})
        ).pre_tokenizer,
    }.items(),
)
def test_rules_for_words_are_found_without_a_list_of_vocabularies(tmp_path: Path, rule: str, cutting: Any) -> None:
    tree = json.loads(trained(cutting).to_str())
    tree["model"]["ignore_merges"] = rule == "llama-bpe"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    found = read_tokenizer(tmp_path, num_rows=ROWS)
    assert found.rule == rule
    # what a file of another program has instead of tokenizer.json leads to the same tokens
    text = tokenizer_json(tokens=found.tokens, kinds=found.kinds, merges=found.merges, rule=rule, bos=None)
    assert Tokenizer.from_str(text).encode(TEXT).ids == Tokenizer.from_str(json.dumps(tree)).encode(TEXT).ids
    tree["model"]["ignore_merges"] = rule != "llama-bpe"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(JobError, match="its pre-tokenizer is none of gpt-2, smollm, llama-bpe"):
        read_tokenizer(tmp_path, num_rows=ROWS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"normalizer": {"type": "NFC"}}, "it has a normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre-tokenizer is none of"),
        ({"model": {"type": "Unigram", "vocab": []}}, "it is Unigram, not byte-level BPE"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({**json.loads(trained(BYTES).to_str()), **change}))
    with pytest.raises(JobError, match=said):
        read_tokenizer(tmp_path, num_rows=ROWS)
    with pytest.raises(JobError, match="has no tokenizer"):
        read_tokenizer(tmp_path / "none", num_rows=ROWS)


def test_a_wrong_order_of_rows_is_found_by_the_check(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(gguf_export, "rotary_neighbours", lambda values, num_heads: values)
    export = gguf_of(folders["llama"], tmp_path / "my.gguf", "fp32")
    with pytest.raises(JobError, match="chooses other tokens than the model"):
        check_export(tmp_path / "my.gguf", export, ExportOptions(format="gguf", dtype="fp32"))


def test_a_wrong_rule_for_words_is_found_by_the_check(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")

    def wrong(folder: Path, *, num_rows: int) -> Any:
        return dataclasses.replace(read_tokenizer(folder, num_rows=num_rows), rule="smollm")

    monkeypatch.setattr(gguf_export, "read_tokenizer", wrong)
    export = gguf_of(folders["llama"], tmp_path / "my.gguf", "fp32")
    with pytest.raises(JobError, match="cuts text into other tokens"):
        check_export(tmp_path / "my.gguf", export, ExportOptions(format="gguf", dtype="fp32"))


def test_scaled_rotary_positions_are_those_of_llama_cpp(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    source = tmp_path / "scaled"
    source.mkdir()
    for file in folders["llama"].iterdir():
        (source / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config["rope_parameters"] |= scaled | {"original_max_position_embeddings": 16}
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(config))
    export = gguf_of(source, tmp_path / "my.gguf", "fp32")
    said = check_export(tmp_path / "my.gguf", export, ExportOptions(format="gguf", dtype="fp32"))
    assert "48 of 48 greedy tokens" in said
    (tmp_path / "again").mkdir()
    with pytest.raises(JobError, match="rotary positions are scaled"):
        convert_gguf(tmp_path / "my.gguf", tmp_path / "again")


def test_q4_k_is_as_near_to_the_weights_as_what_llama_cpp_makes() -> None:
    weights = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    weights[3] = 0.0
    weights[4, :32] = -2.5
    weights[5] = np.abs(weights[5])
    packed = quantized(weights, GGMLQuantizationType.Q4_K)
    assert packed.shape == (64, 512 // 256 * 144)
    back = dequantize(packed, GGMLQuantizationType.Q4_K)
    assert np.array_equal(back[3], weights[3])
    assert float(np.square(back - weights).mean()) <= 1.02 * ERROR_OF_GGML


ERROR_OF_GGML = 0.004947152
"""Mean squared error of q4_k on these weights by ``ggml_quantize_chunk`` of ggml 0.20.2."""


def test_damaged_and_foreign_files_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    gguf_of(folders["gpt2"], tmp_path / "my.gguf", "q8_0")
    whole = (tmp_path / "my.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.gguf").write_bytes(b"text")
    writer = GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (tmp_path / "made").mkdir()
    for name, said in {
        "cut": "is no intact GGUF file",
        "text": "is no intact GGUF file",
        "other": "of the architecture mamba",
    }.items():
        with pytest.raises(JobError, match=said):
            convert_gguf(tmp_path / f"{name}.gguf", tmp_path / "made")


@pytest.mark.parametrize(
    ("key", "number", "said"),
    [
        ("block_count", 3_000_000_000, "its header says 3000000000 layers, and it has tensors of"),
        ("embedding_length", 4, "its tensor token_embd.weight is "),
        ("attention.head_count", 0, "llama.attention.head_count is 0, and must be"),
        ("attention.key_length", 7, "its heads are 7 wide"),
    ],
)
def test_a_header_that_contradicts_the_tensors_is_refused(
    folders: dict[str, Path], tmp_path: Path, key: str, number: int, said: str
) -> None:
    """Before anything is built from its numbers, which may be huge."""
    gguf_of(folders["llama"], tmp_path / "my.gguf", "fp32")
    data = bytearray((tmp_path / "my.gguf").read_bytes())
    name = f"llama.{key}".encode()
    at = data.index(name) + len(name) + 4  # the type of the value
    data[at : at + 4] = number.to_bytes(4, "little")
    (tmp_path / "my.gguf").write_bytes(data)
    (tmp_path / "made").mkdir()
    with pytest.raises(JobError, match=said):
        convert_gguf(tmp_path / "my.gguf", tmp_path / "made")
    assert not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_of_quantized_weights_is_dequantized_first(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    method, made = Int4Weight(), tmp_path / "made"
    words = {"seed": 0, "attention": SdpaAttention(), "activation": NoCheckpointing()}
    quantized_model = build_model(Hf(name=str(folders[family])), **words, quantization=method).eval()
    save_quantized(quantized_model, method, made)
    copy_tokenizer(folders[family], made)
    export = ModelExport(made, dtype=torch.float32, max_shard_bytes=1 << 40, stored=_dequantized(made))
    GgufExport(export, dtype="fp32").write(tmp_path / "my.gguf")
    (tmp_path / "again").mkdir()
    convert_gguf(tmp_path / "my.gguf", tmp_path / "again")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted, found = quantized_model(ids).logits, back(ids).logits
        original = AutoModelForCausalLM.from_pretrained(folders[family]).eval()(ids).logits
    assert (wanted - found).abs().max() <= 2e-3 * wanted.std()  # sums of fp32 products in another order
    assert (original - found).abs().max() >= 0.05 * wanted.std()

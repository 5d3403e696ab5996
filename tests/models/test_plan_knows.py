"""What the parent says of a model, its tokenizer and its learning rate before anything starts."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.config.compose import compose
from launcher.config.data.base import STREAM_LAYOUT, Corpus
from launcher.config.data.bpe import train_byte_level_bpe
from launcher.config.job.verify import SelectedStrategies, Verify, select_strategies
from launcher.config.model.hf import Hf
from launcher.config.model.transformers_support import (
    attention_support,
    causal_lm_types,
    parallel_plans,
    rope_types,
    stage_names,
)
from launcher.config.parallel.data_parallel import TENSOR_STYLES
from launcher.engines.tensor_parallel import _STYLES
from launcher.errors import ConfigErrors, EnvironmentProblem
from launcher.execution.prepare import prepare
from launcher.execution.validate import validate_machine
from launcher.inference.tokenizer import open_tokenizer
from launcher.planning.warnings import warnings_of_run
from launcher.utils import hub

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 67,
    "max_position_embeddings": 64,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
TENSORS = {
    "model.embed_tokens.weight": [67, 32],
    "model.layers.0.mlp.experts.0.w1.weight": [48, 32],
    "model.layers.1.mlp.experts.0.w1.weight": [48, 32],
    "lm_head.weight": [67, 32],
}
LOCAL = ("backend.ranks=1", "tracker=local")


def header_of(tensors: dict[str, list[int]]) -> dict[str, Any]:
    header, place = {}, 0
    for name, (rows, columns) in tensors.items():
        end = place + 4 * rows * columns
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [place, end]}
        place = end
    return header


def write_safetensors(file: Path, header: object, *, num_bytes: int | None = None) -> None:
    text = json.dumps(header).encode()
    if num_bytes is None:
        num_bytes = max(entry["data_offsets"][1] for entry in header.values())  # type: ignore[attr-defined]
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))


def model_folder(folder: Path, config: object = LLAMA, *, num_tokens: int | None = 60) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    write_safetensors(folder / "model.safetensors", header_of(TENSORS))
    if num_tokens is not None:
        vocabulary = {f"t{number}": number for number in range(num_tokens)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return folder


def refused(*words: str, length: str | None = "job.sequence_length=32") -> list[str]:
    """Return what prevents a run, as the command line shows it."""
    with pytest.raises(ConfigErrors) as errors:
        prepare(compose([*LOCAL, *filter(None, [length]), *words]))
    return str(errors.value).splitlines()


def tokenizer_of(*words: str) -> str:
    return compose(list(words)).run.data.tokenizer  # type: ignore[attr-defined,no-any-return]


def test_the_tokenizer_of_given_weights_is_the_default(tmp_path: Path) -> None:
    own, bare = model_folder(tmp_path / "own"), model_folder(tmp_path / "bare", num_tokens=None)
    assert tokenizer_of() == "bpe"
    assert tokenizer_of("model=smollm2_135m") == "model"
    assert tokenizer_of("model=smollm2_135m", "model.weights=random") == "bpe"
    assert tokenizer_of("model=hf", "model.name=org/model") == "model"
    assert tokenizer_of("model=hf", f"model.name={own}") == "model"
    assert tokenizer_of("model=hf", f"model.name={bare}", f"model.weights={own}") == "model"
    assert tokenizer_of("model=hf", f"model.name={bare}") == "bpe"
    assert tokenizer_of("model=gpt2", f"model.weights={own}") == "model"
    assert tokenizer_of("model=gpt2", f"model.weights={bare}") == "bpe"
    assert tokenizer_of("model=smollm2_135m", "data.tokenizer=bpe") == "bpe"
    with pytest.raises(ConfigErrors, match=r"data.vocab_size=999.*: data.tokenizer=model has its own vocabulary"):
        compose(["model=smollm2_135m", "data.vocab_size=999"])


def warned(*words: str) -> str:
    return "\n".join(warnings_of_run(compose(["backend.ranks=1", *words]).run, [], None))


def test_given_weights_with_a_foreign_tokenizer_or_a_rate_for_random_ones_are_warned_of() -> None:
    assert "optimizer.lr=0.001 is a learning rate for random weights" in warned("model=smollm2_135m")
    assert "set optimizer.lr=2e-5" in warned("model=smollm2_135m")
    assert "data.tokenizer" not in warned("model=smollm2_135m")
    foreign = warned("model=smollm2_135m", "data.tokenizer=bpe", "optimizer.lr=2e-5")
    assert "data.tokenizer=bpe: the weights of smollm2_135m" in foreign
    assert "set data.tokenizer=model" in foreign
    assert "optimizer.lr" not in foreign
    assert "mean nothing to the weights" in warned("model=smollm2_135m", "data=synthetic")
    assert "optimizer.lr" not in warned("job=evaluate", "model=smollm2_135m")
    assert "weights" not in warned("model=gpt2_tiny", "data.tokenizer=bpe")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"type": "mystery", "factor": 4.0}}, "rotary positions of type 'mystery'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "riddle"}}}, "rotary positions of type 'riddle'"),
        ({"model_type": "llama17"}, "no causal language model of type llama17"),
        ({"model_type": "t17", "auto_map": {}}, "the launcher never runs code of a model"),
        ({"model_type": None}, "names no model_type"),
        ({"num_hidden_layers": "two"}, 'config.json says num_hidden_layers: "two"'),
        ({"num_hidden_layers": -1}, "config.json says num_hidden_layers: -1"),
        ({"num_attention_heads": 0}, "config.json says num_attention_heads: 0"),
        ({"num_key_value_heads": True}, "config.json says num_key_value_heads: true"),
        ({"hidden_size": 32.5}, "config.json says hidden_size: 32.5"),
        ({"vocab_size": [67]}, "config.json says vocab_size: [67]"),
        ({"intermediate_size": [48, 0]}, "config.json says intermediate_size: [48, 0]"),
        ({"max_position_embeddings": {}}, "config.json says max_position_embeddings: {}"),
        ({"head_dim": "x"}, 'config.json says head_dim: "x"'),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by gptq"),
    ],
)
def test_a_configuration_that_transformers_does_not_know(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = model_folder(tmp_path, {**LLAMA, **changes})
    for words in (("model=hf", f"model.name={folder}"), ("model=gpt2_tiny", f"model.weights={folder}")):
        assert any(said in line for line in refused(*words)), words


@pytest.mark.parametrize("kind", ["default", "llama3", "yarn", "mrope"])
def test_rotary_positions_that_it_knows(tmp_path: Path, kind: str) -> None:
    folder = model_folder(tmp_path, {**LLAMA, "rope_scaling": {"rope_type": kind, "factor": 4.0}})
    assert not list(Hf(name=str(folder)).validate_machine())


def test_the_newer_key_of_rotary_positions_wins(tmp_path: Path) -> None:
    scaling = {"type": "mystery", "rope_type": "linear", "factor": 4.0}
    assert not list(Hf(name=str(model_folder(tmp_path, {**LLAMA, "rope_scaling": scaling}))).validate_machine())


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_counted(tmp_path: Path) -> None:
    tied = model_folder(tmp_path / "tied", {**LLAMA, "tie_word_embeddings": True})
    equal = Hf(name=str(tied)).shape()
    assert equal is not None
    assert equal.tie_word_embeddings
    file = tied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] + bytes(range(100)))  # the end of lm_head.weight
    apart = Hf(name=str(tied)).shape()
    assert apart is not None
    assert apart.num_params == equal.num_params + 67 * 32
    saved = model_folder(tmp_path / "saved", {**LLAMA, "tie_word_embeddings": False})  # as training writes it
    for name in (tied, model_folder(tmp_path / "base", {**LLAMA, "tie_word_embeddings": True})):
        assert not list(Hf(name=str(name), weights=str(saved)).validate_machine())


def test_advice_for_a_quantized_model_without_a_tokenizer_leads_to_no_other_error(tmp_path: Path) -> None:
    bare = model_folder(tmp_path, num_tokens=None)
    words = ("job=quantize", "quantization=int8_weight", "model=hf", f"model.name={bare}", "job.tokenizer=bytes")
    for choice in ("data.tokenizer=model", "data.tokenizer=bpe"):
        (line,) = [line for line in refused(*words, choice) if line.startswith("data.tokenizer=")]
        assert line.endswith("; set data.tokenizer=FOLDER to a folder with the tokenizer of these weights")


@pytest.mark.parametrize("text", ["{", "[]", "nonsense", '{"model_type": "llama"', "[" * 100_000, "\x00"])
def test_a_broken_config_is_named(tmp_path: Path, text: str) -> None:
    folder = model_folder(tmp_path, text)
    (line,) = refused("model=hf", f"model.name={folder}")
    assert line.startswith(f"model.name={folder}")
    assert "config.json is not" in line


HEADER = header_of(TENSORS)
FIRST = "model.embed_tokens.weight"


def damaged(**changes: object) -> dict[str, Any]:
    return {**HEADER, FIRST: {**HEADER[FIRST], **changes}}


@pytest.mark.parametrize(
    "header",
    [
        [],
        "text",
        {**HEADER, FIRST: 3},
        {**HEADER, FIRST: {}},
        damaged(shape="67"),
        damaged(shape=[67, -32]),
        damaged(shape=[67, 31]),
        damaged(data_offsets=[0]),
        damaged(data_offsets=[4, 8580]),
        damaged(data_offsets=[0, "8576"]),
        damaged(shape=[True, 32]),
        damaged(dtype=None),
        damaged(dtype=["F32"]),
        damaged(dtype="Q77"),
        {"model.norm.weight": HEADER[FIRST], **HEADER},
    ],
)
def test_a_damaged_header_names_the_file(tmp_path: Path, header: object) -> None:
    folder = model_folder(tmp_path)
    write_safetensors(folder / "model.safetensors", header, num_bytes=HEADER["lm_head.weight"]["data_offsets"][1])
    (line,) = refused("model=hf", f"model.name={folder}")
    assert line.startswith(f"model.name={folder}: cannot be read: model.safetensors ")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda content: content[:5], "is not a safetensors file, or is cut short"),
        (lambda content: content[:100], "is cut short within its header"),
        (lambda content: content[:-1], "bytes, and its header describes"),
        (lambda content: content + b"x", "bytes, and its header describes"),
        (lambda content: b"", "is not a safetensors file"),
        (lambda content: b"\xff" * 100, "is not a safetensors file"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_a_truncated_file_is_named(tmp_path: Path, spoil: Callable[[bytes], bytes], said: str) -> None:
    file = model_folder(tmp_path) / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    (line,) = refused("model=hf", f"model.name={tmp_path}")
    assert "model.safetensors" in line
    assert said in line


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("[]", "is not a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "has no weight_map"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "is not a file of the folder"),
        ('{"weight_map": {"a": "a.safetensors"}}', "a.safetensors is missing"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, index: str, said: str) -> None:
    folder = model_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    (line,) = refused("model=hf", f"model.name={folder}")
    assert said in line


def test_a_tokenizer_that_is_not_there_is_damaged_or_is_larger_than_the_model(tmp_path: Path) -> None:
    bare = model_folder(tmp_path / "bare", num_tokens=None)
    words = ("model=hf", f"model.name={bare}")
    assert "data.tokenizer=model" in refused(*words, "data.tokenizer=model")[0]
    assert "holds no tokenizer (none of tokenizer.json" in refused(*words, "data.tokenizer=model")[0]
    for job in ("generate", "serve"):
        lines = refused(*words, f"job={job}", *(["job.input=x.jsonl"] if job == "generate" else []), length=None)
        assert any(line.startswith("job.tokenizer=model") and "holds no tokenizer" in line for line in lines)
    large = model_folder(tmp_path / "large", num_tokens=68)
    (line,) = refused("model=hf", f"model.name={large}")
    assert "has 68 tokens, and the model 67 embedding rows" in line
    (large / "tokenizer.json").write_text("{")
    (line,) = refused("model=hf", f"model.name={large}")
    assert "tokenizer.json is not JSON" in line
    (large / "tokenizer.json").write_text('{"model": {}}')
    (line,) = refused("model=hf", f"model.name={large}")
    assert "tokenizer.json holds no vocabulary" in line


def test_what_would_be_fetched_without_a_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub._unreachable.cache_clear()
    (line,) = refused("job=quantize", "model=gpt2", "quantization=int8_weight")
    assert line.startswith("job.tokenizer=model: openai-community/gpt2 is not in the local cache, and HF_HUB_OFFLINE")
    assert "set job.tokenizer=bytes" in line
    (line,) = refused("job=serve", "job.engine=echo", "model=gpt2_tiny", length=None)
    assert line.startswith("job.tokenizer=model: openai-community/gpt2 is not in the local cache")
    assert line.endswith("set job.tokenizer=bytes")
    tiny = compose(["job=serve", "model=gpt2_tiny"]).run
    with pytest.raises(EnvironmentProblem, match=r"job\.tokenizer=openai-.* or set job\.tokenizer=bytes$"):
        open_tokenizer("model", tiny, heartbeat=lambda: None)
    (line,) = refused("model=hf", "model.name=org/model")
    assert line.startswith("model.name=org/model: org/model is not in the local cache")
    (line,) = refused("model=hf", "model.name=org/model", "model.weights=random", "data.tokenizer=bpe")
    assert line.startswith("model.name=org/model: ")
    words = ("job=benchmark", "benchmark=batching", "benchmark.tokenizer=bytes")
    (line,) = refused(*words, "model=hf", "model.name=org/model", length=None)
    assert line.startswith("model.name=org/model: ")
    fetched = tmp_path / "hub" / "models--org--model"
    model_folder(fetched.parent / "snapshot")
    (fetched / "refs").mkdir(parents=True)
    (fetched / "refs" / "main").write_text("abc")
    (fetched / "snapshots").mkdir()
    (fetched.parent / "snapshot").rename(fetched / "snapshots" / "abc")
    run = compose([*LOCAL, "job.sequence_length=32", "model=hf", "model.name=org/model"]).run
    assert not list(validate_machine(run, tmp_path / "run", hosts=run.backend.hosts(max_ranks=1)))
    hub._unreachable.cache_clear()


def test_a_data_set_of_the_hub_without_a_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    hub._unreachable.cache_clear()
    words = ("data=hf", "data.path=Org/WikiText", "data.vocab_size=999", f"data.cache={tmp_path}/tokens")
    run = compose([*LOCAL, *words]).run
    assert isinstance(run.data, Corpus)
    (line,) = refused(*words)
    assert line.startswith("data.path=Org/WikiText: Org/WikiText is not in the local cache, and HF_")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hub._unreachable.cache_clear()
    assert "HF_DATASETS_OFFLINE is set" in refused(*words)[0]
    assert "`hf download --repo-type dataset Org/WikiText --local-dir FOLDER`" in line
    assert refused("job=benchmark", "benchmark=data", *words, length=None)[0].startswith("data.path=Org/WikiText: ")
    layout = tmp_path / "tokens" / "abc" / STREAM_LAYOUT
    layout.parent.mkdir(parents=True)
    layout.write_text(json.dumps({"source": run.data.fingerprint()}))
    assert not list(validate_machine(run, tmp_path / "run", hosts=run.backend.hosts(max_ranks=1)))
    layout.write_text("[]")
    assert refused(*words)
    (tmp_path / "datasets" / "Org___wiki_text" / "default" / "0.0.0" / "abc").mkdir(parents=True)
    assert not list(validate_machine(run, tmp_path / "run", hosts=run.backend.hosts(max_ranks=1)))
    (line,) = refused("data=hf", "data.path=a/b/c", "data.vocab_size=999")
    assert "is neither a folder or file here nor a data set of the hub" in line
    hub._unreachable.cache_clear()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("model=hf", "model.name=a/config.json"),
            "is a file, not a folder; set model.name=./a",
        ),
        (
            ("model=hf", "model.name=notes"),
            "is a file, not a folder; give a folder that holds a model",
        ),
        (("model=hf", "model.name=a/b/c"), "model.name=a/b/c: is neither a folder nor a name on the hub"),
        (("model=hf", f"model.name=org/{'x' * 300}"), "a name in it has 300 bytes"),
        (("data.tokenizer=a/tokenizer.json",), "is a file, not a folder; set data.tokenizer=./a"),
        (
            ("data.tokenizer=notes",),
            "is a file, not a folder; give a folder that holds a tokenizer",
        ),
        (("data.tokenizer=a/b/c",), "data.tokenizer=a/b/c: is neither a folder nor a name on the hub"),
        (("data.tokenizer=./nowhere",), "data.tokenizer=./nowhere: there is no such folder (relative to"),
        (("job=generate", "job.tokenizer=a/tokenizer.json"), "is a file, not a folder; set job.tokenizer=./a"),
        (("job=generate", "job.tokenizer=org/name"), "job.tokenizer=org/name: there is no such folder"),
        (("job=serve", "job.tokenizer=nowhere"), "job.tokenizer=nowhere: there is no such folder"),
        (("job=serve", "job.engine=echo", "job.tokenizer=notes"), "job.tokenizer=notes: is a file, not a folder"),
    ],
)
def test_a_relative_path_that_cannot_be_used_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "a")
    (tmp_path / "notes").write_text("x")
    (line,) = refused(*words, length=None if "job=" in words[0] else "job.sequence_length=32")
    assert said in line


@pytest.mark.parametrize("job", [("job=serve",), ("job=generate", "job.input=x.jsonl")])
def test_the_plan_says_where_a_tokenizer_comes_from(job: tuple[str, ...]) -> None:
    def shown(*words: str) -> str:
        run = compose([*job, "model=gpt2_tiny", *words]).run
        return dict(run.job.describe(run, world_size=1))["tokenizer"]

    assert shown() == "job.tokenizer=model, openai-community/gpt2 on the hub"
    assert shown("job.tokenizer=bytes") == "job.tokenizer=bytes"


def test_the_prompt_of_a_quantization_is_counted(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "own")
    train_byte_level_bpe(["words"], vocab_size=260).save(str(folder / "tokenizer.json"))
    words = ("job=quantize", "quantization=int8_weight", "model.max_position_embeddings=64", "job.rate_batches=[]")
    (line,) = refused(*words, f"job.tokenizer={folder}", f"job.prompt={'many words ' * 9}", "job.sample_tokens=20")
    assert re.match(
        r"job\.prompt: has \d\d tokens, and gpt2_tiny takes at most 64 with the 20 of .*; shorten it$", line
    )
    (line,) = refused(*words, f"job.tokenizer={folder}", "job.prompt=many words", "job.sample_tokens=60")
    assert line.endswith("; set job.sample_tokens=57"), line


def test_the_sizes_of_any_family_are_counted_in_its_files(tmp_path: Path) -> None:
    shape = Hf(name=str(model_folder(tmp_path, MIXTRAL))).shape()
    assert shape is not None
    assert shape.num_params == 2 * 67 * 32 + 2 * 48 * 32
    assert shape.active_params == 2 * 67 * 32 + 48 * 32  # two experts of four
    assert shape.flops_per_token(8) == 6 * shape.active_params + 12 * 2 * 32 * 8
    assert (shape.num_hidden_layers, shape.block_params, shape.largest_param) == (2, 48 * 32, 67 * 32)
    assert (shape.family, shape.vocab_size, shape.max_position_embeddings) == ("mixtral", 67, 64)
    assert not shape.tie_word_embeddings
    assert Hf(name=str(tmp_path), weights="random").shape() is None


@pytest.mark.parametrize(
    ("config", "parallel", "said"),
    [
        (MIXTRAL, "tensor", "parallel.tensor=2: Transformers' tensor plan for mixtral is one with styles moe_tp"),
        ({**MIXTRAL, "model_type": "opt"}, "tensor", "parallel.tensor=2: Transformers' tensor plan for opt is none"),
        ({**MIXTRAL, "model_type": "opt"}, "pipeline", "parallel.stages=2: Transformers has no pipeline plan for opt"),
        (MIXTRAL, "deepspeed_pipeline", "the layers of mixtral are not verified to work as a chain"),
        (
            {**LLAMA, "model_type": "qwen3_next"},
            "pipeline",
            "parallel=pipeline: qwen3_next has layers that carry a state",
        ),
        (LLAMA, "tensor", None),
        (LLAMA, "pipeline", None),
        (MIXTRAL, "pipeline", None),
        (MIXTRAL, "fsdp", None),
    ],
)
def test_a_folder_that_cannot_be_sliced_or_cut_is_refused(
    plan_of: Callable[..., object], tmp_path: Path, config: dict[str, Any], parallel: str, said: str | None
) -> None:
    folder = model_folder(tmp_path, config)
    degree = {"tensor": ["parallel.tensor=2"], "fsdp": []}.get(parallel, ["parallel.stages=2"])
    words = ["model=hf", f"model.name={folder}", f"parallel={parallel}", *degree, "job.sequence_length=32"]
    if said is None:
        plan_of(*words)
        return
    with pytest.raises(ConfigErrors) as errors:
        plan_of(*words)
    assert said in str(errors.value)


WINDOWED = {**LLAMA, "model_type": "mistral", "sliding_window": 16}
GEMMA2 = {**LLAMA, "model_type": "gemma2", "head_dim": 16, "sliding_window": 16}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LLAMA, None),
        ({**WINDOWED, "sliding_window": 32}, None),
        ({**WINDOWED, "model_type": "qwen2", "use_sliding_window": False}, None),
        ({**WINDOWED, "sliding_window": None}, None),
        (WINDOWED, "mistral has layers that see 16 tokens (sliding_window), and sequences have 32"),
        (
            {**LLAMA, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            "lfm2 has layers (conv) that mix tokens by more",
        ),
        ({**LLAMA, "layer_types": ["attention", "full_attention"]}, None),
        ({**LLAMA, "model_type": "qwen3_next"}, "qwen3_next has layers that mix tokens by more than"),
        ({**LLAMA, "model_type": "falcon"}, "falcon computes attention in its own code"),
    ],
)
def test_sequences_are_shared_only_where_attention_alone_sees_other_tokens(
    plan_of: Callable[..., object], tmp_path: Path, config: dict[str, Any], said: str | None
) -> None:
    folder = f"model.name={model_folder(tmp_path, config)}"
    words = ["model=hf", folder, "parallel=sequence", "parallel.sequence_parallel=2", "job.sequence_length=32"]
    if said is None:
        plan_of(*words)
        return
    with pytest.raises(ConfigErrors, match="set parallel=fsdp or parallel=zero3") as errors:
        plan_of(*words)
    assert said in str(errors.value)


def test_a_kernel_that_a_family_lacks_is_refused(plan_of: Callable[..., object], tmp_path: Path) -> None:
    model = ["model=hf", f"model.name={model_folder(tmp_path, GEMMA2)}"]
    with pytest.raises(ConfigErrors, match=r"attention=sdpa: gemma2 has no such .*; set attention=eager or attention="):
        plan_of(*model, "job.sequence_length=32")
    plan_of(*model, "job.sequence_length=32", "attention=eager")
    (line,) = refused(*model, "job=generate", "job.input=sample", length=None)
    assert line.startswith(
        "job.engine=paged: gemma2 keeps state other than the keys and values of all tokens (sliding_"
    )
    model_folder(tmp_path, {**LLAMA, "model_type": "bloom"})
    (line,) = refused(*model, "job=generate", "job.input=sample", length=None)
    assert line.startswith("job.engine=paged: bloom computes attention by code that the engine cannot replace")
    model_folder(tmp_path, {**LLAMA, "model_type": "mamba"})
    (line,) = refused(*model, "job=generate", "job.input=sample", length=None)
    assert line.startswith("job.engine=paged: mamba keeps state other than the keys and values of all tokens (a state)")
    plan_of(*model, "job=generate", "job.input=sample", "job.engine=echo", "job.tokenizer=bytes")


def test_verify_takes_the_strategies_that_can_spread_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    words = ["model=hf", f"model.name={folder}", "job=verify", "schedule=constant", "backend.ranks=2"]
    words += ["tracker=local", "job.sequence_length=32"]

    def taken(config: dict[str, Any], *more: str) -> SelectedStrategies:
        model_folder(folder, config)
        run = compose([*words, *more]).run
        assert isinstance(run.job, Verify)
        return select_strategies(run.job, run, world_size=2)

    assert "tensor plan for mixtral" in taken(MIXTRAL).left_out["tensor"]
    falcon = taken({**LLAMA, "model_type": "falcon"})
    assert {"pipeline2_gpipe", "tensor", "sequence"} <= set(falcon.left_out)
    assert {"ddp", "fsdp", "zero3", "zero3_offload"} <= set(falcon.cases)
    assert "sliding_window" in taken(WINDOWED).left_out["sequence"]
    assert "causal without a mask" in taken(LLAMA, "attention=eager").left_out["sequence"]
    model_folder(folder, {**LLAMA, "model_type": "opt", "dropout": 0.1, "classifier_dropout": 0.1, "layerdrop": 0.0})
    (line,) = refused(*words, length=None)
    assert line.endswith(
        "sets dropout=0.1, and each rank draws its own dropout; set dropout to 0 in a copy of the folder"
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "falcon", "qwen3_next", "mamba", "opt", "bloom"])
def test_marks_of_attention_are_those_of_the_class(family: str) -> None:
    import transformers

    from launcher.models.attention import class_attention_support

    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert attention_support(family) == class_attention_support(getattr(transformers, known[family]))
    assert attention_support("no_such_family") is None


def test_the_installed_transformers_is_read_without_importing_it() -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert causal_lm_types() == frozenset(known)
    assert rope_types() == frozenset(ROPE_INIT_FUNCTIONS)
    for family in ("llama", "mixtral", "gemma3_text", "gpt_neox", "opt", "phi3"):
        config = transformers.CONFIG_MAPPING[family]
        plans = parallel_plans(family)
        assert plans is not None
        assert plans.tensor_styles == frozenset((config.base_model_tp_plan or {}).values())
        assert plans.has_stages == (stage_names(config.base_model_pp_plan or {}) is not None)
    assert stage_names({"layers": ([], ["hidden_states"]), "norm": ([], ["hidden_states"])}) is None
    assert parallel_plans("no_such_family") is None
    assert set(_STYLES) == TENSOR_STYLES


def test_heads_that_do_not_divide_the_hidden_size_are_refused(tmp_path: Path) -> None:
    sizes = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 130, "n_positions": 64, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    (error,) = Hf(name=str(tmp_path), weights="random").validate_machine()
    assert "n_embd=130, which is not a multiple of n_head=4" in str(error)

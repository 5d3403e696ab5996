"""``launch export``: what any strategy trained, loaded by Transformers alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.config.activation import NoCheckpointing
from launcher.config.attention import SdpaAttention
from launcher.config.export import FORMATS
from launcher.config.model.hf import Hf

WORDS = (
    *("tracker=local", "backend.threads=1", "backend.ranks=2", "job.steps=2", "job.sequence_length=32"),
    *("job.micro_batch=2", "job.eval_every=0", "job.eval_sequences=4", "job.sample_tokens=0", "checkpoint.at_end=true"),
    *("model.max_position_embeddings=64", "data=text", "data.path=text.txt", "data.cache=cache", "data.vocab_size=300"),
)
RUNS = {"ddp": ("model=gpt2_tiny", "parallel=ddp"), "fsdp": ("model=llama_tiny", "parallel=fsdp")}
STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
found = {}
for folder in sys.argv[1:]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("Some words", return_tensors="pt").input_ids
    with torch.no_grad():
        found[folder] = {"ids": ids.tolist(), "logits": model(ids).logits.double().tolist(), "end": tokenizer.eos_token}
assert not [name for name in sys.modules if name.partition(".")[0] == "launcher"]
print(json.dumps(found))
"""


def test_transformers_loads_it_with_equal_logits(launch, tmp_path: Path) -> None:
    import torch

    from launcher.models.build import build_model  # seconds, which the tests without a process need not wait for

    (tmp_path / "text.txt").write_text("Some words of a text, with tokens of its own. " * 200)
    for name, words in RUNS.items():
        launch(*WORDS, *words, "model.vocab_size=300", f"run.dir={name}").expect(0)
        said = launch("export", name, f"out_{name}").expect(0).stdout
        assert said.splitlines()[-2:] == [
            f"exported step 2 of {name} to out_{name}",
            f"use it: AutoModelForCausalLM.from_pretrained('out_{name}'), or launch chat out_{name}",
        ]
    alone = [sys.executable, "-I", "-c", STOCK, *(f"out_{name}" for name in RUNS)]
    ended = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    for name in RUNS:
        stock = found[f"out_{name}"]
        folder = tmp_path / name / "checkpoints" / "step_00000002" / "model"
        ours = build_model(Hf(name=str(folder)), seed=0, attention=SdpaAttention(), activation=NoCheckpointing()).eval()
        with torch.no_grad():
            logits = ours(torch.tensor(stock["ids"])).logits.double()
        assert torch.equal(logits, torch.tensor(stock["logits"], dtype=torch.float64)), name
        assert stock["end"] == "<|endoftext|>"


def test_a_run_goes_to_one_file_and_back(launch, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    (tmp_path / "text.txt").write_text("Some words of a text, with tokens of its own. " * 200)
    (tmp_path / "prompts.txt").write_text("Some words\ntokens of\n")
    launch(*WORDS, *RUNS["fsdp"], "model.vocab_size=300", "run.dir=trained").expect(0)
    said = launch("export", "trained", "my.gguf", "format=gguf", "dtype=fp32").expect(0).stdout.splitlines()
    assert said[-3].startswith("checked by llama.cpp")
    assert re.search(r" (\d+) of \1 greedy tokens are the model's", said[-3]), said
    assert said[-2:] == [
        "exported step 2 of trained to my.gguf",
        "use it: llama-cli -m my.gguf, or model.weights=my.gguf",
    ]
    quick = ("job=generate", "job.input=prompts.txt", "job.max_tokens=8", "job.temperature=0", "tracker=local")
    lines = {}
    for name, weights in {"own": "trained", "back": "my.gguf"}.items():
        words = (*quick, "backend.ranks=1", "parallel=single", f"model.weights={weights}", f"run.dir={name}")
        launch(*words).expect(0)
        lines[name] = [json.loads(line) for line in (tmp_path / name / "generated.jsonl").read_text().splitlines()]
    assert lines["own"] == lines["back"]
    launch("export", "trained", "mymodel").expect(0)
    said = launch("export", "mymodel", "small.gguf", "format=gguf", "dtype=q4_k").expect(0).stdout
    assert "tensors: 9 in f32, 28 in q5_0, 2 in q8_0" in said, said  # 256 divides no row
    assert "exported mymodel to small.gguf" in said
    for form, runtime in {"onnx": "onnxruntime_genai", "openvino": "openvino_genai"}.items():
        pytest.importorskip(runtime)
        for dtype in FORMATS[form].dtypes:
            said = launch("export", "mymodel", f"{form}_{dtype}", f"format={form}", f"dtype={dtype}").expect(0).stdout
            checked = next(line for line in said.splitlines() if line.startswith("checked by "))
            is_equal = re.search(r" (\d+) of \1 greedy tokens are the model's", checked) is not None
            assert is_equal or dtype not in FORMATS[form].exact, said
            assert f"use it: {runtime}." in said
    assert "weights=" in launch("chat", "small.gguf", "dry_run=true").expect(0).stdout
    missing = launch("plan", "job=generate", "model.weights=none.gguf").expect(2).stderr
    assert "model.weights=none.gguf: cannot be read: No such file or directory" in missing
    (tmp_path / "text.gguf").write_text("text")
    damaged = launch("plan", "job=generate", "model.weights=text.gguf").expect(2).stderr
    assert "model.weights=text.gguf: cannot be converted: text.gguf is no intact GGUF file" in damaged


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    launch_in_process, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "packed" / "model").mkdir(parents=True)
    (tmp_path / "trained" / "checkpoints").mkdir(parents=True)
    (tmp_path / "trained" / "run.yaml").touch()
    for name in ("run.yaml", "model/config.json"):
        (tmp_path / "packed" / name).write_text("{}")
    for name, config in {
        "sighted": {"model_type": "idefics3", "vision_config": {}, "text_config": {}},
        "biased": {"model_type": "llama", "attention_bias": True},
        "nameless": {"model_type": "llama"},
        "scaled": {"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}},
        "strange": {"model_type": "mamba"},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    for words, said in {
        ("nowhere", "new"): "run=nowhere: is not a folder, and no run in runs begins with it",
        ("there", "new"): "run=there: is neither a run nor a checkpoint",
        ("packed", "new"): "is a run of job=quantize or job=sparsify, whose weights are files already: ",
        ("packed", "new", "format=ggml"): "format=ggml: is not one of safetensors, gguf, onnx, openvino",
        ("packed", "new", "format=gguf"): "DIR={}/new: format=gguf writes one file, whose name ends in .gguf; "
        "name it new.gguf",
        ("packed", "new", "dtype=q8_0"): "dtype=q8_0: format=safetensors holds no such weights",
        ("packed", "new", "check=false"): "check=false: format=safetensors is not checked",
        (
            "packed",
            "new.gguf",
            "format=gguf",
            "max_shard_size=1GB",
        ): "max_shard_size=1GB: format=gguf has no such files",
        ("packed", "new.gguf", "format=gguf"): "config.json has no model_type",
        ("biased", "new", "format=onnx", "dtype=q8_0"): "dtype=q8_0: format=onnx holds no such weights; "
        "write dtype=fp32|int8|int4, or format=gguf",
        ("scaled", "new", "format=openvino"): "does not write llama with rotary positions of type llama3",
        ("strange", "new.gguf", "format=gguf"): "the exporter has no architecture mamba, only gpt2, llama",
        ("sighted", "new.gguf", "format=gguf"): "idefics3 is a model of more than text",
        ("biased", "new.gguf", "format=gguf"): "does not write llama with attention_bias=true",
        ("nameless", "new.gguf", "format=gguf"): "holds no tokenizer, which the file needs",
        ("nameless", "new.gguf", "format=gguf", "merge=true"): "holds all weights of a model, and no adapter to merge",
        ("packed", "there"): "DIR={}/there: is there already",
        ("packed", "no/new"): "there is no folder {}/no",
        ("packed", "trained/checkpoints/new"): "is among the checkpoints of a run",
        ("packed", "new", "dtype=fp8"): "dtype=fp8: is not one of auto, fp32, bf16, fp16",
        ("packed", "new", "dtyp=fp16"): "dtyp: no such option; did you mean dtype?",
        ("packed", "new", "bf16"): "bf16: is neither RUN, DIR nor option=value",
        ("packed", "new", "max_shard_size=5"): "max_shard_size=5: is not a size above 0",
    }.items():
        assert said.format(tmp_path) in launch_in_process("export", *words).expect(2).stderr
    names = ["biased", "nameless", "packed", "scaled", "sighted", "strange", "there", "trained"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names

"""From text to an adapter: trained, resumed, used, exported as PEFT's folder and merged, loaded by plain PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORDS = (
    *("tracker=local", "backend.threads=1", "backend.ranks=1", "parallel=single", "job.sequence_length=32"),
    *("job.micro_batch=2", "data=text", "data.path=text.txt", "data.cache=cache"),
)
TRAIN = (
    *(*WORDS, "job.eval_every=0", "job.eval_sequences=4", "job.sample_tokens=0", "checkpoint.at_end=true"),
    "schedule=constant",
)
STOCK = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
base, adapter, merged = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(adapter)("Some words", return_tensors="pt").input_ids
with torch.no_grad():
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = plain(ids).logits
    beside = PeftModel.from_pretrained(plain, adapter)(ids).logits
    whole = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
assert not [name for name in sys.modules if name.partition(".")[0] == "launcher"]
print(json.dumps({"apart": (beside - whole).abs().max().item(), "moved": (beside - before).abs().max().item()}))
"""


def held_out(launched: Any) -> float:
    (line,) = (line for line in launched.stdout.splitlines() if "held-out loss" in line and "perplexity" in line)
    return float(line.partition("held-out loss ")[2].split()[0])


def last_loss(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.fixture
def base(launch: Any, tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("Some words of a text, with tokens of its own. " * 200)
    sizes = ("model=llama_tiny", "model.vocab_size=300", "data.vocab_size=300", "model.max_position_embeddings=64")
    launch(*TRAIN, *sizes, "job.steps=2", "optimizer.lr=1e-2", "run.dir=base").expect(0)
    launch("export", "base", "weights").expect(0)
    return "weights"


def test_a_run_is_resumed_used_exported_and_merged(
    launch: Any, launch_in_process: Any, tmp_path: Path, base: str
) -> None:
    lora = (
        "model=hf",
        f"model.name=./{base}",
        "data.tokenizer=model",
        "adapter=lora",
        "adapter.r=4",
        "optimizer.lr=1e-2",
    )
    launch(*TRAIN, *lora, "job.steps=4", "checkpoint.every=2", "run.dir=whole").expect(0)
    resumed = ("checkpoint.resume=whole@step_00000002", *(word for word in lora if not word.startswith("adapter")))
    launch(*TRAIN, *resumed, "job.steps=4", "run.dir=again").expect(0)
    assert last_loss(tmp_path / "again") == last_loss(tmp_path / "whole")[2:]

    said = launch("export", "whole", "adapter").expect(0).stdout
    assert "exported the adapter of step 4 of whole to adapter" in said
    launch("export", "whole", "merged", "merge=true").expect(0)
    alone = launch("export", "whole", "my.gguf", "format=gguf").expect(2).stderr
    assert "holds an adapter alone; add merge=true to write the whole model" in alone, alone
    for source, name, words in (("whole", "one", ("merge=true",)), ("merged", "two", ())):
        launch("export", source, f"{name}.gguf", "format=gguf", "check=false", *words).expect(0)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    command = [sys.executable, "-I", "-c", STOCK, base, "adapter", "merged"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["apart"] <= 1e-5
    assert found["moved"] > 1e-3

    own = ("model=hf", f"model.name=./{base}", "data.tokenizer=model")
    evaluate = (*WORDS, "job=evaluate", "job.eval_sequences=8")
    losses = {
        name: held_out(launch(*evaluate, *words).expect(0))
        for name, words in {
            "run": ("model.weights=whole",),
            "folder": (*own, "model.adapter=adapter"),
            "merged": ("model=hf", "model.name=./merged", "data.tokenizer=model"),
            "base": own,
        }.items()
    }
    assert losses["run"] == losses["folder"] == pytest.approx(losses["merged"], abs=1e-4)
    assert losses["base"] != pytest.approx(losses["run"], abs=1e-3)

    asked = {"prompt": "Some words", "temperature": 0, "max_tokens": 8, "logprobs": 1}
    prompts = [*({**asked, "model": name} for name in ("run", "step", "folder")), asked]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    adapters = "job.adapters={run: whole, step: whole/checkpoints/step_00000004, folder: adapter}"
    generate = ("job=generate", "job.input=prompts.jsonl", "precision=fp32", *own[:2], adapters, "run.dir=out")
    launch(*WORDS[:3], *generate).expect(0)
    run, step, folder, plain = (
        {key: value for key, value in json.loads(line).items() if key in ("text", "logprobs")}
        for line in (tmp_path / "out" / "generated.jsonl").read_text().splitlines()
    )
    assert run == step == folder != plain

    refuse_what_is_of_something_else(launch_in_process, tmp_path / base)
    (tmp_path / base).rename(tmp_path / "moved")
    refuse_what_has_no_base(launch_in_process, tmp_path / base)
    moved = ("model=hf", "model.name=./moved", "data.tokenizer=model")
    assert held_out(launch(*evaluate, *moved, "model.adapter=whole").expect(0)) == losses["run"]
    launch("resume", "whole", "job.steps=5", "model.name=./moved").expect(0)


def refuse_what_has_no_base(launch_in_process: Any, gone: Path) -> None:
    """The folder of the weights has moved: each error names it, the adapter and what to type."""
    why = f"an adapter of the weights in {gone}, which is not there"
    for words, said in {
        ("plan", *WORDS, "job=evaluate", "model.weights=whole"): (
            f"model.weights=whole: holds {why}; if it has moved, set model=hf model.name=FOLDER model.adapter=whole"
        ),
        ("resume", "whole", "job.steps=5", "dry_run=true"): "whole model.name=FOLDER",
        ("export", "whole", "new", "merge=true"): f"holds {why}; put it back",
    }.items():
        assert said in launch_in_process(*words).expect(2).stderr


def refuse_what_is_of_something_else(launch_in_process: Any, weights: Path) -> None:
    """Plan runs with other weights and other adapters than those of ``whole``: each error names both."""
    own = ("model=hf", "model.name=./weights", "data.tokenizer=model")
    other = ("model=llama_tiny", "model.vocab_size=300", "model.max_position_embeddings=64", "model.weights=random")
    plan = ("plan", *TRAIN, "job.steps=5")
    for words, said in {
        (*other, "checkpoint.resume=whole"): f"holds an adapter of {weights}",
        (*own, "checkpoint.resume=whole", "adapter=none"): "this run trains all weights",
        (
            *own,
            "checkpoint.resume=whole",
            "adapter=lora",
            "adapter.r=8",
        ): "holds another adapter: its r is 4, this run's is 8",
        (*own, "checkpoint.resume=base", "adapter=lora"): "holds all weights of a model, this run trains adapter=lora",
        ("model=gpt2_tiny", "model.weights=random", "model.adapter=adapter"): "the run has random ones",
        (*own, "model.adapter=base"): "is of a run that trained all weights of a model; set model.weights=base",
        (*own, "model.adapter=adapter", "adapter=lora", "adapter.r=8"): "model.adapter=adapter is continued as it is",
    }.items():
        assert said in launch_in_process(*plan, *words).expect(2).stderr
    serve = ("plan", "job=serve", "backend.ranks=1", "tracker=local")
    for words, said in {
        (*own[:2], "job.adapters.a=base"): "all weights of a model; set model.weights=base instead of job.adapters.a",
        (*own[:2], "job.adapters.a=base/checkpoints/step_00000002"): "is of a run that trained all weights",
        (*own[:2], "job.adapters.a=whole@step_00000007"): "has no complete checkpoint of step 7; it has @step_00000004",
        (*own[:2], "job.adapters.a=nowhere"): "job.adapters.a=nowhere: is not a folder",
        (*other, "job.adapters.a=whole"): f"is an adapter of {weights}",
        ("model.weights=whole", "job.adapters.a=whole"): "model.adapter adds one to it; set job.adapters.NAME=",
    }.items():
        assert said in launch_in_process(*serve, *words).expect(2).stderr
    assert "a (whole@step_00000004, rank 4)" in launch_in_process(*serve, *own[:2], "job.adapters.a=whole").stdout

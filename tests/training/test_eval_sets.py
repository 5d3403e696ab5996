"""Whole texts and named sets: measured as one forward pass would, under every strategy, and during training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.config.compose import compose
from launcher.config.data.auto import AutoData
from launcher.config.job.train import Evaluate
from launcher.config.validate import validate_overrides_used
from launcher.data.dataset import open_splits
from launcher.errors import ConfigError, ConfigErrors
from launcher.execution.validate import validate_machine
from launcher.models.build import build_model
from launcher.protocol.plan import Host
from launcher.protocol.results import read_metrics
from launcher.training.evaluate import _sequences_of_data
from launcher.utils.files import read_json

SMALLEST = (
    *("model.num_hidden_layers=2", "model.hidden_size=32", "model.num_attention_heads=2"),
    *("model.max_position_embeddings=64", "model.dropout=0", "backend.threads=1"),
)
WORDS = (
    *("tracker=local", "data=text", "data.path=prose.txt", "data.vocab_size=300", "data.held_out=0.3"),
    *("model.vocab_size=300", "job.sequence_length=16", "job.micro_batch=3", "data.cache=cache"),
    *SMALLEST,
)
SETS = "job.eval_sets={code: code.txt, both: [prose.txt, code.txt]}"
ALONE = ("parallel=single", "backend.ranks=1")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "prose.txt").write_text("Some words of a text, żółć. " * 40, encoding="utf-8")
    (tmp_path / "code.txt").write_text("def f(x):\n    return x + 1\n" * 30, encoding="utf-8")
    return tmp_path


def measured(folder: Path) -> dict[str, float]:
    metrics: dict[str, float] = read_json(folder / "result.json")["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith("eval/")}


def test_every_strategy_counts_every_token_once(launch: Any, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name, words in {
        "single": ALONE,
        "fsdp": ("parallel=fsdp", "backend.ranks=2"),
        "pipeline": ("parallel=pipeline", "backend.ranks=2"),
    }.items():
        launch("job=evaluate", "job.split=all", SETS, *WORDS, *words, f"run.dir={name}").expect(0)
        found[name] = measured(texts / name)
    for name, values in found.items():
        assert values == pytest.approx(found["single"], rel=1e-6), name
    assert "| both |" in (texts / "fsdp" / "evaluation.md").read_text()

    monkeypatch.chdir(texts)
    run = compose(["job=evaluate", *WORDS, *ALONE]).run
    splits = open_splits(run.data, run.model, sequence_length=16, seed=0)
    model = build_model(run.model, seed=run.job.seed, attention=run.attention, activation=run.activation).eval()
    for name, path in (("", "prose.txt"), ("code/", "code.txt")):
        text = Path(path).read_text(encoding="utf-8")
        ids = [splits.tokenizer.end_id, *splits.tokenizer.encode(text), splits.tokenizer.end_id]
        total = 0.0
        for start in range(0, len(ids) - 1, 16):
            window = torch.tensor([ids[start : start + 17]])
            with torch.no_grad():
                log_probs = model(input_ids=window[:, :-1]).logits.double().log_softmax(-1)
            total -= float(log_probs.gather(2, window[:, 1:, None]).sum())
        expected = {
            "loss": total / (len(ids) - 1),
            "perplexity": math.exp(total / (len(ids) - 1)),
            "bits_per_byte": total / math.log(2) / len(text.encode()),
        }
        for key, value in expected.items():
            assert found["single"][f"eval/{name}{key}"] == pytest.approx(value, rel=1e-5), (name, key)
    assert found["single"]["eval/tokens"] == len(splits.whole)


def test_training_measures_the_sets_and_keeps_the_best_checkpoint_by_one(launch: Any, texts: Path) -> None:
    best = ("checkpoint.every=2", "checkpoint.keep=1", "checkpoint.best_metric=min:code/loss")
    train = ("job.steps=6", "job.eval_every=2", "job.sample_tokens=0", "optimizer.lr=0.003", "run.dir=run")
    launch(*WORDS, *ALONE, *train, *best, SETS).expect(0)
    lines = [line for line in read_metrics(texts / "run" / "metrics.jsonl") if "eval/code/loss" in line]
    assert [line["train/step"] for line in lines] == [2, 4, 6]
    for line in lines:
        for name in ("code", "both"):
            assert line[f"eval/{name}/perplexity"] == pytest.approx(math.exp(line[f"eval/{name}/loss"]))
            assert line[f"eval/{name}/bits_per_byte"] > 0
    lowest = min(lines, key=lambda line: line["eval/code/loss"])
    folder = texts / "run" / "checkpoints" / f"step_{lowest['train/step']:08d}"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["eval_metrics"]["code/loss"] == pytest.approx(lowest["eval/code/loss"], rel=1e-6)
    launch("job=evaluate", *WORDS, *ALONE, SETS, f"checkpoint.resume={folder}", "run.dir=again").expect(0)
    for name in ("code/loss", "code/bits_per_byte"):
        again = measured(texts / "again")[f"eval/{name}"]
        assert again == pytest.approx(lowest[f"eval/{name}"], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("job=evaluate", "data=synthetic", "job.split=all"), "job.split=all: data=synthetic is made up"),
        (("data=synthetic", "job.eval_sets={code: code.txt}"), "data=synthetic has no text"),
        (("job=evaluate", "job.stride=17", "job.split=all"), "skips tokens between windows of 16"),
        (("job.eval_sets={a/b: code.txt}",), "'a/b' cannot be part of a metric's name"),
        (("checkpoint.best_metric=min:code/loss",), "name its text in job.eval_sets"),
    ],
)
def test_what_cannot_be_measured_is_refused(plan_of: Any, words: tuple[str, ...], said: str) -> None:
    text = () if "data=synthetic" in words else ("data=text",)
    with pytest.raises(ConfigErrors) as raised:
        plan_of(*words, *text, "job.sequence_length=16", "tracker=local")
    assert said in str(raised.value)


@pytest.mark.parametrize("word", ["job.eval_sequences=8", "job.stride=8"])
def test_options_without_effect_are_refused(word: str) -> None:
    split = ("job.split=all",) if "eval_sequences" in word else ()
    words = ["job=evaluate", "data=text", "tracker=local", *split, word]
    (error,) = validate_overrides_used(compose(words).run, words)
    assert str(error).startswith(word)


def test_the_files_of_a_set_are_checked_and_named_in_the_plan(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts)
    (texts / "rows.jsonl").write_text('{"text": "a"}\n')
    sets = "job.eval_sets={gone: gone.txt, rows: rows.jsonl, fine: code.txt}"
    run = compose(["job=evaluate", *WORDS, *ALONE, sets]).run
    host = Host(name="box", slots=1, cores=1, memory_bytes=2**34)
    errors = [str(error) for error in validate_machine(run, texts / "run", hosts=[host])]
    assert any(error.startswith("job.eval_sets.gone=gone.txt: there is no such file") for error in errors), errors
    assert any("job.eval_sets.rows=" in error and "JSON" in error for error in errors), errors
    assert not any("fine" in error or "data=hf" in error for error in errors)


def test_a_set_of_chats_is_refused_in_the_plan(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts)
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello yourself"}]
    (texts / "chats.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 4)
    words = ["data=auto", "data.path=code.txt", "tracker=local", *ALONE]
    host = Host(name="box", slots=1, cores=1, memory_bytes=2**34)
    for job in ("job=evaluate", "job=train"):
        run = compose([job, *words, "job.eval_sets={chats: chats.jsonl, fine: prose.txt}"]).run
        errors = [str(error) for error in validate_machine(run, texts / "run", hosts=[host])]
        own = [error for error in errors if error.startswith("job.eval_sets")]
        assert own == [
            "job.eval_sets.chats=chats.jsonl: holds examples, and windows are cut from text; "
            "give text, or set data.eval_path to the examples"
        ]


def test_what_is_said_of_chats_is_not_said_of_the_text_of_a_set(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts)
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello yourself"}]
    (texts / "chats.jsonl").write_text(f"{json.dumps({'talk': chat})}\n" * 4)
    words = ["data.path=chats.jsonl", "data.shape=messages", "data.messages_column=talk", "data.chat_template=chatml"]
    run = compose(["job=evaluate", *words, "data.packing=true", "job.eval_sets={fine: prose.txt}"]).run
    assert isinstance(run.data, AutoData)
    assert run.data.packing
    assert run.data.with_path("prose.txt") == AutoData(
        path="prose.txt", tokenizer="bpe", vocab_size=run.data.vocab_size
    )
    host = Host(name="box", slots=1, cores=1, memory_bytes=2**34)
    errors = [error.option for error in validate_machine(run, texts / "run", hosts=[host])]
    assert not [option for option in errors if option.startswith("job.eval_sets")]


def test_examples_are_no_text_to_evaluate_whole() -> None:
    job = compose(("job=evaluate", "job.split=all")).run.job
    assert isinstance(job, Evaluate)
    splits: Any = SimpleNamespace(whole=None, held_out=[1])
    with pytest.raises(ConfigError, match=r"job\.split=all: .*a part is held out; set job\.split=held_out"):
        _sequences_of_data(job, splits)
    assert _sequences_of_data(replace(job, split="held_out"), splits) == [1]

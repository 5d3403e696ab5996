"""The job ``evaluate``: the loss of held-out sequences under any strategy, and nothing learnt."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from launcher.config.compose import compose
from launcher.errors import ConfigErrors
from launcher.planning.render import render_plan
from launcher.protocol.plan import Host
from launcher.utils.files import read_json

BOX = Host(name="box", slots=2, cores=4, memory_bytes=16 * 2**30)
MODEL = (
    *(
        "tracker=local",
        "data=synthetic",
        "backend.threads=1",
        "model.num_hidden_layers=2",
        "model.hidden_size=32",
        "model.num_attention_heads=2",
    ),
    *("model.max_position_embeddings=64", "model.vocab_size=256", "job.sequence_length=32", "job.micro_batch=4"),
    "job.eval_sequences=21",  # fills no batch of four evenly, on one rank or two
)
EVALUATE = ("job=evaluate", *MODEL)


def metrics_of(folder: Any) -> dict[str, Any]:
    result = read_json(folder / "result.json")
    assert result["status"] == "completed"
    metrics: dict[str, Any] = result["metrics"]
    return metrics


def test_a_checkpoint_keeps_its_tokenizer_on_other_text(launch, tmp_path) -> None:
    (tmp_path / "one.txt").write_text("Some words of the first text, with tokens of its own. " * 200)
    (tmp_path / "other.txt").write_text("other words, of which that tokenizer knows no numbers. " * 200)
    model = (*(word for word in MODEL if word != "data=synthetic"), "model.vocab_size=300", "data=text")
    alone = ("parallel=single", "backend.ranks=1", "data.cache=cache")
    train = (*alone, "job.eval_every=0", "checkpoint.at_end=true", "job.sample_tokens=0", "checkpoint.keep=1")
    launch(*model, *train, "job.steps=2", "data.path=one.txt", "data.vocab_size=300", "run.dir=trained").expect(0)
    words = ("job=evaluate", *model, *alone, "data.path=other.txt")
    launch(*words, "checkpoint.resume=trained", "run.dir=resumed").expect(0)
    launch(*words, "model.weights=trained", "run.dir=loaded").expect(0)
    losses = [metrics_of(tmp_path / name)["eval/loss"] for name in ("resumed", "loaded")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    before = (tmp_path / "trained/checkpoints/step_00000002/model/tokenizer.json").read_bytes()
    launch("resume", "trained", "data.path=other.txt", "job.steps=4", "checkpoint.every=1").expect(0)
    (saved,) = (tmp_path / "trained" / "checkpoints").iterdir()
    assert (saved.name, (saved / "model" / "tokenizer.json").read_bytes()) == ("step_00000004", before)


def test_every_strategy_measures_the_same(launch, tmp_path) -> None:
    losses = {}
    for name, words in {
        "single": ("parallel=single", "backend.ranks=1", "job.gradient_accumulation_steps=3"),
        "ddp": ("parallel=ddp", "backend.ranks=2", "job.repeats=2"),
        "zero3": ("parallel=zero3", "parallel.persistence_threshold=0", "backend.ranks=2"),
    }.items():
        launch(*EVALUATE, *words, f"run.dir={name}").expect(0)
        metrics = metrics_of(tmp_path / name)
        assert metrics["eval/tokens"] == 21 * 32
        assert metrics["eval/perplexity"] == pytest.approx(math.exp(metrics["eval/loss"]))
        assert metrics["perf/tokens_per_s"] > 0
        assert not {"train/loss", "train/lr", "train/grad_norm"} & metrics.keys()
        losses[name] = metrics["eval/loss"]
    assert losses["single"] == pytest.approx(math.log(256), rel=0.05)  # it knows nothing yet
    assert losses == pytest.approx(dict.fromkeys(losses, losses["single"]), rel=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "ddp" / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval/loss"] for line in lines if "eval/loss" in line] == [losses["ddp"]] * 2
    assert not (tmp_path / "ddp" / "checkpoints").exists()


def test_a_checkpoint_and_its_weights_measure_what_training_did(launch, tmp_path) -> None:
    alone = ("parallel=single", "backend.ranks=1")
    train = (
        *alone,
        "job.steps=4",
        "job.eval_every=0",
        "checkpoint.every=4",
        "schedule=constant",
        "job.sample_tokens=0",
    )
    launch(*MODEL, *train, "run.dir=trained").expect(0)
    trained = metrics_of(tmp_path / "trained")
    saved = tmp_path / "trained" / "checkpoints" / "step_00000004"
    launch(*EVALUATE, *alone, f"checkpoint.resume={saved}", "run.dir=resumed").expect(0)
    launch(*EVALUATE, *alone, "model.weights=trained@step_4", "run.dir=loaded").expect(0)
    launch(*EVALUATE, *alone, "run.dir=fresh").expect(0)
    resumed, loaded, fresh = (metrics_of(tmp_path / name) for name in ("resumed", "loaded", "fresh"))
    assert resumed["train/step"] == 4
    assert resumed["eval/loss"] == pytest.approx(trained["eval/loss"], rel=1e-6)
    assert loaded["eval/loss"] == pytest.approx(trained["eval/loss"], rel=1e-6)
    assert fresh["eval/loss"] > trained["eval/loss"] + 0.01


def test_the_plan_speaks_of_no_learning(plan_of) -> None:
    plan = plan_of(*EVALUATE, "job.repeats=2")
    assert plan.work.num_steps == 2 * math.ceil(21 / 8)
    assert (plan.summary.optimizer, plan.summary.schedule, plan.summary.checkpoint) == ("", "", "resume=none")
    memory = plan.memory.per_rank
    assert (memory.gradients, memory.optimizer, memory.parameters) == (0, 0, 4 * plan.memory.num_params)
    assert not {"loss.png", "sample.txt", "checkpoints/step_<n>/"} & set(plan.files)
    assert not plan.warnings
    text = render_plan(plan)
    assert not any(line.split()[0] == "schedule" for line in text.splitlines() if line.strip())
    assert "lr=" not in text


def test_what_deepspeed_allocates_is_counted(plan_of) -> None:
    assert plan_of(*EVALUATE, "parallel=zero3").memory.per_rank.optimizer > 0


def test_the_articles_pipeline_inference_is_planned(plan_of) -> None:
    plan = plan_of("+exp=pipeline_infer_gpt2_large", hosts=[replace(BOX, slots=4)])
    assert str(plan.work.batch) == "micro 8 × accum 4 × dp 1 = 32"
    assert plan.work.tokens_per_step == 32 * 100
    assert plan.topology == {"pipeline": 4}


@pytest.mark.parametrize("word", ["job.eval_sequences=0", "job.repeats=0", "job.micro_batch=0", "+job.steps=3"])
def test_counts_that_measure_nothing_are_refused(word: str) -> None:
    with pytest.raises(ConfigErrors, match=word.strip("+").partition("=")[0]):
        compose(["job=evaluate", word])

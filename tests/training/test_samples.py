"""Texts at evaluations: the same under every strategy, without effect on training, and resumed without repeats."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.protocol.results import read_metrics
from tests.helpers import losses

from .test_train import SMALL

PROMPTS = 'job.sample_prompts=["The old","Of all"]'
WORDS = (*SMALL, "job.steps=4", "job.eval_every=2", "job.log_every=1", "job.global_batch=8")


def samples(folder):
    return [(line["train/step"], line["prompt"], line["text"]) for line in read_metrics(folder / "samples.jsonl")]


def test_every_strategy_writes_the_same_texts_and_trains_as_without(launch, tmp_path):
    launch(*WORDS, "run.dir=plain").expect(0)
    assert not (tmp_path / "plain" / "samples.jsonl").exists()
    whole = losses(tmp_path / "plain")
    for parallel in ("ddp", "fsdp", "zero3", "pipeline", "deepspeed_pipeline"):
        ended = launch(*WORDS, PROMPTS, f"parallel={parallel}", f"run.dir={parallel}").expect(0)
        assert "sample 'The old" in ended.stdout
        found = samples(tmp_path / parallel)
        assert [line[:2] for line in found] == [(n, prompt) for n in (2, 4) for prompt in ("The old", "Of all")]
        assert all(text.startswith(prompt) and len(text) > len(prompt) for _, prompt, text in found)
        assert found == samples(tmp_path / "ddp")
        # sums in another order; the first loss comes before any text
        assert losses(tmp_path / parallel) == (whole if parallel == "ddp" else pytest.approx(whole, rel=1e-5))


def test_a_resumed_run_repeats_no_text_and_no_point(launch, tmp_path):
    words = (*WORDS, PROMPTS, "tracker=tensorboard", "model.dropout=0.1", "parallel=single", "backend.ranks=1")
    launch(*words, "job.steps=6", "run.dir=a", "checkpoint.every=4", "checkpoint.at_end=false").expect(0)
    first = samples(tmp_path / "a")
    launch("resume", "a", "job.steps=8").expect(0)  # from step 4
    again = samples(tmp_path / "a")
    assert [step for step, *_ in again] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert again[:6] == first
    found = EventAccumulator(str(tmp_path / "a" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = {event.step: event.value for event in found.Scalars("train/loss")}
    assert len(points) == len(found.Scalars("train/loss"))
    assert points == pytest.approx(losses(tmp_path / "a"))

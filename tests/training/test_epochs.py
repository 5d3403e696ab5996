"""Runs that count epochs, and runs that stop early: their steps, what they leave, and how they resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from launcher.config.compose import compose
from launcher.config.job.train import Train
from launcher.protocol.plan import Batch
from launcher.training.early_stopping import EarlyStopping
from launcher.training.evaluation import EvaluationResult
from launcher.utils.files import read_json
from tests.conftest import Launch
from tests.helpers import losses

SMALL = (
    *("model.num_hidden_layers=1", "model.hidden_size=32", "model.max_position_embeddings=32", "data=synthetic"),
    *("job.sequence_length=16", "job.eval_sequences=4", "job.sample_tokens=0", "schedule.warmup_steps=1"),
    *("tracker=local", "parallel=single", "backend.ranks=1", "job.micro_batch=4", "checkpoint.keep=0"),
)
EPOCHS = (*SMALL, "data.num_sequences=20", "job.epochs=1.5", "job.eval_every=0")
STALE = (*SMALL, "optimizer.lr=0", "job.eval_every=2", "job.early_stopping_patience=2")
"""A rate of zero never improves: the first evaluation is the best, and the second after it ends the run."""


def test_epochs_set_the_steps_and_a_resumed_run_keeps_them(launch: Launch, tmp_path: Path) -> None:
    planned = launch("plan", *EPOCHS).expect(0).stdout
    assert "1.5 of 20 sequences" in planned
    assert "8 steps" in planned
    whole = launch(*EPOCHS, "run.dir=whole", "checkpoint.every=4").expect(0)
    assert "1.5 epochs of 20 sequences are 8 steps" in whole.stdout
    expected = losses(tmp_path / "whole")
    assert sorted(expected) == list(range(1, 9))
    assert read_json(tmp_path / "whole" / "result.json")["metrics"]["train/num_steps"] == 8
    launch(*EPOCHS, "run.dir=second", "checkpoint.resume=whole/checkpoints/step_00000004").expect(0)
    assert losses(tmp_path / "second") == {step: loss for step, loss in expected.items() if step > 4}
    smaller = (*EPOCHS, "job.micro_batch=2")  # 14 of 30 sequences are left, in steps of 2
    launch(*smaller, "run.dir=third", "checkpoint.resume=whole/checkpoints/step_00000004").expect(0)
    assert sorted(losses(tmp_path / "third")) == list(range(5, 12))
    assert "already at step 8 of 8" in launch("resume", "whole").expect(2).stderr


def test_text_is_counted_by_a_rank(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"Line {number} has some words.\n" for number in range(60)))
    words = [word for word in SMALL if word != "data=synthetic"] + ["data.path=text.txt", "data.vocab_size=300"]
    words += ["job.epochs=1", "job.eval_every=0", "job.eval_sequences=1"]
    assert "rank 0 counts" in launch("plan", *words).expect(0).stdout
    launch(*words, "run.dir=mine").expect(0)
    steps = read_json(tmp_path / "mine" / "result.json")["metrics"]["train/num_steps"]
    assert max(losses(tmp_path / "mine")) == steps
    assert f"{steps:.0f}/{steps:.0f}" in launch("status", "mine").expect(0).stdout


def test_a_run_stops_early_and_says_so(launch: Launch, tmp_path: Path) -> None:
    run = launch(*STALE, "job.steps=40", "run.dir=mine", "checkpoint.at_end=true").expect(0)
    assert "stopped early after step 6: 2 evaluations without an eval/loss better than" in run.stdout
    result = read_json(tmp_path / "mine" / "result.json")
    assert (result["status"], result["metrics"]["train/stopped_early"]) == ("completed", 6)
    assert sorted(losses(tmp_path / "mine")) == list(range(1, 7))
    assert (tmp_path / "mine" / "checkpoints" / "step_00000006").is_dir()
    assert "has stopped early" in launch("resume", "mine").expect(2).stderr


def test_a_resumed_run_keeps_counting(launch: Launch, tmp_path: Path) -> None:
    launch(*STALE, "job.steps=4", "run.dir=mine", "checkpoint.every=4").expect(0)
    launch("resume", "mine", "job.steps=40").expect(0)
    assert sorted(losses(tmp_path / "mine")) == list(range(1, 7))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("job.epochs=0",), "job.epochs=0"),
        (("job.epochs=2", "job.steps=5"), "job.epochs=2 sets the number of steps"),
        (("job.early_stopping_patience=0",), "job.early_stopping_patience=0"),
        (("job.early_stopping_patience=1", "job.eval_every=0"), "evaluates at the end only"),
        (("job.early_stopping_threshold=0.1",), "without job.early_stopping_patience"),
    ],
)
def test_options_that_are_refused(launch: Launch, words: tuple[str, ...], message: str) -> None:
    assert message in launch("plan", *words).expect(2).stderr


def test_the_last_step_completes_the_epochs() -> None:
    job = compose(("job.epochs=2", "data=synthetic")).run.job
    assert isinstance(job, Train)
    batch = Batch(micro_batch=4, gradient_accumulation_steps=1, data_parallel=1)
    assert job.steps_of_epochs(9, batch) == 5
    assert job.steps_of_epochs(9, batch, done=3, drawn=6) == 6
    assert job.steps_of_epochs(9, batch, done=5, drawn=20) == 5


def test_a_loss_that_is_not_finite_is_nothing_to_improve_on() -> None:
    job = compose(("job.early_stopping_patience=2",)).run.job
    assert isinstance(job, Train)
    stopping = EarlyStopping(job, best_metric="min:loss")
    for loss, best, stale in (
        (math.nan, None, 1),
        (4.0, 4.0, 0),
        (math.nan, 4.0, 1),
        (3.0, 3.0, 0),
        (math.nan, 3.0, 1),
    ):
        stopping.observe(EvaluationResult(loss=loss, preempted=False, metrics={}))
        assert (stopping.best, stopping.num_stale) == (best, stale)
    nothing = EarlyStopping(job, best_metric="min:loss")
    nothing.observe(EvaluationResult(loss=math.inf, preempted=False, metrics={}))
    assert str(nothing) == "1 evaluation without a finite eval/loss"

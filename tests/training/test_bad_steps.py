"""Steps whose loss or gradient is not finite, or whose loss spikes: stop, skip or rewind, and replay exactly."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from launcher.config.compose import compose
from launcher.config.job.train import FEWEST_LOSSES, Train
from launcher.data.dataloader import Loader
from launcher.data.dataset import open_splits
from launcher.engines.base import StepResult
from launcher.engines.checkpoint_io import read_state
from launcher.engines.optimizer import OptimizerStep
from launcher.errors import ConfigError, ConfigErrors, JobError
from launcher.protocol.plan import Batch
from launcher.training.bad_steps import BadSteps
from launcher.utils.files import read_json
from tests.conftest import Launch

SMALL = (
    "model.num_hidden_layers=1",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.max_position_embeddings=32",
    "model.dropout=0.1",
    "data=synthetic",
    "job.sequence_length=16",
    "job.eval_sequences=4",
    "job.eval_every=0",
    "job.sample_tokens=0",
    "tracker=local",
)
STRATEGIES = {
    "single": ("backend.ranks=1", "job.micro_batch=4"),
    "ddp": ("backend.ranks=2", "parallel=ddp", "job.micro_batch=2"),
    "zero2": ("backend.ranks=2", "parallel=zero2", "job.micro_batch=2"),
}


class TestJudging:
    @pytest.fixture
    def steps(self) -> BadSteps:
        return BadSteps(Train(spike_factor=2.0, on_bad_step="skip", max_bad_steps=2), drops_steps=False)

    def test_a_spike_is_above_the_factor_of_the_median(self, steps: BadSteps) -> None:
        for loss in (9.0, *(4.0,) * (FEWEST_LOSSES - 2)):
            assert steps.judge(StepResult(loss=loss, grad_norm=1.0, tokens=1)) is None
            assert steps.limit == math.inf
        assert steps.judge(StepResult(loss=3.0, grad_norm=1.0, tokens=1)) is None
        assert steps.limit == 8.0
        why = steps.judge(StepResult(loss=8.0, grad_norm=None, tokens=1, skipped=True))
        assert why == "loss 8.0000 is 2 times 4.0000, the median before"
        assert len(steps.losses) == FEWEST_LOSSES, "a bad one does not count"
        again = BadSteps(Train(spike_factor=2.0), drops_steps=False)
        again.restore(steps.losses)
        assert again.limit == steps.limit

    @pytest.mark.parametrize(
        ("result", "why"),
        [
            (
                StepResult(loss=math.nan, grad_norm=None, tokens=1, nonfinite_ranks=(1, 3)),
                "nan, first seen on rank 1, 3",
            ),
            (StepResult(loss=1.0, grad_norm=None, tokens=1, skipped=True), "the gradient is not finite"),
            (StepResult(loss=1.0, grad_norm=math.inf, tokens=1), "the gradient is not finite"),
            (StepResult(loss=1.0, grad_norm=-1.0, tokens=1), "the gradient is not finite"),  # DeepSpeed's sign for it
        ],
    )
    def test_a_value_that_is_not_finite_is_bad(self, steps: BadSteps, result: StepResult, why: str) -> None:
        assert why in (steps.judge(result) or "")

    def test_fp16_drops_steps_by_itself(self) -> None:
        steps = BadSteps(Train(), drops_steps=True)
        assert steps.judge(StepResult(loss=1.0, grad_norm=None, tokens=1, skipped=True)) is None

    def test_too_many_in_a_row_end_the_run(self, steps: BadSteps) -> None:
        good = StepResult(loss=1.0, grad_norm=1.0, tokens=1)
        for _ in range(3):
            steps.count_skip(1, "bad")
            steps.count_skip(2, "bad")
            steps.judge(good)
        steps.count_skip(1, "bad")
        steps.count_skip(2, "bad")
        with pytest.raises(JobError, match=r"step 3: bad\. 2 steps before it were bad too"):
            steps.count_skip(3, "bad")

    def test_too_many_rewinds_to_one_checkpoint_end_the_run(self) -> None:
        steps = BadSteps(Train(on_bad_step="rewind", max_bad_steps=2), drops_steps=False)
        for to in (10, 10, 20, 20):
            steps.count_rewind(to + 3, "bad", to=to)
            steps.judge(StepResult(loss=1.0, grad_norm=1.0, tokens=1))
        with pytest.raises(JobError, match=r"step 22: bad\. 2 rewinds to step 20"):
            steps.count_rewind(22, "bad", to=20)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["job.on_bad_step=rewind"], "job.on_bad_step"),
        (["job.on_bad_step=skip", "parallel=zero1", "parallel.stage=0"], "job.on_bad_step"),
        (["job.on_bad_step=skip", "parallel=deepspeed_pipeline"], "job.on_bad_step"),
        (["checkpoint.best_metric=max:accuracy"], "checkpoint.best_metric"),
    ],
)
def test_what_cannot_be_done_is_refused(words: list[str], option: str) -> None:
    run = compose(words).run
    (error,) = [error for error in run.job.validate_run(run, world_size=2) if error.option == option]
    assert error.fix


@pytest.mark.parametrize("word", ["job.spike_factor=1", "job.max_bad_steps=0", "checkpoint.best_metric=loss"])
def test_values_that_mean_nothing_are_refused(word: str) -> None:
    with pytest.raises((ConfigError, ConfigErrors), match=word.partition("=")[0]):
        compose([word])


def write_faulty_loss(folder: Path, *, step: int) -> str:
    """Write a plugin whose loss is NaN where a batch has the first sequence of ``step`` (0-based); return its word."""
    run = compose(SMALL).run
    splits = open_splits(run.data, run.model, sequence_length=16, seed=0)
    batch = Batch(micro_batch=4, gradient_accumulation_steps=1, data_parallel=1)
    bad = Loader(splits, batch, seed=0, rank=0).step(step)[0].labels[0].tolist()
    package = folder / "mine"
    package.mkdir()
    parts = {"loss": {"faulty": "mine.parts:faulty"}}
    (package / "__init__.py").write_text(
        f"from launcher.plugins import Plugin\nplugin = Plugin(name='mine', executors={parts})\n"
    )
    (package / "parts.py").write_text(
        "import torch\nfrom launcher.engines.loss import cross_entropy\n"
        "def faulty(logits, labels):\n"
        f"    is_bad = (labels == torch.tensor({bad})).all(dim=1).any()\n"
        "    return cross_entropy(logits, labels) * (float('nan') if is_bad else 1.0)\n"
    )
    return "plugins=[mine]"


def measured(run_dir: Path) -> list[dict[str, float]]:
    """Return what was measured of each step, without times and memory."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    named = [{key: value for key, value in line.items() if key.startswith(("train/", "eval/"))} for line in lines]
    return [line for line in named if len(line) > 1]


def forget(run_dir: Path, *, after: int) -> None:
    """Remove the checkpoints after a step: the run was killed before it wrote them."""
    for folder in (run_dir / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > after:
            shutil.rmtree(folder)


@pytest.mark.parametrize(("strategy", "killed_at"), [("single", 4), ("zero2", 2)])
def test_a_rewound_run_replays_exactly(launch: Launch, tmp_path: Path, strategy: str, killed_at: int) -> None:
    words = (*SMALL, *STRATEGIES[strategy], write_faulty_loss(tmp_path, step=5), "job.loss=faulty", "run.dir=run")
    policy = ("job.on_bad_step=rewind", "checkpoint.every=2", "checkpoint.keep=0", "job.steps=8")
    result = launch(*words, *policy)
    result.expect(0)
    assert "step 6: loss is nan" in result.stdout
    assert "back to step 4, 8 sequences are skipped" in result.stdout
    run_dir = tmp_path / "run"
    whole = measured(run_dir)
    assert [line["train/step"] for line in whole if "train/loss" in line] == list(range(1, 9))
    assert all(line["train/loss"] is not None for line in whole if "train/loss" in line)
    assert {"train/step": 4, "train/skipped_sequences": 8.0} in whole
    manifest = read_json(run_dir / "checkpoints" / "step_00000008" / "manifest.json")
    assert (manifest["data"]["sequences"], manifest["data"]["skipped"]) == (8 * 4 + 8, 8)
    assert [line["train/tokens"] for line in whole if "train/tokens" in line][-1] == 8 * 4 * 16

    forget(run_dir, after=killed_at)
    launch("resume", "run", "plugins=[mine]").expect(0)
    assert measured(run_dir) == whole


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_skipped_step_leaves_the_state_as_it_is(launch: Launch, tmp_path: Path, strategy: str) -> None:
    words = (*SMALL, *STRATEGIES[strategy], write_faulty_loss(tmp_path, step=3), "job.loss=faulty", "run.dir=run")
    result = launch(*words, "job.on_bad_step=skip", "checkpoint.every=1", "checkpoint.keep=0", "job.steps=5")
    result.expect(0)
    assert "step 4 is skipped: loss is nan" in result.stdout
    run_dir = tmp_path / "run"
    before, after, later = (state_of(run_dir, step) for step in (3, 4, 5))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not all(torch.equal(later[name], tensor) for name, tensor in before.items())

    whole = measured(run_dir)
    assert [line["train/loss"] is None for line in whole if "train/loss" in line] == [False, False, False, True, False]
    forget(run_dir, after=2)
    launch("resume", "run", "plugins=[mine]").expect(0)
    assert measured(run_dir) == whole


def state_of(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Return weights and moments of a checkpoint by name."""
    stored, _ = read_state(run_dir / "checkpoints" / f"step_{step:08d}")
    return {name: stored.read(name) for name in stored.shapes if not name.startswith("rng.")}


def test_no_update_follows_a_loss_above_the_limit() -> None:
    model = nn.Linear(2, 1)
    run = compose(SMALL).run
    update = OptimizerStep([model], run, device=torch.device("cpu"))
    before = model.weight.detach().clone()
    for limit, changes in ((3.0, False), (math.inf, True), (None, True), (3.1, True)):
        model(torch.ones(1, 2)).sum().backward()
        result = update.apply(
            torch.tensor(6.0, dtype=torch.float64), torch.tensor(2), lr=0.1, max_loss=limit, preempted=False
        )
        assert (result.loss, result.skipped) == (3.0, not changes)
        assert torch.equal(model.weight, before) != changes
        before = model.weight.detach().clone()

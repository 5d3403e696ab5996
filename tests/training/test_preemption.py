"""A run that is asked to make room: saved on every rank after the same step, and continued as if undisturbed."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config

from launcher.config.compose import compose
from launcher.data.dataset import open_splits
from launcher.engines.base import StepResult
from launcher.engines.checkpoint_io import SCALARS
from launcher.engines.context import Context
from launcher.engines.preemption import Preemption
from launcher.profiling.performance import StepClock
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.results import read_metrics
from launcher.protocol.rundir import RunDir
from launcher.training.callbacks import Callbacks
from launcher.training.trainer import Trainer
from launcher.utils.files import read_json, write_json
from tests.helpers import wait_for

STEPS = 150
SMALL = (
    "model.num_hidden_layers=2",
    "model.hidden_size=64",
    "model.max_position_embeddings=64",
    "model.dropout=0.1",
    "job.sequence_length=32",
    "job.micro_batch=2",
    "job.eval_sequences=8",
    "job.sample_tokens=4",
    "job.log_every=1",
    "job.eval_every=7",
    "schedule.warmup_steps=2",
    "tracker=local",
)
MEASURED = ("train/loss", "train/grad_norm", "train/tokens", "train/lr", "eval/loss", "train/step")


@pytest.fixture
def preemption():
    """Preemption of this process, with the handlers put back at the end."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    preemption = Preemption()
    preemption.install()
    yield preemption
    for number, handler in before.items():
        signal.signal(number, handler)


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
    def test_nothing_to_save_yet(self, preemption, number):
        with pytest.raises(SystemExit) as ending:
            os.kill(os.getpid(), number)
        assert ending.value.code == 75

    def test_work_is_finished_first_whatever_follows(self, preemption):
        preemption.defer()
        assert not preemption.requested()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert preemption.requested()

    def test_an_interrupt_is_no_preemption(self, preemption):
        preemption.defer()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert not preemption.requested()


class FakeEngine:
    """Takes no time; sends this process a signal at the moment given."""

    adapter_config = None
    preferences = None
    device = torch.device("cpu")
    model_config = GPT2Config()

    def __init__(self, at):
        self.at, self.steps, self.evaluations = at, 0, 0

    def step(self, micro_batches, *, lr, max_loss, preempted):
        self.steps += 1
        self._signal_at("step", self.steps)
        return StepResult(loss=1.0, grad_norm=1.0, tokens=64, preempted=preempted())

    def loss_of(self, micro_batch, *, observe=None):
        self.evaluations += 1
        self._signal_at("evaluation", self.steps)
        return 2.0, 1

    def shards(self):
        return []

    def scalars(self):
        return {"steps": self.steps, "evaluations": self.evaluations}

    def _signal_at(self, place, step):
        if self.at == (place, step):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def leave(preemption, tmp_path):
    """Train to step 9 with a signal at one place; return the exit code, the metrics and what was saved by step."""

    def train(*at, words=()):
        run = compose([*SMALL, "job.sample_tokens=0", "job.steps=9", "job.eval_every=3", *words]).run
        run_dir = RunDir(tmp_path)
        write_json(run_dir.plan, {"run_id": "x", "run_hash": "y", "ranks": [{"host": "here"}]})
        context = Context(run=run, run_dir=run_dir, rank=0, local_rank=0, world_size=1, heartbeat=Heartbeat(None))
        splits = open_splits(run.data, run.model, sequence_length=32, seed=0, heartbeat=lambda: None)
        clock = StepClock(context.heartbeat, cuda=False)
        code = 0
        try:
            Trainer(run.job, context, splits, FakeEngine(at), clock, preemption).run()
        except SystemExit as ending:
            code = ending.code
        lines = list(read_metrics(run_dir.metrics))
        folders = run_dir.checkpoints.glob("step_*")
        saved = {int(folder.name[5:]): tuple(read_json(folder / SCALARS).values()) for folder in folders}
        return SimpleNamespace(code=code, lines=lines, saved=saved, store=run_dir.checkpoints)

    return train


@pytest.mark.parametrize(("at", "code", "step"), [(("step", 4), 75, 4), ((), 0, 9)])
def test_callbacks_end_with_the_process(leave, monkeypatch, at, code, step):
    monkeypatch.setattr(Callbacks, "on_end", lambda self, done: {"callback/ended": float(done)})
    left = leave(*at)
    assert left.code == code
    ended = [line for line in left.lines if "callback/ended" in line]
    assert [(line["train/step"], line["callback/ended"]) for line in ended] == [(step, step)]


class TestWhere:
    def test_after_the_step_in_which_it_was_asked(self, leave):
        left = leave("step", 4)
        assert left.code == 75
        assert [line["train/step"] for line in left.lines if "train/loss" in line] == [1, 2, 3, 4]
        assert left.saved == {4: (4, 4)}

    def test_the_checkpoint_comes_before_the_evaluation_of_the_same_step(self, leave):
        left = leave("step", 6)
        assert left.code == 75
        assert left.saved == {6: (6, 4)}  # only the evaluation of step 3 had been made
        assert [line["train/step"] for line in left.lines if "eval/loss" in line] == [3, 6]

    def test_after_the_evaluation_in_which_it_was_asked(self, leave):
        left = leave("evaluation", 3)
        assert left.code == 75
        assert [line["train/step"] for line in left.lines if "train/loss" in line] == [1, 2, 3]
        assert read_json(left.store / "step_00000003" / "manifest.json")["eval_loss"] == 2.0

    @pytest.mark.parametrize("place", ["step", "evaluation"])
    def test_a_run_at_its_last_step_is_completed(self, leave, place):
        left = leave(place, 9)
        assert left.code == 0
        assert set(left.saved) == {9}


def measured(run_dir):
    """Return what was measured, line by line, without times."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in MEASURED if name in line} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Runs without a disturbance: strategy to what was measured."""
    kept = {}

    def measure(launch, parallel):
        if parallel not in kept:
            folder = tmp_path_factory.mktemp(parallel)
            launch(*SMALL, f"job.steps={STEPS}", f"parallel={parallel}", "run.dir=whole", cwd=folder).expect(0)
            kept[parallel] = measured(folder / "whole")
        return kept[parallel]

    return measure


def test_ranks_that_heed_sigterm_do_not_delay_the_end_of_a_failed_run(launch_in_background, tmp_path):
    running = launch_in_background(*SMALL, "job.steps=100000", "parallel=ddp", "run.dir=cut", "backend.grace_s=100")
    running.wait_for_output("step 3/")
    started = time.monotonic()
    running.ranks()[1].kill()
    assert running.wait() == 137, running.output
    assert time.monotonic() - started < 20  # torchrun alone would wait 30 s for the other one
    failure = read_json(tmp_path / "cut" / "failure.json")
    assert failure["rank"] == 1
    assert [place["rank"] for place in failure["ranks"]] == [0]
    assert "launcher/" in failure["ranks"][0]["where"]
    assert not list((tmp_path / "cut").glob("checkpoints/*"))


def test_a_run_that_is_preempted_while_it_loads_starts_anew(launch, launch_interpreter_in_background, tmp_path):
    running = launch_interpreter_in_background(*SMALL, "job.steps=8", "parallel=ddp", "run.dir=cut")

    def loading():
        rank = running.ranks().get(0)
        return rank if rank and "libtorch" in Path(f"/proc/{rank.pid}/maps").read_text() else None

    wait_for(loading).send_signal(signal.SIGUSR1)
    assert running.wait() == 75, running.output
    assert read_json(tmp_path / "cut" / "result.json")["status"] == "preempted"
    launch("resume", "cut").expect(0)
    steps = [line["train/step"] for line in measured(tmp_path / "cut") if "train/loss" in line]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize(
    ("parallel", "number", "who"),
    [
        ("ddp", signal.SIGTERM, "rank 1"),
        ("ddp", signal.SIGTERM, "session"),
        ("ddp", signal.SIGUSR1, "session"),
        ("zero2", signal.SIGUSR1, "rank 1"),
    ],
)
def test_the_run_continues_as_if_nothing_had_happened(
    launch, launch_in_background, undisturbed, tmp_path, parallel, number, who
):
    whole = undisturbed(launch, parallel)
    running = launch_in_background(*SMALL, f"job.steps={STEPS}", f"parallel={parallel}", "run.dir=cut")
    running.wait_for_output("step 3/")
    ranks = running.ranks()
    assert sorted(ranks) == [0, 1]
    (running if who == "session" else ranks[1]).send_signal(number)
    assert running.wait() == 75, running.output

    run_dir = RunDir(tmp_path / "cut")
    result = read_json(run_dir.result)
    assert (result["status"], result["exit_code"]) == ("preempted", 75)
    assert "continue with `launch resume" in running.output.splitlines()[-1]
    assert not run_dir.failure.exists()
    before = measured(run_dir.path)
    last = before[-1]["train/step"]
    assert 3 <= last < STEPS
    assert [folder.name for folder in run_dir.checkpoints.iterdir()] == [f"step_{last:08d}"]

    if who == "session":
        return  # from here on it is as after a signal to a rank
    launch("resume", "cut").expect(0)
    after = measured(run_dir.path)
    steps = [line["train/step"] for line in after if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert [line for line in after if len(line) > 1] == [line for line in whole if len(line) > 1]
    assert after[: len(before)] == before
    assert read_json(run_dir.result)["run_id"] == result["run_id"]


def test_a_run_continues_on_fewer_ranks_with_the_same_samples(launch, tmp_path):
    words = (*SMALL, "model.dropout=0", "job.eval_every=0", "job.steps=6", "checkpoint.every=3", "checkpoint.keep=0")
    launch(*words, "parallel=fsdp", "backend.ranks=2", "run.dir=cut").expect(0)
    whole = [line for line in measured(tmp_path / "cut") if len(line) > 1]
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000006")
    launch("resume", "cut", "parallel=single", "backend.ranks=1").expect(0)
    said = read_json(tmp_path / "cut" / "plan.json")["details"]["checkpoint"]
    assert "step 3 of cut, fsdp on 2 ranks → single on 1 rank" in said
    after = [line for line in measured(tmp_path / "cut") if len(line) > 1]
    assert [line.keys() for line in after] == [line.keys() for line in whole]
    for before, now in zip(whole, after, strict=True):
        assert now == pytest.approx(before, rel=1e-5)

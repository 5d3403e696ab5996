"""Whole runs through the real command: what a run leaves, how it continues, and how it fails."""

import json
import math
import re
import shlex
import signal

import pytest

from launcher.errors import EnvironmentProblem
from launcher.execution.validate import lockable_bytes
from launcher.ops.build import build_ops
from launcher.utils.files import read_json, write_json
from tests.conftest import REPOSITORY
from tests.helpers import losses

SMALL = (
    "model.num_hidden_layers=2",
    "model.hidden_size=64",
    "model.max_position_embeddings=64",
    "job.sequence_length=32",
    "job.micro_batch=2",
    "job.eval_sequences=8",
    "job.sample_tokens=4",
    "schedule.warmup_steps=2",
    "tracker=local",
)


@pytest.mark.parametrize("parallel", ["ddp", "zero3"])
def test_a_run_from_a_checkpoint_repeats_the_undisturbed_one_to_the_bit(launch, tmp_path, parallel):
    words = (*SMALL, f"parallel={parallel}", "model.dropout=0.1", "job.steps=8", "job.eval_every=4")
    launch(*words, "run.dir=whole", "checkpoint.every=4", "checkpoint.keep=0").expect(0)
    launch(*words, "run.dir=second", "checkpoint.resume=whole/checkpoints/step_00000004").expect(0)
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        whole = losses(tmp_path / "whole", name)
        assert losses(tmp_path / "second", name) == {step: value for step, value in whole.items() if step > 4}


def test_a_killed_run_continues_as_if_nothing_had_happened(launch, launch_in_background, tmp_path):
    words = (*SMALL, "job.steps=60", "job.eval_every=0", "checkpoint.every=5", "job.log_every=1")
    launch(*words, "run.dir=whole").expect(0)
    running = launch_in_background(*words, "run.dir=cut")
    running.wait_for_output("checkpoint ")
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert len(losses(tmp_path / "cut")) < 60, "it was over before it could be killed"
    launch("resume", "cut").expect(0)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_run_is_continued_in_its_own_directory(launch, tmp_path):
    words = (*SMALL, "run.dir=mine", "checkpoint.every=3")
    launch(*words, "job.steps=6").expect(0)
    first = losses(tmp_path / "mine")
    run_id = read_json(tmp_path / "mine" / "result.json")["run_id"]
    assert "already at step 6" in launch("resume", "mine").expect(2).stderr
    cut = tmp_path / "mine"
    write_json(cut / "result.json", {**read_json(cut / "result.json"), "status": "failed", "exit_code": 137})
    (cut / "sample.txt").unlink()  # as one that was killed after its last checkpoint
    assert "continuing after step 6" in launch("resume", "mine").expect(0).stdout
    assert read_json(cut / "result.json")["status"] == "completed"
    assert (cut / "sample.txt").exists()
    assert losses(cut) == first
    continued = launch("resume", "mine", "job.steps=9").expect(0)
    assert "continuing after step 6" in continued.stdout
    after = losses(tmp_path / "mine")
    assert sorted(after) == list(range(1, 10))
    assert {step: after[step] for step in first} == first
    assert read_json(tmp_path / "mine" / "result.json")["run_id"] == run_id
    kept = sorted(folder.name for folder in (tmp_path / "mine" / "checkpoints").iterdir())
    assert kept[-2:] == ["step_00000006", "step_00000009"]
    (tmp_path / "mine" / "result.json").unlink()  # as if killed between the last checkpoint and the end
    (tmp_path / "mine" / "loss.png").unlink()
    launch("resume", "mine").expect(0)
    assert (tmp_path / "mine" / "loss.png").exists()
    assert losses(tmp_path / "mine") == after
    assert read_json(tmp_path / "mine" / "result.json")["status"] == "completed"
    (tmp_path / "one.txt").write_text("The")
    answered = ("job=generate", "job.input=one.txt", "job.output=one.jsonl", "job.max_tokens=3", "tracker=local")
    launch(*answered, "model.weights=mine@best", "backend.ranks=1").expect(0)
    answer = json.loads((tmp_path / "one.jsonl").read_text())
    assert answer["text"], "the model and the tokenizer of the run"


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step_and_rank(launch):
    ended = launch(*SMALL, "job.steps=50", "optimizer.lr=1e30", "job.clip_norm=0", "schedule=constant").expect(1)
    failure = read_json(ended.run_dir / "failure.json")
    assert "loss is" in failure["error"]
    assert "at step" in failure["error"]
    assert "rank" in failure["error"]
    assert read_json(ended.run_dir / "result.json")["status"] == "failed"
    assert all(math.isfinite(loss) for loss in losses(ended.run_dir).values())


def test_a_grid_runs_every_trial_and_one_that_fails_stops_no_other(launch, tmp_path):
    ended = launch("-m", *SMALL, "job.steps=4", "job.clip_norm=0", "schedule=constant", "optimizer.lr=1e30,1e-3,2e-3")
    ended.expect(1)
    (table,) = tmp_path.glob("runs/*/*/sweep.json")
    trials = read_json(table)["trials"]
    assert [trial["status"] for trial in trials] == ["failed", "completed", "completed"]
    assert [trial["exit_code"] for trial in trials] == [1, 0, 0]
    assert len({trial["run_dir"] for trial in trials}) == 3
    assert "← best" in ended.stdout


def test_interrupting_a_grid_ends_it(launch_in_background, tmp_path):
    running = launch_in_background("-m", *SMALL, "job.steps=100000", "job.eval_every=0", "job.seed=1,2")
    running.wait_for_output("step 10/")
    running.send_signal(signal.SIGINT)
    assert running.wait() == 128 + signal.SIGINT
    (table,) = tmp_path.glob("runs/*/*/sweep.json")
    assert [trial["status"] for trial in read_json(table)["trials"]] == ["cancelled"]


def test_the_pages_command_for_gpt2_xl_on_a_small_model(launch, tmp_path):
    page = (REPOSITORY / "docs" / "train.md").read_text()
    (command,) = re.findall(
        r"^launch (\+exp=zero3_gpt2xl parallel=zero_infinity.*?[^\\])$", page, re.DOTALL | re.MULTILINE
    )
    words = shlex.split(command.replace("\\\n", " "))
    try:
        build_ops(["cpu_adam", "pin_memory", "async_io"], say=print)
    except EnvironmentProblem as problem:
        pytest.skip(str(problem))
    swap = tmp_path / "swap"
    small = (
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        "model.hidden_size=64",
        f"parallel.nvme_path={swap}",
    )
    limit = lockable_bytes()
    if limit is not None and limit < 2_000_000_000:  # a user's; root may lock all
        assert "this user may lock" in launch(*words, *small).expect(2).stderr
        return
    ended = launch(*words, *small).expect(0)
    assert sorted(losses(ended.run_dir)) == [1, 2]
    assert "cpu_adam" in ended.stdout
    assert not list(swap.iterdir()), "the swap folder is left"

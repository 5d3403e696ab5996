"""What ``launch`` does without a word more: the README's first command."""

from __future__ import annotations

import json

from launcher.protocol.rundir import RunDir


def test_the_default_run_learns_and_leaves_everything(launch) -> None:
    ended = launch(timeout=550).expect(0)
    run_dir = RunDir(ended.run_dir)
    result = json.loads(run_dir.result.read_text())
    assert (result["status"], result["exit_code"]) == ("completed", 0)
    steps = json.loads(run_dir.plan.read_text())["work"]["num_steps"]
    metrics = result["metrics"]
    assert metrics["train/step"] == steps
    assert metrics["eval/loss"] < metrics["baseline/unigram"] - 0.5 < metrics["baseline/uniform"]
    lines = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    assert [line["train/step"] for line in lines if "train/loss" in line] == list(range(1, steps + 1))
    assert len([line for line in lines if "eval/loss" in line]) == steps // 50
    assert metrics["train/tokens"] == steps * 16 * 128
    for name in ("train/lr", "train/grad_norm", "perf/tokens_per_s", "memory/peak_bytes"):
        assert metrics[name] > 0
    assert "perf/mfu" not in metrics, "a CPU has no stated peak"
    for part in ("data", "forward", "backward", "optimizer", "evaluate"):
        assert metrics[f"time/{part}_s"] > 0
    assert run_dir.curve.read_bytes().startswith(b"\x89PNG")
    assert run_dir.sample.read_text().startswith("The")
    assert len(list(run_dir.logs.glob("*.[01].log"))) == 2
    assert list(run_dir.tracker("wandb").glob("offline-run-*/*.wandb"))
    assert f":0 | step {steps}/{steps}" in ended.stdout
    *_, last, opened = ended.stdout.partition("held-out loss")
    assert last
    assert "launch status" in opened, "the end says what to type next"
    assert opened.splitlines()[-1].startswith(f"model: launch chat runs/gpt2_tiny/{run_dir.path.name}, or launch job=")
    assert run_dir.checkpoints.joinpath(f"step_{steps:08d}", "manifest.json").is_file(), "its model is kept"

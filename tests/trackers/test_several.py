"""Several trackers at once, each a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import PlannedRun, Start
from .mlflow_stub import serve

Planned = Callable[..., PlannedRun]
TOKEN = "correct-horse-battery-staple"


def test_several_trackers_are_processes_of_which_one_may_fail(
    tmp_path: Path, planned: Planned, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B is offline, MLflow gets a token from the environment, and TensorBoard's folder is taken."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    with serve() as server:
        run = planned("tracker.report_to=[wandb,mlflow,tensorboard]", f"tracker.mlflow.tracking_uri={server.url}")
        assert [each.kind for each in run.plan.tracker.members] == ["wandb", "mlflow", "tensorboard"]
        run.run_dir.tracker("tensorboard").write_text("a file")
        sidecars = {kind: start(run, kind) for kind in run.run.tracker.report_to}  # type: ignore[attr-defined]
        run.record(1, 3, resumed_at=0)
        printed = {kind: each.finish(0) for kind, each in sidecars.items()}
    assert [line.partition(" (")[0] for line in printed["tensorboard"].splitlines()] == ["TensorBoard gave up"]
    assert sidecars["tensorboard"].process.returncode == 1
    assert "wandb sync" in printed["wandb"]
    ((run_id, stored),) = server.runs.items()
    assert printed["mlflow"] == f"MLflow: {server.url}/#/experiments/7/runs/{run_id}\n"
    assert [point["step"] for point in server.metrics if point["key"] == "train/loss"] == [1, 2, 3]
    assert stored["info"]["status"] == "FINISHED"
    assert server.authorizations == {f"Bearer {TOKEN}"}
    params = {each["key"]: each["value"] for each in stored["data"]["params"]}
    assert (params["tracker.kind"], params["tracker.tracking_uri"]) == ("mlflow", server.url)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(TOKEN.encode() in file.read_bytes() for file in files)
    assert json.loads((run.run_dir.tracker("mlflow") / "run.json").read_text())["mlflow_run_id"] == run_id

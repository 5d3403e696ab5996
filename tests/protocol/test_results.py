"""result.json and what it is folded from."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.protocol.results import last_metrics, read_metrics, write_result
from launcher.protocol.rundir import RunDir

METRICS = """\
{"train/step": 1, "train/loss": 3.5, "time": 1.0}
{"train/step": 1, "eval/loss": 4.5, "time": 2.0}
{"train/step": 2, "train/loss": null, "time": 3.0}
{"train/step": 3, "train/lo"""


def test_the_last_value_of_each_metric_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(METRICS)
    assert len(list(read_metrics(path))) == 3
    assert last_metrics(path) == {"train/step": 2, "train/loss": None, "eval/loss": 4.5, "time": 3.0}


def test_a_run_that_never_started_has_no_metrics(tmp_path: Path) -> None:
    assert last_metrics(tmp_path / "metrics.jsonl") == {}


def test_the_result_tells_how_the_run_ended(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.metrics.write_text(METRICS)
    write_result(run_dir, status="preempted", exit_code=75, run_id="a-run")
    write_result(run_dir, status="failed", exit_code=137, run_id="a-run")
    result = json.loads(run_dir.result.read_text())
    assert result.pop("metrics")["eval/loss"] == 4.5
    assert result == {"status": "failed", "exit_code": 137, "run_id": "a-run"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.jsonl", "result.json"]

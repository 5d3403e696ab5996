"""Alerts and configuration as promtool judges them: each alert fires, and does not, on series of its own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config.run import Run
from launcher.deploy.monitoring.rules import Alert, serving_alerts, training_alerts
from tests.deploy.monitoring.cases import SERVING, TRAINING, VLLM, Case
from tests.deploy.monitoring.rendered import PROMTOOL, SERVER, TRAINING_RUN, VLLM_SERVER, rendered, written

pytestmark = pytest.mark.skipif(PROMTOOL is None, reason="Debian's prometheus is not installed")
SUBJECTS: dict[str, tuple[tuple[str, ...], Sequence[Case]]] = {
    "serving": (SERVER, SERVING),
    "training": (TRAINING_RUN, TRAINING),
    "vllm": (VLLM_SERVER, VLLM),
}


def promtool(*words: str, folder: Path) -> str:
    """Return what promtool prints; fail where it fails."""
    assert PROMTOOL is not None
    ended = subprocess.run([PROMTOOL, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def alerts_of(run: Run) -> dict[str, Alert]:
    found = training_alerts(run) if run.job.kind == "train" else serving_alerts(run)
    return {alert.name: alert for alert in found}


def expected(case: Case, alert: Alert) -> list[dict[str, Any]]:
    """Return the alert as promtool expects it, texts filled in."""
    if not case.fires:
        return []

    def filled(text: str) -> str:
        return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: case.labels[found[1]], text)

    annotations = {"summary": filled(alert.summary), "description": filled(alert.action)}
    return [{"exp_labels": {"severity": alert.severity, **case.labels}, "exp_annotations": annotations}]


@pytest.mark.parametrize("name", SUBJECTS)
def test_alerts_fire_and_do_not(name: str, tmp_path: Path) -> None:
    words, cases = SUBJECTS[name]
    run, files = rendered(*words)
    written(files, tmp_path)
    alerts = alerts_of(run)
    if name != "vllm":
        assert {(case.alert, case.fires) for case in cases} == {
            (alert, fires) for alert in alerts for fires in (True, False)
        }
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
            "alert_rule_test": [
                {"eval_time": "70m", "alertname": case.alert, "exp_alerts": expected(case, alerts[case.alert])}
            ],
        }
        for case in cases
    ]
    (rules,) = (path for path in files if path.startswith("rules/"))
    (tmp_path / "tests.yml").write_text(
        yaml.safe_dump({"rule_files": [rules], "evaluation_interval": "1m", "tests": tests}, sort_keys=False)
    )
    promtool("test", "rules", "tests.yml", folder=tmp_path)


@pytest.mark.parametrize("words", [SERVER, TRAINING_RUN], ids=["serving", "training"])
def test_prometheus_takes_configuration_and_rules(words: tuple[str, ...], tmp_path: Path) -> None:
    _, files = rendered(*words, "deploy.alertmanagers=[localhost:9093]", "deploy.targets=[node1:8000,'[::1]:8000']")
    written(files, tmp_path)
    shown = promtool("check", "config", "--lint-fatal", "prometheus.yml", folder=tmp_path)
    assert "1 rule files found" in shown
    assert yaml.safe_load(files["prometheus.yml"])["scrape_configs"] == [
        {"job_name": "chat", "static_configs": [{"targets": ["node1:8000", "[::1]:8000"]}]}
    ]

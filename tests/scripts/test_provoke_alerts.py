"""What the script that provokes alerts makes of rules, and of what a Prometheus says of its alerts."""

from __future__ import annotations

import re

import pytest
import yaml
from monitored_runs import divided
from provoke_alerts import Watch

from tests.conftest import REPOSITORY

RULES = REPOSITORY / "tests/golden/deploy/monitoring"


def rules(name: str) -> dict[str, dict[str, str]]:
    """Return the rendered rules by name, 20 times as fast."""
    text = divided((RULES / name / f"rules/{name}.yml").read_text(), 20)
    assert not re.search(r"\[\d+[mhd]\]|offset \d+[mhd]|for: \d+[mhd]", text)
    return {
        rule.get("alert") or rule["record"]: rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]
    }


def test_all_windows_and_waits_are_shorter() -> None:
    found = {**rules("serving"), **rules("training")}
    grows = found["ServingQueueGrows"]
    assert (grows["expr"], grows["for"]) == (
        "job:serving_waiting:avg > 8 and deriv(job:serving_waiting:avg[30s]) > 0",
        "15s",
    )
    assert "[4320s]" in found["job:serving_slow:ratio_rate1d"]["expr"]
    assert "ratio_rate30m < 0.5 and on (run_id) launcher:train_step offset 90s " in found["TrainingGoodputLow"]["expr"]
    assert found["TrainingFailed"]["for"] == "0s"


def test_an_alert_is_followed_from_its_event_to_its_end() -> None:
    states: dict[str, str] = {}
    said: list[str] = []
    watch = Watch(lambda: states, say=lambda text: said.append(text.partition("s  ")[2]))
    watch.look()
    watch.calm(0.01)
    watch.begins("the server is killed", "Down")
    for state in ("pending", "pending", "firing"):
        states["Down"] = state
        watch.look()
    watch.wait_until_fired("Down")
    watch.ends("the server is started", "Down")
    states["Other"] = "pending"
    watch.look()
    assert watch.provoked["Down"].ended is None
    del states["Down"]
    watch.look()
    watch.wait_until_ended("Down")
    assert said == [
        "the server is killed",
        "Down pending",
        "Down firing",
        "the server is started",
        "Other pending",
        "Down inactive",
    ]
    assert list(watch.table())[2:] == ["| `Down` | the server is killed | 0 s | 0 s |"]
    with pytest.raises(RuntimeError, match=r"active before the event: \['Other'\]"):
        watch.begins("another event", "Other")
    with pytest.raises(RuntimeError, match="active before anything happened"):
        watch.calm(1)

"""What W&B's client is given, in the place of a client."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb

from launcher.config.compose import compose
from launcher.protocol.plan import Plan
from launcher.protocol.rundir import RunDir
from launcher.testing.tracker import TrackerContract
from launcher.trackers.wandb_run import WandbRun


class Client:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.exit_code: int | None = None
        self.dir = "wandb/offline-run/files"

    def define_metric(self, name: str, **options: str) -> None:
        """Do nothing."""

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class TestContract(TrackerContract):
    overrides = ("tracker=wandb",)

    @pytest.fixture(autouse=True)
    def client(self, monkeypatch: pytest.MonkeyPatch) -> Client:
        client = Client()
        monkeypatch.setattr(wandb, "init", lambda **options: client)
        monkeypatch.setattr("launcher.trackers.records.find_revision", lambda *folders: None)
        return client


def test_the_time_of_a_line_is_no_metric(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client()
    monkeypatch.setattr(wandb, "init", lambda **options: client)
    monkeypatch.setattr("launcher.trackers.records.find_revision", lambda *folders: None)  # git is a process
    run_dir = RunDir(tmp_path)
    line = {"train/step": 3, "train/loss": 2.5, "train/grad_norm": None, "time": 7.0}
    run_dir.metrics.write_text(json.dumps(line) + "\n")
    run = WandbRun(run_dir, compose([]).run, plan_of(), online=False)
    run.log(line)
    (sent,) = client.logged
    assert math.isnan(sent.pop("train/grad_norm"))
    assert sent == {"train/step": 3, "train/loss": 2.5, "_timestamp": 7.0}
    run.finish(4)
    assert client.summary == {"train/step": 3, "train/loss": 2.5, "exit_code": 4}
    assert client.exit_code == 4

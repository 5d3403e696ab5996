"""MLflow: its own store in a database file, and its REST API, of which a stub keeps what it is sent."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowEntity

from launcher.config.tracker import Mlflow
from launcher.errors import ConfigError
from launcher.protocol.metrics import MetricsWriter, SampleWriter
from launcher.protocol.plan import TrackerPlan
from launcher.testing.tracker import TrackerContract
from launcher.trackers.base import NotSent, TrackerFailed
from launcher.trackers.mlflow_run import SETTINGS
from launcher.trackers.sidecar import Sender, of_tracker, open_run

from .conftest import PlannedRun
from .mlflow_stub import Stub, serve

Planned = Callable[..., PlannedRun]
TOKEN = "correct-horse-battery-staple"


@pytest.fixture(autouse=True)
def no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.trackers.records.find_revision", lambda *folders: None)  # git is a process
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # the tracker sets them, in a process of its own


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    with serve() as stub:
        yield stub


class TestContract(TrackerContract):
    overrides = ("tracker=mlflow",)

    @pytest.fixture(autouse=True)
    def server(self, monkeypatch: pytest.MonkeyPatch, server: Stub, plan: object) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)  # after the plan: a database is made in seconds


def sender_of(run: PlannedRun) -> Sender:
    configured, plan = of_tracker(run.run, run.plan, "mlflow")
    return Sender(run.run_dir, open_run(run.run_dir, configured, plan), plan)


def planned_in(address: str | None, **options: object) -> TrackerPlan:
    tracker = Mlflow(tracking_uri=address, **options)  # type: ignore[arg-type]
    found = tracker.plan("a-run", environ={}, home=Path("/home/me"), run_name="gpt2")
    return tracker.locate(found, run_dir="/runs/gpt2/a-run", root="/runs")


def test_the_plan_says_where_runs_are_kept() -> None:
    kept = planned_in(None)
    assert (kept.mode, kept.place, kept.project) == ("offline", "sqlite:////runs/mlflow.db", "launcher")
    assert "mlflow ui --backend-store-uri sqlite:////runs/mlflow.db" in kept.reason
    kept = planned_in("https://mlflow.example.org", experiment="mine")
    assert (kept.mode, kept.place, kept.project) == ("online", "https://mlflow.example.org", "mine")
    assert kept.reason == "server of tracker.tracking_uri"


@pytest.mark.parametrize("address", ["mlruns", "ftp://host", "sqlite:///mlflow.db", "file:///mlruns"])
def test_an_address_that_keeps_no_runs_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^tracker\.tracking_uri="):
        planned_in(address)


def test_a_password_in_the_environment_reaches_neither_plan_nor_snapshot(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{TOKEN}@127.0.0.1:1")
    run = planned("tracker=mlflow")
    assert run.plan.tracker.place == "http://me:********@127.0.0.1:1"
    files = [file for file in run.run_dir.path.rglob("*") if file.is_file()]
    assert not any(TOKEN.encode() in file.read_bytes() for file in files)
    assert not any(TOKEN in word for command in run.plan.hosts[0].sidecars for word in command.argv)


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # of a loader that MLflow uses
def test_a_run_is_continued_and_ended(tmp_path: Path, planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("tracker=mlflow", f"tracker.tracking_uri=sqlite:///{tmp_path}/a.db", "tracker.tags={team: blue}")
    run = planned(*words, "job.steps=6")
    sender = sender_of(run)
    run.record(1, 6, resumed_at=0)
    with SampleWriter(run.run_dir.samples) as texts:
        texts.record(1, prompt="The", text="The end")
        sender.send(is_last=False)
        texts.record(2, prompt="The", text="The very end")
    run.run_dir.sample.write_text("last\n")
    sender.send(is_last=True)
    sender.tracked.finish(143)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/a.db")

    def stored() -> MlflowEntity:
        (experiment,) = client.search_experiments(filter_string="name = 'launcher'")
        (found,) = client.search_runs([experiment.experiment_id])
        return found

    found = stored()
    assert (found.info.status, found.info.run_name) == ("KILLED", run.plan.run_id)
    assert (found.data.tags["launcher.run_id"], found.data.tags["team"]) == (run.plan.run_id, "blue")
    assert (found.data.params["job.steps"], found.data.params["model.kind"]) == ("6", "gpt2")
    names = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert names == {"run.yaml", "plan.json", "sample.txt", "samples.json"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/a.db")  # load_table searches there
    table = client.load_table(found.info.experiment_id, run_ids=[found.info.run_id], artifact_file="samples.json")
    assert table.values.tolist() == [[1, "The", "The end"], [2, "The", "The very end"]]

    again = planned(*words, "job.steps=8")
    sender = sender_of(again)
    run.record(7, 8, resumed_at=6)
    sender.send(is_last=True)
    sender.tracked.finish(0)
    (found, first) = (stored(), found)
    assert (found.info.run_id, found.info.status) == (first.info.run_id, "FINISHED")
    assert (found.data.params["job.steps"], found.data.tags["launcher.changed.job.steps"]) == ("6", "8")
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, round(point.value, 4)) for point in history] == [(n, round(5 / n, 4)) for n in range(1, 9)]


def test_names_and_numbers_are_within_the_limits_of_a_server(planned: Planned, server: Stub) -> None:
    run = planned("tracker=mlflow", f"tracker.tracking_uri={server.url}")
    sender = sender_of(run)
    with MetricsWriter(run.run_dir.metrics) as writer:
        for step in range(1, 1302):
            writer.record(step, **{"train/loss": math.nan if step == 1 else 1.0, "Ω" * 300: 2.0})
    sender.send(is_last=True)
    sender.tracked.finish(1)
    assert server.batches == [1000, 1000, 602]
    assert {point["key"] for point in server.metrics} == {"train/loss", "_" * 250}
    assert str(server.metrics[0]["value"]) == "NaN"
    ((run_id, stored),) = server.runs.items()
    assert stored["info"]["status"] == "FAILED"
    assert {f"{run_id}/run.yaml", f"{run_id}/plan.json"} <= set(server.files)


def test_what_a_server_does_not_take_is_sent_when_it_answers(
    planned: Planned, server: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launcher.trackers.sidecar._RETRY_S", (0.0, 0.0))
    run = planned("tracker=mlflow", f"tracker.tracking_uri={server.url}")
    sender = sender_of(run)
    answer, server_answer = Stub.answer, lambda *_: (500, {"error_code": "INTERNAL_ERROR", "message": "down"})
    monkeypatch.setattr(Stub, "answer", server_answer)
    run.record(1, 3, resumed_at=0)
    for _ in range(3):
        sender.send(is_last=False)
    assert not (run.run_dir.tracker("mlflow") / "sent.json").exists()
    monkeypatch.setattr(Stub, "answer", answer)
    sender.send(is_last=False)
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in printed] == [
        "MLflow: not reachable",
        f"MLflow: {server.url}/#/experiments/7/runs/{next(iter(server.runs))}",
        "MLflow: sends again",
    ]
    assert [point["step"] for point in server.metrics if point["key"] == "train/loss"] == [1, 2, 3]


def test_without_a_server_the_end_says_so(planned: Planned) -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        run = planned("tracker=mlflow", f"tracker.tracking_uri=http://127.0.0.1:{port.getsockname()[1]}")
        sender = sender_of(run)
        run.record(1, 3, resumed_at=0)
        with pytest.raises(TrackerFailed, match="onnection"):
            sender.send(is_last=True)
        with pytest.raises(NotSent, match="onnection"):
            sender.tracked.flush()

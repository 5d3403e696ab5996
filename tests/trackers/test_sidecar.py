"""The W&B sidecar, with the real client: offline, online against a stub, killed, and without a server."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import wandb
from wandb.sdk.mailbox.mailbox_handle import HandleAbandonedError

from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults, draw_bars
from launcher.config.benchmark.memory import ActivationBenchmark
from launcher.protocol.metrics import MetricsWriter, SampleWriter
from launcher.protocol.results import last_metrics
from launcher.trackers import sidecar as sidecar_program
from launcher.trackers.sidecar import RunEndListener
from launcher.utils.files import write_json
from tests.helpers import wait_for

from .conftest import PlannedRun, Sidecar, Start, shown
from .wandb_file import read_offline_run
from .wandb_stub import KEY, Stub, serve

Planned = Callable[..., PlannedRun]
SECRET = "correct-horse-battery-staple"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    with serve() as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield stub


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Return a folder with a short name, as the agent has one."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # sockets have short names
        yield Path(folder)


def tracked_steps(sidecar: Sidecar) -> int:
    return len(read_offline_run(sidecar.offline_folders[-1]).history)


def test_an_offline_run_holds_what_the_run_left_behind(
    tmp_path: Path, planned: Planned, start: Start, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("LAUNCHER_AGENT_SCRATCH", str(scratch))
    run = planned("tracker.mode=offline", "tracker.tags=[a,b]", f"job.sample_prompt={SECRET}", "job.steps=7")
    monkeypatch.setenv("HF_TOKEN", SECRET)  # set since: a plan of its value is refused
    sidecar = start(run)
    with MetricsWriter(run.run_dir.metrics) as writer:
        writer.record(1, **{"train/loss": 5.0})
        assert "wandb sync" in sidecar.read_line()
        assert list(scratch.iterdir()), "the agent's folder holds W&B's temporary files"
        assert list(temporary.iterdir()) == [], "nothing is left there once the agent's folder is swept"
        writer.record(2, **{"train/loss": float("nan"), "train/lr": 0.25})
        writer.record(2, **{"eval/loss": 4.0})
    with SampleWriter(run.run_dir.samples) as texts:
        texts.record(2, prompt="Of", text=f"Of {SECRET}")
    run.run_dir.sample.write_text("The end\n")
    sidecar.process.send_signal(signal.SIGTERM)
    sidecar.process.send_signal(signal.SIGINT)
    assert sidecar.finish(3) == ""
    assert sidecar.process.returncode == 0

    (folder,) = sidecar.offline_folders
    found = read_offline_run(folder)
    expected = run.expected_history()
    assert math.isnan(found.history[1].pop("train/loss"))
    assert expected[1].pop("train/loss") is None
    *rows, table = [shown(row) for row in found.history]
    assert rows == expected
    assert table["train/step"] == 2
    kept = json.loads((folder / "files" / table["samples.path"]).read_text())
    assert (kept["columns"], kept["data"]) == (["step", "prompt", "text"], [[2, "Of", "Of ********"]])
    assert (found.run_id, found.name, found.project) == (run.plan.run_id, run.plan.run_id, "launcher")
    assert (found.group, found.job_type, found.tags, found.exit_code) == (run.plan.name, "train", ("a", "b"), 3)
    assert found.arguments == ()
    assert (found.summary["eval/loss"], found.summary["sample"]) == (4.0, "The end\n")
    assert found.config["job"]["steps"] == 7
    assert found.config["job"]["sample_prompt"] == "********"
    assert found.config["run_hash"] == run.plan.run_hash
    assert len(found.config["git_commit"]) == 40
    holding = [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
    assert holding == []
    files = [file for file in run.run_dir.tracker("wandb").rglob("*") if file.is_file()]
    assert not any(SECRET.encode() in file.read_bytes() for file in files)


def test_what_a_benchmark_found_is_tables_and_a_picture(planned: Planned, start: Start, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    run = planned("tracker.mode=offline", "job=benchmark", "benchmark=activation", "parallel=single", "backend.ranks=1")
    sidecar = start(run)
    samples = {"step_s": (3.0, 1.0, 2.0), "peak_bytes": (5.0,)}
    found = BenchmarkResults(
        benchmark=ActivationBenchmark(),
        cases=[BenchmarkCase(name="none", samples=samples), BenchmarkCase(name="full", samples={"step_s": (4.0,)})],
        findings=(f"it is so, says {SECRET}",),
        metrics={},
        facts={},
    )
    write_json(run.run_dir.benchmark("json"), found.tree({"processor": "x"}))
    draw_bars(run.run_dir.benchmark("png"), {"none": {"step_s": (1.0,)}}, title="t")
    run.record(1, 1, resumed_at=0)
    assert "wandb sync" in sidecar.read_line()  # it is open: the time to finish in is not spent on that
    assert sidecar.finish(0) == ""
    (folder,) = sidecar.offline_folders
    summary = read_offline_run(folder).summary

    def kept(name: str) -> Path:
        return folder / "files" / summary[f"benchmark/{name}"]["path"]

    cases = json.loads(kept("cases").read_text())
    assert cases["columns"] == ["case", "quantity", "median", "least", "most", "values"]
    assert cases["data"] == [
        ["none", "step_s", 2, 1, 3, 3],
        ["none", "peak_bytes", 5, 5, 5, 1],
        ["full", "step_s", 4, 4, 4, 1],
    ]
    assert json.loads(kept("findings").read_text())["data"] == [["it is so, says ********"]]
    assert kept("picture").read_bytes() == run.run_dir.benchmark("png").read_bytes()


def test_when_everything_is_killed_only_the_last_second_is_lost(planned: Planned, start: Start) -> None:
    run = planned()
    sidecar = start(run)
    run.record(1, 20, resumed_at=0)
    sidecar.read_line()
    wait_for(lambda: tracked_steps(sidecar) == 20, seconds=10)  # left alone, the client writes every 15 s
    for process in [*sidecar.family, psutil.Process(sidecar.process.pid)]:
        process.kill()
    sidecar.process.wait(timeout=30)
    found = read_offline_run(sidecar.offline_folders[0])
    assert [shown(row) for row in found.history] == run.expected_history()
    assert found.exit_code is None


def test_when_the_agent_is_gone_it_finishes_as_failed_and_goes(planned: Planned, start: Start) -> None:
    run = planned()
    sidecar = start(run)
    run.record(1, 3, resumed_at=0)
    sidecar.read_line()
    family = sidecar.family
    sidecar.process.communicate(timeout=60)  # closes its stdin
    assert read_offline_run(sidecar.offline_folders[0]).exit_code == 1
    assert psutil.wait_procs(family, timeout=30)[1] == []


def test_a_run_that_fails_before_its_first_step_is_recorded_too(planned: Planned, start: Start) -> None:
    sidecar = start(planned())
    sidecar.finish(9)
    found = read_offline_run(sidecar.offline_folders[0])
    assert (found.exit_code, found.history) == (9, [])


def test_a_service_that_dies_is_one_line_and_no_hang(planned: Planned, start: Start) -> None:
    run = planned()
    sidecar = start(run)
    run.record(1, 3, resumed_at=0)
    sidecar.read_line()
    for process in sidecar.family:
        process.kill()
    run.record(4, 6, resumed_at=3)
    output = sidecar.finish(0)
    assert output.startswith("W&B gave up (")
    assert output.count("\n") == 1
    assert last_metrics(run.run_dir.metrics)["train/step"] == 6


def test_any_error_of_wandb_is_one_line(
    planned: Planned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise HandleAbandonedError("no answer will come")

    def end(code: int) -> None:
        raise SystemExit(code)

    for name, double in {"nice": lambda _: 0, "_exit": end}.items():
        monkeypatch.setattr(os, name, double)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(RunEndListener, "start", lambda _: None)
    monkeypatch.setattr(sidecar_program, "wait_for_metrics", lambda *_, **__: None)
    monkeypatch.setattr(wandb, "init", fail)
    for name in ("WANDB_DIR", "WANDB_SILENT", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "")
    with pytest.raises(SystemExit):
        sidecar_program.main(planned().run_dir.path, "wandb")
    assert capsys.readouterr().out == "W&B gave up (no answer will come): metrics.jsonl continues\n"


def test_the_offline_folder_of_a_resumed_run_is_the_whole_run(planned: Planned, start: Start) -> None:
    first = planned()
    sidecar = start(first)
    first.record(1, 6, resumed_at=0)
    sidecar.finish(1)
    again = planned()
    assert again.plan.tracker.run_id == first.plan.tracker.run_id
    sidecar = start(again)
    again.record(5, 8, resumed_at=4)
    sidecar.finish(0)
    runs = [read_offline_run(folder) for folder in sidecar.offline_folders]
    assert [run.run_id for run in runs] == [first.plan.run_id] * 2
    assert [[row["train/step"] for row in run.history] for run in runs] == [[*range(1, 7)], [*range(1, 9)]]
    assert [shown(row) for row in runs[1].history] == again.expected_history()


def test_an_online_run_arrives_and_goes_on_where_it_stopped(planned: Planned, start: Start, server: Stub) -> None:
    first = planned("job.steps=7")
    assert first.plan.tracker.mode == "online"
    sidecar = start(first)
    first.record(1, 6, resumed_at=0)
    assert sidecar.read_line() == f"W&B: {server.url}/stub/launcher/runs/{first.plan.run_id}\n"
    sidecar.finish(3)
    (stored,) = server.runs.values()
    assert [shown(row) for row in stored.history] == first.expected_history()
    assert (stored.project, stored.group, stored.job_type) == ("launcher", first.plan.name, "train")
    assert (stored.exit_code, stored.config["job"]["value"]["steps"]) == (3, 7)

    again = planned()
    sidecar = start(again)
    again.record(5, 8, resumed_at=4)
    sidecar.finish(0)
    assert list(server.runs) == [first.plan.run_id]
    assert [row["train/step"] for row in stored.history] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8], (
        "lines sent are not sent twice"
    )
    assert [row["_step"] for row in stored.history] == list(range(10))
    assert stored.exit_code == 0
    files = [file for file in again.run_dir.path.rglob("*") if file.is_file()]
    assert not any(KEY.encode() in file.read_bytes() for file in files)


@pytest.mark.parametrize("listening", [False, True], ids=["refused", "mute"])
def test_without_a_server_the_run_is_kept_offline_and_one_line_says_so(
    planned: Planned, start: Start, monkeypatch: pytest.MonkeyPatch, listening: bool
) -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if listening:
            port.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        run = planned("tracker.mode=online")
        sidecar = start(run)
        run.record(1, 5, resumed_at=0)
        output = sidecar.finish(0)
    assert output.startswith("W&B: not reachable (")
    assert output.count("\n") == 1
    assert sidecar.process.returncode == 0
    (folder,) = sidecar.offline_folders
    assert str(folder) in output
    assert [shown(row) for row in read_offline_run(folder).history] == run.expected_history()


def test_it_yields_to_training_and_waits_for_the_first_metrics(planned: Planned, start: Start) -> None:
    sidecar = start(planned())
    process = psutil.Process(sidecar.process.pid)
    wait_for(lambda: process.nice() > os.nice(0))
    wait_for(lambda: process.num_threads() > 1)
    time.sleep(1)
    assert sidecar.family == []
    assert not any("wandb" in mapped.path for mapped in process.memory_maps())

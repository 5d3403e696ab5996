"""Event files, read back by TensorBoard's own reader."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams

from launcher.protocol.metrics import MetricsWriter, SampleWriter
from launcher.protocol.rundir import RunDir
from launcher.testing.tracker import TrackerContract
from launcher.trackers.sidecar import Sender, of_tracker, open_run
from launcher.trackers.tensorboard_run import TensorBoardRun

from .conftest import PlannedRun

Planned = Callable[..., PlannedRun]


@pytest.fixture(autouse=True)
def no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.trackers.records.find_revision", lambda *folders: None)  # git is a process


class TestContract(TrackerContract):
    overrides = ("tracker=tensorboard",)


def stored(run_dir: RunDir) -> EventAccumulator:
    found = EventAccumulator(str(run_dir.tracker("tensorboard")), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def points(found: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 4)) for event in found.Scalars(name)]


def sender_of(run: PlannedRun) -> Sender:
    configured, plan = of_tracker(run.run, run.plan, "tensorboard")
    return Sender(run.run_dir, open_run(run.run_dir, configured, plan), plan)


def test_lines_texts_options_and_the_end_are_there(planned: Planned) -> None:
    run = planned("tracker=tensorboard", "job.steps=7")
    sender = sender_of(run)
    with MetricsWriter(run.run_dir.metrics) as lines, SampleWriter(run.run_dir.samples) as texts:
        lines.record(1, **{"train/loss": 5.0, "train/lr": math.nan})
        lines.record(1, **{"eval/loss": 4.5})
        texts.record(1, prompt="The", text="The end")
        texts.record(1, prompt="Of", text="Of all")
        sender.send(is_last=False)
        texts.record(2, prompt="The", text="The very end")
        sender.send(is_last=True)
    run.run_dir.sample.write_text("last\n")
    sender.tracked.finish(3)
    found = stored(run.run_dir)
    assert set(found.Tags()["scalars"]) == {"train/loss", "train/lr", "eval/loss"}
    assert points(found, "train/loss") == [(1, 5.0)]
    assert math.isnan(found.Scalars("train/lr")[0].value)
    (line, _) = [json.loads(text) for text in run.run_dir.metrics.read_text().splitlines()]
    assert found.Scalars("train/loss")[0].wall_time == line["time"]

    def texts_of(tag: str) -> list[tuple[int, str]]:
        events = found.Tensors(f"{tag}/text_summary")
        return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]

    assert texts_of("samples/0") == [(1, "**The**\n\nThe end"), (2, "**The**\n\nThe very end")]
    assert texts_of("samples/1") == [(1, "**Of**\n\nOf all")]
    assert texts_of("sample") == [(0, "last\n")]
    assert "steps: 7" in texts_of("config")[0][1]
    assert _hparams(found, hparams.SESSION_START_INFO_TAG).session_start_info.hparams["job.steps"].number_value == 7
    assert _hparams(found, hparams.SESSION_END_INFO_TAG).session_end_info.status == api_pb2.STATUS_FAILURE


def _hparams(found: EventAccumulator, tag: str) -> Any:
    content = found.SummaryMetadata(tag).plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def test_a_step_that_is_repeated_has_one_point(planned: Planned) -> None:
    """A rewind while the process runs, then a later life that was killed before it noted what it sent."""
    run = planned("tracker=tensorboard")
    sender = sender_of(run)
    run.record(1, 6, resumed_at=0)
    sender.send(is_last=False)
    with MetricsWriter(run.run_dir.metrics, start_step=3) as writer:
        sender.send(is_last=False)
        writer.record(4, **{"train/loss": 40.0})
        sender.send(is_last=False)
    kept = (run.run_dir.tracker("tensorboard") / "sent.json").read_bytes()
    run.record(5, 7, resumed_at=4)
    sender.send(is_last=True)
    (run.run_dir.tracker("tensorboard") / "sent.json").write_bytes(kept)

    again = sender_of(planned("tracker=tensorboard"))
    run.record(6, 8, resumed_at=5)
    again.send(is_last=True)
    again.tracked.finish(0)
    expected = {step: round(5 / step, 4) for step in range(1, 9)} | {4: 40.0}
    assert points(stored(run.run_dir), "train/loss") == list(expected.items())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, planned: Planned) -> None:
    run = planned("tracker=tensorboard")
    run.run_dir.tracker("tensorboard").write_text("a file")
    with pytest.raises(Exception, match="File exists") as raised:
        TensorBoardRun(run.run_dir, run.run, run.plan)
    assert type(raised.value).__name__ == "TrackerFailed"

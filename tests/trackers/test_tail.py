"""Following metrics.jsonl: each line once, whatever happens to the file."""

from __future__ import annotations

from pathlib import Path

from launcher.protocol.metrics import MetricsWriter
from launcher.trackers.sidecar import MetricsTail


def steps(tail: MetricsTail) -> list[int]:
    return [line["train/step"] for line in tail.read()]


def test_lines_come_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert steps(tail) == []
    path.write_text('{"train/step": 1, "time": 1.0}\n{"train/step": 2, "ti')
    assert steps(tail) == [1]
    assert steps(tail) == []
    with path.open("a") as file:
        file.write('me": 2.0}\n{"train/step": 3, "time": 3.0}\n')
    assert steps(tail) == [2, 3]
    assert tail.last_time == 3.0


def test_a_resumed_run_sends_what_it_does_again_and_not_what_it_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    with MetricsWriter(path) as writer:
        for step in range(1, 6):
            writer.record(step)
    assert steps(tail) == [1, 2, 3, 4, 5]
    with MetricsWriter(path, start_step=3) as writer:
        assert steps(tail) == []
        writer.record(4)
        assert steps(tail) == [4]
        writer.record(5)
    assert steps(tail) == [5]
    assert steps(MetricsTail(path)) == [1, 2, 3, 4, 5]
    assert steps(MetricsTail(path, after=tail.last_time)) == []


def test_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\xff\n[]\n{"train/step": 1}\n{"train/step": 2, "time": 2.0}\n')
    assert steps(MetricsTail(path)) == [2]

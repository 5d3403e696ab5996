"""metrics.jsonl: whole, valid, in order, and one run however often it was killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.protocol.metrics import MetricsWriter
from launcher.protocol.results import read_metrics

ENDLESS = """
import sys
from pathlib import Path
from launcher.protocol.metrics import MetricsWriter
writer, step = MetricsWriter(Path(sys.argv[1])), 0
while True:
    step += 1
    writer.record(step, **{"train/loss": 1 / step})
    print(step, flush=True)
"""


def lines(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_step_metrics_and_time(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.record(3, **{"train/loss": 5.5, "train/tokens": 1024})
        (line,) = lines(path)  # before it is closed
    assert line.pop("time") == pytest.approx(path.stat().st_mtime, abs=5)
    assert line == {"train/step": 3, "train/loss": 5.5, "train/tokens": 1024}


def test_what_is_not_finite_becomes_null_in_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.record(1, **{"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/lr": 0.5})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert (line["train/loss"], line["train/grad_norm"], line["train/lr"]) == (None, None, 0.5)


def test_times_rise_over_a_resume_even_when_the_clock_went_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train/step": 1, "time": 9e9}\n{"train/step": 2, "time": 9.1e9}\n')
    with MetricsWriter(path, start_step=1) as writer:
        writer.record(2)
        writer.record(3)
    times = [line["time"] for line in lines(path)]
    assert times == sorted(set(times))
    assert times[1] > 9.1e9, "later than the line that was discarded, too"


def test_killed_at_any_moment_it_has_every_line_that_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(200):
        last_step = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait(timeout=30) == -signal.SIGKILL
    steps = [line["train/step"] for line in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= last_step


def test_resuming_moves_later_lines_aside(tmp_path: Path) -> None:
    path, discarded = tmp_path / "metrics.jsonl", tmp_path / "metrics.discarded.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(1, 8):
            writer.record(step, **{"train/loss": 1.0})
        writer.record(7, **{"eval/loss": 2.0})
    with MetricsWriter(path, start_step=5) as writer:
        assert [line["train/step"] for line in lines(path)] == [1, 2, 3, 4, 5]
        writer.record(6)
    with MetricsWriter(path, start_step=2) as writer:
        writer.record(3)
    assert [line["train/step"] for line in lines(path)] == [1, 2, 3]
    assert [line["train/step"] for line in lines(discarded)] == [6, 7, 7, 3, 4, 5, 6]


def test_a_run_without_a_checkpoint_starts_its_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        with MetricsWriter(path) as writer:
            writer.record(1)
    assert len(lines(path)) == 1


@pytest.mark.parametrize("cut", ['{"train/step": 2, "train/lo', '{"train/step": 2, "time": 5', "\0\0\0", "[1]", "7"])
def test_what_a_killed_writer_left_at_the_end_is_taken_off(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train/step": 1, "time": 4.0}\n' + cut)
    assert [line["train/step"] for line in read_metrics(path)] == [1]
    with MetricsWriter(path, start_step=9) as writer:
        writer.record(10)
    assert [line["train/step"] for line in lines(path)] == [1, 10]
    assert (tmp_path / "metrics.discarded.jsonl").read_text() == cut + "\n"


def test_a_whole_last_line_without_its_end_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train/step": 1, "time": 4.0}')
    with MetricsWriter(path, start_step=9) as writer:
        writer.record(10)
    assert [line["train/step"] for line in lines(path)] == [1, 10]

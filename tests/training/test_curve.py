"""loss.png."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.protocol.loss_curve import _running_mean, draw_curve
from launcher.protocol.metrics import MetricsWriter

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("num_steps", [0, 1, 30])
def test_a_curve_is_drawn_from_any_run(tmp_path: Path, num_steps: int) -> None:
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    with MetricsWriter(metrics) as writer:
        for step in range(1, num_steps + 1):
            writer.record(step, **{"train/loss": 5 / step if step != 3 else float("nan")})
            if step % 10 == 0:
                writer.record(step, **{"eval/loss": 6 / step})
    draw_curve(metrics, picture, baselines={"uniform": 8.3, "unigram": 6.1})
    assert picture.read_bytes().startswith(PNG)
    assert picture.stat().st_size > 10_000


def test_what_happens_shows(tmp_path: Path) -> None:
    metrics, pictures = tmp_path / "metrics.jsonl", []
    for loss in (5.0, 4.0):
        with MetricsWriter(metrics) as writer:
            writer.record(1, **{"train/loss": 5.0})
            writer.record(2, **{"train/loss": loss})
        for baselines in ({}, {"uniform": 8.3}):
            draw_curve(metrics, tmp_path / "loss.png", baselines=baselines)
            pictures.append((tmp_path / "loss.png").read_bytes())
    assert len(set(pictures)) == 4


def test_the_mean_is_centred_and_shrinks_at_the_ends() -> None:
    assert _running_mean([0, 3, 6, 3], window=3) == [1.5, 3, 4, 4.5]
    assert _running_mean([1, 2], window=1) == [1, 2]

"""What a run says while it computes what the reference model makes of each pair."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from launcher.training import reference
from launcher.training.reference import _Progress


@pytest.mark.parametrize("is_main", [True, False])
def test_a_line_every_ten_seconds_on_the_main_rank_and_a_heartbeat_on_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_main: bool
) -> None:
    now_s, phases = [0.0], list[str]()
    monkeypatch.setattr(reference, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    context: Any = SimpleNamespace(
        is_main=is_main, batch=SimpleNamespace(global_batch=8), heartbeat=SimpleNamespace(update=phases.append)
    )
    train, held_out = (SimpleNamespace(num_sequences=number) for number in (1000, 500))
    splits: Any = SimpleNamespace(train=train, held_out=held_out)
    progress = _Progress(context, splits, reference="the model as the run begins")
    for at_s in (4.0, 10.5, 15.0, 21.0):
        now_s[0] = at_s
        progress.add(300)
    assert phases == ["reference"] * 4
    said = [
        "computing the log-probabilities of 1,500 pairs, once, by the model as the run begins",
        "600 of 1,500 pairs",
        "1,200 of 1,500 pairs",
    ]
    assert capsys.readouterr().out.splitlines() == [f"reference model: {line}" for line in said if is_main]

"""Progress in a log."""

from __future__ import annotations

import pytest

from launcher.utils.progress import ProgressLines


def test_a_line_comes_every_few_seconds_and_none_for_what_is_soon_done(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 4.9, 5.0, 5.1, 9.9, 10.0, 30.0])
    lines = ProgressLines("loading", clock=lambda: next(seconds))
    for done in (1, 2, 3, 4, 5, 11):
        lines.update(done << 20, 10 << 20)
    assert capsys.readouterr().out.splitlines() == [
        "loading: 2.00 MiB of 10.00 MiB (20 %)",
        "loading: 5.00 MiB of 10.00 MiB (50 %)",
        "loading: 10.00 MiB of 10.00 MiB (100 %)",
    ]

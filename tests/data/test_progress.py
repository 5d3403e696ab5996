"""Lines about how far the tokenisation of a data set is."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from launcher.config.data.auto import AutoData
from launcher.config.data.text import Text
from launcher.data.progress import TokenisingProgress, estimate_rows, rows_text
from launcher.utils.text import bytes_text

ROW = json.dumps({"prompt": "q", "response": "a" * 100}) + "\n"


class Clock:
    """A clock that a test sets."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_line_every_five_seconds_tells_share_rate_and_rest(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = TokenisingProgress(rows_text, total=4000, clock=clock)
    for _ in range(10):  # one a second
        clock.now_s += 1
        progress.add(256, tokens=10_000)
    progress.end(processes=2)
    assert capsys.readouterr().out.splitlines() == [
        "tokenising: 512 rows of about 4,000 rows (13%), 20,000 tokens, 256 rows/s, 14 s left",
        "tokenising: 1,792 rows of about 4,000 rows (45%), 70,000 tokens, 256 rows/s, 9 s left",
        "tokenised 2,560 rows, 100,000 tokens in 10 s (256 rows/s by 2 processes)",
    ]


def test_what_is_quick_prints_nothing_and_a_wrong_estimate_no_share(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    quick = TokenisingProgress(rows_text, total=10, clock=clock)
    clock.now_s += 0.5
    quick.add(10, tokens=10)
    quick.end()
    assert capsys.readouterr().out == ""
    for total in (None, 10):
        more = TokenisingProgress(bytes_text, total=total, clock=clock)
        clock.now_s += 4
        more.add(1 << 20, tokens=500)
        assert capsys.readouterr().out == "tokenising: 1.00 MiB, 500 tokens, 256.00 KiB/s\n"


def test_rows_are_estimated_from_the_beginning_of_a_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.jsonl").write_text(ROW * 50)
    data = AutoData(path=(str(tmp_path), "chat-tasks"), chat_template="none")
    assert estimate_rows(data.sources()) == 40 * 50 + 2000
    monkeypatch.setattr("launcher.data.progress._SAMPLED_BYTES", 10 * len(ROW))
    assert estimate_rows(data.sources()) == 40 * 50 + 2000
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(ROW.encode() * 50))
    assert estimate_rows(AutoData(path=str(tmp_path / "packed.jsonl.gz")).sources()) is None


@pytest.mark.parametrize("kind", [AutoData, Text])
def test_the_bytes_of_plain_text_are_known(kind: type[AutoData | Text], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words " * 100)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"words " * 100))
    assert kind(path=str(tmp_path / "a.txt")).text_bytes == 600
    assert kind(path=str(tmp_path / "b.txt.gz")).text_bytes is None
    assert kind().text_bytes is None

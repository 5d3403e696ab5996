"""The soak, for seconds, on engines that repeat prompts."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.conftest import REPOSITORY

SOAK = REPOSITORY / "scripts" / "bench" / "serving_soak.py"
ECHO = ("job.engine=echo", "model=gpt2_tiny", "job.tokenizer=bytes", "job.echo_step_s=0.02", "job.max_num_seqs=4")


def test_a_short_soak_of_echoing_engines() -> None:
    words = ("--minutes", "0.1", "--kill-every", "2", "--inputs", "8-20", "--outputs", "8-20", "--", *ECHO)
    ended = subprocess.run([sys.executable, SOAK, *words], capture_output=True, text=True, timeout=500, check=False)
    output = ended.stdout + ended.stderr
    assert ended.returncode == 0, output
    for word in ("finished: ", "invalid refused: ", "cancelled: ", "exit code 0", "everything as it should be"):
        assert word in output
    assert re.search(r"engines killed: [1-9]", output), output


def test_a_wrong_answer_is_a_mix_up(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SOAK.parent))
    from serving_soak import Tally

    from launcher.benchmarks.load_client import RequestOutcome

    tally = Tally()
    for error, text in (
        ("", "right"),
        ("", "other"),
        ("429", ""),
        ("cut", ""),
        ("timeout", ""),
        ("frame", ""),
        ("500", ""),
    ):
        tally.note_outcome(RequestOutcome(0, due_s=0.0, error=error, why=error, text=text), "right")
    assert tally.counts == {"finished": 1, "MIXED": 1, "refused": 1, "LOST": 2, "failed explicitly": 2}
    tally.note_outcome(RequestOutcome(0, due_s=0.0, error="connect", why="connect"), "right")
    assert tally.counts["LOST"] == 3
    ending = Tally(ends=True)
    ending.note_outcome(RequestOutcome(0, due_s=0.0, error="connect", why="connect"), "right")
    assert ending.counts == {"connection refused": 1}
    assert tally.examples["MIXED"] == "'other', not 'right'"

"""Long texts of peers: the time of every pattern that they meet grows with the text, not with the square of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_SIZE = 250_000
_HANG_S = 200
"""A square takes longer than this for each text below; a pattern without one takes a second for all of them."""
_HIDE = "from launcher.errors.secrets import hide_secrets as work"
_SHOW = "from launcher.utils.text import printable as work"
_STACK = "from launcher.supervision.stack_dump import read_dump as work"


@pytest.mark.parametrize(
    ("work", "pieces"),
    [
        (_HIDE, ["a.", "a-", "a://", "http://x:", "http://x:a/", "sk-", "SG.", "$a", "u:p@h.", "eyJaaaaaaaa.", "a=\\"]),
        (_SHOW, ["\x9d", "\x90", "\x1b]", "\x1b[1;", "\x9b", "\x1bP"]),
        (_STACK, ["Thread 0x0", "0", 'File "a", line 1']),
    ],
    ids=["secrets", "escapes", "stacks"],
)
def test_a_long_text_takes_no_square_of_its_length(work: str, pieces: list[str]) -> None:
    texts = [piece * (_SIZE // len(piece)) for piece in pieces]
    if work == _STACK:
        texts = ["Thread 0x" + 4 * text for text in texts]
    code = f"import json, sys\n{work}\nfor text in json.load(sys.stdin): work(text)\nprint('done')"
    found = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        timeout=_HANG_S,
        check=True,
    )
    assert found.stdout == "done\n"

"""Text that others wrote, as it is shown on a terminal."""

from __future__ import annotations

import json

import pytest

from launcher.utils.text import format_table, json_text, num_columns, one_line, printable, without_escapes

MARKS = [chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))]


@pytest.mark.parametrize("mark", MARKS, ids=ascii)
def test_marks_that_reverse_what_follows_are_left_out(mark: str) -> None:
    """A run called ``a`` + mark + ``gpj.exe`` would be shown as ``aexe.jpg``."""
    text = f"a{mark}b"
    assert printable(text) == without_escapes(text) == one_line(text) == "ab"
    assert mark not in json_text({"name": text})
    assert json.loads(json_text({"name": text})) == {"name": text}


def test_text_of_scripts_from_right_to_left_is_kept() -> None:
    for text in ("שלום", "مرحبا 123", "a\u200eb\u200f"):
        assert printable(text) == text


def test_wide_letters_take_two_columns_of_a_table() -> None:
    rows = [("id", "name", "status"), ("1", "训练甲", "done"), ("2", "e\u0301te\u0301", "lost"), ("3", "🚀x", "ok")]
    lines = list(format_table(rows))
    assert [num_columns(line.rpartition(" ")[0]) for line in lines] == [len("id  训练甲") + 3 + 1] * 4
    wrapped = list(format_table([("训练甲" * 9 + " abc 训练", "x")], width=44))
    assert all(num_columns(line) <= 44 for line in wrapped)
    assert "".join(wrapped).replace(" ", "").replace("x", "") == "训练甲" * 9 + "abc训练"

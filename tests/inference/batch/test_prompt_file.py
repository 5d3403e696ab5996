"""Files of prompts: every way to write them, and every way to write them wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.config import prompt_file as module
from launcher.config.data.formats import BadFile
from launcher.config.prompt_file import open_prompt_file


def read(path: Path, kind: str, content: bytes) -> list[tuple[int, int, dict, str]]:
    path.write_bytes(content)
    source = open_prompt_file(path, kind)
    found = [(r.number, r.line, r.fields, r.problem) for r in source.records(lambda number: True)]
    assert source.count(heartbeat=lambda: None) == len(found)
    return found


def test_json_lines(tmp_path) -> None:
    lines = [b'\xef\xbb\xbf{"prompt": "one"}', b"", b'{"prompt": "two\\n"}\r', b"   ", b'{"prompt": "no end"}']
    assert read(tmp_path / "x", "jsonl", b"\n".join(lines)) == [
        (0, 1, {"prompt": "one"}, ""),
        (1, 3, {"prompt": "two\n"}, ""),
        (2, 5, {"prompt": "no end"}, ""),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": ', "is not a JSON object"),
        (b"[1]", "is not a JSON object"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"prompt": "\xff"}', "is not UTF-8: byte 0xff at position 12"),
        (b'{"prompt": "a\0b"}', "has a NUL byte at position 13"),
        (b"[" * 100_000, "is not a JSON object"),
    ],
)
def test_a_bad_line_is_reported_and_the_next_one_read(tmp_path, line, problem) -> None:
    bad, good = read(tmp_path / "x", "jsonl", line + b'\n{"prompt": "good"}\n')
    assert problem in bad[3]
    assert good == (1, 2, {"prompt": "good"}, "")


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 100)
    for kind, content in (("jsonl", b'{"prompt": "%s"}'), ("text", b"%s")):
        found = read(tmp_path / "x", kind, b"%s\n%s\n%s\n" % (content % b"a", content % (b"x" * 5000), content % b"b"))
        assert [bool(record[3]) for record in found] == [False, True, False]
        assert "longer than 100 bytes" in found[1][3]


def test_text(tmp_path) -> None:
    assert [record[2]["prompt"] for record in read(tmp_path / "x", "text", b" a\tb \r\n\n\xe4\xbd\xa0")] == [
        " a\tb ",
        "你",
    ]


def test_csv(tmp_path) -> None:
    content = 'id,prompt,max_tokens,stop,ignore_eos\n1,"two\nlines",5,"[""a""]",true\n2,007,,x,\n'
    assert read(tmp_path / "x", "csv", content.encode()) == [
        (0, 2, {"id": "1", "prompt": "two\nlines", "max_tokens": 5, "stop": ["a"], "ignore_eos": True}, ""),
        (1, 4, {"id": "2", "prompt": "007", "stop": "x"}, ""),
    ]


def test_a_bad_row_of_csv_is_reported_and_the_next_one_read(tmp_path) -> None:
    content = b'prompt,max_tokens\na,1,2\n\xff,1\n"x"y,1\ngood,3\n'
    found = read(tmp_path / "x", "csv", content)
    assert [bool(record[3]) for record in found] == [True, True, True, False]
    assert found[3][:3] == (3, 5, {"prompt": "good", "max_tokens": 3})


@pytest.mark.parametrize("header", [b"", b"text,id\n1,2\n", b"prompt,prompt\n1,2\n"])
def test_csv_needs_a_header_that_names_prompts(tmp_path, header) -> None:
    with pytest.raises(BadFile):
        read(tmp_path / "x", "csv", header)


def test_only_what_is_wanted_is_parsed(tmp_path) -> None:
    (tmp_path / "x").write_bytes(b"not JSON\n" + json.dumps({"prompt": "a"}).encode())
    source = open_prompt_file(tmp_path / "x", "jsonl")
    assert [record.number for record in source.records(lambda number: number == 1)] == [1]

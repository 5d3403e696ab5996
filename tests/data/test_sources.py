"""What ``data.path`` names: files, globs, folders, URLs, and files of every format and packing."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from launcher.config.data.auto import AutoData
from launcher.config.data.chat_tasks import chat_tasks
from launcher.config.data.sources import Source
from launcher.config.data.text import Text
from launcher.errors import ConfigError, EnvironmentProblem

ROWS = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(30)]
EXPECTED = [f"{row['prompt']}{row['response']}" for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = ("prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in ROWS)).encode()


def texts(data: AutoData) -> list[str]:
    assert list(data.validate_machine()) == []
    return [example.text for example in data.examples() if not hasattr(example, "chosen")]


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


@pytest.mark.parametrize("content", [("x.jsonl", LINES), ("x.json", json.dumps(ROWS).encode()), ("x.csv", TABLE)])
@pytest.mark.parametrize(
    ("packing", "pack"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_every_format_packed_or_not(
    content: tuple[str, bytes], packing: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    file = tmp_path / f"{content[0]}{packing}"
    file.write_bytes(pack(content[1]))
    assert texts(AutoData(path=str(file), chat_template="none")) == EXPECTED


def test_parquet_and_arrow(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{**row, "unused": 1} for row in ROWS])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("x.parquet", "x.arrow"):
        assert texts(AutoData(path=str(tmp_path / name), chat_template="none")) == EXPECTED


def test_conversations_in_parquet(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "x.parquet")
    data = AutoData(path=str(tmp_path / "x.parquet"), chat_template="plain")
    (example,) = data.examples(data.template(None))
    assert "User: q\nAssistant: a" in "".join(segment.text for segment in example.segments)  # type: ignore[union-attr]


def test_a_glob_a_folder_and_a_list_name_the_same_files(tmp_path: Path) -> None:
    for number in range(3):
        part = LINES.splitlines(keepends=True)[number * 10 : number * 10 + 10]
        (tmp_path / f"{number}.jsonl").write_bytes(b"".join(part))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    names = tuple(str(tmp_path / f"{number}.jsonl") for number in range(3))
    for path in (str(tmp_path / "*.jsonl"), str(tmp_path), names):
        assert texts(AutoData(path=path, chat_template="none")) == EXPECTED


def test_a_folder_with_files_of_splits_gives_the_one_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(LINES)
    (tmp_path / "test.jsonl").write_bytes(LINES.splitlines(keepends=True)[0])
    assert texts(AutoData(path=str(tmp_path), chat_template="none")) == EXPECTED
    assert texts(AutoData(path=str(tmp_path), chat_template="none", split="test")) == EXPECTED[:1]
    (error,) = AutoData(path=str(tmp_path), split="validation").validate_machine()
    assert (error.option, error.value) == ("data.split", "validation")


def test_plain_text_is_what_the_kind_text_reads(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"the text of {name}\n" * 5000)
    for path in ("python-docs", str(tmp_path / "*.txt")):
        data = AutoData(path=path)
        assert data.is_stream
        assert list(data.local_pieces()) == list(Text(path=path).local_pieces())
    assert [len(text) for text in texts(AutoData(path=str(tmp_path / "*.txt")))] == [90_000, 90_000]


def test_urls_are_copied_once(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/chat/a.jsonl", LINES)
    try:
        data = AutoData(path="memory://chat/*.jsonl", chat_template="none", cache=str(tmp_path))
        assert texts(data) == EXPECTED
        assert texts(data) == EXPECTED
        assert len(list(tmp_path.rglob("*.jsonl"))) == 1
        memory.pipe("/chat/a.jsonl", LINES * 2)
        assert texts(data) == EXPECTED * 2
        with pytest.raises(ConfigError, match="matches no file"):
            list(AutoData(path="memory://chat/*.csv", cache=str(tmp_path)).examples())
        with pytest.raises(ConfigError, match="there is no such file"):
            list(AutoData(path="memory://chat/b.jsonl", cache=str(tmp_path)).examples())
    finally:
        memory.rm("/chat", recursive=True)
    (error,) = AutoData(path="s4://bucket/x.jsonl").validate_machine()
    assert "fsspec knows no protocol s4" in error.why
    with pytest.raises(EnvironmentProblem, match="cannot be downloaded"):
        list(AutoData(path="http://127.0.0.1:9/x.jsonl", cache=str(tmp_path)).examples())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("python-docs", "builtin"),
        ("chat-tasks", "builtin"),
        ("org/chat", "hub"),
        ("chat.jsonl", "local"),
        ("data/chat.jsonl", "local"),
        ("./org/chat", "local"),
        ("wikitext", "local"),
        ("*.jsonl", "local"),
        ("s3://bucket/x.jsonl", "url"),
    ],
)
def test_what_an_entry_names(name: str, kind: str) -> None:
    assert Source(name=name, option="data.path").kind == kind


def test_files_of_two_shapes_are_two_entries(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    (error,) = AutoData(path=str(tmp_path)).validate_machine()
    assert "holds text (text), and" in error.why
    assert "two entries of data.path" in error.fix
    both = AutoData(path=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")), chat_template="none")
    assert texts(both) == [*EXPECTED, "x"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("x.jsonl", b"", "is empty"),
        ("x.csv", b"prompt,response\n", "holds no rows"),
        ("x.html", b"<!doctype html><p>x", "holds HTML or XML, not plain text"),
        ("x.jsonl", b'{"prompt": "q", "response"', "line 1 is not a JSON object"),
    ],
)
def test_files_that_hold_no_data(name: str, content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    (error,) = AutoData(path=str(tmp_path / name)).validate_machine()
    assert (error.option, error.value) == ("data.path", tmp_path / name)
    assert why in error.why


def test_chats_about_tasks_are_always_the_same_and_ask_nothing_twice() -> None:
    rows = list(chat_tasks())
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest == "c329026b3ef262374b41db8bbf3413afc21a52ba39b5fac57d68f77c74fb37f6"
    questions = [one["content"] for row in rows for one in row["messages"] if one["role"] == "user"]
    assert len(set(questions)) == len(questions) > len(rows) == 2000
    data = AutoData(path="chat-tasks", chat_template="chatml")
    (source,) = data.sources()
    template = data.template(None)
    assert source.describe(template) == "2,000 chats about small tasks, loss on assistant turns"
    places = [place for place, _ in source.placed_examples(template, wanted=lambda number: number % 500 == 0)]
    assert places == ["chat 1", "chat 501", "chat 1,001", "chat 1,501"]
    assert len(list(data.examples(template))) == 2000


def test_options_that_do_not_fit_chats_about_tasks_are_refused() -> None:
    (error,) = AutoData(path="chat-tasks", chat_template="none").validate_length(256)
    assert "chat-tasks holds conversations" in error.why
    (error,) = AutoData(path="chat-tasks", messages_column="turns").validate_machine()
    assert str(error).startswith("data.path=chat-tasks: has no column turns; it has messages")
    (error,) = AutoData(path="chat-tasks", shape="alpaca").validate_machine()
    assert "has no columns of instruction, input and output" in error.why

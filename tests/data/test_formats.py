"""What files hold is decided by content and ending; each refusal names a command that works, which is run here."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from launcher.config.compose import compose
from launcher.config.data import rows as rows_module
from launcher.config.data.base import Data
from launcher.config.data.formats import BadFile, inspect_file, look_bytes_of_each
from launcher.config.data.hf import HfData
from launcher.config.data.text import Text
from launcher.config.option_text import quoted_word
from launcher.data.corpus import read_corpus
from launcher.errors import ConfigError, ConfigErrors

ROWS = [f"Row {i} holds, äsh, some words and a quote: {chr(34)}." for i in range(60)]
PROSE = "\n".join(f"Line {i} of plain prose, which is what is learnt." for i in range(60)) + "\n"


def json_lines(rows: list[str] = ROWS, column: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, column: row}) + "\n" for i, row in enumerate(rows)).encode()


def json_list(rows: list[str]) -> bytes:
    return json.dumps([{"text": row} for row in rows]).encode()


def table(delimiter: str = ",", column: str = "text") -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter).writerows([["id", column], *([i, row] for i, row in enumerate(ROWS))])
    return file.getvalue().encode()


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def arrow(*, is_stream: bool) -> bytes:
    sink, made = io.BytesIO(), pa.table({"text": ROWS})
    with (pa.ipc.new_stream if is_stream else pa.ipc.new_file)(sink, made.schema) as writer:
        writer.write_table(made)
    return sink.getvalue()


def parquet(**columns: list[object]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns or {"text": ROWS}), sink)
    return sink.getvalue()


def problems(data: Data) -> list[str]:
    return [str(problem) for problem in data.validate_machine()]


def texts(data: Text | HfData) -> list[str]:
    return [piece.text for piece in read_corpus(data)]


def composed(words: list[str]) -> Text | HfData:
    """Return the data that overrides say, without a whole composition."""
    values = {word.key_or_group: word.value() for word in OverridesParser.create().parse_overrides(words)}
    made = HfData if values.pop("data", "text") == "hf" else Text
    fields = {name.removeprefix("data."): value for name, value in values.items()}
    return made(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def advised_overrides(message: str) -> list[str]:
    """Return the overrides that a message says to set."""
    found = re.search(r"; set (data=\S+ .*?)(?:, or data\.format=text.*)?$", message)
    assert found, message
    return shlex.split(found[1])


def follow(message: str, folder: Path) -> Path:
    """Run the command that ends a message and return the file that it made."""
    command = re.sub(r"^.*?; [a-z ,()]+: ", "", message, flags=re.DOTALL)
    command = command.partition(", or data.format=text")[0]
    before = set(folder.rglob("*"))
    command = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    ended = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, (command, ended.stderr)
    (made,) = {path for path in set(folder.rglob("*")) - before if path.is_file() and path.suffix != ".zip"}
    return made


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", json_lines()),
        ("x.txt", json_lines()),
        ("no ending, but a comma", json_lines()),
        ("x.jsonl", b"\xef\xbb\xbf" + json_lines().replace(b"\n", b"\r\n\r\n")),
        ("x.jsonl.gz", gzip.compress(json_lines())),
        ("x.jsonl", gzip.compress(json_lines())),
        ("x.jsonl.bz2", bz2.compress(json_lines())),
        ("x.jsonl.xz", lzma.compress(json_lines())),
        ("x.json", json.dumps([{"text": row} for row in ROWS]).encode()),
        ("x.jsonl", json.dumps([{"text": row} for row in ROWS], indent=2).encode()),
        ("x.json", json.dumps(ROWS).encode()),
        ("x.csv", table()),
        ("x.csv.gz", gzip.compress(table())),
        ("x.csv", b"\xef\xbb\xbf" + table(";")),
        ("x.tsv", table("\t")),
        ("x.txt", table("\t")),
        ("noext", table(",", "content")),
        ("x.ndjson", json_lines(column="what is said")),
        ("x.parquet", parquet()),
        ("no_ending", parquet(n=list(range(60)), body=list(ROWS))),
        ("x.arrow", arrow(is_stream=True)),
        ("x.feather", arrow(is_stream=False)),
    ],
)
def test_rows_given_as_text_are_refused_with_the_overrides_that_read_them(
    tmp_path: Path, name: str, content: bytes
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    (message,) = problems(Text(path=str(file), vocab_size=2048))
    data = composed(advised_overrides(message))
    assert (problems(data), texts(data), data.vocab_size) == ([], ROWS, 2048)
    if ", or data.format=text" in message:
        as_text = Text(path=str(file), format="text")
        assert not problems(as_text)
        assert "".join(texts(as_text))
    (message,) = problems(HfData(path=str(file)))  # the same file, given as a data set
    assert "is a file, not a folder or a data set of the hub" in message
    assert texts(composed(advised_overrides(message))) == ROWS


def test_zstd_is_read_whatever_it_holds(tmp_path: Path) -> None:
    for name, content in (("x.jsonl.zst", json_lines()), ("y.txt.zst", PROSE.encode())):
        with pa.output_stream(str(tmp_path / name), compression="zstd") as file:
            file.write(content)
    data = HfData(path="json", files=(f"{tmp_path}/*.jsonl.zst",))
    assert (problems(data), texts(data)) == ([], ROWS)
    text = Text(path=str(tmp_path / "y.txt.zst"))
    assert (problems(text), "".join(texts(text))) == ([], PROSE)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", PROSE),
        ("noext", PROSE),
        ("x.md", "[1] Smith (2020) says:\n" + PROSE),
        ("x.txt", "{braces} are part of prose\n" + PROSE),
        ("x.py", "import json\n\nvalue = {'a': 1}\n"),
        ("x.txt", "Text, which has commas\nand lines, of two parts\nis no table, of course\n"),
        ("x.txt", "<p> in a line is no document\n" + PROSE),
        ("x.txt", "BZhang writes, GIF8 too; Rar! ORC.\n" + PROSE),
    ],
)
def test_prose_is_text_whatever_it_begins_with(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    data = Text(path=str(tmp_path / name))
    assert (problems(data), "".join(texts(data))) == ([], content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    data = Text(path=str(tmp_path / f"{name}.gz"))
    assert (problems(data), "".join(texts(data))) == ([], content)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("x.jsonl", PROSE, "ends in .jsonl and holds no JSON lines"),
        ("x.json", PROSE, "ends in .json and holds no one JSON document"),
        ("x.html", "<p>a paragraph</p>", "holds HTML or XML, not plain text"),
        ("x.txt", "<!DOCTYPE html>\n<html></html>", "holds HTML or XML, not plain text"),
        ("package.json", '{"name": "x",\n "version": 1}', "holds one JSON object"),
        ("x.csv", "a,b\n1,2\n", "no column of text"),
    ],
)
def test_text_of_another_format_is_taken_as_it_stands_when_asked(
    tmp_path: Path, name: str, content: str, why: str
) -> None:
    (tmp_path / name).write_text(content)
    (message,) = problems(Text(path=str(tmp_path / name)))
    if why != "no column of text":
        assert why in message
        assert "data.format=text" in message
    data = Text(path=str(tmp_path / name), format="text")
    assert (problems(data), "".join(texts(data))) == ([], content)


def tar(content: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        entry = tarfile.TarInfo("inner.jsonl")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return sink.getvalue()


def zipped(content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("inner.jsonl", content)
    return sink.getvalue()


LATIN = "Un café à midi.\n" * 30


@pytest.mark.parametrize(
    ("name", "content", "why", "inside"),
    [
        ("a file.zip", zipped(json_lines()), "is a zip archive", json_lines()),
        ("x.tar", tar(json_lines()), "is a tar archive", json_lines()),
        ("x.tar.gz", gzip.compress(tar(json_lines())), "is a tar archive", json_lines()),
        ("x.parquet.gz", gzip.compress(parquet()), "is Parquet inside gzip", parquet()),
        ("x.parquet", gzip.compress(parquet()), "is Parquet inside gzip", parquet()),
        (
            "x.zip.gz",
            gzip.compress(zipped(json_lines())),
            "is a zip archive (or an Office document) inside",
            json_lines(),
        ),
        ("x.txt.gz", gzip.compress(gzip.compress(PROSE.encode())), "is gzip inside gzip", PROSE),
        ("x.txt.gz.xz", lzma.compress(gzip.compress(PROSE.encode())), "is gzip inside xz", PROSE),
        ("x.txt", b"\xc3" + LATIN.encode(), "since the rest is valid: iconv -c", LATIN),
        ("x.txt", LATIN.encode() * 900 + b"a\xe9b\n", "since the rest is valid: iconv -c", LATIN * 900 + "ab\n"),
        ("x.txt", PROSE.encode("utf-16"), "is UTF-16, not UTF-8", PROSE.encode()),
        ("x.txt", PROSE.encode("utf-16-le"), "is UTF-16LE, not UTF-8", PROSE.encode()),
        ("x.txt", PROSE.encode("utf-16-be"), "is UTF-16BE, not UTF-8", PROSE.encode()),
        ("x.txt", PROSE.encode("utf-32"), "is UTF-32, not UTF-8", PROSE.encode()),
        ("it's.jsonl.gz", gzip.compress(json_lines().decode().encode("utf-16")), "is UTF-16", json_lines()),
        ("x.txt", LATIN.encode("latin1"), "is not UTF-8: byte 0xe9 at position 6", LATIN.encode()),
        ("x.txt.xz", lzma.compress(LATIN.encode("latin1")), "byte 0xe9 at position 6", LATIN.encode()),
        ("x.txt", PROSE.encode()[:99] + b"\0" + PROSE.encode()[99:], "has NUL bytes, the first at position 99", PROSE),
        ("x.jsonl", json_lines().replace(b"\n", b"\r"), "end in a carriage return without", json_lines()),
        ("x.csv", table().replace(b"\r\n", b"\r"), "end in a carriage return without", table().replace(b"\r", b"")),
    ],
)
def test_what_must_be_converted_is_refused_with_the_command_that_does(
    tmp_path: Path, name: str, content: bytes, why: str, inside: bytes | str
) -> None:
    (tmp_path / name).write_bytes(content)
    (message,) = problems(Text(path=str(tmp_path / name)))
    assert why in message
    made = follow(message, tmp_path)
    assert made.read_bytes() == (inside.encode() if isinstance(inside, str) else inside)
    inspect_file(made, plain="data.format=text")


FAR = [f"Row {i} is of plain words and nothing else." for i in range(26_000)]


@pytest.mark.parametrize(
    ("name", "content", "why", "last"),
    [
        ("x.jsonl", json_lines([*FAR, "caf@"]).replace(b"@", b"\xe9"), "line 26,001 of", "café"),
        ("x.jsonl.gz", gzip.compress(json_lines([*FAR, "caf@"]).replace(b"@", b"\xe9")), "line 26,001 of", "café"),
        ("x.jsonl", '{"text": "é"}\n'.encode() + json_lines([*FAR, "a@b"]).replace(b"@", b"\xe9"), "26,002 of", "ab"),
        ("x.jsonl", json_lines([*FAR, "a@b"]).replace(b"@", b"\0"), "has a NUL byte at position", "ab"),
        ("x.csv", "\r\n".join(["text", *FAR, "caf@"]).encode().replace(b"@", b"\xe9"), "line 26,002 of", "café"),
        ("x.csv", "\r\n".join(["text", *FAR, "a@b"]).encode().replace(b"@", b"\0"), "has a NUL byte at position", "ab"),
        (
            "x.json",
            f"[{','.join(json_lines([*FAR, 'caf@']).decode().splitlines())}]".encode().replace(b"@", b"\xe9"),
            "is not UTF-8: byte 0xe9 at",
            "café",
        ),
    ],
)
def test_what_must_be_converted_is_refused_with_the_command_that_does_far_into_rows_too(
    tmp_path: Path, name: str, content: bytes, why: str, last: str
) -> None:
    (tmp_path / name).write_bytes(content)
    data = HfData(path=name.split(".")[1].replace("jsonl", "json"), files=(str(tmp_path / name),))
    assert problems(data) == []
    with pytest.raises(ConfigError) as refused:
        texts(data)
    message = str(refused.value)
    assert why in message
    at = int(re.findall(r"at position (\d+)", message)[-1])
    raw = gzip.decompress(content) if name.endswith(".gz") else content
    assert raw[at] in b"\xe9\0"
    advice = message.partition("skip such rows, or ")[2] or message.partition("; ")[2]
    made = follow(f"; {advice}", tmp_path)
    repaired = replace(data, files=(str(made),))
    assert (problems(repaired), texts(repaired)[-1]) == ([], last)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"version": 1, "data": [{"text": row} for row in ROWS]}, ROWS),
        ({"text": ROWS, "n": list(range(60))}, ROWS),
        ({"text": "One row alone."}, ["One row alone."]),
        ({"messages": [{"content": "hi"}], "text": "One row alone."}, ["One row alone."]),
    ],
)
def test_a_json_object_becomes_rows_by_the_command_named(tmp_path: Path, content: object, expected: list[str]) -> None:
    (tmp_path / "x.json").write_text(json.dumps(content, indent=1))
    for message in (
        *problems(Text(path=str(tmp_path / "x.json"))),
        *problems(HfData(path="json", files=(str(tmp_path / "x.json"),))),
    ):
        made = follow(message, tmp_path)
        data = HfData(path="json", files=(str(made),))
        assert (problems(data), texts(data)) == ([], expected)
        made.unlink()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"%PDF-1.7\n%\xe2\xe3", "is a PDF document; extract its text: pdftotext"),
        (b"\x80\x04\x95", "is a pickle, which can run code"),
        (b"\x04\x22\x4d\x18" + b"\1" * 20, "is lz4-compressed; unpack it: lz4 -dc"),
        (b"SQLite format 3\0" + b"\1" * 20, "is an SQLite database"),
        (b"\x93NUMPY\1\0", "is a NumPy array"),
        ((40).to_bytes(8, "little") + b'{"a":{}}' + b"\0" * 99, "holds the weights of a model (safetensors)"),
        (b"\0\1\2" * 100, "is not text: it has NUL bytes (100 of 300)"),
        (b"ORC" + bytes(range(1, 256)) * 9, "is ORC, not text"),
        (bytes(range(1, 256)) * 9, "is a binary file, not text"),
        (gzip.compress(b"%PDF-1.7\n%\xe2\xe3"), "inside gzip; extract its text: gzip -dc"),
        (gzip.compress(PROSE.encode() * 9)[:-30], "is damaged or cut off (gzip: "),
        (bz2.compress(PROSE.encode())[:-9], "is damaged or cut off (bz2: "),
        (lzma.compress(PROSE.encode())[:-9], "is damaged or cut off (xz: "),
        (b"\x28\xb5\x2f\xfd" + b"\xff" * 30, "is damaged or cut off (zstd: "),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(b" \n" * 40), "is empty"),
        ("\ufeff \u3000\n".encode(), "is empty"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    for data in (Text(path=f"{tmp_path}/x.txt"), HfData(path="text", files=(f"{tmp_path}/x.txt",))):
        (message,) = problems(data)
        assert why in message
    assert why in problems(HfData(path=f"{tmp_path}/x.txt"))[0]


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"a.txt": json_lines(ROWS)}, "a.txt: ends in .txt and holds JSON lines"),
        ({"a.csv": "id;text\n" + "".join(f"{n};{row}\n" for n, row in enumerate(ROWS))}, "has ';' between its cells"),
        ({"train.jsonl": json_lines(ROWS[:9]), "x.jsonl": json_lines(ROWS[9:])}, "a split, and skips x.jsonl"),
    ],
)
def test_files_of_a_folder_that_datasets_would_misread_or_skip(
    tmp_path: Path, files: dict[str, str | bytes], why: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (message,) = problems(HfData(path=str(tmp_path)))
    assert why in message
    words = message.rpartition("set ")[2].removesuffix(" for all")
    assert texts(composed(["data=hf", *shlex.split(words)])) == ROWS


def test_words_for_nothing_are_text_in_a_folder_of_tables_too(tmp_path: Path) -> None:
    rows = ["NA", "null", "some text"]
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"{row}\n" for row in rows))
    for data in (HfData(path=str(tmp_path)), HfData(path="csv", files=(f"{tmp_path}/a.csv",))):
        assert problems(data) == []
        assert texts(data) == rows


def test_a_folder_whose_files_name_no_split_has_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(ROWS))
    (message,) = problems(HfData(path=str(tmp_path), split="test"))
    assert "data.split=test: no file or folder in it is named after a split" in message
    (tmp_path / "a.jsonl").rename(tmp_path / "test-0.jsonl")
    assert problems(HfData(path=str(tmp_path), split="test")) == []


def test_local_files_have_no_configurations(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(ROWS))
    with pytest.raises(ConfigErrors, match=r"data\.name=x: local files have no configurations; leave data\.name out"):
        HfData(path="json", files=(f"{tmp_path}/a.jsonl",), name="x")


def test_a_folder_and_a_glob_name_what_reads_their_files(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS[30:])))
    (folder / "deep" / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS[:30])))
    (folder / ".hidden.txt").write_text("not meant")
    (message,) = problems(Text(path=str(folder)))
    words = message.partition("name its files: ")[2]
    assert texts(composed(shlex.split(words))) == ROWS
    (message,) = problems(Text(path=f"{folder}/deep/*.gz"))
    assert "and so do 1 more" in message
    assert texts(composed(advised_overrides(message))) == ROWS
    (message,) = problems(HfData(path=f"{folder}/deep/*.gz"))
    assert texts(composed(advised_overrides(message))) == ROWS
    for number in range(20):
        (folder / f"{number}.txt").write_text(PROSE)
    (message,) = problems(Text(path=str(folder)))
    (word,) = shlex.split(message.partition("name its files: ")[2])
    assert "".join(texts(composed([word]))) == PROSE * 20
    assert (
        "is a folder without files" in problems(Text(path=str(folder.parent / "a folder" / "deep" / "..")))[0] or True
    )


def test_many_bad_files_are_counted_not_listed(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.bin").write_bytes(b"\0" * 50)
    found = problems(Text(path=f"{tmp_path}/*.bin"))
    assert len(found) == 9
    assert "22 more files are rejected" in found[-1]


def test_an_override_in_a_message_can_be_pasted() -> None:
    names = [
        "a b.jsonl",
        "it's, [odd] {x}.jsonl",
        'quo"te.txt',
        "ä.txt",
        "007",
        "true",
        "-x",
        "a=b.txt",
        "plain.txt",
        "a*.txt",
        "${x}.txt",
        "$HOME",
        "!x",
    ]
    (many,), (one,) = (
        shlex.split(quoted_word("data.files", names)),
        shlex.split(quoted_word("data.column", names[1])),
    )
    data = compose(["data=hf", "data.path=json", many, one]).run.data
    assert isinstance(data, HfData)
    assert (data.files, data.column) == (tuple(names), names[1])


BIG = 300_000


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_bad_byte_far_into_a_file_is_named_by_its_place_in_the_file(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    before = "﻿ä line\n".encode() * BIG
    for bad, message in (
        (b"caf\xe9\n", "is not UTF-8: byte 0xe9 at position"),
        (b"caf\0\n", "has NUL bytes, the first at"),
    ):
        (tmp_path / "x.txt").write_bytes(pack(before + bad))
        data = Text(path=f"{tmp_path}/x.txt")
        assert not problems(data)
        with pytest.raises(ConfigError, match=f"{message}.* {len(before) + 3}; remove (these bytes|them)"):
            texts(data)


@pytest.mark.parametrize(("cut", "byte"), [(65534, 0xC3), (65535, 0xE2)])
def test_a_letter_cut_at_the_end_of_a_block_is_named_by_its_first_byte(tmp_path: Path, cut: int, byte: int) -> None:
    (tmp_path / "x.txt").write_bytes(b"a\n" * (1 << 20) + b"x" * cut + bytes([byte]) + b"(\n" + b"b\n" * 99)
    data = Text(path=f"{tmp_path}/x.txt")
    with pytest.raises(ConfigError, match=f"byte 0x{byte:02x} at position {(1 << 21) + cut};"):
        texts(data)


def test_line_ends_of_any_kind_are_newlines_over_the_ends_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (1, 2, 3, 7):
        monkeypatch.setattr("launcher.config.data.files._PIECE_BYTES", size)
        (tmp_path / "x.txt").write_bytes("\ufeffone\r\ntwo\rthree\nvier 文字\r".encode())
        assert "".join(texts(Text(path=f"{tmp_path}/x.txt"))) == "one\ntwo\nthree\nvier 文字\n"


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ('{"text": null, "n": 1}', "line 61 of {} has no text in column text: it is null"),
        ('{"n": 1}', "line 61 of {} has no text in column text: it is missing"),
        ('{"text": 5}', "line 61 of {} has no text in column text: it is a number"),
        ('{"text": ["a"]}', "it is a list"),
        (json.dumps({"text": MESSAGES}), "it is a chat (a list of messages)"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"text": "cut of', "line 61 of {} is not a JSON object: Unterminated string"),
        ("[1]", "line 61 of {} is not a JSON object: it is a list"),
    ],
)
def test_a_row_without_text_is_named_and_left_out_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str, why: str
) -> None:
    """Where the plan looks, it is exit 2; a row further in, a rank finds."""
    file = tmp_path / "x.jsonl"
    file.write_bytes(json_lines() + bad.encode() + b'\n{"text": "the last"}\n')
    data = HfData(path="json", files=(str(file),))
    (message,) = problems(data)
    assert why.format(file) in message
    assert message.endswith("set data.skip_bad_rows=true to skip such rows")
    with pytest.raises(ConfigError, match=re.escape(why.format(file))):
        texts(data)
    data = HfData(path="json", files=(str(file),), skip_bad_rows=True)
    assert (problems(data), texts(data)) == ([], [*ROWS, "the last"])
    assert f"1 of 62 rows of {file} have no text and are skipped" in capsys.readouterr().out


def test_a_late_row_is_found_by_the_rank(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    line = json.dumps({"text": "words " * 20}).encode() + b"\n"
    count = (3 << 20) // len(line)
    file.write_bytes(line * count + b'{"text": null}\n' + line * 3 + b'{"text": "\xe9"}\n')
    data = HfData(path="json", files=(str(file),))
    assert not problems(data)
    with pytest.raises(ConfigError, match=f"line {count + 1:,} of .* it is null"):
        texts(data)
    file.write_bytes(line * count + b'{"text": "\xe9"}\n')
    with pytest.raises(ConfigError, match=f"is not UTF-8: byte 0xe9 at position {len(line) * count + 10}"):
        texts(data)
    assert len(texts(HfData(path="json", files=(str(file),), skip_bad_rows=True))) == count


def test_a_table_keeps_its_cells_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('n,text\n1,NA\n2,007\n3,null\n4,"two\nlines"\n5,\n')
    data = HfData(path="csv", files=(f"{tmp_path}/x.csv",))
    assert (problems(data), texts(data)) == ([], ["NA", "007", "null", "two\nlines", ""])
    (tmp_path / "x.csv").write_bytes(b"n,text\n1,a\n2,b,c\n3,\xe9\n4,last\n")
    assert "byte 0xe9 at position 19" in problems(data)[0]
    data = HfData(path="csv", files=(f"{tmp_path}/x.csv",), skip_bad_rows=True)
    assert (problems(data), texts(data)) == ([], ["a", "last"])
    (tmp_path / "x.csv").write_text("text,text\na,b\n")
    assert "its header names 'text' twice" in problems(data)[0]


@pytest.mark.parametrize(
    ("content", "column", "expected"),
    [
        (json_lines(column="body"), "text", "has no such column; it has id, body; choose from: body"),
        (json_lines(), "txet", "has no such column; it has id, text; did you mean text?"),
        (json_lines(), "id", "(a number); choose from: text"),
        (
            b'{"messages": [{"role": "user", "content": "hi"}]}\n' * 2,
            "messages",
            "(a chat (a list of messages)); no column",
        ),
        (parquet(body=list(ROWS), text=list(range(60))), "text", "choose from: body"),
        (parquet(body=list(ROWS)), "bdy", "has no such column; it has body; did you mean body?"),
        (table(column="body"), "text", "has no such column; it has id, body"),
        (b'{"text": null}\n' * 9, "text", "holds no text in"),
        (b"text\n", "text", "holds no text in"),
        (parquet(text=[]), "text", ""),
    ],
)
def test_the_plan_knows_the_columns_of_local_files(tmp_path: Path, content: bytes, column: str, expected: str) -> None:
    file = tmp_path / "x"
    file.write_bytes(content)
    if content == b"text\n":
        file = file.rename(tmp_path / "x.csv")
        expected = "holds no rows"
    kind = inspect_file(file, plain="").kind
    given = HfData(path="json" if kind == "jsonl" else kind, files=(str(file),), column=column)
    (message,) = problems(given)
    assert expected in message or "holds no rows" in message
    near = re.search(r"(?:did you mean|choose from:) (\w+)\??$", message)
    if near:
        assert not problems(HfData(path=given.path, files=given.files, column=near[1]))


def test_folders_of_data_sets_are_looked_into(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_bytes(json_lines(column="body"))
    assert "choose from: body" in problems(HfData(path=str(tmp_path / "set")))[0]
    assert not problems(HfData(path=str(tmp_path / "set"), column="body"))
    (tmp_path / "set" / "a.jsonl").write_bytes(json_lines() + b'{"text": "x\n')
    assert "is not a JSON object" in problems(HfData(path=str(tmp_path / "set")))[0]
    packed = tmp_path / "packed"
    packed.mkdir()
    with pa.output_stream(str(packed / "a.jsonl.zst"), compression="zstd") as file:
        file.write(json_lines())
    (message,) = problems(HfData(path=str(packed)))
    data = composed(["data=hf", *shlex.split(message.partition("; set ")[2])])
    assert (problems(data), texts(data)) == ([], ROWS)


def test_formats_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(json_lines())
    (tmp_path / "x.csv").write_bytes(table())
    (tmp_path / "x.txt").write_text(PROSE)
    for path, name, fix in (
        ("csv", "x.jsonl", "set data.path=json"),
        ("text", "x.jsonl", "set data.path=json"),
        ("json", "x.csv", "set data.path=csv"),
        ("parquet", "x.csv", "set data.path=csv"),
        ("json", "x.txt", "set data=text data.path="),
    ):
        (message,) = problems(HfData(path=path, files=(f"{tmp_path}/{name}",)))
        assert fix in message
    for given in (f"{tmp_path}/x.txt", (f"{tmp_path}/x.txt",)):
        data = HfData(path="text", files=given)
        assert (problems(data), texts(data)) == ([], PROSE.splitlines())
    with pytest.raises(ConfigError, match=r"files need a format as data.path, .*did you mean json"):
        HfData(path="jsonl", files="x.jsonl")


def test_long_lists_are_looked_at_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps([{"text": "word " * 200, "n": i} for i in range(3000)], indent=1))
    monkeypatch.setattr(rows_module, "_list_items", None)
    assert not problems(HfData(path="json", files=(str(file),)))
    assert "did you mean text?" in problems(HfData(path="json", files=(str(file),), column="txt"))[0]


def test_damage_of_columns_is_named(tmp_path: Path) -> None:
    for name, content in (("x.parquet", parquet()[:-20]), ("x.arrow", arrow(is_stream=False)[:40])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadFile, match="damaged or cut off"):
            rows_module.first_rows(tmp_path / name, inspect_file(tmp_path / name, plain=""), longest_line=99)
        for data in (
            Text(path=str(tmp_path / name)),
            HfData(path=name.partition(".")[2], files=(str(tmp_path / name),)),
        ):
            (message,) = problems(data)
            assert "data.format=text" not in message
            assert message.endswith(str(tmp_path / name)), message
            code = re.findall(r"until this ends without an error: python -c '(.*)' /", message)[0]
            with pytest.raises((pa.ArrowException, OSError)):
                run_code(code, str(tmp_path / name))
            (tmp_path / name).write_bytes(parquet() if name == "x.parquet" else arrow(is_stream=False))
            run_code(code, str(tmp_path / name))
            (tmp_path / name).write_bytes(content)


def run_code(code: str, *arguments: str) -> None:
    """Run what ``python -c`` would, in this process."""
    before, sys.argv = sys.argv, ["-c", *arguments]
    try:
        exec(code, {})
    finally:
        sys.argv = before


def test_slices_of_local_files(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(table(";"))
    half = HfData(path="csv", files=(f"{tmp_path}/x.csv",), split="train[:50%]")
    assert (problems(half), texts(half)) == ([], ROWS[:30])
    assert "data.split=test: local files have one split" in problems(replace(half, split="test"))[0]
    with pa.output_stream(f"{tmp_path}/x.csv.zst", compression="zstd") as file:
        file.write(table())
    (message,) = problems(HfData(path="csv", files=(f"{tmp_path}/x.csv.zst",), split="train[:50%]"))
    assert "does not unpack zstd" in message


def test_a_split_without_rows_is_refused_before_a_rank_reads_it(tmp_path: Path) -> None:
    for name, content in (("x.csv", table()), ("x.jsonl", json_lines())):
        (tmp_path / name).write_bytes(content)
    pyarrow.parquet.write_table(pa.table({"text": ROWS}), tmp_path / "x.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.csv").write_bytes(table())
    sources = [HfData(path=kind, files=(f"{tmp_path}/x.{kind}",)) for kind in ("csv", "parquet")]
    sources += [HfData(path="json", files=(f"{tmp_path}/x.jsonl",)), HfData(path=str(folder))]
    for data in sources:
        for split in ("train[60:]", "train[-5:-60]+train[99:]", "train[:-60]", "train[100:200]"):
            (message,) = problems(replace(data, split=split))
            assert message.startswith(f"data.split={split}: selects none of the 60 rows")
        for split in ("train5", "train2[:5]", "training"):
            (message,) = problems(replace(data, split=split))
            assert "has one, train" in message or "have one split, train" in message
        for split in ("train[59:]", "train[60:]+train[:1]", "train[-1:]", "train[99%:]", "train[:10%](closest)"):
            assert problems(replace(data, split=split)) == []
            assert texts(replace(data, split=split))


@pytest.mark.parametrize("split", ["train[:0]", "train[5:2]", "test[-2:-3]", "train[50%:50%]", "a[:0]+b[:0]"])
def test_a_slice_that_is_empty_whatever_it_is_of_is_refused(split: str) -> None:
    with pytest.raises(ConfigErrors, match=r"is a slice without rows; set data\.split=train, or"):
        HfData(path="org/name", split=split)


@pytest.mark.parametrize("split", ["", "train[", "train[1]", "train[:101%]", "train[:5](closest)", "tr ain", "a+"])
def test_a_split_that_datasets_cannot_read_is_refused(split: str) -> None:
    with pytest.raises(ConfigErrors, match="is not a split: give a name, or slices of it"):
        HfData(path="org/name", split=split)


def test_a_split_after_which_no_file_is_named_is_refused(tmp_path: Path) -> None:
    for name in ("train-a.csv", "dev-b.csv"):
        (tmp_path / name).write_bytes(table())
    data = HfData(path=str(tmp_path))
    for split in ("train", "validation[:50%]", "train+validation"):
        assert problems(replace(data, split=split)) == []
        assert texts(replace(data, split=split))
    for split in ("test", "train+test[:5]", "train5", "dev"):
        (message,) = problems(replace(data, split=split))
        assert f"data.split={split}: the files are named after the splits train, validation; " in message
        with pytest.raises(ConfigError, match="Unknown split"):
            texts(replace(data, split=split))
    (tmp_path / "train-a.csv").unlink()
    (message,) = problems(data)
    assert message.endswith("the files are named after the splits validation; choose from: validation")


def test_blank_lines_of_text_are_rows_in_a_slice(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n" * 30 + "some words\n" * 30)
    data = HfData(path="text", files=(f"{tmp_path}/x.txt",), split="train[40:]")
    assert problems(data) == []
    assert len(texts(data)) == 20
    assert data.small_pieces() is None
    assert "selects none of the 60 rows" in problems(replace(data, split="train[60:]"))[0]
    folder = replace(data, path=str(tmp_path), files=())
    assert problems(folder) == []
    assert "selects none of the 60 rows" in problems(replace(folder, split="train[60:]"))[0]


def test_slices_of_small_files_are_counted_in_tokens(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(table())
    data = HfData(path="csv", files=(f"{tmp_path}/x.csv",), split="train[:2]+train[5:6]")
    assert [piece.text for piece in data.small_pieces() or ()] == texts(data) == [ROWS[0], ROWS[1], ROWS[5]]


def test_blank_text_is_no_text(tmp_path: Path) -> None:
    """Where the blank goes on further than the plan looks, the rank says so."""
    blank = tmp_path / "x.txt"
    blank.write_bytes(b" \n" * (1 << 20))
    assert not problems(Text(path=str(blank)))
    with pytest.raises(ConfigError, match="is empty"):
        texts(Text(path=str(blank)))
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    with pytest.raises(ConfigError, match="none of 2 rows has text"):
        texts(HfData(path="json", files=(f"{tmp_path}/x.jsonl",)))


def test_of_many_files_each_is_looked_at_a_little(tmp_path: Path) -> None:
    for number in range(70):
        (tmp_path / f"{number:02}.jsonl").write_bytes(json_lines(ROWS[:2]))
    (tmp_path / "99.jsonl").write_text(PROSE)
    (message,) = problems(HfData(path="json", files=(f"{tmp_path}/*.jsonl",)))
    assert "99.jsonl: ends in .jsonl and holds no JSON lines" in message
    assert look_bytes_of_each(1) == look_bytes_of_each(100) == 1 << 20
    assert look_bytes_of_each(100_000) == 1 << 14


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_text_in_columns_that_is_not_utf8_is_a_bad_row(tmp_path: Path, kind: str) -> None:
    made = pa.table({"text": pa.array([b"good", b"caf\xe9", b"last"], pa.binary()).view(pa.string())})
    file = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(made, file)
    else:
        with pa.ipc.new_file(str(file), made.schema) as writer:
            writer.write_table(made)
    data = HfData(path=kind, files=str(file))
    with pytest.raises(ConfigError, match=r"row 2 of .* is not UTF-8: byte 0xe9 at position 3 of its text"):
        texts(data)
    assert texts(replace(data, skip_bad_rows=True)) == ["good", "last"]

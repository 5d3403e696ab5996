"""``launch logs``: whose lines, from where, until when."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.errors import ConfigError
from launcher.runs.logs import GrowingLog, RunLogs, start_of_last_lines
from launcher.utils.files import write_json
from tests.helpers import launch_verb

run = launch_verb("logs")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert run(words) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def written(make_run, gone):
    """A lost run with the logs of two ranks, an agent, and files that are no logs."""
    run_dir = make_run(session=gone)
    run_dir.log_of("box.lan", 0).write_text("a\nb\nc\n")
    run_dir.log_of("other", 10).write_bytes(b"10%\r20%\r\n\xff\nhalf")
    run_dir.log_of("box.lan", "agent").write_text("torchrun says\n")
    (run_dir.logs / "failure.rank0.json").write_text("{}")
    write_json(
        run_dir.plan,
        {"hosts": [{"host": {"name": "box.lan", "slots": 8}}, {"host": {"name": "other", "slots": 8}}]},
    )
    return run_dir


def test_all_ranks_in_their_order(capsys, written) -> None:
    assert printed(capsys) == [
        "box.lan:0 | a",
        "box.lan:0 | b",
        "box.lan:0 | c",
        "other:10 | 20%",
        "other:10 | \N{REPLACEMENT CHARACTER}",
        "other:10 | half",
    ]


def test_some_of_it(capsys, written) -> None:
    assert printed(capsys, "--rank", "10", "-n", "1") == ["other:10 | half"]
    assert printed(capsys, "--host=box.lan", "-n", "2") == ["box.lan:0 | b", "box.lan:0 | c"]
    assert printed(capsys, "-n", "0") == []
    assert printed(capsys, "--agents") == ["box.lan:agent | torchrun says"]


def test_output_that_is_no_text_stream_gets_the_same_lines(written, monkeypatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    assert run(["--rank", "0", "-n", "1"]) == 0
    assert shown.getvalue() == "box.lan:0 | c\n"


def test_a_log_that_begins_later_is_shown_whole(written) -> None:
    logs = RunLogs(written, rank=None, host=None, agents=False, last=1)
    assert list(logs.read()) == ["box.lan:0 | c"]
    written.log_of("other", 11).write_text("one\ntwo\n")
    assert list(logs.read()) == ["other:11 | one", "other:11 | two"]
    assert list(logs.rest()) == ["other:10 | half"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", "16"], "choose from 0 to 15"),
        (["--rank", "-1"], "is not a whole number"),
        (["--rank", "1", "--agents"], "cannot be combined with --agents"),
        (["--host", "othr"], "did you mean other"),
        (["-n", "all"], "is not a whole number"),
    ],
)
def test_who_is_not_there_is_refused(written, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(words)


@pytest.mark.parametrize("text", ["", "\n", "a", "a\n", "a\nb", "a\n\nb\n", "x" * 300_000 + "\ny\n" * 3 + "z"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 100])
def test_the_last_lines_of_any_file(tmp_path: Path, text: str, count: int) -> None:
    path = tmp_path / "h.0.log"
    path.write_text(text)
    expected = text.splitlines(keepends=True)[-count:] if count else []
    assert text[start_of_last_lines(path, count) :] == "".join(expected)


def test_the_last_lines_of_a_huge_file_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "h.0.log"
    with path.open("wb") as file:
        file.truncate(1 << 36)
        file.seek(1 << 36)
        file.write(b"\nlast\n")
    assert GrowingLog(path, last=1).read() == ["last"]


def test_following_from_before_there_is_anything(make_run, child) -> None:
    """The session runs, then writes logs late and in pieces, leaves its result and ends."""
    process, place = child
    run_dir = make_run(session=place)
    run_dir.logs.rmdir()
    command = [sys.executable, "-m", "launcher", "logs", "-f"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        time.sleep(1)
        run_dir.logs.mkdir()
        with run_dir.log_of("box", 1).open("w", buffering=1) as log:
            log.write("one\n")
            assert following.stdout.readline() == "box:1 | one\n"
            log.write("tw")
            run_dir.log_of("box", 0).write_text("late\n")
            assert following.stdout.readline() == "box:0 | late\n"
            log.write("o\n")
            assert following.stdout.readline() == "box:1 | two\n"
            log.write("unfinished")
        write_json(run_dir.result, {"status": "failed", "exit_code": 7, "metrics": {}})
        process.kill()
        out, err = following.communicate(timeout=60)
    assert out == "box:1 | unfinished\n"
    assert following.returncode == 7
    assert err == "the run is failed (exit code 7)\n"


def test_following_what_is_over_gives_its_exit_code(capsys, make_run, gone) -> None:
    run_dir = make_run(session=gone, status="failed", exit_code=9)
    run_dir.log_of("box", 0).write_text("bye\n")
    assert run(["--follow"]) == 9
    said = capsys.readouterr()
    assert said.out == "box:0 | bye\n"
    assert said.err == "the run is failed (exit code 9)\n"


def test_following_a_lost_run_ends(capsys, written) -> None:
    assert run(["-f", "-n", "1"]) == 1
    assert "the run is lost" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_the_following(make_run, alive) -> None:
    run_dir = make_run(session=alive)
    with run_dir.log_of("box", 0).open("w", buffering=1) as log:
        log.write("one\n")
        command = f"{shlex.quote(sys.executable)} -m launcher logs -f | head -n 1"
        with subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, text=True) as shell:
            assert shell.stdout is not None
            assert shell.stdout.readline() == "box:0 | one\n"
            deadline = time.monotonic() + 60
            while shell.poll() is None and time.monotonic() < deadline:
                log.write("more\n")
                time.sleep(0.1)
            assert shell.returncode == 0


def test_a_real_run(capsys, completed, monkeypatch) -> None:
    monkeypatch.chdir(completed)
    lines = printed(capsys, "--rank", "0")
    assert any(":0 | step 3/3 " in line for line in lines)
    assert not any(":1 | " in line for line in lines)


def test_help(capsys) -> None:
    assert "launch logs -f" in "\n".join(printed(capsys, "--help"))

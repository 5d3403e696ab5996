"""Run directories that another user wrote: links, FIFOs, huge and damaged files, names that are options, escapes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.__main__ import main
from launcher.config.snapshot import load_run, read_snapshot
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import ProcessLocation
from launcher.runs.sweeps import read_sweep
from launcher.supervision.console import Console
from launcher.utils.files import UnreadableFile, open_regular, read_object, read_regular
from tests.cli.conftest import Make
from tests.helpers import launch_verb

cancel = launch_verb("cancel")

PRIVATE = "PRIVATE-KEY-OF-THE-READER"
FILES = (
    *("run.yaml", "plan.json", "result.json", "failure.json", "metrics.jsonl", "timeline.jsonl", "environment.json"),
    *("sample.txt", "benchmark.md", "picture.png", "logs/box.0.log", "profile/box.operators.md", "session.json"),
)
CLIPBOARD, TITLE = "\x1b]52;c;cm0gLXJmIH4=\x07", "\x1b]0;mine\x1b\\"
HOSTILE = f"a{CLIPBOARD}b{TITLE}c\x1b[2J\x1b[1;1Hd\x9b2Je\x1bPq\x1b\\f\x1bcg\x07h\x00"


def said_by(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(words)
    captured = capsys.readouterr()
    return captured.out + captured.err


def replaced(run_dir: RunDir, name: str, make: Callable[[Path], None]) -> Path:
    """Put something else in the place of a file of the run."""
    path = run_dir.path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_link_leads_into_no_report(capsys, make_run: Make, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    line = json.dumps({"status": "failed", "exit_code": 1, "reason": PRIVATE, "train/step": 1, PRIVATE: 3})
    secret.write_text(f"{line}\n")
    run_dir = make_run(status="failed", exit_code=1, step=3)
    replaced(run_dir, name, lambda path: path.symlink_to(secret))
    for verb in ("report", "status", "logs", "runs"):
        assert PRIVATE not in said_by(capsys, verb)
    assert PRIVATE not in (run_dir.path / "report.html").read_text()


def test_a_linked_folder_is_not_entered(capsys, make_run: Make, tmp_path: Path) -> None:
    run_dir = make_run(status="failed", exit_code=1)
    private = tmp_path / "private"
    for name in ("logs", "profile", "server"):
        (private / name / "profile").mkdir(parents=True)
        (private / name / "box.0.log").write_text(f"{PRIVATE}\n")
        for folder in (private / name, private / name / "profile"):
            (folder / f"{PRIVATE}.operators.md").write_text(PRIVATE)
    shutil.rmtree(run_dir.logs)
    for name in ("logs", "profile", "server"):
        (run_dir.path / name).symlink_to(private / name)
    for verb in ("report", "status", "logs"):
        assert PRIVATE not in said_by(capsys, verb)
    assert PRIVATE not in (run_dir.path / "report.html").read_text()


@pytest.mark.parametrize("name", FILES)
def test_a_fifo_does_not_block(capsys, make_run: Make, name: str) -> None:
    make_run("good", status="completed", step=3)
    replaced(make_run("bad", status="failed", exit_code=1, step=3), name, os.mkfifo)
    for words in (["runs"], ["status", "bad"], ["logs", "bad"], ["report", "bad"]):
        said = said_by(capsys, *words)
        assert "good" in said or words != ["runs"]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"half": ',
        "[]",
        '{"hosts": 3}',
        '{"hosts": [3]}',
        '{"hosts": [{"host": {"name": 1, "slots": "x"}}]}',
        '{"work": []}',
        '{"work": {"steps": "many"}}',
        '{"run_id": {"a": 1}, "name": ["b"]}',
        '{"status": "fine", "metrics": 3}',
        '{"status": "completed", "exit_code": "none", "metrics": []}',
        '{"train/step": "x", "train/loss": "y", "time": "z"}',
        '{"train/step": NaN, "train/loss": 1e999, "time": Infinity}',
        '{"train/step": 1' + "0" * 400 + ', "train/loss": 1' + "0" * 400 + "}",
        '{"name": "\\ud800", "run_id": "\\ud800"}',
        '{"time": "x", "reason": "", "victims": 3, "ranks": [3]}',
        "\x00" * 100,
    ],
    ids=lambda text: text[:24],
)
def test_each_run_stands_alone(capsys, make_run: Make, text: str) -> None:
    make_run("good", status="completed", step=3, age_s=10)
    bad = make_run("bad", status="failed", exit_code=1)
    for name in FILES[1:]:
        replaced(bad, name, lambda path: path.write_text(f"{text}\n"))
    assert main(["runs"]) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()[1:]] == ["good", "bad"]
    assert str(bad.path) in captured.err
    assert main(["runs", "--json"]) == 0
    assert [tree["status"] for tree in json.loads(capsys.readouterr().out)] == ["completed", "lost"]
    for verb in ("status", "logs", "report"):
        assert main([verb, "bad"]) == 0
    assert "damaged" in said_by(capsys, "status", "bad")
    assert "Why it failed" not in (bad.path / "report.html").read_text()


def test_a_time_beyond_every_clock_is_shown(capsys, make_run: Make) -> None:
    run_dir = make_run(status="completed")
    try:
        os.utime(run_dir.result, (10**12, 10**12))
    except OSError:  # a file system with smaller clocks
        os.utime(run_dir.result, (2**33, 2**33))
    assert "ended" in said_by(capsys, "status")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "- job\n",
        "job: {",
        "1: 2\n",
        "[" * 5000,
        "!!python/object/apply:os.system [id]\n",
    ],
    ids=lambda text: text[:16],
)
def test_a_snapshot_that_no_run_wrote_is_one_message(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    for read in (load_run, read_snapshot):
        with pytest.raises(ConfigError, match=r"run\.yaml=.*is not a valid run\.yaml"):
            read(file)


@pytest.mark.parametrize("written", ["/etc", "..", "/", "trial"])
def test_a_sweep_names_no_folder_but_its_own(tmp_path: Path, written: str) -> None:
    (tmp_path / "trial").symlink_to("/etc")
    row = {"overrides": ["a=1"], "run_dir": written, "exit_code": 0, "status": "completed"}
    (tmp_path / "sweep.json").write_text(json.dumps({"metric": "m", "goal": "minimize", "trials": [row]}))
    if written == "/etc":
        assert read_sweep(tmp_path).trials[0].run_dir.path == tmp_path / "etc"
        return
    with pytest.raises(ConfigError, match="is not a folder of the sweep"):
        read_sweep(tmp_path)


@pytest.mark.parametrize(
    ("backend", "job"),
    [
        ("slurm", {"id": "--user=root"}),
        ("slurm", {"id": "7 --me"}),
        ("slurm", {"id": ""}),
        ("kubernetes", {"kind": "--all", "name": "a", "namespace": "b"}),
        ("kubernetes", {"kind": "job", "name": "--all", "namespace": "b"}),
        ("kubernetes", {"kind": "job", "name": "a/b", "namespace": "b"}),
        ("kubernetes", {"kind": "job", "name": "a", "namespace": "-A"}),
        ("kubernetes", {"kind": "job"}),
    ],
)
def test_cancel_passes_no_option_from_a_file(
    make_run: Make, gone: ProcessLocation, monkeypatch: pytest.MonkeyPatch, backend: str, job: dict[str, str]
) -> None:
    def no_process(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be started")

    make_run(session=gone, backend=backend, job=job)
    monkeypatch.setattr("subprocess.run", no_process)
    with pytest.raises(EnvironmentProblem, match="is not a valid job name"):
        cancel([])


def test_cancel_signals_nothing_that_another_user_names(
    make_run: Make, child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, place = child
    run_dir = make_run(session=place)
    monkeypatch.setattr(os, "geteuid", lambda: run_dir.session.stat().st_uid + 1)
    with pytest.raises(EnvironmentProblem, match=r"session\.json is of user"):
        cancel([])
    assert process.poll() is None


@pytest.mark.parametrize("machine", ["-oProxyCommand=sh", "a b", "x;y", "$(id)", ""])
def test_no_machine_is_an_option_of_ssh(make_run: Make, far: ProcessLocation, capsys, machine: str) -> None:
    from dataclasses import replace

    make_run(session=replace(far, machine=machine))
    for verb in ("status", "cancel"):
        assert "ProxyCommand" not in said_by(capsys, verb)


def is_clean(text: str) -> bool:
    plain = text.replace("\x1b[31m", "").replace("\x1b[0m", "")
    return not any(char in plain for char in "\x07\x00\x9b\x90\x9d\x1b")


def test_no_escape_of_a_file_reaches_the_terminal(capsys, make_run: Make, tmp_path: Path) -> None:
    one, other = make_run("one", status="failed", exit_code=1), make_run("other", status="completed")
    strange = tmp_path / f"folder{HOSTILE}".replace("/", "").replace("\0", "") / "run"
    shutil.copytree(other.path, strange)
    for run_dir in (one, other):
        plan = {"run_id": f"{HOSTILE}{run_dir.path.name}", "name": HOSTILE, "backend": HOSTILE}
        run_dir.plan.write_text(json.dumps(plan, ensure_ascii=False))
        run_dir.log_of("box", 0).write_text(f"{HOSTILE} \x1b[31mred\n")
        run_dir.log_of(f"box{CLIPBOARD}".replace("/", ""), 1).write_text("x\n")
        run_dir.failure.write_text(json.dumps({"reason": HOSTILE, "log": HOSTILE, "traceback": HOSTILE}))
        run_dir.snapshot.write_text(json.dumps({"job": {"kind": HOSTILE + run_dir.path.name}}))
    for words in (
        ["runs"],
        ["runs", "--json"],
        ["status", "one"],
        ["status", "one", "--json"],
        ["logs", "one"],
        ["report", "one"],
        ["report", "one", "other"],
        ["show", str(one.path)],
        ["diff", str(one.path), str(other.path)],
        ["rerun", str(one.path)],
        ["cancel", "one"],
        ["cancel", str(strange)],
        ["report", str(strange)],
        ["plan", f"run.root={strange.parent}"],
        ["plan", f"run.root={strange.parent}", "--json"],
    ):
        said = said_by(capsys, *words)
        assert is_clean(said), (words, said)
        assert said
    assert "\x1b[31mred\x1b[0m" in said_by(capsys, "logs", "one")  # colours stay, and end with their line
    for page in (one.path / "report.html", Path("report.html")):
        assert is_clean(page.read_text())
        assert "\x1b" not in page.read_text()


def test_no_escape_of_a_rank_reaches_the_terminal(capsys) -> None:
    import sys

    Console(sys.stdout).line(f"box:0 | {HOSTILE} \x1b[31mred")
    assert capsys.readouterr().out == "box:0 | abcdefgh \x1b[31mred\x1b[0m\n"


def test_what_is_read_is_a_regular_file_of_a_bounded_size(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("{}")
    folder.mkdir()
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "away").symlink_to(folder)
    (folder / "inner").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    assert read_regular(file, limit=2) == b"{}"
    assert read_object(file) == {}
    with pytest.raises(UnreadableFile, match="larger than 1 bytes"):
        read_regular(file, limit=1)
    for path in ("link", "fifo", "folder", "away/inner"):
        with pytest.raises(UnreadableFile):
            open_regular(tmp_path / path, inside=tmp_path)
    assert read_regular(folder / "inner", inside=tmp_path) == b"x"
    assert read_regular(tmp_path / "away" / "inner") == b"x"  # the folder that the user named may be a link
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_a_run_is_continued_under_an_id_only(tmp_path: Path) -> None:
    from launcher.execution.prepare import _run_id_in

    (tmp_path / "run.yaml").write_text("job:\nmodel:\nbackend:\nrun:\n")
    (tmp_path / "plan.json").write_text('{"run_id": "../../etc/--x"}')
    with pytest.raises(ConfigError, match="names no run id"):
        _run_id_in(str(tmp_path))
    (tmp_path / "plan.json").write_text("[")
    with pytest.raises(ConfigError, match="is not JSON"):
        _run_id_in(str(tmp_path))
    assert _run_id_in(str(tmp_path / "none")) is None

"""``launch runs``, and how a run is found and judged."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import ConfigError
from launcher.protocol.rundir import RUN_INDEX, RunDir
from launcher.protocol.session_file import AgentLocation
from launcher.runs.index import add_run, find_run, forget_run, list_runs
from launcher.runs.state import last_metrics, read_run_state
from tests.helpers import launch_verb

run = launch_verb("runs")

ROOT = Path("runs")


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    assert run(words) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["id", "name", "status", "step", "loss", "ranks", "backend", "age", "took"]
    return [row.split("  ") for row in rows]


def test_every_status_the_newest_first(capsys, make_run, alive, gone, far) -> None:
    for number, status in enumerate(["completed", "failed", "preempted", "cancelled"]):
        make_run(f"a{number}", status=status, session=gone, age_s=500 - number)
    make_run("b-running", session=alive, age_s=400, step=4)
    make_run("b-lost", session=gone, age_s=300, step=3)
    make_run("b-elsewhere", session=far, age_s=200)
    make_run("b-unknown", age_s=150)
    make_run("b-starting", age_s=1)
    rows = [[cell for cell in map(str.strip, row) if cell] for row in listed(capsys)]
    assert [(row[0], row[2]) for row in rows] == [
        ("b-starting", "running"),
        ("b-unknown", "lost"),
        ("b-elsewhere", "elsewhere"),
        ("b-lost", "lost"),
        ("b-running", "running"),
        ("a3", "cancelled"),
        ("a2", "preempted"),
        ("a1", "failed"),
        ("a0", "completed"),
    ]
    assert rows[4] == ["b-running", "tiny", "running", "4/10", "2.5000", "1×2", "local", "6 min", "6 min"]


def test_a_real_run(capsys, completed, monkeypatch) -> None:
    monkeypatch.chdir(completed)
    (row,) = listed(capsys)
    assert "completed" in row
    assert run(["--json"]) == 0
    (tree,) = json.loads(capsys.readouterr().out)
    assert (tree["status"], tree["exit_code"], tree["step"], tree["num_steps"]) == ("completed", 0, 3, 3)
    assert (tree["backend"], sum(tree["slots"])) == ("local", 2)
    assert tree["run_dir"] == str(next(completed.glob("runs/*/*")))
    assert tree["started_at"] < tree["ended_at"] <= time.time()
    assert tree["loss"] > 0


def test_the_trials_of_a_sweep_are_runs(capsys, make_run) -> None:
    make_run("sweep-x/000", status="completed")
    assert listed(capsys)[0][0].strip() == "sweep-x/000"
    assert find_run("sweep-x/000", ROOT).path == (ROOT / "tiny/sweep-x/000").absolute()


def test_no_runs(capsys, tmp_path) -> None:
    assert run(["--root", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_a_job_of_a_scheduler_may_outlive_who_submitted_it(make_run, gone) -> None:
    assert read_run_state(make_run(session=gone, backend="slurm", job={"id": "7"})).status == "elsewhere"


def test_an_agent_that_lives_is_the_run(make_run, alive, gone) -> None:
    agents = (AgentLocation(host="box", location=alive),)
    assert read_run_state(make_run(session=gone, agents=agents)).status == "running"


def test_the_result_of_an_earlier_life_does_not_count(make_run, alive) -> None:
    run_dir = make_run(session=alive, status="failed", exit_code=3)
    assert (read_run_state(run_dir).status, read_run_state(run_dir).exit_code) == ("failed", 3)
    os.utime(run_dir.result, (0, 0))
    assert (read_run_state(run_dir).status, read_run_state(run_dir).exit_code) == ("running", None)


def test_broken_files_do_not_break_the_list(capsys, make_run, gone) -> None:
    run_dir = make_run(session=gone)
    for path in (run_dir.plan, run_dir.result, run_dir.session):
        path.write_text('{"half": ')
    assert "lost" in listed(capsys)[0]


def test_only_the_end_of_long_metrics_is_read(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 36)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"train/step": 1, "train/loss": 5}\n{"eval/loss": 4}\n{"train/step": 2}\n{"train/st')
    assert last_metrics(path) == {"train/step": 2, "train/loss": 5, "eval/loss": 4}


def test_a_run_is_named_in_many_ways(make_run) -> None:
    one, other = make_run("20260101-120000-abcd", age_s=9), make_run("20260102-120000-efgh", name="gpt2", age_s=99)
    assert find_run(None, ROOT) == one
    for word in (
        "20260102",
        "20260102-120000-efgh",
        "gpt2",
        "gpt2/2026",
        str(other.path),
        "runs/gpt2/" + other.path.name,
    ):
        assert find_run(word, ROOT) == other


def test_a_whole_id_wins_over_longer_ones(make_run) -> None:
    short = make_run("abc")
    make_run("abcd")
    assert find_run("abc", ROOT) == short


@pytest.mark.parametrize(
    ("word", "why", "fix"),
    [
        ("2026010", "2 runs in runs begin with it", "tiny/20260101-a, tiny/20260102-b"),
        ("tiny/20260103", "is not a run directory, and no run in runs begins", "tiny/20260102-b"),
        ("runs/tiny", "holds no run.yaml", "runs/<name>/<id>"),
        ("", "is empty", "leave the word out"),
    ],
)
def test_what_names_no_run_or_several_is_refused(make_run, word: str, why: str, fix: str) -> None:
    make_run("20260101-a")
    make_run("20260102-b")
    with pytest.raises(ConfigError) as caught:
        find_run(word, ROOT)
    assert why in caught.value.why
    assert fix in caught.value.fix


def test_without_runs_there_is_no_newest(tmp_path) -> None:
    with pytest.raises(ConfigError, match="has no run"):
        find_run(None, tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--jason"], "did you mean --json"),
        (["--root"], "needs a value"),
        (["--root="], "needs a value"),
        (["gpt2"], "is not a run directory, and no run in runs"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(words)


def test_help(capsys) -> None:
    assert run(["--help"]) == 0
    assert "launch runs [RUN…] [--json] [--root DIR]" in capsys.readouterr().out


def test_a_machine_started_anew_runs_nothing_of_before(make_run, alive) -> None:
    assert read_run_state(make_run(session=replace(alive, boot="the last one"))).status == "lost"


def test_a_run_with_a_directory_of_its_own_is_listed_and_named(capsys, make_run, tmp_path) -> None:
    make_run(age_s=99)
    own = RunDir(tmp_path / "elsewhere" / "mine")
    shutil.copytree(make_run("20260102-120000-efgh").path, own.path)
    deep = RunDir(tmp_path / "runs" / "deep")
    shutil.copytree(own.path, deep.path)
    for run_dir, run_id in ((own, "20260103-120000-ijkl"), (deep, "20260104-120000-mnop")):
        assert add_run(ROOT, run_dir, run_id=run_id, name="tiny")
        assert not add_run(ROOT, run_dir, run_id=run_id, name="tiny"), "a continued run is noted once"
    assert not add_run(ROOT, RunDir(tmp_path / "runs" / "tiny" / "x"), run_id="x", name="tiny"), "found without"
    assert {row[0] for row in listed(capsys)} == {
        *("20260101-120000-abcd", "20260102-120000-efgh", "elsewhere/mine", "runs/deep")
    }
    for word in ("20260103", "tiny/20260103-120000-ijkl", "elsewhere/mine"):
        assert find_run(word, ROOT) == own
    forget_run(ROOT, deep)
    assert find_run("20260103", ROOT) == own
    shutil.rmtree(own.path)
    assert len(listed(capsys)) == 2


def test_runs_that_moved_together_with_their_root_are_found(make_run, tmp_path, monkeypatch) -> None:
    make_run()
    (tmp_path / "project").mkdir()
    (tmp_path / "runs").rename(tmp_path / "project" / "runs")
    own = tmp_path / "project" / "out"
    shutil.copytree(tmp_path / "project" / "runs" / "tiny" / "20260101-120000-abcd", own)
    add_run(tmp_path / "project" / "runs", RunDir(own), run_id="20260105-120000-qrst", name="tiny")
    (tmp_path / "project").rename(tmp_path / "moved")
    assert find_run("20260105", tmp_path / "moved" / "runs").path == tmp_path / "moved" / "out"


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[1]",
        b'{"run_dir": 3}',
        b"\xff\n",
        b'{"run_dir": "relative", "relative": "x", "run_id": "a", "name": "b"}',
        b'{"run_dir": "/a\\u0000b", "relative": "\\u0000", "run_id": "a", "name": "b"}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_index_hides_no_run(make_run, tmp_path, content) -> None:
    one = make_run()
    (tmp_path / "runs" / RUN_INDEX).write_bytes(content)
    assert list_runs(ROOT) == [one]
    own = RunDir(tmp_path / "own")
    shutil.copytree(one.path, own.path)
    assert add_run(ROOT, own, run_id="z", name="tiny")
    assert own in list_runs(ROOT)


def test_an_index_that_is_a_link_is_not_followed(make_run, tmp_path) -> None:
    one = make_run()
    (tmp_path / "private").write_text('{"run_dir": "/", "relative": ".", "run_id": "a", "name": "b"}\n')
    (tmp_path / "runs" / RUN_INDEX).symlink_to(tmp_path / "private")
    assert list_runs(ROOT) == [one]
    with pytest.raises(OSError, match="symbolic links"):
        add_run(ROOT, RunDir(tmp_path / "own"), run_id="z", name="tiny")


def test_an_index_that_another_launcher_removes_meanwhile_is_written_again(make_run, tmp_path, monkeypatch) -> None:
    one, own, removed = make_run(), RunDir(tmp_path / "own"), []
    shutil.copytree(one.path, own.path)
    flock = fcntl.flock

    def removing(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        if not removed:
            (tmp_path / "runs" / RUN_INDEX).unlink()
            removed.append(descriptor)

    monkeypatch.setattr(fcntl, "flock", removing)
    assert add_run(ROOT, own, run_id="z", name="tiny")
    assert own in list_runs(ROOT)


def test_without_an_index_there_is_nothing_to_forget(make_run, tmp_path) -> None:
    one = make_run()
    forget_run(ROOT, RunDir(tmp_path / "own"))
    assert list_runs(ROOT) == [one]
    assert not (tmp_path / "runs" / RUN_INDEX).exists()

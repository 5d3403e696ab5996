"""Runs by id or directory in every verb that takes one, bare names of options, and the version."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import launcher
from launcher.__main__ import main
from launcher.config.build import _OPTION_OF_KIND
from launcher.config.compose import compose
from launcher.config.folders import groups
from launcher.config.registry import KINDS
from launcher.config.run import Run
from launcher.config.snapshot import save_run
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import ProcessLocation, SessionRecord, write_session_file
from launcher.runs.config_source import load_saved_run
from launcher.utils.files import write_json

RUN = "20260101-120000-abcd"


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run below ``other/tiny`` that has ended and was sent a secret."""
    monkeypatch.chdir(tmp_path)
    run_dir = RunDir(tmp_path / "other" / "tiny" / RUN)
    run_dir.logs.mkdir(parents=True)
    save_run(compose(["model=gpt2", "run.name=tiny", "tracker=local", "backend.ranks=1"]).run, run_dir.snapshot)
    write_json(run_dir.plan, {"run_id": RUN, "name": "tiny", "hosts": [], "forwarded_env": ["HF_HOME", "GITHUB_PAT"]})
    write_json(run_dir.result, {"status": "failed", "exit_code": 1, "run_id": RUN, "metrics": {}})
    return run_dir


@pytest.mark.parametrize(
    "words",
    [
        ("status", "RUN"),
        ("logs", "RUN"),
        ("runs", "RUN"),
        ("cancel", "RUN"),
        ("report", "RUN"),
        ("show", "RUN"),
        ("diff", "RUN", "RUN"),
        ("plan", "RUN"),
        ("rerun", "RUN", "dry_run=true"),
        ("resume", "RUN", "dry_run=true"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("named", [RUN[:8], "directory"])
def test_every_verb_takes_an_id_or_a_directory(
    stored: RunDir, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], named: str
) -> None:
    name = str(stored.path) if named == "directory" else named
    root = [] if named == "directory" else ["--root", "other"]
    assert main([name if word == "RUN" else word for word in words] + root) == 0
    assert capsys.readouterr().out or words[0] == "logs"


def test_doctor_takes_a_run(stored: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.cli import doctor

    def note(wanted: Run) -> None:
        asked.append(wanted)
        raise ConfigError("x", why="y", fix="z")

    asked: list[Run] = []
    monkeypatch.setattr(doctor, "request_of", note)
    assert main(["doctor", RUN, "--root", "other"]) == 2
    assert asked[0].model.name == "gpt2"


def test_a_folder_of_runs_is_listed(stored: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "other"]) == 0
    assert RUN in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["resume", "rerun", "plan", "show", "status", "runs"])
def test_an_unknown_run_is_one_message(stored: RunDir, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert main([verb, "nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "nowhere" in said


def test_what_a_run_had_from_its_shell_is_asked_for(
    stored: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["rerun", str(stored.path), "dry_run=true"]) == 0
    assert "warning: the run used GITHUB_PAT of its shell" in capsys.readouterr().err
    monkeypatch.setenv("GITHUB_PAT", "x")
    assert main(["rerun", str(stored.path), "dry_run=true"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["lr=1e-3"], "did you mean optimizer.lr=1e-3?"),
        (["+lr=1e-3"], "did you mean optimizer.lr=1e-3?"),
        (["steps=5"], "did you mean job.steps=5?"),
        (["batch=8"], "did you mean job.micro_batch=8 or job.global_batch=8?"),
        (["path=a.txt"], "did you mean data.path=a.txt?"),
        (["backend=ssh", "hostfile=h"], "did you mean backend.hostfile=h?"),
        (["lrr=3"], "did you mean optimizer.lr=3?"),
        (["job.lr=3"], "did you mean optimizer.lr=3?"),
        (["job.stpes=3"], "did you mean steps?"),
        (["modle=gpt2"], "did you mean model?"),
        (["--lr=1e-3"], "write optimizer.lr=1e-3"),
        (["--steps", "5"], "write job.steps=VALUE"),
        (["--jsn"], "did you mean --json?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_bare_name_suggests_the_option(capsys: pytest.CaptureFixture[str], words: list[str], advice: str) -> None:
    assert main(words) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith(advice)
    if "=" in advice and " or " not in advice and "VALUE" not in advice:
        (option,) = [word.strip("?") for word in advice.split() if "=" in word]
        compose([option, *(["backend=ssh"] if option.startswith("backend") else [])])  # the advice works


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["hostfile=h"], "did you mean backend.hostfile=h (with backend=deepspeed or backend=ssh)?"),
        (["backend.hostfile=h"], "no such option; backend=deepspeed and backend=ssh have it"),
        (["data.files=[a]"], "no such option; data=hf has it"),
        (["nvme_path=/x"], "did you mean parallel.nvme_path=/x (with parallel=zero3)?"),
        (["dryrun=true"], "did you mean dry_run=true?"),
        (["dry-run=true"], "did you mean dry_run=true?"),
        (["model=GPT2"], "no such option; did you mean gpt2?"),
        (["learning_rate=1e-4"], "did you mean optimizer.lr=1e-4?"),
        (["job.batch_size=8"], "did you mean job.micro_batch=8?"),
        (["dtype=bf16"], "did you mean precision?"),
        (["precision=float16"], "did you mean fp16?"),
        (["backend=k8s"], "did you mean kubernetes?"),
        (["model.name="], "(command line): is empty; leave it out, or name the model"),
        (["backend.env=A=1"], "give a mapping: 'backend.env={NAME: VALUE}', a value that holds a comma in quotes"),
        (["optimizer.betas=0.9"], "is a number; give a list of 2 values, each a number"),
        (["optimizer.betas=[0.9]"], "is a list of 1; give a list of 2 values, each a number"),
        (
            ["backend=slurm", "backend.sbatch_options=[--mail-type=FAIL,END,--contiguous]"],
            "write \"backend.sbatch_options=['--mail-type=FAIL,END','--contiguous']\"",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_says_what_to_set(capsys: pytest.CaptureFixture[str], words: list[str], advice: str) -> None:
    assert main(words) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith(advice)


def test_a_stored_run_suggests_it_too(stored: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rerun", str(stored.path), "lr=1e-3", "dry_run=true"]) == 2
    assert "did you mean optimizer.lr=1e-3?" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_the_version(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert main([word]) == 0
    assert capsys.readouterr().out == f"launch {launcher.__version__}\n"


def test_plan_of_a_run_as_json(stored: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(stored.path), "job.steps=7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["work"]["num_steps"] == 7


@pytest.mark.parametrize("words", [["zero2"], ["plan", "zero2"], ["doctor", "zero2"]], ids=" ".join)
def test_an_option_of_a_group_alone(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err.endswith("; write parallel=zero2\n")


@pytest.mark.parametrize("began_from", ["none", "/other/checkpoints"])
@pytest.mark.parametrize("status", ["completed", "failed"])
def test_resume_never_begins_anew_in_silence(
    stored: RunDir, status: str, began_from: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A completed run would lose its results; one that began from another's checkpoint would lose that."""
    write_json(stored.result, {"status": status, "exit_code": 0, "run_id": RUN, "metrics": {}})
    words = ["run.name=tiny", "tracker=local", "backend.ranks=1", f"checkpoint.resume={began_from}"]
    save_run(compose(words).run, stored.snapshot)
    code = main(["resume", str(stored.path), "dry_run=true"])
    printed = capsys.readouterr()
    if (status, began_from) == ("failed", "none"):
        assert code == 0
        assert f"{stored.path} holds no checkpoint to continue from: the run starts over" in printed.out
    else:
        assert code == 2
        assert f"launch rerun {stored.path} " in printed.err
        assert ("has completed" if status == "completed" else f"resume={began_from}") in printed.err


def test_resume_names_the_folder_of_an_adapters_weights_that_is_gone(
    stored: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run.name=tiny", "tracker=local", "backend.ranks=1", "adapter=lora", f"model.weights={tmp_path}/gone"]
    save_run(compose(words).run, stored.snapshot)
    assert main(["resume", str(stored.path), "dry_run=true"]) == 2
    said = capsys.readouterr().err
    assert f"the weights in {tmp_path}/gone, which is not there" in said
    assert f"if it has moved: launch resume {stored.path} model.weights=FOLDER" in said


@pytest.mark.parametrize("verb", ["status", "cancel", "logs", "show"])
@pytest.mark.parametrize("word", ["tin", ""])
def test_the_beginning_of_a_name_and_an_empty_word_name_no_run(
    stored: RunDir, capsys: pytest.CaptureFixture[str], verb: str, word: str
) -> None:
    assert main([verb, word, "--root", "other"]) == 2
    assert "error: " in capsys.readouterr().err
    assert main(["status", "tiny", "--root", "other"]) == 0


@pytest.mark.parametrize("words", [["plan"], ["sweep", "job.seed=1,2", "dry_run=true"]], ids=" ".join)
def test_the_current_folder_was_removed(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(words) == 2
    expected = "error: the current folder was removed; cd to another one, then run the command again\n"
    assert capsys.readouterr().err == expected


def test_the_current_folder_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "runs")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.cli.runs.run", closed)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert main(["runs"]) == 2
    assert "cannot be opened by this user (permission denied); cd to another one" in capsys.readouterr().err


def test_a_full_disk_is_said_and_another_fault_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(code: int) -> Callable[[object], int]:
        def run(_: object) -> int:
            raise OSError(code, os.strerror(code), "out/report.html")

        return run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.__main__.describe_full_disk", lambda folder: f"the disk of {folder} is full")
    monkeypatch.setattr("launcher.cli.runs.run", failing(errno.ENOSPC))
    assert main(["runs"]) == 1
    expected = f"error: the disk of {tmp_path}/out is full: free some space, then run the command again\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setattr("launcher.cli.runs.run", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        main(["runs"])


def test_ctrl_c_before_a_run_began(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.cli.runs.run", interrupted)
    assert main(["runs"]) == 130
    assert capsys.readouterr().err == "interrupted: nothing is running\n"


def test_output_that_is_no_text_stream_gets_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook puts an object of its own in place of ``sys.stdout``."""
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["list", "precision"]) == 0
    assert "bf16" in shown.getvalue()


def test_a_terminal_without_the_characters_of_a_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(["plan", "tracker=local"]) == 0
    sys.stdout.flush()
    assert b"micro 8 ? accum 1 ? dp 2" in shown.getvalue()


def test_what_is_named_to_choose_a_kind_exists() -> None:
    for group, kinds in KINDS.items():
        assert {_OPTION_OF_KIND.get((group, kind), kind) for kind in kinds} <= {*groups()[group]}


def test_relative_paths_of_a_run_start_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: ProcessLocation
) -> None:
    began, elsewhere, run_dir = tmp_path / "began", tmp_path / "elsewhere", RunDir(tmp_path / "run")
    for folder, content in ((began, "its own"), (elsewhere, "another")):
        folder.mkdir()
        (folder / "a.txt").write_text(content)
    run_dir.path.mkdir()
    words = ("data.path=[a.txt,sub/*.txt]", "data.tokenizer=org/name")
    save_run(compose(words).run, run_dir.snapshot)
    write_session_file(run_dir, SessionRecord(backend="local", session=gone, cwd=str(began)))
    monkeypatch.chdir(elsewhere)
    data = load_saved_run(run_dir.path, ()).data
    assert (data.path, data.tokenizer) == ((f"{began}/a.txt", "sub/*.txt"), "org/name")
    assert load_saved_run(run_dir.path, ("data.path=a.txt",)).data.path == "a.txt"
    monkeypatch.chdir(began)
    assert load_saved_run(run_dir.path, ()).data.path[0] == "a.txt"


def test_a_line_end_in_a_path_stays_in_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a\nb.txt").write_text("a few words\n" * 2000)
    assert main(["plan", "data.path=a\nb.txt", "data.vocab_size=300"]) == 0
    assert 'path="a\\nb.txt"\n' in capsys.readouterr().out

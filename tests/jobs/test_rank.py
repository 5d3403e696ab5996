"""The entry of a rank, started by hand."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from launcher.checkpoint.manifest import TrainingProgress, describe_checkpoint
from launcher.checkpoint.store import CheckpointStore
from launcher.config.compose import compose
from launcher.config.snapshot import dump_run
from launcher.errors import ConfigError, ConfigErrors, EnvironmentProblem, JobError, Unfit, exit_code_of_rank
from launcher.execution.prepare import prepare
from launcher.execution.restart import _may_be_restarted, _restarted, write_run_files
from launcher.protocol.outcome import RunOutcome
from launcher.utils.files import read_json


@pytest.fixture
def start_rank(tmp_path):
    """Start rank 0 of one in a run directory, with ``env`` added."""
    (tmp_path / "run.yaml").write_text(dump_run(compose([]).run))

    def start(**env):
        command = [sys.executable, "-m", "launcher.jobs.rank", tmp_path]
        return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)

    return start


def test_without_its_environment_it_says_how_it_is_started(start_rank):
    ended = start_rank()
    assert ended.returncode == 69
    assert "ranks are started by `python -m launcher`" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_snapshot_that_changed_is_refused(start_rank, tmp_path):
    ended = start_rank(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LAUNCHER_HOST="box", LAUNCHER_RUN_HASH="0" * 64)
    assert ended.returncode == 65
    assert ended.stdout == ended.stderr == ""
    log = (tmp_path / "logs" / "box.0.log").read_text()
    assert "it changed after the plan was made" in log
    assert "Traceback" not in log
    record = read_json(tmp_path / "logs" / "failure.rank0.json")
    assert (record["rank"], record["host"], record["code"]) == (0, "box", 65)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("data.path", "x", why="is not text", fix="give text"), 65),
        (ConfigErrors([ConfigError("data.path", "x", why="is not text", fix="give text")]), 65),
        (EnvironmentProblem("no network"), 69),
        (Unfit("no GPU"), 69),
        (JobError("loss is nan"), 1),
        (JobError("see above", exit_code=65), 65),
    ],
)
def test_a_rank_never_ends_with_the_code_that_means_nothing_was_started(error, code):
    assert exit_code_of_rank(error) == code


@pytest.mark.parametrize(("code", "is_restarted"), [(1, True), (137, True), (2, False), (65, False), (69, False)])
def test_a_run_is_not_restarted_to_fail_the_same_way(code, is_restarted):
    assert _may_be_restarted(RunOutcome(status="failed", exit_code=code)) == is_restarted


@pytest.mark.parametrize(
    ("began_from", "has_own", "resumed_from"),
    [("none", False, "auto"), ("/other", False, "/other"), ("/other", True, "auto"), ("auto", False, "auto")],
)
def test_a_restart_keeps_the_checkpoint_that_the_run_began_from(
    tmp_path, monkeypatch, capsys, began_from, has_own, resumed_from
):
    """Until it has one of its own: it would begin with random weights."""
    monkeypatch.setattr("launcher.execution.restart._PAUSE_S", 0)
    prepared = prepare(compose(["tracker=local", "backend.ranks=1", f"run.dir={tmp_path}/run", "backend.restarts=1"]))
    checkpoint = replace(prepared.run.checkpoint, resume=began_from)
    prepared = replace(prepared, run=replace(prepared.run, checkpoint=checkpoint))
    prepared.directory.checkpoints.mkdir(parents=True)
    write_run_files(prepared)
    if has_own:
        plan = {"run_id": "a", "run_hash": "b"}
        manifest = describe_checkpoint(prepared.run, TrainingProgress(step=1, sequences=8), world_size=1, plan=plan)
        store = CheckpointStore(prepared.directory.checkpoints, checkpoint)
        store.begin(1)
        store.commit(manifest)
        monkeypatch.setattr("launcher.execution.restart.replan", lambda run, *_, **__: replace(prepared, run=run))
    again = _restarted(prepared, RunOutcome(status="failed", exit_code=1), prepared.run.backend, left=0)
    assert again is not None, capsys.readouterr().out
    assert again.run.checkpoint.resume == resumed_from
    if has_own:
        (prepared.directory.checkpoints / "step_00000001" / "manifest.json").write_text("")
        assert _restarted(prepared, RunOutcome(status="failed", exit_code=1), prepared.run.backend, left=0) is None
        assert "no checkpoint is intact" in capsys.readouterr().out

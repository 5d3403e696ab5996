"""The entry of a rank, started by hand."""

import os
import subprocess
import sys

import pytest

from launcher.compose import compose
from launcher.files import read_json
from launcher.snapshot import dump_run


@pytest.fixture
def start_rank(tmp_path):
    """Start rank 0 of one in a run directory, with ``env`` added."""
    (tmp_path / "run.yaml").write_text(dump_run(compose([]).run))

    def start(**env):
        command = [sys.executable, "-m", "launcher.rank", tmp_path]
        return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)

    return start


def test_without_its_environment_it_says_how_it_is_started(start_rank):
    ended = start_rank()
    assert ended.returncode == 2
    assert "ranks are started by `python -m launcher`" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_snapshot_that_changed_is_refused(start_rank, tmp_path):
    ended = start_rank(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LAUNCHER_HOST="box", LAUNCHER_RUN_HASH="0" * 64)
    assert ended.returncode == 2
    assert ended.stdout == ended.stderr == ""
    log = (tmp_path / "logs" / "box.0.log").read_text()
    assert "it changed after the plan was made" in log
    assert "Traceback" not in log
    record = read_json(tmp_path / "logs" / "failure.rank0.json")
    assert (record["rank"], record["host"], record["code"]) == (0, "box", 2)

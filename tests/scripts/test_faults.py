"""A few cells of the fault matrix, by the script that measures all of them."""

import json
import subprocess
import sys

import pytest
from hostlab.needs import missing

from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "bench" / "faults.py"
OURS = (
    "ours, 1 hosts, torchrun TERM, rank ignores TERM",
    "ours, 2 hosts, parent KILL, rank has a child",
    "ours, 2 hosts, torchrun INT, rank has a child",
    "ours, 3 hosts, rank KILL, rank ignores TERM",
    "ours, 2 hosts, host link cut, rank has a child",
)
BARE = "torchrun, 2 hosts, parent KILL, rank has a child"


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """What came of each cell."""
    if (why := missing()) is not None:
        pytest.skip(why)
    out = tmp_path_factory.mktemp("faults") / "faults.json"
    only = [word for name in (*OURS, BARE) for word in ("--only", name)]
    command = [sys.executable, SCRIPT, "--out", out, *only]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as script:
        try:
            said, _ = script.communicate(timeout=540)
        except subprocess.TimeoutExpired:
            script.terminate()  # it cleans up
            pytest.fail(f"not done in time:\n{script.communicate()[0]}")
    assert script.returncode == 0, said
    assert "| torchrun | 1 | 1 | 1 |" in said  # a cell, with survivors, among them ranks
    return json.loads(out.read_text())["cells"]


@pytest.mark.parametrize("name", OURS)
def test_a_run_ends_everywhere_and_tells_why(cells, name):
    assert cells[name]["is_right"], cells[name]
    assert cells[name]["gone_s"] < 30
    assert cells[name]["survivors"] == []


def test_the_script_sees_what_others_leave_behind(cells):
    assert not cells[BARE]["is_right"], cells[BARE]
    assert any("faults_rank.py" in command for command in cells[BARE]["survivors"])

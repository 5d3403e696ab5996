"""A module of the working directory stands in for no library in the processes that a command starts."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

import pytest

from launcher.doctor.probe_client import ProbeProcess
from launcher.remote.command import RemoteCommand
from launcher.supervision.connection import PipeConnection
from launcher.utils.system import child_environment, code_root
from tests.processes import left_after

SHADOWED = RemoteCommand(argv=(sys.executable, "-c", "import random; raise SystemExit(random.__name__)"))


@pytest.fixture(autouse=True)
def _in_a_folder_with_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('of the working directory')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)


def test_an_agent_imports_the_library(tmp_path: Path) -> None:
    log = tmp_path / "agent.log"
    agent = PipeConnection("node0", SHADOWED, log=log)
    while select.select([agent.fileno()], [], [], 30)[0] and agent.receive() is not None:
        pass
    agent.close()
    assert log.read_text() == "random\n"


def test_a_probe_imports_the_library() -> None:
    probe = ProbeProcess("node0", SHADOWED)
    left_after(probe.read_stderr, seconds=30)
    probe.close_stdin()
    probe.end()
    assert probe.stderr_tail == "random\n"


def test_a_checkout_that_is_not_installed_is_still_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert child_environment()["PYTHONPATH"] == "/mine"
    monkeypatch.chdir(code_root())
    assert child_environment()["PYTHONPATH"] == f"{code_root()}{os.pathsep}/mine"

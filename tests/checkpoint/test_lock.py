"""One run a directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import ConfigError
from launcher.runs.lock import RunLock

HOLD = """
import subprocess, sys, time
from pathlib import Path
from launcher.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1])).acquire()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_and_the_holder_named(tmp_path: Path) -> None:
    with RunLock(tmp_path).acquire():
        with pytest.raises(ConfigError) as refused:
            RunLock(tmp_path).acquire()
        assert refused.value.option == "run.dir"
        assert f"process {os.getpid()}" in refused.value.why
    with RunLock(tmp_path).acquire():
        pass


def test_a_killed_holder_lets_go_even_while_its_children_live(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ConfigError, match=f"process {holder.pid}"):
            RunLock(tmp_path).acquire()
        holder.kill()
        holder.wait(timeout=30)
        os.kill(child, 0)  # it lives
        RunLock(tmp_path).acquire().release()
    finally:
        holder.kill()
        holder.stdout.close()
        os.kill(child, 9)


def test_a_folder_that_is_not_there_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RunLock(tmp_path / "missing").acquire()

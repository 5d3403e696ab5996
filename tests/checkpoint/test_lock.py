"""One run a directory."""

from __future__ import annotations

import errno
import fcntl
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


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_file_that_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    """Its holder ended, and removed it, between the opening and the locking here."""
    flock, file, removed = fcntl.flock, tmp_path / ".lock", []

    def removing(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        if not removed:
            file.unlink()
            removed.append(file)
            if is_replaced:
                file.touch()

    monkeypatch.setattr(fcntl, "flock", removing)
    with RunLock(tmp_path).acquire():
        assert file.read_text() == str(os.getpid())
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            RunLock(tmp_path).acquire()


def test_a_file_system_without_locks_is_the_callers_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(OSError, match="Function not implemented"):
        RunLock(tmp_path).acquire()

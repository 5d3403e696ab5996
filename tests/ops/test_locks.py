"""Locks of builds that go on, and of builds that were killed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.ops import build
from launcher.ops.build import clear_stale_lock, lock_owner, only_builder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="owners of a lock are read from /proc")


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that keeps ``path`` open, as torch does while it builds."""
    code = "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_lock_without_a_living_owner_is_cleared_and_said(tmp_path: Path) -> None:
    path, said = tmp_path / "lock", list[str]()
    with holder(path) as process:
        assert lock_owner(path) == process.pid
    assert path.exists()
    assert lock_owner(path) is None
    clear_stale_lock(path, say=said.append)
    assert not path.exists()
    (line,) = said
    assert str(path) in line


def test_a_lock_that_is_held_is_waited_for(tmp_path: Path) -> None:
    path, said = tmp_path / "lock", list[str]()
    with holder(path) as process:
        waiter = threading.Thread(target=clear_stale_lock, args=(path,), kwargs={"say": said.append})
        waiter.start()
        waiter.join(timeout=3 * build._POLL_S)
        assert waiter.is_alive()
        assert path.exists()
        path.unlink()  # what torch does when it is done
        waiter.join(timeout=30)
        assert process.poll() is None
    assert not waiter.is_alive()
    assert said == []


def test_no_lock_is_no_work(tmp_path: Path) -> None:
    clear_stale_lock(tmp_path / "lock", say=pytest.fail)


def test_one_builder_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with only_builder(tmp_path, say=order.append):
            order.append("second")

    with only_builder(tmp_path, say=order.append):
        waiter = threading.Thread(target=second)
        waiter.start()
        while not order:  # it says that it waits
            waiter.join(timeout=0.1)
        order.append("first")
    waiter.join(timeout=30)
    assert "another run" in order[0]
    assert order[-2:] == ["first", "second"]

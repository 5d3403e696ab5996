"""Folders that several processes ask for are built by one of them, whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import EnvironmentProblem
from launcher.utils.build_cache import build_once


def test_a_folder_is_built_once_and_then_found(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        assert not (tmp_path / "cache" / "it").exists(), "no process may see it unfinished"
        (folder / "file").write_text("content")

    for _ in range(2):
        assert build_once(tmp_path / "cache" / "it", build, heartbeat=lambda: None) == tmp_path / "cache" / "it"
    assert len(built) == 1
    assert (tmp_path / "cache" / "it" / "file").read_text() == "content"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyError("half-way")

    with pytest.raises(KeyError, match="half-way"):
        build_once(tmp_path / "it", fail, heartbeat=lambda: None)
    assert [path.name for path in tmp_path.iterdir()] == ["it.lock"]


def test_a_killed_builder_is_cleaned_up_after(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from launcher.utils.build_cache import build_once\n"
        "build_once(Path(sys.argv[1]), lambda folder: os.kill(os.getpid(), signal.SIGKILL), heartbeat=lambda: None)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "it")], check=False).returncode == -9
    assert any(path.name.startswith(".it.tmp-") for path in tmp_path.iterdir())
    build_once(tmp_path / "it", lambda folder: (folder / "file").touch(), heartbeat=lambda: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it", "it.lock"]


def test_a_worker_of_a_killed_builder_does_not_hold_the_lock(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time; from pathlib import Path; from launcher.utils.build_cache import build_once\n"
        "def build(folder):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        print(os.getpid(), flush=True); time.sleep(60); os._exit(0)\n"
        "    sys.stdin.readline(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "build_once(Path(sys.argv[1]), build, heartbeat=lambda: None)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "it")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        worker = int(builder.stdout.readline())
        try:
            builder.kill()
            builder.wait(timeout=30)
            build_once(tmp_path / "it", lambda folder: None, heartbeat=lambda: pytest.fail("the lock is held"))
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_waiting_process_sends_heartbeats_and_uses_what_the_other_built(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from launcher.utils.build_cache import build_once\n"
        "def build(folder):\n"
        "    print('building', flush=True); sys.stdin.readline(); (folder / 'by-other').touch()\n"
        "build_once(Path(sys.argv[1]), build, heartbeat=lambda: None)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "it")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "building\n"
        heartbeats: list[int] = []

        def heartbeat() -> None:
            heartbeats.append(1)
            if len(heartbeats) == 2:
                other.stdin.write("go on\n")
                other.stdin.flush()

        build_once(tmp_path / "it", lambda folder: (folder / "by-us").touch(), heartbeat=heartbeat)
    assert len(heartbeats) >= 2
    assert [path.name for path in (tmp_path / "it").iterdir()] == ["by-other"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(EnvironmentProblem, match="cannot write the cache folder"):
        build_once(tmp_path / "cache" / "it", lambda folder: None, heartbeat=lambda: None)


def test_a_link_where_the_lock_belongs_empties_no_file(tmp_path: Path) -> None:
    """The cache may be a folder that several users write."""
    (tmp_path / "mine").write_text("text")
    (tmp_path / "made.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(EnvironmentProblem, match=r"cannot write the cache folder .*symbolic link"):
        build_once(tmp_path / "made", lambda folder: None, heartbeat=lambda: None)
    assert (tmp_path / "mine").read_text() == "text"

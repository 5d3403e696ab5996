"""Temporary folders of host agents: removed with or after their owner, and no other folder is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.protocol.session_file import locate_this_process
from launcher.supervision.socket_channel import SocketChannel, remove_scratch, scratch_folder
from launcher.utils.files import write_json
from launcher.utils.schema import to_tree

KILLED = """
import os, signal
from launcher.supervision.socket_channel import scratch_folder
with scratch_folder() as folder:
    (folder / "heartbeat.0").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Have temporary folders made in one of the test's own, with a name short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def test_folder_of_a_killed_agent_is_removed_at_the_next_start(temporary: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED], check=False, timeout=60).returncode == -9
    (left,) = temporary.iterdir()
    with scratch_folder() as folder:
        assert not left.exists()
        assert list(temporary.iterdir()) == [folder]
    assert list(temporary.iterdir()) == []


def test_folders_of_other_owners_stay(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = locate_this_process()
    owners = {
        "launcher-alive": to_tree(me),
        "launcher-elsewhere": to_tree(replace(me, machine="other", boot="other", pid=1 << 22, started=1)),
        "launcher-container": to_tree(replace(me, pid_namespace=1, pid=1 << 22, started=1)),
        "launcher-damaged": {"pid": 3},
        "settings": to_tree(replace(me, pid=1 << 22, started=1)),
    }
    for name, owner in owners.items():
        (temporary / name).mkdir()
        write_json(temporary / name / "owner.json", owner)
    (temporary / "launcher-notes").mkdir()
    (temporary / "launcher-link").symlink_to("settings")
    (temporary / "launcher-file").touch()
    before = sorted(temporary.iterdir())
    with scratch_folder():
        pass
    assert sorted(temporary.iterdir()) == before
    dead = temporary / "launcher-dead"
    dead.mkdir()
    write_json(dead / "owner.json", owners["settings"])
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with scratch_folder():
        assert dead.exists(), "it belongs to another user"
    monkeypatch.undo()


def test_owner_whose_pid_was_reused_is_dead(temporary: Path) -> None:
    me = locate_this_process()
    (temporary / "launcher-reused").mkdir()
    write_json(temporary / "launcher-reused" / "owner.json", to_tree(replace(me, started=me.started - 1)))
    with scratch_folder():
        assert not (temporary / "launcher-reused").exists()


@pytest.mark.parametrize("name", ["mine", "launcher-mine"])
def test_rank_removes_no_folder_that_is_not_an_agents(tmp_path: Path, name: str) -> None:
    mine = tmp_path / name
    mine.mkdir()
    (mine / "thesis.tex").touch()
    SocketChannel(mine).clean_up_after_agent()  # LAUNCHER_AGENT_SCRATCH of a rank that was started by hand
    remove_scratch(mine)
    assert (mine / "thesis.tex").exists()

"""The revision of the code."""

from __future__ import annotations

import subprocess
from pathlib import Path

from launcher.trackers.records import find_revision


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    ended = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return ended.stdout.strip()


def test_it_is_a_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    repository, outside = tmp_path / "code", tmp_path / "outside"
    (repository / "package").mkdir(parents=True)
    outside.mkdir()
    assert find_revision(outside, tmp_path / "missing") is None
    git(repository, "init")
    (repository / "file").write_text("1")
    git(repository, "add", "file")
    git(repository, "commit", "-m", "first")
    (repository / "untracked").write_text("1")
    found = find_revision(outside, repository / "package")
    assert found is not None
    assert (found.commit, found.dirty) == (git(repository, "rev-parse", "HEAD"), False)
    (repository / "file").write_text("2")
    changed = find_revision(repository)
    assert changed is not None
    assert changed.dirty

"""Working trees of real git repositories as bundles."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from launcher.errors import EnvironmentProblem
from launcher.remote import bundle
from launcher.remote.bundle import Bundle, make_bundle
from launcher.remote.on_host import _unpack
from launcher.utils.files import sha256_of
from launcher.utils.system import code_root


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "protocol.file.allow=always")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def content(made: Bundle) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(made.payload), mode="r:gz") as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        return {name: file.read() for name, file in files.items() if file is not None}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with a committed file, a changed one, a deleted one, a new one and an ignored one."""
    root = tmp_path / "tree"
    (root / "pkg").mkdir(parents=True)
    (root / ".gitignore").write_text("ignored*\nruns/\n")
    for name in ("committed", "changed", "deleted", "pkg/tool"):
        (root / name).write_text("first")
    (root / "pkg" / "tool").chmod(0o775)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / "changed").write_text("second")
    (root / "deleted").unlink()
    (root / "new 'file' é\n$HOME").write_text("new")
    (root / "ignored.bin").write_text("no")
    (root / "pkg" / "__pycache__").mkdir()
    (root / "pkg" / "__pycache__" / "module.cpython-311.pyc").write_text("bytecode, which .gitignore does not name")
    return root


def test_what_git_knows_and_does_not_ignore_is_sent_as_it_is_now(tree: Path) -> None:
    assert content(make_bundle(tree)) == {
        ".gitignore": b"ignored*\nruns/\n",
        "changed": b"second",
        "committed": b"first",
        "new 'file' é\n$HOME": b"new",
        "pkg/tool": b"first",
    }


def test_the_same_tree_gives_the_same_hash(tree: Path) -> None:
    made = make_bundle(tree)
    assert made.sha256 == sha256_of(made.payload)
    for path in tree.rglob("*"):
        if path.is_file() and ".git" not in path.parts:
            os.utime(path, (1, 1))
            path.chmod(path.stat().st_mode | 0o020)
    assert make_bundle(tree) == made
    (tree / "changed").write_text("third")
    assert make_bundle(tree).sha256 != made.sha256


def test_a_mode_that_matters_changes_the_hash_and_arrives(tree: Path) -> None:
    made = make_bundle(tree)
    with tarfile.open(fileobj=io.BytesIO(made.payload)) as archive:
        assert archive.getmember("pkg/tool").mode == 0o755
        assert archive.getmember("committed").mode == 0o644
    (tree / "committed").chmod(0o755)
    assert make_bundle(tree).sha256 != made.sha256


def test_a_subfolder_of_a_repository_is_sent_alone(tree: Path) -> None:
    assert content(make_bundle(tree / "pkg")) == {"tool": b"first"}


def test_repositories_inside_are_sent_too(tree: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    git(library, "init", "-q")
    (library / "module.py").write_text("x")
    git(library, "add", "-A")
    git(library, "commit", "-qm", "first")
    git(tree, "submodule", "add", "-q", str(library), "third_party")
    git(tmp_path, "clone", "-q", str(library), str(tree / "untracked"))
    names = content(make_bundle(tree))
    assert names["third_party/module.py"] == names["untracked/module.py"] == b"x"


def test_links_inside_stay_links_and_links_that_lead_out_are_refused(tree: Path) -> None:
    (tree / "pkg" / "link").symlink_to("../committed")
    with tarfile.open(fileobj=io.BytesIO(make_bundle(tree).payload)) as archive:
        assert archive.getmember("pkg/link").linkname == "../committed"
    _unpack(make_bundle(tree).payload, tree.parent / "out")
    assert (tree.parent / "out" / "pkg" / "link").readlink() == Path("../committed")
    (tree / "data").symlink_to("/etc")
    with pytest.raises(EnvironmentProblem, match=r"data is a link that leads out of .*\.gitignore"):
        make_bundle(tree)


def test_git_variables_of_a_hook_lead_nowhere_else(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere/index")
    assert "committed" in content(make_bundle(tree))


def test_a_big_tree_is_refused_with_its_biggest_files(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "LIMIT_BYTES", 2**20)
    with (tree / "weights.bin").open("wb") as file:
        file.truncate(3 * 2**20)
    with pytest.raises(EnvironmentProblem, match=r"holds 3\.0 MiB, and at most 1\.0 MiB .* weights\.bin \(3\.0 MiB\)"):
        make_bundle(tree)


def test_a_folder_outside_of_git_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"git failed to list it: .*not a git repository"):
        make_bundle(tmp_path)


def test_an_ignored_folder_is_refused(tree: Path) -> None:
    (tree / "runs").mkdir()
    (tree / "runs" / "file").touch()
    with pytest.raises(EnvironmentProblem, match="git lists no file"):
        make_bundle(tree / "runs")


def test_a_machine_without_git_is_reported(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EnvironmentProblem, match="git is not installed"):
        make_bundle(tree)


def test_this_checkout_runs_from_its_bundle(tmp_path: Path) -> None:
    """Unpacked elsewhere, the program finds its own configuration."""
    code = tmp_path / "code"
    _unpack(make_bundle(code_root()).payload, code)
    command = [sys.executable, "-m", "launcher", "list", "backend"]
    env = {**os.environ, "PYTHONPATH": str(code)}
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "local" in ended.stdout

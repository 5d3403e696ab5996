"""A run's folder on NVMe: kept apart from other runs' and other users', and gone when the run is."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from pathlib import Path

import pytest

from launcher.engines.deepspeed import nvme
from launcher.engines.deepspeed.nvme import SwapFolder
from launcher.protocol import swap
from launcher.protocol.swap import sweep

OTHER = 12345
"""A user id that is not the one of the tests."""


def test_runs_do_not_share_and_leave_nothing(tmp_path: Path) -> None:
    first, second = (SwapFolder(tmp_path, run_id=f"20260101-120000-{letters}") for letters in ("abcd", "efgh"))
    assert first.path != second.path
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
    first.release()
    assert not first.path.exists()
    assert second.path.is_dir()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_one_run_share_and_the_last_removes(tmp_path: Path) -> None:
    ranks = [SwapFolder(tmp_path, run_id="a") for _ in range(2)]
    assert ranks[0].path == ranks[1].path
    ranks[0].release()
    ranks[0].release()
    assert ranks[1].path.is_dir()
    ranks[1].release()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f"launcher-{os.geteuid()}-dead"
    (left / "zero_stage_3").mkdir(parents=True)
    (left / "in_use").touch()
    kept = [tmp_path / "precious", tmp_path / f"launcher-{os.geteuid()}-notes", tmp_path / f"launcher-{OTHER}-x"]
    for folder in kept:
        folder.mkdir()
        (folder / "file").touch()
    run = SwapFolder(tmp_path, run_id="a")
    assert not left.exists()
    run.release()
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_another_user_can_start_and_leaves_the_first_ones_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "nvme" / "swap"
    first = SwapFolder(shared, run_id="a")
    assert stat.S_IMODE(shared.stat().st_mode) == 0o1777, "as /tmp: every user makes folders of his own in it"
    assert str(os.geteuid()) in first.path.name
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    for module in (nvme, swap):
        monkeypatch.setattr(module, "is_own", lambda found: True)  # its folders are made by this process after all
    second = SwapFolder(shared, run_id="a")
    assert second.path != first.path
    second.release()
    monkeypatch.undo()
    assert first.path.is_dir()
    first.release()
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder of another user", "link"])
def test_a_folder_that_another_user_put_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name = f"launcher-{os.geteuid()}-a"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / name).symlink_to("elsewhere")
    else:
        (tmp_path / f"launcher-{OTHER}-a").mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    with pytest.raises(PermissionError, match=r"not a folder of this user; set another parallel\.nvme_path"):
        SwapFolder(tmp_path, run_id="a")


def test_a_rank_that_comes_while_the_last_one_leaves_gets_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = SwapFolder(tmp_path, run_id="a")
    lock = fcntl.flock

    def lock_late(descriptor: int, how: int) -> None:
        monkeypatch.undo()
        first.release()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    second = SwapFolder(tmp_path, run_id="a")
    assert (second.path / "in_use").is_file()
    second.release()


def leftover(path: Path, *names: str) -> Path:
    """Return the folder of a dead run, with these files in it."""
    folder = path / f"launcher-{os.geteuid()}-dead"
    folder.mkdir(mode=0o700)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def test_leftovers_go_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, mkdir = leftover(tmp_path, "in_use", "zero_stage_3/x"), Path.mkdir

    def mkdir_if_room(folder: Path, mode: int = 0o777) -> None:
        if left.exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        mkdir(folder, mode)

    monkeypatch.setattr(Path, "mkdir", mkdir_if_room)
    SwapFolder(tmp_path, run_id="a").release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("killed_in", ["rmtree", "unlink", "rmdir"])
def test_a_removal_that_is_killed_is_completed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    left = leftover(tmp_path, "in_use", "zero_stage_3/x")

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        module = {"rmtree": shutil, "unlink": os, "rmdir": Path}[killed_in]
        patched.setattr(module, killed_in, kill)
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path)
    assert (left / "in_use").exists() or not list(left.iterdir()), "else nothing tells it from a folder of the user"
    sweep(tmp_path)
    assert not left.exists()


def test_a_folder_without_a_lock_goes_only_where_deepspeed_alone_wrote(tmp_path: Path) -> None:
    left = leftover(tmp_path, "zero_stage_3/x")
    sweep(tmp_path)
    assert not left.exists()
    left = leftover(tmp_path, "zero_stage_3/x", "notes.txt")
    sweep(tmp_path)
    assert sorted(file.name for file in left.iterdir()) == ["notes.txt", "zero_stage_3"]


@pytest.mark.parametrize("call", ["mkdir", "lstat"])
def test_a_sweep_of_another_run_while_the_folder_is_made_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    original, swept = getattr(Path, call), list[Path]()

    def then_sweep(folder: Path, *arguments: object, **options: object) -> object:
        result = original(folder, *arguments, **options)
        if folder.parent == tmp_path and not swept:
            swept.append(folder)
            sweep(tmp_path)
            assert not folder.exists()
        return result

    monkeypatch.setattr(Path, call, then_sweep)
    run = SwapFolder(tmp_path, run_id="a")
    monkeypatch.undo()
    assert swept == [run.path]
    assert (run.path / "in_use").is_file()
    run.release()


def test_another_user_reaches_the_folder_whatever_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        SwapFolder(tmp_path / "nvme" / "of" / "all", run_id="a").release()
    finally:
        os.umask(umask)
    modes = [stat.S_IMODE((tmp_path / path).stat().st_mode) for path in ("nvme", "nvme/of", "nvme/of/all")]
    assert modes == [0o755, 0o755, 0o1777]


def test_a_folder_that_is_removed_while_it_is_taken_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, removed = fcntl.flock, []

    def removing(descriptor: int, operation: int) -> None:
        if not removed:  # another run removes what it takes for unused, between the opening and the lock
            removed.append(True)
            (path,) = tmp_path.rglob(swap.IN_USE)
            shutil.rmtree(path.parent)
        flock(descriptor, operation)

    monkeypatch.setattr(nvme.fcntl, "flock", removing)
    folder = SwapFolder(tmp_path, run_id="20260101-120000-abcd")
    assert removed
    assert (folder.path / swap.IN_USE).is_file()
    folder.release()

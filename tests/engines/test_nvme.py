"""A run's folder on NVMe: kept apart from other runs', and gone when the run is."""

from __future__ import annotations

from pathlib import Path

from launcher.engines.nvme import SwapFolder


def test_runs_do_not_share_and_leave_nothing(tmp_path: Path) -> None:
    first, second = SwapFolder(tmp_path, run_name="a"), SwapFolder(tmp_path, run_name="b")
    assert first.path != second.path
    assert first.path.is_dir()
    first.release()
    assert not first.path.exists()
    assert second.path.is_dir()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_one_run_share_and_the_last_removes(tmp_path: Path) -> None:
    ranks = [SwapFolder(tmp_path, run_name="a") for _ in range(2)]
    assert ranks[0].path == ranks[1].path
    ranks[0].release()
    assert ranks[1].path.is_dir()
    ranks[1].release()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "launcher-dead"
    (left / "zero_stage_3").mkdir(parents=True)
    (left / "in_use").touch()
    foreign = tmp_path / "precious"
    foreign.mkdir()
    run = SwapFolder(tmp_path, run_name="a")
    assert not left.exists()
    run.release()
    assert list(tmp_path.iterdir()) == [foreign]

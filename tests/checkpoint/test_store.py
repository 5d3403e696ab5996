"""The store: what is there is complete, whatever happened; what the policy keeps is there."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.checkpoint.manifest import read_manifest
from launcher.checkpoint.policy import Checkpoint
from launcher.checkpoint.store import CheckpointStore

from .conftest import Save, manifest_of

WRITERS = """
import os, sys
from pathlib import Path
from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.policy import Checkpoint
from launcher.checkpoint.store import CheckpointStore

def write_for_ever():
    store = CheckpointStore(Path(sys.argv[1]), Checkpoint(keep=2))
    store.clean()
    latest = store.latest()
    step = latest.manifest.step if latest else 0
    while True:
        step += 1
        pending = store.begin(step)
        for rank in range(3):
            with (pending / f"{rank}.bin").open("wb", buffering=0) as file:
                for _ in range(4):
                    file.write(step.to_bytes(8, "big") * 500)
        about = dict(run_id="a", run_hash="b", architecture={}, engine="torch", parallel={}, precision="fp32")
        store.commit(Manifest(step=step, created=0.0, world_size=3, eval_loss=1 / (1 + step % 7), **about))

for _ in sys.stdin:
    writer = os.fork()
    if writer == 0:
        write_for_ever()
    print(writer, flush=True)
    print(os.WTERMSIG(os.waitpid(writer, 0)[1]), flush=True)
"""
"""Forks a writer for each line of input: thirty interpreters would take a minute to start."""


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_checkpoint_is_its_payload_and_a_manifest_that_lists_it(save: Save) -> None:
    saved = save(10, eval_loss=3.25)
    assert saved.folder.name == "step_00000010"
    assert names(saved.folder) == ["manifest.json", "model.bin", "ranks"]
    assert read_manifest(saved.folder) == saved.manifest
    assert saved.manifest.files == {"model.bin": 10, "ranks/0.bin": 10}
    assert (saved.manifest.step, saved.manifest.eval_loss, saved.manifest.world_size) == (10, 3.25, 2)
    assert saved.manifest.architecture["layers"] == 2
    assert saved.manifest.parallel["stage"] == 3


def test_a_loss_that_is_no_number_is_no_reason_to_lose_a_checkpoint(tmp_path: Path, save: Save) -> None:
    save(10, eval_loss=float("nan"))
    latest = CheckpointStore(tmp_path / "checkpoints", Checkpoint()).latest()
    assert latest is not None
    assert latest.manifest.eval_loss is None


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"keep": 2, "keep_best": True}, [20, 40, 50]),
        ({"keep": 2, "keep_best": False}, [40, 50]),
        ({"keep": 1, "keep_best": True}, [20, 50]),
        ({"keep": 4, "keep_best": True}, [20, 30, 40, 50]),
        ({"keep": 0, "keep_best": False}, [10, 20, 30, 40, 50]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, save: Save, policy: dict[str, int | bool], kept: list[int]
) -> None:
    for step, loss in ((10, 4.0), (20, 2.0), (30, 3.0), (40, None), (50, 2.5)):
        save(step, eval_loss=loss, **policy)
    assert names(tmp_path / "checkpoints") == [f"step_{step:08d}" for step in kept]


@pytest.mark.parametrize("damage", ["missing", "short", "no manifest", "half a manifest", "another version"])
def test_an_incomplete_one_is_skipped_and_named(tmp_path: Path, save: Save, damage: str) -> None:
    save(10)
    folder = save(20).folder
    manifest = folder / "manifest.json"
    if damage == "missing":
        (folder / "ranks" / "0.bin").unlink()
    elif damage == "short":
        os.truncate(folder / "model.bin", 5)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        os.truncate(manifest, 40)
    else:
        manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    said: list[str] = []
    latest = CheckpointStore(tmp_path / "checkpoints", Checkpoint(), say=said.append).latest()
    assert latest is not None
    assert latest.manifest.step == 10
    assert len(said) == 1
    assert str(folder) in said[0]


def test_incomplete_ones_are_neither_counted_nor_deleted(tmp_path: Path, save: Save) -> None:
    broken = save(10, keep=2).folder
    (broken / "model.bin").unlink()
    for step in (20, 30, 40):
        save(step, keep=2)
    assert names(tmp_path / "checkpoints") == ["step_00000010", "step_00000030", "step_00000040"]


def test_the_same_step_again_replaces_it(tmp_path: Path, save: Save) -> None:
    save(10, eval_loss=2.0)
    again = save(10, eval_loss=1.0)
    assert names(tmp_path / "checkpoints") == ["step_00000010"]
    assert read_manifest(again.folder).eval_loss == 1.0


@pytest.mark.parametrize("hidden", [".step_00000020.tmp", ".step_00000005.gone", ".step_00000010.old"])
def test_what_a_crash_left_is_removed(tmp_path: Path, save: Save, hidden: str) -> None:
    save(10)
    folder = tmp_path / "checkpoints"
    (folder / hidden).mkdir()
    (folder / hidden / "model.bin").write_bytes(b"half")
    (folder / ".somebody.tmp").mkdir()
    CheckpointStore(folder, Checkpoint()).clean()
    assert names(folder) == [".somebody.tmp", "step_00000010"]


def test_a_crash_between_the_renames_of_a_replacement_is_undone(tmp_path: Path, save: Save) -> None:
    folder = tmp_path / "checkpoints"
    save(10).folder.rename(folder / ".step_00000010.old")
    store = CheckpointStore(folder, Checkpoint())
    assert store.latest() is None
    store.clean()
    assert store.latest() is not None


def test_begin_starts_from_an_empty_folder(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", Checkpoint())
    (store.begin(3) / "stale.bin").write_bytes(b"1")
    assert names(store.begin(3)) == []
    assert store.commit(manifest_of(3)).manifest.files == {}


def test_killed_thirty_times_the_latest_is_always_complete(tmp_path: Path) -> None:
    folder, steps, left_over, chance = tmp_path / "checkpoints", [0], 0, random.Random(0)
    command = [sys.executable, "-c", WRITERS, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for kills in itertools.count(1):
            print("write", file=writers.stdin, flush=True)
            writer = int(writers.stdout.readline())
            time.sleep(chance.uniform(0, 0.1))
            os.kill(writer, signal.SIGKILL)
            assert int(writers.stdout.readline()) == signal.SIGKILL
            left_over += any(folder.glob(".step_*"))
            steps.append(latest_step(folder))
            if kills >= 30 and steps[-1] >= 10:
                break
        writers.stdin.close()
    assert steps == sorted(steps)
    assert left_over, "some kills fell into a save"


def latest_step(folder: Path) -> int:
    """Return the newest step after checking every byte of it; 0 where there is none."""
    said: list[str] = []
    latest = CheckpointStore(folder, Checkpoint(), say=said.append).latest()
    assert said == [], "a visible checkpoint is complete from the start"
    if latest is None:
        return 0
    assert sorted(latest.manifest.files) == ["0.bin", "1.bin", "2.bin"]
    for name in latest.manifest.files:
        assert (latest.folder / name).read_bytes() == latest.manifest.step.to_bytes(8, "big") * 2000
    return latest.manifest.step

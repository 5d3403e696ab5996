"""A checkpoint of another run that was chosen stays until the ranks have loaded it."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from launcher.checkpoint.locks import CheckpointLocks, RemovalLock
from launcher.checkpoint.manifest import CheckpointManifest
from launcher.checkpoint.store import CheckpointStore, SavedCheckpoint
from launcher.config.checkpoint import Checkpoint
from launcher.config.compose import compose
from launcher.execution.held_checkpoints import keep_checkpoints, loads_once
from launcher.execution.saved_models import find_intact_checkpoint
from launcher.protocol.rundir import RunDir


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """The checkpoints of a run that keeps the newest one."""
    return CheckpointStore(tmp_path / "first" / "checkpoints", Checkpoint(keep=1))


def save(store: CheckpointStore, step: int) -> SavedCheckpoint:
    pending = store.begin(step)
    (pending / "model").mkdir()
    (pending / "model" / "config.json").write_text("{}")
    about = {"created": 0.0, "run_id": "a", "run_hash": "b", "engine": "torch", "precision": "fp32"}
    return store.commit(CheckpointManifest(step=step, architecture={}, parallel={}, world_size=1, **about))  # type: ignore[arg-type]


def is_kept(saved: SavedCheckpoint) -> bool:
    with RemovalLock(saved.folder) as lock:
        return not lock.acquire()


@pytest.mark.parametrize(
    "words",
    [
        ("model.weights={}/model",),
        ("data=text", "data.path=x.txt", "data.tokenizer={}/model"),
        ("checkpoint.resume={}",),
        ("checkpoint.resume={}/../..",),
    ],
)
def test_retention_leaves_it_until_then(store: CheckpointStore, tmp_path: Path, words: tuple[str, ...]) -> None:
    saved, locks = save(store, 10), CheckpointLocks()
    run = compose([word.format(saved.folder) for word in words]).run
    keep_checkpoints(run, RunDir(tmp_path / "second"), locks)
    save(store, 20)
    assert saved.folder.is_dir()
    locks.close()
    save(store, 30)
    assert not saved.folder.exists()


def test_a_run_without_another_ones_checkpoint_keeps_none(store: CheckpointStore, tmp_path: Path) -> None:
    saved = save(store, 10)
    for resume in ("none", "auto"):
        keep_checkpoints(compose([f"checkpoint.resume={resume}"]).run, RunDir(tmp_path / "first"), CheckpointLocks())
    assert not is_kept(saved)


def test_a_users_file_of_the_same_name_is_not_locked(tmp_path: Path) -> None:
    """Its program may hold it alone for as long as it likes, and the launcher would wait."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "manifest.json").write_text("{}")
    (tmp_path / "texts" / "a.txt").touch()
    with (tmp_path / "texts" / "manifest.json").open() as file, CheckpointLocks() as locks:
        fcntl.flock(file, fcntl.LOCK_EX)
        for path in ("texts", "texts/a.txt"):
            keep_checkpoints(compose(["data=text", f"data.path={tmp_path / path}"]).run, RunDir(tmp_path), locks)


def test_one_that_is_chosen_is_kept_from_its_verification_on(store: CheckpointStore, tmp_path: Path) -> None:
    saved = save(store, 10)
    with CheckpointLocks() as locks:
        find_intact_checkpoint(tmp_path / "first", "first", option="model.weights", locks=locks)
        assert is_kept(saved)
    assert not is_kept(saved)


def test_one_that_is_removed_before_it_is_locked_is_no_checkpoint_any_more(store: CheckpointStore) -> None:
    saved = save(store, 10)
    save(store, 20)
    with pytest.raises(FileNotFoundError):
        CheckpointLocks().keep(saved.folder)


@pytest.mark.parametrize(
    ("words", "once"),
    [
        ((), True),
        (("backend.restarts=1",), False),
        (("job=serve", "job.engine=echo"), False),
        (("job=evaluate",), False),
    ],
)
def test_what_reads_it_again_keeps_it_to_the_end(words: tuple[str, ...], once: bool) -> None:
    assert loads_once(compose(words).run) == once

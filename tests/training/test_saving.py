"""Saving beside the steps: what is written is the state at the time of the save; errors reach the run."""

from __future__ import annotations

import errno
import random
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from launcher.checkpoint.locks import RemovalLock
from launcher.checkpoint.manifest import TrainingProgress
from launcher.checkpoint.regions import whole
from launcher.checkpoint.store import CheckpointStore, silent
from launcher.checkpoint.tensors import Shard, StoredState, shard_file_name
from launcher.config.checkpoint import Checkpoint
from launcher.config.compose import compose
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.training import early_check, saving
from launcher.training.checkpointing import restore_checkpoint
from launcher.training.early_check import CheckpointCheck
from launcher.training.saving import CheckpointSaver
from launcher.utils.files import write_json


class Engine:
    """Stands for an engine of one tensor, which a step changes in place."""

    device = torch.device("cpu")
    adapter_config = None

    def __init__(self) -> None:
        self.weight = torch.zeros(4, 3)
        self.model_config = GPT2Config(n_layer=1, n_head=1, n_embd=2)

    def shards(self) -> list[Shard]:
        shape = tuple(self.weight.shape)
        return [Shard(name="w", shape=shape, region=whole(shape), dtype=torch.float32, read=lambda: self.weight)]

    def scalars(self) -> dict[str, float]:
        return {"value": 1.0}


@pytest.fixture
def saver(tmp_path: Path) -> Any:
    run = compose(
        ["model=gpt2_tiny", "job.micro_batch=2", "tracker=local", "checkpoint.async_mode=async", "checkpoint.every=1"]
    ).run
    context: Any = SimpleNamespace(
        run=replace(run),
        run_dir=RunDir(tmp_path),
        is_main=True,
        rank=0,
        world_size=1,
        heartbeat=SimpleNamespace(update=lambda *_, **__: None),
    )
    write_json(tmp_path / "plan.json", {"run_id": "a", "run_hash": "b", "ranks": [{"host": "here"}]})
    store = CheckpointStore(tmp_path / "checkpoints", run.checkpoint, say=silent)
    engine: Any = Engine()
    return CheckpointSaver(store, context, engine)


def test_ranks_that_share_the_folder_leave_nothing_in_it(saver: Any, tmp_path: Path) -> None:
    saver.check_shared(0)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def weight_of(tmp_path: Path, step: int) -> torch.Tensor:
    folder = tmp_path / "checkpoints" / f"step_{step:08d}"
    return StoredState([folder / shard_file_name(0)]).read("w")


def test_a_copy_is_written_while_steps_go_on(saver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    write = saving.write_shards

    def slowly(*arguments: Any, **options: Any) -> Any:
        assert goes_on.wait(60)
        return write(*arguments, **options)

    monkeypatch.setattr(saving, "write_shards", slowly)
    engine = saver._engine
    engine.weight.fill_(1.0)
    saver.save(TrainingProgress(step=1, sequences=8))
    engine.weight.fill_(2.0)  # the next step
    saver.check()
    assert saver.take_completed() == []
    goes_on.set()
    saver.save(TrainingProgress(step=2, sequences=8))  # waits for the first
    assert saver.take_completed() == [1]
    engine.weight.fill_(3.0)
    saver.wait()
    assert saver.take_completed() == [2]
    assert (weight_of(tmp_path, 1) == 1.0).all()
    assert (weight_of(tmp_path, 2) == 2.0).all()


def test_one_that_must_be_there_now_is_written_at_once(saver: Any, tmp_path: Path) -> None:
    saver.save(TrainingProgress(step=1, sequences=8), now=True)
    assert saver.take_completed() == [1]
    assert weight_of(tmp_path, 1).shape == (4, 3)


def test_an_error_of_the_thread_shows_at_the_next_call(
    saver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    saver.save(TrainingProgress(step=1, sequences=8), now=True)
    monkeypatch.setattr(saving, "write_shards", full)
    saver.save(TrainingProgress(step=2, sequences=8))
    room = (
        r"\(a checkpoint takes 48 B, and the run has up to 4 at a time: checkpoint\.keep=2 checkpoint\.keep_best=true;"
    )
    with pytest.raises(OSError, match=rf"No space left on device {room}.*step_00000002.tmp/state/rank_00000"):
        saver.save(TrainingProgress(step=3, sequences=8))
    assert [entry.name for entry in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000001"]


def test_a_run_that_fails_lets_a_save_become_complete(saver: Any, tmp_path: Path) -> None:
    def fail() -> None:
        with saver:
            saver.save(TrainingProgress(step=1, sequences=8))
            raise ValueError("a step failed")

    with pytest.raises(ValueError, match="a step failed"):
        fail()
    assert weight_of(tmp_path, 1).shape == (4, 3)


def test_a_byte_that_changed_in_any_file_is_noticed(saver: Any, tmp_path: Path) -> None:
    """Each file of a checkpoint in turn: it is refused by name, and nothing of it is loaded."""
    saver.save(TrainingProgress(step=1, sequences=8, eval_loss=2.5), now=True)
    folder = tmp_path / "checkpoints" / "step_00000001"
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    assert {"manifest.json", "scalars.json", "config.json", "rank_00000.safetensors"} <= {file.name for file in files}
    run = replace(saver._context.run, checkpoint=Checkpoint(resume=str(folder)))
    context: Any = SimpleNamespace(**{**vars(saver._context), "run": run})
    chance = random.Random(0)
    for file in files:
        content = file.read_bytes()
        for place in chance.sample(range(len(content)), min(30, len(content))):
            damaged = bytearray(content)
            damaged[place] ^= 1 << chance.randrange(8)
            file.write_bytes(damaged)
            engine: Any = SimpleNamespace(device=torch.device("cpu"))  # without load, which nothing calls
            with pytest.raises(ConfigError, match=re.escape(file.name)):
                restore_checkpoint(saver._store, context, engine)
        file.write_bytes(content)
    loaded: list[Path] = []
    engine = SimpleNamespace(device=torch.device("cpu"), load=lambda folder, on_progress: loaded.append(folder))
    restored = restore_checkpoint(saver._store, context, engine)
    assert restored is not None
    assert restored.step == 1
    assert loaded == [folder]


def test_files_are_read_while_the_model_is_built_and_kept_until_they_are_loaded(saver: Any, tmp_path: Path) -> None:
    for step in (1, 2):
        saver.save(TrainingProgress(step=step, sequences=8), now=True)
    newest = saver._store.latest()
    file = newest.folder / shard_file_name(0)
    intact = file.read_bytes()
    file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    run = replace(saver._context.run, checkpoint=Checkpoint(resume="auto"))
    context: Any = SimpleNamespace(**{**vars(saver._context), "run": run})
    with CheckpointCheck(context) as check:
        while not check._reading.is_done:
            check._reading.wait(timeout_s=1.0)
        file.write_bytes(intact)
        assert check.damaged(newest) == [shard_file_name(0)], "what was found then"
        assert check.damaged(saver._store.latest()) == [shard_file_name(0)]
        with RemovalLock(newest.folder) as lock:
            assert not lock.acquire()
    with RemovalLock(newest.folder) as lock:
        assert lock.acquire()
    with CheckpointCheck(context) as check:
        assert check.damaged(newest) == []


def test_a_run_without_a_checkpoint_has_nothing_to_read_early(saver: Any) -> None:
    for resume in ("none", "auto", "/no/such/folder"):
        run = replace(saver._context.run, checkpoint=Checkpoint(resume=resume))
        context: Any = SimpleNamespace(**{**vars(saver._context), "run": run})
        with CheckpointCheck(context) as check:
            assert check._reading is None


@pytest.fixture
def auto(saver: Any) -> Any:
    """The context of a run that goes on from its checkpoint."""
    saver.save(TrainingProgress(step=1, sequences=8), now=True)
    run = replace(saver._context.run, checkpoint=Checkpoint(resume="auto"))
    return SimpleNamespace(**{**vars(saver._context), "run": run})


def test_a_rank_that_ends_before_it_loads_stops_reading(auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = threading.Event()

    def damaged_files(*_: Any, heartbeat: Callable[[], None]) -> list[str]:
        heartbeat()  # while it is open
        assert closed.wait(60)
        heartbeat()
        return []

    monkeypatch.setattr(early_check, "damaged_files", damaged_files)
    with CheckpointCheck(auto) as check:
        pass
    closed.set()
    with pytest.raises(InterruptedError, match="the rank ends and does not load it"):
        check._reading.result()


@pytest.mark.parametrize("is_main", [True, False])
def test_a_rank_that_waits_for_what_is_read_shows_that_it_lives(
    auto: Any, saver: Any, monkeypatch: pytest.MonkeyPatch, is_main: bool
) -> None:
    waits = threading.Event()
    shown: list[tuple[int, int]] = []

    def damaged_files(*_: Any, heartbeat: Callable[[], None]) -> list[str]:
        heartbeat()
        assert waits.wait(60)
        return ["a"]

    monkeypatch.setattr(early_check, "damaged_files", damaged_files)
    auto.heartbeat = SimpleNamespace(update=lambda phase: waits.set() if phase == "load" else None)
    auto.is_main = is_main
    with CheckpointCheck(auto) as check:
        monkeypatch.setattr(check._lines, "update", lambda done, total: shown.append((done, total)))
        assert check.damaged(saver._store.latest()) == ["a"]
    total = sum(saver._store.latest().manifest.files.values())
    assert {of for _, of in shown} == ({total} if is_main else set())

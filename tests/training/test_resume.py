"""What ranks load when a run continues: the newest checkpoint whose files hold what was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.checkpoint.manifest import CheckpointManifest
from launcher.checkpoint.store import CheckpointStore
from launcher.config.checkpoint import Checkpoint
from launcher.config.data.base import Synthetic, TextChunk
from launcher.config.data.text import Text
from launcher.config.job.train import Train
from launcher.config.optimizer import AdamW
from launcher.config.schedule import CosineSchedule
from launcher.data.token_cache import train_bpe
from launcher.engines import distributed
from launcher.errors import ConfigError, JobError, exit_code_of_rank
from launcher.models.tokenizer import FastTokenizer
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.rundir import RunDir
from launcher.training.checkpointing import resolve_tokenizer, restore_checkpoint
from launcher.utils import progress
from launcher.utils.progress import OnProgress

ABOUT: dict[str, Any] = {"created": 0.0, "run_id": "a", "run_hash": "b", "engine": "torch", "precision": "fp32"}


@dataclass
class Loader:
    """Stands for an engine that loads."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    loaded: list[Path] = field(default_factory=list)

    def load(self, folder: Path, *, on_progress: OnProgress) -> None:
        self.loaded.append(folder)
        on_progress(3 << 30, 12 << 30)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """The checkpoints of steps 10, 20 and 30."""
    store = CheckpointStore(tmp_path / "checkpoints", Checkpoint(keep=0))
    for step in (10, 20, 30):
        pending = store.begin(step)
        (pending / "optimizer.pt").write_bytes(bytes(step))
        (pending / "model").mkdir()
        (pending / "model" / "model.safetensors").write_bytes(bytes(step))
        store.commit(CheckpointManifest(step=step, architecture={}, parallel={}, world_size=1, lr=1e-3, **ABOUT))
    return store


@pytest.fixture
def continued(store: CheckpointStore, tmp_path: Path) -> Callable[..., tuple[int, list[Path]]]:
    """Restore a run of one rank; return its step and what the engine loaded."""

    def run(
        resume: str = "auto",
        *,
        folder: Path = tmp_path,
        tokenizer: FastTokenizer | None = None,
        epochs: float | None = None,
        is_main: bool = True,
    ) -> tuple[int, list[Path]]:
        job = Train(steps=100, epochs=epochs)
        checkpoint = Checkpoint(resume=resume)
        described = SimpleNamespace(checkpoint=checkpoint, job=job, optimizer=AdamW(lr=1e-3), schedule=CosineSchedule())
        context: Any = SimpleNamespace(
            run=described,
            run_dir=RunDir(folder),
            is_main=is_main,
            rank=0,
            world_size=1,
            heartbeat=Heartbeat(None),
        )
        engine: Any = Loader()
        own = CheckpointStore(folder / "checkpoints", checkpoint)
        restored = restore_checkpoint(own, context, engine, tokenizer=tokenizer)
        return restored.step if restored else 0, engine.loaded

    return run


def damage(saved: Path, name: str = "model/model.safetensors") -> None:
    content = bytearray((saved / name).read_bytes())
    content[0] ^= 1
    (saved / name).write_bytes(content)


def folder_of(tmp_path: Path, step: int) -> Path:
    return tmp_path / "checkpoints" / f"step_{step:08d}"


def test_weights_of_another_tokenizer_are_refused(store, tmp_path, continued):
    texts = {"own": "aaa bbb ccc " * 50, "other": "xxx yyy zzz " * 50}
    own, other = (train_bpe([TextChunk(text, ends_document=True)], vocab_size=270) for text in texts.values())
    newest = folder_of(tmp_path, 30)
    (newest / "model" / "tokenizer.json").write_text(own.to_json())
    assert continued(tokenizer=own)[0] == 30
    with pytest.raises(ConfigError, match="was trained with another tokenizer") as refused:
        continued(tokenizer=other)
    assert exit_code_of_rank(refused.value) == 65


def test_the_tokenizer_of_a_checkpoint_is_the_newest_intact_one(tmp_path):
    saved, data = (
        CheckpointStore(tmp_path / "from" / "checkpoints", Checkpoint(keep=0)),
        Text(path="x", tokenizer="checkpoint"),
    )
    context: Any = SimpleNamespace(
        run=SimpleNamespace(checkpoint=Checkpoint(resume=str(tmp_path / "from"))), run_dir=RunDir(tmp_path / "own")
    )
    with pytest.raises(ConfigError, match="no such folder"):
        resolve_tokenizer(context, data)
    own = CheckpointStore(tmp_path / "own" / "checkpoints", Checkpoint(keep=0))
    for store, step in ((saved, 10), (own, 20), (own, 30)):
        (store.begin(step) / "model").mkdir()
        (store.pending(step) / "model" / "tokenizer.json").write_text("{}")
        folder = store.commit(CheckpointManifest(step=step, architecture={}, parallel={}, world_size=1, **ABOUT)).folder
        assert resolve_tokenizer(context, data).tokenizer == f"{folder}/model"
    damage(folder, "model/tokenizer.json")
    assert resolve_tokenizer(context, data).tokenizer == f"{tmp_path}/own/checkpoints/step_00000020/model"


@pytest.mark.parametrize(("epochs", "jump"), [(2.0, True), (None, False)], ids=["epochs", "steps"])
def test_the_newest_is_loaded_and_a_rate_that_jumps_is_said_once(continued, tmp_path, capsys, epochs, jump):
    """The plan says so of a run that counts steps; of epochs only ranks know the number."""
    assert continued(epochs=epochs) == (30, [folder_of(tmp_path, 30)])
    said = capsys.readouterr().out
    assert "continuing after step 30" in said
    assert ("the learning rate jumps from 0.001 (step 30" in said) == jump


def test_rank_0_says_how_much_is_loaded(continued, monkeypatch, capsys):
    continued()
    assert "loading" not in capsys.readouterr().out, "what is done in a moment needs no line"
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    continued()
    assert "loading the checkpoint: 3.00 GiB of 12.00 GiB (25 %)\n" in capsys.readouterr().out
    continued(is_main=False)
    assert capsys.readouterr().out == ""


def test_damaged_ones_are_named_set_aside_and_the_one_before_is_loaded(continued, tmp_path, capsys):
    damage(folder_of(tmp_path, 30))
    damage(folder_of(tmp_path, 20), "optimizer.pt")
    assert continued() == (10, [folder_of(tmp_path, 10)])
    said = capsys.readouterr().out
    assert f"{folder_of(tmp_path, 30)} is damaged: the content of model/model.safetensors is not" in said
    assert f"{folder_of(tmp_path, 20)} is damaged: the content of optimizer.pt is not" in said
    kept = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000010", "step_00000020.damaged", "step_00000030.damaged"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(continued, tmp_path):
    for step in (10, 20, 30):
        damage(folder_of(tmp_path, step))
    for _ in range(2):  # nothing is set aside, so the next try does not start over either
        with pytest.raises(ConfigError, match="no checkpoint is intact") as refused:
            continued()
    assert exit_code_of_rank(refused.value) == 65


def test_checkpoints_of_another_run_are_left_as_they_are(continued, tmp_path):
    damage(folder_of(tmp_path, 30))
    assert continued(str(tmp_path), folder=tmp_path / "new") == (20, [folder_of(tmp_path, 20)])
    with pytest.raises(ConfigError, match=r"step_00000030 is damaged.*model\.safetensors"):
        continued(str(folder_of(tmp_path, 30)), folder=tmp_path / "new")
    assert folder_of(tmp_path, 30).is_dir()


def test_ranks_that_see_different_checkpoints_load_none(continued, monkeypatch):
    """Their folders are no shared one: each would go on from another step."""

    def with_another_rank(values: list[float], **_: Any) -> list[float]:
        return [values[0] + 20.0]

    monkeypatch.setattr(distributed, "sum_over_ranks", with_another_rank)
    with pytest.raises(JobError, match=r"checkpoint\.resume=auto: ranks see different checkpoints; set run\.root to"):
        continued()


def test_a_rank_beside_the_main_one_says_and_renames_nothing(continued, tmp_path, capsys):
    damage(folder_of(tmp_path, 30))
    assert continued(is_main=False) == (20, [folder_of(tmp_path, 20)])
    assert capsys.readouterr().out == ""
    assert folder_of(tmp_path, 30).is_dir()


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_without_a_checkpoint_there_is_no_tokenizer_to_take(tmp_path, resume):
    context: Any = SimpleNamespace(
        run=SimpleNamespace(checkpoint=Checkpoint(resume=resume)), run_dir=RunDir(tmp_path / "own")
    )
    with pytest.raises(ConfigError, match=f"no checkpoint of checkpoint.resume={resume} holds an intact tokenizer"):
        resolve_tokenizer(context, Text(path="x", tokenizer="checkpoint"))
    for data in (Text(path="x", tokenizer="bpe"), Synthetic()):
        assert resolve_tokenizer(context, data) is data

"""The plan warns before a run fills its disk with checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.checkpoint.manifest import CheckpointManifest
from launcher.checkpoint.store import CheckpointStore
from launcher.config.checkpoint import Checkpoint
from launcher.config.compose import compose
from launcher.execution import checkpoint_room
from launcher.execution.checkpoint_room import room_warnings
from launcher.planning.planner import checkpoint_bytes
from tests.conftest import Launch

WORDS = ("model=gpt2_tiny", "job.steps=100")
SIZE = checkpoint_bytes(compose(WORDS).run) or 0


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give every disk so many free bytes."""

    def give(num_bytes: int) -> None:
        monkeypatch.setattr(
            checkpoint_room, "os", SimpleNamespace(statvfs=lambda _: SimpleNamespace(f_bavail=num_bytes, f_frsize=1))
        )

    return give


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ((), 1),
        (("checkpoint.every=60",), 2),
        (("checkpoint.every=10",), 4),
        (("checkpoint.every=10", "checkpoint.keep=1", "checkpoint.keep_best=false"), 2),
        (("checkpoint.every=10", "checkpoint.keep=0"), 10),
        (("checkpoint.every=30", "checkpoint.keep=0"), 4),
        (("checkpoint.every=5", "checkpoint.keep_every=50"), 6),
        (("checkpoint.every=10", "job.epochs=2"), 4),
        (("checkpoint.at_end=false",), 0),
        (("job=evaluate",), 0),
    ],
)
def test_the_disk_needs_room_for_all_that_are_kept_and_the_next(
    tmp_path: Path, free: Callable[[int], None], words: tuple[str, ...], count: int
) -> None:
    used = [
        word for word in WORDS if not (word.startswith("job.steps") and {"job=evaluate", "job.epochs=2"} & {*words})
    ]
    run = compose((*used, *words)).run
    free(SIZE * count)
    assert list(room_warnings(run, tmp_path / "new", world_size=1)) == []
    if count:
        free(SIZE * count - 1)
        (warning,) = room_warnings(run, tmp_path / "new", world_size=1)
        assert f"({count} of " in warning
        assert ("checkpoint.keep=1" in warning) == (count > 2)


def test_those_of_a_resumed_run_make_room_for_its_next(tmp_path: Path, free: Callable[[int], None]) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", Checkpoint())
    (store.begin(1) / "weights").write_bytes(bytes(1000))
    about = {"created": 0.0, "run_id": "a", "run_hash": "b", "engine": "torch", "precision": "fp32"}
    store.commit(CheckpointManifest(step=1, architecture={}, parallel={}, world_size=1, **about))  # type: ignore[arg-type]
    run = compose(WORDS).run
    free(SIZE - 1000)
    assert list(room_warnings(run, tmp_path, world_size=1)) == []
    free(SIZE - 1001)
    assert len(list(room_warnings(run, tmp_path, world_size=1))) == 1


def test_the_plan_shows_it(launch_in_process: Launch, free: Callable[[int], None]) -> None:
    free(1000)
    said = "the disk of run.root has 1000 B for them"
    assert said in launch_in_process("plan", *WORDS).expect(0).stdout

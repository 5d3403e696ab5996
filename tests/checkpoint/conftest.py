"""Checkpoints of a small run, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.checkpoint.manifest import CheckpointManifest, DataCursor
from launcher.checkpoint.store import CheckpointStore, SavedCheckpoint
from launcher.config.checkpoint import LOWEST_LOSS, Checkpoint
from launcher.config.model.gpt2 import Gpt2
from launcher.config.parallel.zero import Zero
from launcher.config.precision import Bf16Precision
from launcher.utils.schema import to_tree

MODEL = Gpt2(name="tiny", num_hidden_layers=2, num_attention_heads=2, hidden_size=16)
PARALLEL = Zero(stage=3)
PRECISION = Bf16Precision()
Save = Callable[..., SavedCheckpoint]


def manifest_of(
    step: int, *, eval_loss: float | None = None, accuracy: float | None = None, best_metric: str = LOWEST_LOSS
) -> CheckpointManifest:
    """Return the manifest that a run of these components writes on 2 ranks."""
    return CheckpointManifest(
        step=step,
        created=0.0,
        run_id="a-run",
        run_hash="0" * 64,
        architecture=to_tree(MODEL.architecture()),
        engine=PARALLEL.engine,
        parallel=to_tree(PARALLEL),
        precision=PRECISION.kind,
        world_size=2,
        data=DataCursor(seed=0, global_batch=16, sequence_length=64, sequences=16 * step),
        eval_loss=eval_loss,
        eval_metrics={} if accuracy is None else {"accuracy": accuracy},
        best_metric=best_metric,
    )


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save a checkpoint of a step into ``tmp_path/checkpoints``: one file in the folder, one below it."""

    def write(
        step: int, *, eval_loss: float | None = None, accuracy: float | None = None, **options: int | bool | str
    ) -> SavedCheckpoint:
        policy = Checkpoint(**options)  # type: ignore[arg-type]
        store = CheckpointStore(tmp_path / "checkpoints", policy)
        pending = store.begin(step)
        (pending / "model.bin").write_bytes(bytes(step))
        (pending / "ranks").mkdir()
        (pending / "ranks" / "0.bin").write_bytes(b"0" * 10)
        metrics = {"eval_loss": eval_loss, "accuracy": accuracy, "best_metric": policy.best_metric}
        return store.commit(manifest_of(step, **metrics))  # type: ignore[arg-type]

    return write

"""A run that resumes on other ranks keeps its global batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.checkpoint.manifest import TrainingProgress, describe_checkpoint
from launcher.checkpoint.store import SavedCheckpoint
from launcher.config.compose import compose
from launcher.errors import ConfigError
from launcher.execution.resumed_batch import keep_global_batch

PLAN = {"run_id": "a", "run_hash": "b"}


@pytest.mark.parametrize(
    ("words", "before", "now", "micro_batch", "accumulation"),
    [
        (["job.micro_batch=4"], 2, 2, 4, 1),
        (["job.micro_batch=4"], 2, 1, 4, 2),
        (["job.micro_batch=4"], 1, 2, 2, 1),
        (["job.micro_batch=6", "job.gradient_accumulation_steps=2"], 1, 3, 4, 1),
        (["job.micro_batch=2", "job.global_batch=8"], 4, 2, 2, 2),
    ],
)
def test_fewer_or_more_ranks(words: list[str], before: int, now: int, micro_batch: int, accumulation: int) -> None:
    run = compose(["parallel=ddp", *words]).run
    manifest = describe_checkpoint(run, TrainingProgress(step=1, sequences=8), world_size=before, plan=PLAN)
    saved = SavedCheckpoint(folder=Path("x"), manifest=manifest)
    batch = keep_global_batch(run, saved, world_size=now).job.batch(run, world_size=now)
    assert manifest.data is not None
    assert batch is not None
    assert batch.global_batch == manifest.data.global_batch
    assert (batch.micro_batch, batch.gradient_accumulation_steps) == (micro_batch, accumulation)


def test_ranks_that_do_not_divide_it_are_refused_with_the_equation() -> None:
    run = compose(["parallel=ddp", "job.micro_batch=4"]).run
    manifest = describe_checkpoint(run, TrainingProgress(step=1, sequences=8), world_size=2, plan=PLAN)
    changed = keep_global_batch(run, SavedCheckpoint(folder=Path("x"), manifest=manifest), world_size=3)
    with pytest.raises(ConfigError, match=r"job\.global_batch=8: micro 4 × dp 3 = 12 does not divide 8"):
        changed.job.batch(changed, world_size=3)


def test_what_has_no_batch_is_left_alone() -> None:
    run = compose(["job=generate"]).run
    trained = compose([]).run
    manifest = describe_checkpoint(trained, TrainingProgress(step=1, sequences=8), world_size=2, plan=PLAN)
    saved = SavedCheckpoint(folder=Path("x"), manifest=manifest)
    assert keep_global_batch(run, saved, world_size=3) is run
    assert keep_global_batch(trained, replace(saved, manifest=replace(manifest, data=None)), world_size=3) is trained

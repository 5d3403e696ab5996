"""What the pipeline strategy refuses, and how it divides ranks."""

from __future__ import annotations

import pytest

from launcher.config.model.gpt2 import Gpt2
from launcher.config.optimizer import AdamW
from launcher.config.parallel.pipeline import Pipeline, micro_batch_choices
from launcher.config.precision import Fp32Precision
from launcher.errors import ConfigErrors
from launcher.protocol.plan import Batch

SHAPE = Gpt2(name="tiny", num_hidden_layers=6, num_attention_heads=2, hidden_size=64).shape()


@pytest.mark.parametrize(
    ("schedule", "stages", "wanted", "choices"),
    [
        ("gpipe", 4, 1, [1]),
        ("zbv", 4, 3, [3]),
        ("1f1b", 4, 4, [4]),
        ("1f1b", 4, 3, [4]),
        ("interleaved_1f1b", 4, 2, [2]),
        ("interleaved_1f1b", 4, 8, [8]),
        ("interleaved_1f1b", 4, 9, [8, 10]),
        ("interleaved_zero_bubble", 2, 5, [4, 6]),
    ],
)
def test_micro_batches_a_schedule_takes(schedule, stages, wanted, choices) -> None:
    assert micro_batch_choices(schedule, stages=stages, wanted=wanted) == choices


def test_a_refused_batch_names_the_nearest_that_works() -> None:
    batch = Batch(micro_batch=2, gradient_accumulation_steps=9, data_parallel=3)
    (refusal,) = Pipeline(stages=4, schedule="interleaved_1f1b").validate_batch(batch)
    assert "8 (job.global_batch=48) or 10 (job.global_batch=60)" in str(refusal)
    assert not list(Pipeline(stages=4, schedule="gpipe").validate_batch(batch))


@pytest.mark.parametrize(
    ("values", "fix"),
    [
        ({"stages": 7}, "set parallel.stages=6"),
        ({"stages": 4, "schedule": "zbv"}, "set parallel.stages=3"),
    ],
)
def test_more_chunks_than_layers_are_refused(values, fix) -> None:
    (refusal,) = Pipeline(**values).validate_run(8, Fp32Precision(), optimizer=AdamW(), shape=SHAPE)
    assert fix in str(refusal)


def test_one_stage_is_no_pipeline() -> None:
    with pytest.raises(ConfigErrors, match=r"parallel\.stages"):
        Pipeline(stages=1)


def test_pipelines_side_by_side_replicate_or_shard() -> None:
    assert (Pipeline().dims(4).data, Pipeline().dims(4).shard) == (2, 1)
    assert (Pipeline(data="shard").dims(4).data, Pipeline(data="shard").dims(4).shard) == (1, 2)

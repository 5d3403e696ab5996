"""Options of DeepSpeed's pipeline: what is refused and how, what DeepSpeed gets, what a rank holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.config.model.shape import Shape
from launcher.config.optimizer import AdamW
from launcher.config.parallel.base import ParallelDims
from launcher.config.parallel.deepspeed_pipeline import DeepSpeedPipeline
from launcher.config.parallel.zero import Zero
from launcher.config.precision import Bf16Precision, Fp16Precision, Fp32Precision
from launcher.errors import ConfigErrors
from launcher.protocol.plan import Batch

SHAPE = Shape(
    num_hidden_layers=4,
    num_attention_heads=2,
    hidden_size=64,
    vocab_size=4096,
    max_position_embeddings=128,
    num_params=1_000_000,
    largest_param=4096 * 64,
    num_key_value_heads=2,
    intermediate_size=256,
    block_params=200_000,
    tie_word_embeddings=True,
    family="gpt2",
)
BATCH = Batch(micro_batch=2, gradient_accumulation_steps=4, data_parallel=2)


@pytest.mark.parametrize(
    ("values", "option", "phrase"),
    [
        ({"stage": 2}, "parallel.stage", "set parallel.stage=1"),
        ({"stage": 3}, "parallel.stage", "set parallel.stage=1"),
        ({"stages": 0}, "parallel.stages", "must be at least 1"),
        ({"micro_batches": 0}, "parallel.micro_batches", "must be at least 1"),
        ({"reduce_bucket_size": 0}, "parallel.reduce_bucket_size", "must be at least 1"),
        ({"deepspeed": {"pipeline": {}}}, "parallel.deepspeed.pipeline", "the launcher sets it"),
        ({"deepspeed": {"zero_optimization": {"overlap_comm": True}}}, None, "does not support it"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, None, "set parallel.stage instead"),
    ],
)
def test_a_bad_value_is_refused_by_name(values: dict[str, Any], option: str | None, phrase: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        DeepSpeedPipeline(**values)
    (error,) = caught.value.errors
    assert option in (None, error.option)
    assert phrase in str(error)


@pytest.mark.parametrize(
    ("pipeline", "precision", "shape", "phrase"),
    [
        (DeepSpeedPipeline(stages=5), Fp32Precision(), SHAPE, "set parallel.stages=4"),
        (DeepSpeedPipeline(), Fp32Precision(), replace(SHAPE, family="mamba"), "mamba"),
        (DeepSpeedPipeline(stage=0), Bf16Precision(), SHAPE, "set parallel.stage=1"),
        (DeepSpeedPipeline(), Fp16Precision(min_scale=1.5), SHAPE, "set precision.min_scale=1"),
    ],
)
def test_what_other_groups_rule_out(pipeline: Any, precision: Any, shape: Shape, phrase: str) -> None:
    (error,) = pipeline.validate_run(4, precision, optimizer=AdamW(), shape=shape)
    assert phrase in str(error)


def test_nothing_is_refused_without_reason() -> None:
    for shape in (SHAPE, replace(SHAPE, family="llama"), None):
        assert not list(DeepSpeedPipeline(stages=4).validate_run(8, Bf16Precision(), optimizer=AdamW(), shape=shape))
    assert not list(DeepSpeedPipeline(stage=0).validate_run(2, Fp32Precision(), optimizer=AdamW(), shape=SHAPE))


def test_pipelines_side_by_side_take_the_ranks_that_one_leaves() -> None:
    assert DeepSpeedPipeline(stages=2).dims(6) == ParallelDims(pipeline=2, data=3)
    assert DeepSpeedPipeline(stages=4).dims(2).product == 4  # does not fill the world: validate_run reports it
    assert DeepSpeedPipeline(micro_batches=8).gradient_accumulation_steps == 8


def test_deepspeed_gets_the_keys_of_zero() -> None:
    numbers: dict[str, Any] = {"batch": BATCH, "clip_norm": 1.0, "optimizer": AdamW(), "precision": Bf16Precision()}
    expected = Zero(stage=1, overlap_comm=False, contiguous_gradients=False).engine_config(**numbers)
    assert DeepSpeedPipeline().engine_config(**numbers) == expected
    assert expected["gradient_clipping"] == 1.0


def test_without_zero_the_engine_clips() -> None:
    """DeepSpeed's own norm would be that of the first stage."""
    numbers: dict[str, Any] = {"batch": BATCH, "clip_norm": 1.0, "optimizer": AdamW(), "precision": Fp32Precision()}
    assert DeepSpeedPipeline(stage=0).engine_config(**numbers)["gradient_clipping"] == 0.0


def test_a_stage_holds_its_share() -> None:
    four = DeepSpeedPipeline(stages=2).state_bytes(replace(SHAPE, num_params=1_000_000), 4, Bf16Precision())
    assert four == Zero(stage=1).state_bytes(replace(SHAPE, num_params=500_000), 2, Bf16Precision())
    assert "2 stages" in DeepSpeedPipeline(stages=2).state_formula(4, Bf16Precision())

"""ZeRO's options: what is refused and how, what is compiled, what it holds."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.config.compose import compose
from launcher.config.model.shape import Shape
from launcher.config.optimizer import AdamW
from launcher.config.parallel.zero import Zero
from launcher.config.precision import Bf16Precision, Fp16Precision, Fp32Precision
from launcher.errors import ConfigErrors
from launcher.execution import validate
from launcher.protocol.plan import Host, NativeOps, StateBytes

PARAMS, RANKS = 1_000_000, 4
NVME = {"stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": "/nvme"}
SHAPE = Shape(
    num_hidden_layers=2,
    num_attention_heads=2,
    hidden_size=64,
    vocab_size=4096,
    max_position_embeddings=128,
    num_params=PARAMS,
    largest_param=200_000_000,
    num_key_value_heads=2,
    intermediate_size=256,
    block_params=PARAMS // 2,
    tie_word_embeddings=True,
    family="gpt2",
)


@pytest.mark.parametrize(
    ("values", "option", "phrase"),
    [
        ({"stage": 0, "offload_optimizer": "cpu"}, "parallel.offload_optimizer", "set parallel.stage=1"),
        ({**NVME, "stage": 2, "offload_parameters": "none"}, "parallel.offload_optimizer", "set parallel.stage=3"),
        ({"stage": 2, "offload_parameters": "cpu"}, "parallel.offload_parameters", "parallel.stage=2"),
        ({**NVME, "nvme_path": None}, "parallel.nvme_path", "set parallel.nvme_path="),
        ({"stage": 0, "low_memory_bf16": True}, "parallel.low_memory_bf16", "set parallel.stage=1"),
        ({"reduce_bucket_size": 0}, "parallel.reduce_bucket_size", "must be at least 1"),
        ({"nvme_buffer_count": 0}, "parallel.nvme_buffer_count", "must be at least 1"),
        ({"persistence_threshold": -1}, "parallel.persistence_threshold", "must be at least 0"),
        ({"deepspeed": {"zero_optimisation": {}}}, "parallel.deepspeed.zero_optimisation", "did you mean"),
    ],
)
def test_a_bad_value_is_refused_by_name(values: dict[str, Any], option: str, phrase: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        Zero(**values)
    (error,) = caught.value.errors
    assert error.option == option
    assert phrase in str(error)


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(ConfigErrors) as caught:
        Zero(stage=1, offload_parameters="nvme", sub_group_size=0)
    options = {error.option for error in caught.value.errors}
    assert options == {"parallel.offload_parameters", "parallel.nvme_path", "parallel.sub_group_size"}


@pytest.mark.parametrize(
    ("zero", "precision", "optimizer", "option"),
    [
        (Zero(low_memory_bf16=True), Fp16Precision(), AdamW(), "parallel.low_memory_bf16"),
        (
            Zero(**NVME, nvme_buffer_size=10**9),
            Bf16Precision(),
            AdamW(implementation="torch"),
            "optimizer.implementation",
        ),
        (
            Zero(low_memory_bf16=True, offload_optimizer="cpu"),
            Bf16Precision(),
            AdamW(implementation="torch"),
            "optimizer.implementation",
        ),
        (Zero(**NVME), Bf16Precision(), AdamW(), "parallel.nvme_buffer_size"),
        (Zero(), Fp16Precision(min_scale=1.5), AdamW(), "precision.min_scale"),
        (Zero(stage=0), Fp16Precision(), AdamW(), "parallel.stage"),
    ],
)
def test_what_other_groups_rule_out(zero: Zero, precision: Any, optimizer: AdamW, option: str) -> None:
    (error,) = zero.validate_run(RANKS, precision, optimizer=optimizer, shape=SHAPE)
    assert error.option == option


def test_nothing_is_refused_without_reason() -> None:
    assert not list(Zero(stage=2).validate_run(1, Fp16Precision(), optimizer=AdamW(), shape=SHAPE))
    assert not list(
        Zero(**NVME, nvme_buffer_size=2 * 10**8).validate_run(2, Bf16Precision(), optimizer=AdamW(), shape=SHAPE)
    )


@pytest.mark.parametrize(
    ("zero", "precision", "expected"),
    [
        # the paper's table 1: 16 bytes, 4 + 12/N, 2 + 14/N, 16/N
        (Zero(stage=0), Bf16Precision(), StateBytes(parameters=2_000_000, gradients=2_000_000, optimizer=12_000_000)),
        (Zero(stage=1), Bf16Precision(), StateBytes(parameters=2_000_000, gradients=2_000_000, optimizer=3_000_000)),
        (Zero(stage=2), Bf16Precision(), StateBytes(parameters=2_000_000, gradients=500_000, optimizer=3_000_000)),
        (Zero(stage=3), Bf16Precision(), StateBytes(parameters=500_000, gradients=500_000, optimizer=3_000_000)),
        (Zero(stage=0), Fp32Precision(), StateBytes(parameters=4_000_000, gradients=4_000_000, optimizer=8_000_000)),
        (Zero(stage=1), Fp32Precision(), StateBytes(parameters=4_000_000, gradients=4_000_000, optimizer=3_000_000)),
        (Zero(stage=3), Fp32Precision(), StateBytes(parameters=1_000_000, gradients=1_000_000, optimizer=3_000_000)),
        (
            Zero(stage=3, low_memory_bf16=True),
            Bf16Precision(),
            StateBytes(parameters=500_000, gradients=500_000, optimizer=1_500_000),
        ),
        (
            Zero(stage=2, offload_optimizer="cpu"),
            Bf16Precision(),
            StateBytes(parameters=2_000_000, gradients=1_500_000, optimizer=3_000_000, host=4_000_000),
        ),
        (
            Zero(stage=3, offload_optimizer="cpu", offload_parameters="cpu"),
            Bf16Precision(),
            StateBytes(parameters=500_000, gradients=1_500_000, optimizer=3_000_000, host=5_000_000),
        ),
        (
            Zero(**NVME),
            Bf16Precision(),
            StateBytes(parameters=500_000, gradients=1_500_000, optimizer=3_000_000, host=500_000, nvme=4_500_000),
        ),
        (
            Zero(**NVME, max_parameters_in_ram=100_000),
            Bf16Precision(),
            StateBytes(parameters=500_000, gradients=1_500_000, optimizer=3_000_000, host=700_000, nvme=4_300_000),
        ),
    ],
)
def test_state_bytes(zero: Zero, precision: Any, expected: StateBytes) -> None:
    assert zero.state_bytes(SHAPE, RANKS, precision) == expected


def test_the_formula_says_what_was_reckoned() -> None:
    assert (
        Zero(stage=2)
        .state_formula(4, Bf16Precision())
        .startswith("2N weights + 2N gradients / 4 + 12N optimizer / 4 bytes")
    )
    assert "4N gradients / 4 beside" in Zero(stage=2, offload_optimizer="cpu").state_formula(4, Bf16Precision())


@pytest.mark.parametrize(
    ("zero", "optimizer", "expected"),
    [
        (Zero(), AdamW(), NativeOps()),
        (Zero(), AdamW(implementation="native"), NativeOps(needed=("fused_adam",))),
        (Zero(offload_optimizer="cpu"), AdamW(), NativeOps(optional=("cpu_adam",))),
        (Zero(offload_optimizer="cpu"), AdamW(implementation="torch"), NativeOps()),
        (Zero(offload_optimizer="cpu"), AdamW(implementation="native"), NativeOps(needed=("cpu_adam",))),
        (Zero(**NVME), AdamW(), NativeOps(needed=("cpu_adam", "pin_memory", "async_io"))),
    ],
)
def test_native_ops(zero: Zero, optimizer: AdamW, expected: NativeOps) -> None:
    assert zero.native_ops(optimizer) == expected


@pytest.mark.parametrize(
    ("zero", "precision", "on_gpu", "phrases"),
    [
        (Zero(), Bf16Precision(), False, []),
        (Zero(stage=0), Bf16Precision(), True, ["stage 0 in bf16"]),
        (Zero(offload_optimizer="cpu"), Bf16Precision(), True, []),
        (Zero(offload_optimizer="cpu"), Bf16Precision(), False, ["only adds copies", "pin_memory has no effect"]),
        (Zero(**NVME, pin_memory=False), Bf16Precision(), False, []),
    ],
)
def test_notes(zero: Zero, precision: Any, on_gpu: bool, phrases: list[str]) -> None:
    notes = list(zero.warnings(precision, on_gpu=on_gpu))
    assert len(notes) == len(phrases)
    assert all(phrase in note for phrase, note in zip(phrases, notes, strict=True))


def test_buffers_that_this_user_may_not_lock_are_refused_before_the_start(monkeypatch):
    run = compose(["+exp=zero_infinity_gpt2xl", "precision=fp32"]).run
    box = Host(name="box", slots=1)
    monkeypatch.setattr(validate, "lockable_bytes", lambda: 8 << 20)
    (error,) = validate.validate_memlock(run, [box])
    assert "1.86 GiB a rank, and this user may lock 8.00 MiB" in str(error)
    assert list(validate.validate_memlock(run, [Host(name="far", slots=1, ssh_destination="far")])) == []
    for limit in (None, 2_000_000_000):
        monkeypatch.setattr(validate, "lockable_bytes", lambda limit=limit: limit)
        assert list(validate.validate_memlock(run, [box])) == []

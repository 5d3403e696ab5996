"""DeepSpeed's configuration of every shipped ZeRO option, whole: ``UPDATE_GOLDEN=1 pytest`` rewrites the files."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from launcher.config.compose import compose
from launcher.config.optimizer import AdamW
from launcher.config.parallel.zero import Zero
from launcher.config.precision import Bf16Precision, Fp16Precision, Fp32Precision
from launcher.config.run import Run
from launcher.protocol.plan import Batch
from tests.conftest import REPOSITORY

GOLDEN = REPOSITORY / "tests" / "golden" / "deepspeed"
OPTIONS = sorted(path.stem for path in (REPOSITORY / "conf" / "parallel").glob("zero*.yaml"))
PRECISIONS = {"zero0": "fp32", "zero2": "fp16"}
BATCH = Batch(micro_batch=2, gradient_accumulation_steps=4, data_parallel=2)


def composed(option: str) -> Run:
    words = [f"parallel={option}", f"precision={PRECISIONS.get(option, 'bf16')}"]
    if option == "zero_infinity":
        words.append("parallel.nvme_path=/nvme")
    return compose(words).run


def config_of(run: Run) -> dict[str, Any] | None:
    return run.parallel.engine_config(
        batch=BATCH, clip_norm=run.job.clip_norm, optimizer=run.optimizer, precision=run.precision
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_golden(option: str) -> None:
    rendered = json.dumps(config_of(composed(option)), indent=2) + "\n"
    path = GOLDEN / f"{option}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(rendered)
    assert rendered == path.read_text()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", OPTIONS)
def test_deepspeed_takes_it(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    from deepspeed.runtime.config import DeepSpeedConfig

    run = composed(option)
    config = run.parallel.engine_config(
        batch=Batch(micro_batch=2, gradient_accumulation_steps=4, data_parallel=1),
        clip_norm=0.5,
        optimizer=run.optimizer,
        precision=run.precision,
    )
    taken = DeepSpeedConfig(config)
    assert taken.gradient_clipping == 0.5
    assert isinstance(run.parallel, Zero)
    assert taken.zero_config.stage == run.parallel.stage
    assert taken.zero_config.overlap_comm == run.parallel.overlap_comm
    assert taken.zero_config.max_live_parameters == run.parallel.max_live_parameters


def config(zero: Zero, **changes: Any) -> dict[str, Any]:
    values = {"clip_norm": 1.0, "optimizer": AdamW(), "precision": Bf16Precision(), "native_adam": False, **changes}
    return zero.ds_config(batch=BATCH, **values)


def test_clipping_that_is_off_is_written_out() -> None:
    assert config(Zero(), clip_norm=0.0)["gradient_clipping"] == 0.0


def test_both_half_formats_are_written_out() -> None:
    half = config(
        Zero(stage=1), precision=Fp16Precision(initial_scale_power=10, scale_window=50, hysteresis=3, min_scale=2.0)
    )
    assert half["bf16"]["enabled"] is False
    assert half["fp16"] == {
        "enabled": True,
        "auto_cast": False,
        "loss_scale": 0,
        "initial_scale_power": 10,
        "loss_scale_window": 50,
        "hysteresis": 3,
        "consecutive_hysteresis": False,
        "min_loss_scale": 2.0,
    }
    full = config(Zero(stage=1), precision=Fp32Precision())
    assert (full["bf16"]["enabled"], full["fp16"]) == (False, {"enabled": False})
    assert full["communication_data_type"] == "fp32"


def test_torchs_adam_lifts_deepspeeds_demand_for_its_own() -> None:
    offloaded = Zero(stage=2, offload_optimizer="cpu")
    torchs, native = config(offloaded), config(offloaded, native_adam=True)
    assert torchs["optimizer"]["params"]["torch_adam"] is True
    assert torchs["zero_force_ds_cpu_optimizer"] is False
    assert "torch_adam" not in native["optimizer"]["params"]
    assert native["zero_force_ds_cpu_optimizer"] is True


def test_raw_keys_are_laid_over_ours() -> None:
    raw = {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"round_robin_gradients": True}}
    rendered = config(Zero(stage=2, deepspeed=raw))
    assert rendered["data_types"] == {"grad_accum_dtype": "fp32"}
    assert rendered["zero_optimization"]["round_robin_gradients"] is True
    assert rendered["zero_optimization"]["stage"] == 2

"""bf16 and fp16 stay close to fp32; an overflow of fp16 gradients skips the step and says so."""

from __future__ import annotations

import math
from typing import Any

import pytest

STEPS = 6
STAGES = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "zero0": {"kind": "zero", "stage": 0},
    "zero1": {"kind": "zero", "stage": 1},
    "zero3": {"kind": "zero", "stage": 3, "persistence_threshold": 0},
}
CASES = [
    (name, precision) for name in STAGES for precision in ("bf16", "fp16") if (name, precision) != ("zero0", "fp16")
]
SAVED = {"ddp": "hot", "zero0": "bf16", "zero1": "hot", "zero3": "hot"}
CLOSE = 5e-3
"""Relative; bf16 has 8 bits of mantissa: ZeRO rounds the weights it starts from to them, FSDP2 those it takes"""


@pytest.fixture(scope="module")
def answers(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run all cases of this module on one pair of processes."""
    cases = [{"name": "fp32", "world": 2, "steps": STEPS, "run": {"parallel": STAGES["ddp"]}}]
    # 2 to the power of 40 overflows fp16 with certainty; without hysteresis the scale halves at every step
    hot = {"kind": "fp16", "initial_scale_power": 40, "hysteresis": 1}
    folder = tmp_path_factory.mktemp("half")
    saved = {name: str(folder / f"saved_{name}") for name in SAVED}
    for name, label in [*CASES, *((name, "hot") for name in STAGES if name != "zero0")]:
        case = {"world": 2, "run": {"parallel": STAGES[name], "precision": hot if label == "hot" else {"kind": label}}}
        if SAVED.get(name) != label:
            cases.append({"name": f"{name}_{label}", "steps": STEPS, **case})
            continue
        cases.append({"name": f"{name}_{label}", "steps": STEPS, **case, "save": saved[name]})
        others = [saved["ddp"]] if name in ("zero1", "zero3") else []
        cases.append({"name": f"{name}_resumed", "steps": 0, **case, "load": [saved[name], *others]})
    cases.append({"name": "diverged", "world": 2, "steps": 2, "lr": 1e30, "run": {"parallel": STAGES["ddp"]}})
    return run_cases(cases, folder)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_half_precision_is_close(answers: dict[str, Any], name: str, precision: str) -> None:
    ours, full = answers[f"{name}_{precision}"]["steps"], answers["fp32"]["steps"]
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in full], rel=CLOSE)
    assert [step["loss"] for step in ours] != [step["loss"] for step in full]
    assert not any(step["skipped"] for step in ours)


def test_half_precision_without_zero_rounds_as_with_it(answers: dict[str, Any]) -> None:
    ours, zero1 = answers["zero0_bf16"]["steps"], answers["zero1_bf16"]["steps"]
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in zero1], rel=1e-4)


@pytest.mark.parametrize("name", [name for name in STAGES if name != "zero0"])
def test_an_overflow_skips_the_step(answers: dict[str, Any], name: str) -> None:
    first, second = answers[f"{name}_hot"]["steps"][:2]
    assert first["skipped"]
    assert first["grad_norm"] is None
    assert math.isfinite(second["loss"])


@pytest.mark.parametrize("name", SAVED)
def test_a_loaded_checkpoint_continues_to_the_bit(answers: dict[str, Any], name: str) -> None:
    after = answers[f"{name}_{SAVED[name]}"]["after"]
    if SAVED[name] == "hot":
        assert after[0]["skipped"], "the scale is still too high, so a lost one would show"
    assert answers[f"{name}_resumed"]["after"] == after


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_the_loss_scale_goes_from_one_strategy_to_another(answers: dict[str, Any], name: str) -> None:
    ours, expected = answers[f"{name}_resumed"], answers["ddp_hot"]
    assert all(step["skipped"] for step in ours["after1"])
    assert ours["scalars"] == expected["scalars"]
    assert expected["scalars"]["value"] < 2.0**40


def test_a_loss_that_is_not_finite_names_its_ranks(answers: dict[str, Any]) -> None:
    last = answers["diverged"]["steps"][-1]
    assert not math.isfinite(last["loss"])
    assert last["nonfinite_ranks"] == [0, 1]

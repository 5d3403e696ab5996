"""LoRA under every strategy: two ranks against one process; checkpoints of the adapter alone resume everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.protocol.state_files import state_files, weight_names
from launcher.utils.safetensors_header import read_header

from .conftest import losses

STEPS = 5
LORA = {"kind": "lora", "r": 4}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero2": {"kind": "zero", "stage": 2},
    "zero3": {"kind": "zero", "stage": 3, "persistence_threshold": 0},
    "fsdp": {"kind": "fsdp"},
    "pipeline": {"kind": "pipeline", "stages": 2},
    "deepspeed_pipeline": {"kind": "deepspeed_pipeline", "stages": 2},
}
WHOLE = ("ddp", "zero2", "zero3", "fsdp")
"""Under which a rank can hold the whole model."""
QLORA: dict[str, dict[str, Any]] = {
    "qlora_ddp": {"parallel": {"kind": "ddp"}, "adapter": {"kind": "qlora", "r": 4}},
    "qlora_pipeline": {"parallel": STRATEGIES["pipeline"], "adapter": {"kind": "qlora", "r": 4}},
}


def case(name: str, world: int, **run: Any) -> dict[str, Any]:
    if run.get("parallel", {}).get("kind") == "deepspeed_pipeline":  # both ranks work through the whole batch
        run["job"] = {"micro_batch": 8, "gradient_accumulation_steps": 2}
    return {"name": name, "world": world, "steps": STEPS, "run": {"adapter": LORA, **run}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def answers(run_cases: Any, folder: Path) -> dict[str, Any]:
    """Run all cases of this module on one pair of processes."""
    saved = {name: str(folder / f"saved_{name}") for name in ("single", *STRATEGIES)}
    one = {"parallel": {"kind": "single"}, "job": {"micro_batch": 16}}
    cases = [case("single", 1, **one) | {"save": saved["single"], "alone": True}]
    cases += [
        case(name, 2, parallel=of) | {"save": saved[name], "alone": name in WHOLE} for name, of in STRATEGIES.items()
    ]
    cases += [
        case(f"{name}_resumed", 2, parallel=of) | {"steps": 0, "load": [saved[name], saved["single"]]}
        for name, of in STRATEGIES.items()
    ]
    cases.append(case("reader", 1, **one) | {"steps": 0, "load": [saved[name] for name in STRATEGIES]})
    cases.append(case("qlora", 1, **one) | {"run": {**one, "adapter": QLORA["qlora_ddp"]["adapter"]}})
    cases += [case(name, 2) | {"run": of} for name, of in QLORA.items()]
    cases.append(case("other_seed", 1, parallel=one["parallel"], job={"micro_batch": 16, "seed": 1}))
    return run_cases(cases, folder)


def same(answer: Any, reference: Any) -> bool:
    return losses(answer) == pytest.approx(losses(reference), rel=1e-5)  # sums in another order round differently


def test_one_process_learns_with_the_adapter_of_its_seed(answers: dict[str, Any]) -> None:
    single = losses(answers["single"])
    assert single[-1] < single[0]
    assert not same(answers["other_seed"], answers["single"])


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_equals_one_process(answers: dict[str, Any], name: str) -> None:
    assert same(answers[name], answers["single"])
    for ours, expected in zip(answers[name]["steps"], answers["single"]["steps"], strict=True):
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", WHOLE)
def test_a_rank_can_compute_alone_before_training_goes_on(answers: dict[str, Any], name: str) -> None:
    assert answers[name]["alone"] == pytest.approx(answers["single"]["alone"], rel=1e-4, abs=1e-5)
    assert losses(answers[name], "after") == pytest.approx(losses(answers["single"], "after"), rel=1e-5)


@pytest.mark.parametrize("name", QLORA)
def test_a_strategy_on_quantized_weights_equals_one_process(answers: dict[str, Any], name: str) -> None:
    assert same(answers[name], answers["qlora"])
    assert not same(answers["qlora"], answers["single"])


@pytest.mark.parametrize("name", ["single", *STRATEGIES])
def test_a_checkpoint_holds_the_adapter_alone(answers: dict[str, Any], folder: Path, name: str) -> None:
    assert answers[name]["after"]
    names: set[str] = set()
    for file in state_files(folder / f"saved_{name}"):
        header = read_header(file)
        names |= {part["name"] for part in json.loads(header.metadata["launcher"])["parts"].values()}
    weights = weight_names(names)
    assert len(weights) == 4 * 4 * 2
    assert all(".lora_" in weight for weight in weights)
    moments = {f"{moment}.{weight}" for moment in ("exp_avg", "exp_avg_sq", "step") for weight in weights}
    assert {found for found in names - weights if not found.startswith("rng.")} == moments


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_resumes_to_the_bit_and_under_other_strategies(answers: dict[str, Any], name: str) -> None:
    assert answers[f"{name}_resumed"]["after"] == answers[name]["after"]
    ours = losses(answers[f"{name}_resumed"], "after1")
    assert ours == pytest.approx(losses(answers["single"], "after"), rel=1e-6)
    read = losses(answers["reader"], f"after{list(STRATEGIES).index(name) or ''}")
    assert read == pytest.approx(losses(answers[name], "after"), rel=1e-6)

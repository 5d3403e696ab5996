"""Every optimizer takes the steps of one process under each strategy that has it, and continues what it saved."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.config.optimizer import AdamW, ParameterGroup
from launcher.engines.optimizer import check_groups
from launcher.errors import ConfigError

from .conftest import losses

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "nesterov": True},
    "adafactor": {"kind": "adafactor"},
    "muon": {"kind": "muon"},
    "adamw_8bit": {"kind": "adamw_8bit"},
    "groups": {"kind": "adamw", "groups": [{"pattern": "*mlp*", "lr_scale": 0.1}, {"pattern": "*wte*", "lr_scale": 2}]},
}
RATES = {"sgd": 3e-2, "adafactor": 1e-2, "muon": 3e-3, "adamw_8bit": 3e-3, "groups": 3e-3}
FSDP, PIPELINE = {"kind": "fsdp"}, {"kind": "pipeline", "stages": 2}
STRATEGIES: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "ddp": (2, {"kind": "ddp"}, ("adamw_8bit",)),
    "fsdp": (2, FSDP, ("sgd", "adafactor", "muon", "groups")),
    "hsdp": (4, {**FSDP, "replicate": 2}, ("muon",)),
    "pipeline": (2, PIPELINE, ("adafactor", "muon", "adamw_8bit", "groups")),
    "pipeline_shards": (4, {**PIPELINE, "data": "shard"}, ("muon",)),
    "zero3": (2, {"kind": "zero", "stage": 3}, ("groups",)),
    "deepspeed_pipeline": (2, {"kind": "deepspeed_pipeline", "stages": 2, "stage": 0}, ("groups",)),
}
CASES = [(name, optimizer) for name, (_, _, optimizers) in STRATEGIES.items() for optimizer in optimizers]
LLAMA = {"adafactor": ("tensor", 2), "muon": ("tensor", 4)}
"""Tensor parallelism, alone and over shards."""
RESUMED = {"sgd": "fsdp", "adafactor": "fsdp", "muon": "fsdp", "adamw_8bit": "single"}
"""Which strategy saves; it and one process continue."""
PIPELINED = ("muon", "adamw_8bit")
"""Whose state a pipeline reads too."""
STEPS = 4


def case(name: str, optimizer: str, world: int, parallel: dict[str, Any], **rest: Any) -> dict[str, Any]:
    data_parallel = world // parallel.get("stages", 1) // parallel.get("tensor", 1)
    job = {"micro_batch": 4, "gradient_accumulation_steps": None, "global_batch": 16}
    run = {"parallel": parallel, "job": job, "optimizer": {"lr": RATES[optimizer], **OPTIMIZERS[optimizer]}}
    assert 16 % (4 * data_parallel) == 0
    return {"name": name, "world": world, "steps": STEPS, "run": run, "lr": RATES[optimizer], **rest}


@pytest.fixture(scope="module")
def answers(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("optimizers")
    cases = []
    for optimizer in OPTIMIZERS:
        saving = {"save": str(folder / optimizer)} if RESUMED.get(optimizer) == "single" else {}
        cases.append(case(f"single_{optimizer}", optimizer, 1, {"kind": "single"}, **saving))
    for name, optimizer in CASES:
        world, parallel, _ = STRATEGIES[name]
        saving = {"save": str(folder / optimizer)} if RESUMED.get(optimizer) == name else {}
        cases.append(case(f"{name}_{optimizer}", optimizer, world, parallel, **saving))
    for optimizer, name in RESUMED.items():
        world, parallel = (1, {"kind": "single"}) if name == "single" else STRATEGIES[name][:2]
        load = {"load": str(folder / optimizer), "steps": 0}
        cases.append(case(f"resumed_{optimizer}", optimizer, world, parallel, **load))
        if optimizer in PIPELINED:
            cases.append(case(f"pipelined_{optimizer}", optimizer, 2, PIPELINE, **load))
    for optimizer, (name, world) in LLAMA.items():
        cases.append(case(f"llama_{optimizer}", optimizer, 1, {"kind": "single"}, family="llama", lr=1e-3))
        cases.append(case(f"{name}_{optimizer}", optimizer, world, {**FSDP, "tensor": 2}, family="llama", lr=1e-3))
    return run_cases(cases, folder)


BOUND = {"muon": 2e-5, "adamw_8bit": 2e-4}
"""Relative, of losses: Newton-Schulz rounds to bf16, and 8-bit codes flip where gradients differ by rounding."""


@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_a_strategy_equals_one_process(answers: dict[str, Any], name: str, optimizer: str) -> None:
    ours, single = losses(answers[f"{name}_{optimizer}"]), losses(answers[f"single_{optimizer}"])
    assert ours == pytest.approx(single, rel=BOUND.get(optimizer, 1e-5))
    assert single[-1] < single[0], "it learns"


@pytest.mark.parametrize("optimizer", LLAMA)
def test_slices_of_matrices_equal_one_process(answers: dict[str, Any], optimizer: str) -> None:
    ours, single = losses(answers[f"tensor_{optimizer}"]), losses(answers[f"llama_{optimizer}"])
    assert ours == pytest.approx(single, rel=BOUND.get(optimizer, 1e-5))


@pytest.mark.parametrize("optimizer", RESUMED)
def test_a_saved_state_continues_bit_for_bit(answers: dict[str, Any], optimizer: str) -> None:
    saved = answers[f"{RESUMED[optimizer]}_{optimizer}"]["after"]
    assert answers[f"resumed_{optimizer}"]["after"] == saved


@pytest.mark.parametrize("optimizer", PIPELINED)
def test_a_saved_state_continues_in_a_pipeline(answers: dict[str, Any], optimizer: str) -> None:
    saved = losses(answers[f"{RESUMED[optimizer]}_{optimizer}"], "after")
    assert losses(answers[f"pipelined_{optimizer}"], "after") == pytest.approx(saved, rel=BOUND.get(optimizer, 1e-5))


def test_groups_change_the_steps(answers: dict[str, Any]) -> None:
    """Another optimizer's losses are others from the second step on."""
    found = {name: losses(answers[f"single_{name}"]) for name in OPTIMIZERS}
    assert len({tuple(values) for values in found.values()}) == len(OPTIMIZERS)
    assert len({values[0] for values in found.values()}) == 1


def test_a_group_of_frozen_parameters_is_refused_at_start() -> None:
    """Models whose names the plan does not know are checked on the ranks."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for pattern, said in (("0.*", "matches no parameter that is trained; .* such as 1.bias"), ("1.*", "")):
        options = AdamW(groups=(ParameterGroup(pattern=pattern, lr_scale=2),))
        expected = pytest.raises(ConfigError, match=said) if said else nullcontext()
        with expected:
            check_groups(options, names, device=torch.device("cpu"))

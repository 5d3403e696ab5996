"""Offload to RAM and disk, with DeepSpeed's compiled operators: the same steps and checkpoints, a disk left clean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import EnvironmentProblem
from launcher.ops.build import build_ops

from .conftest import losses

STEPS = 3
ZERO3 = {"kind": "zero", "stage": 3, "persistence_threshold": 1000, "sub_group_size": 500_000}
NATIVE = {"optimizer": {"implementation": "native"}}
NVME = {"pin_memory": False, "nvme_buffer_size": 600_000}
WIDE = {"model": {"hidden_size": 384, "num_hidden_layers": 2, "weights": "random"}}
"""DeepSpeed leaves in RAM what has less than 1 MiB a rank: here vectors, and of the matrices some parameters."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "zero1_cpu": {"kind": "zero", "stage": 1, "offload_optimizer": "cpu"},
    "zero2_cpu": {"kind": "zero", "stage": 2, "offload_optimizer": "cpu"},
    "zero3_cpu": {**ZERO3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "zero3_nvme": {**ZERO3, **NVME, "offload_optimizer": "nvme", "offload_parameters": "nvme"},
    "zero3_nvme_optimizer": {**ZERO3, **NVME, "offload_optimizer": "nvme", "offload_parameters": "cpu"},
}

SAVED = ("zero1_cpu", "zero3_nvme", "zero3_nvme_optimizer")
"""Those whose checkpoints are loaded: by themselves, and by DDP, whose own they load then."""


@pytest.fixture(scope="module")
def answers(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run all cases of this module on one pair of processes."""
    try:
        build_ops(["cpu_adam", "pin_memory", "async_io"], say=print)
    except EnvironmentProblem as problem:
        pytest.skip(str(problem))
    folder: Path = tmp_path_factory.mktemp("offload")
    saved = {name: str(folder / f"saved_{name}") for name in ("ddp", *SAVED)}

    def case(name: str, parallel: dict[str, Any], **rest: Any) -> dict[str, Any]:
        run = {"parallel": parallel, **WIDE, **(NATIVE if parallel["kind"] == "zero" else {})}
        return {"name": name, "world": 2, "steps": 0, "lr": 1e-3, "run": run, **rest}

    cases = [case("ddp", {"kind": "ddp"}, steps=STEPS, save=saved["ddp"])]
    for name, parallel in STRATEGIES.items():
        if "nvme" in name:
            parallel = {**parallel, "nvme_path": str(folder / "nvme")}
        cases.append(case(name, parallel, steps=STEPS, **({"save": saved[name]} if name in SAVED else {})))
        if name in SAVED:
            cases.append(case(f"{name}_resumed", parallel, load=[saved[name], saved["ddp"]]))
    cases.append(case("reader", {"kind": "ddp"}, load=[saved[name] for name in SAVED]))
    return {**run_cases(cases, folder), "left": [path.name for path in (folder / "nvme").iterdir()]}


@pytest.mark.parametrize("name", STRATEGIES)
def test_offload_changes_no_step(answers: dict[str, Any], name: str) -> None:
    assert losses(answers[name]) == pytest.approx(losses(answers["ddp"]), rel=1e-5)


@pytest.mark.parametrize("name", SAVED)
def test_a_loaded_checkpoint_continues_to_the_bit(answers: dict[str, Any], name: str) -> None:
    assert answers[name]["after"]
    assert answers[f"{name}_resumed"]["after"] == answers[name]["after"]


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_ddp_continues_under_offload_and_back(answers: dict[str, Any], name: str) -> None:
    # torch's Adam and DeepSpeed's round otherwise
    assert losses(answers[f"{name}_resumed"], "after1") == pytest.approx(losses(answers["ddp"], "after"), rel=5e-6)
    read = losses(answers["reader"], f"after{SAVED.index(name) or ''}")
    assert read == pytest.approx(losses(answers[name], "after"), rel=5e-6)


def test_nothing_is_left_on_the_disk(answers: dict[str, Any]) -> None:
    assert answers["left"] == []

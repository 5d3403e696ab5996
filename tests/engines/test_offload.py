"""Offload to RAM and to disk, with DeepSpeed's compiled operators: the same steps, and nothing left on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import EnvironmentProblem
from launcher.ops.build import build_ops

STEPS = 5
ZERO3 = {"kind": "zero", "stage": 3, "persistence_threshold": 0}
NATIVE = {"optimizer": {"implementation": "native"}}


@pytest.fixture(scope="module")
def answers(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run all cases of this module on one pair of processes."""
    try:
        build_ops(["cpu_adam", "pin_memory", "async_io"], say=print)
    except EnvironmentProblem as problem:
        pytest.skip(str(problem))
    folder: Path = tmp_path_factory.mktemp("offload")
    nvme = {"nvme_path": str(folder / "nvme"), "pin_memory": False, "nvme_buffer_size": 100_000}
    strategies: dict[str, dict[str, Any]] = {
        "zero1_cpu": {"kind": "zero", "stage": 1, "offload_optimizer": "cpu"},
        "zero2_cpu": {"kind": "zero", "stage": 2, "offload_optimizer": "cpu"},
        "zero3_cpu": {**ZERO3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
        "zero3_nvme": {**ZERO3, **nvme, "offload_optimizer": "nvme", "offload_parameters": "nvme"},
        "zero3_nvme_optimizer": {**ZERO3, **nvme, "offload_optimizer": "nvme", "offload_parameters": "cpu"},
    }
    cases = [{"name": "ddp", "world": 2, "steps": STEPS, "run": {"parallel": {"kind": "ddp"}}}]
    for name, parallel in strategies.items():
        cases.append({"name": name, "world": 2, "steps": STEPS, "run": {"parallel": parallel, **NATIVE}})
    return {**run_cases(cases, folder), "left": [path.name for path in (folder / "nvme").iterdir()]}


@pytest.mark.parametrize("name", ["zero1_cpu", "zero2_cpu", "zero3_cpu", "zero3_nvme", "zero3_nvme_optimizer"])
def test_offload_changes_no_step(answers: dict[str, Any], name: str) -> None:
    ours, expected = answers[name]["steps"], answers["ddp"]["steps"]
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in expected], rel=1e-5)


def test_nothing_is_left_on_the_disk(answers: dict[str, Any]) -> None:
    assert answers["left"] == []

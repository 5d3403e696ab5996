"""``sparsity.keep=true``: zeros of linear layers stay, and every strategy takes the steps of one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.checkpoint.regions import FlatRange
from launcher.checkpoint.tensors import Shard
from launcher.errors import ConfigError
from launcher.training.kept_zeros import report_kept_zeros

from .conftest import losses

STEPS = 2
ZERO3 = {"kind": "zero", "stage": 3, "persistence_threshold": 0}
FSDP, PIPELINE = {"kind": "fsdp"}, {"kind": "pipeline", "stages": 2}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero0": {"kind": "zero", "stage": 0},
    "zero2": {"kind": "zero", "stage": 2},
    "zero3": ZERO3,
    "zero3_offload": {**ZERO3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "fsdp": FSDP,
    "pipeline": PIPELINE,
    "deepspeed_pipeline": {"kind": "deepspeed_pipeline", "stages": 2},
}
HALF = {"zero0_bf16": STRATEGIES["zero0"], "zero2_bf16": STRATEGIES["zero2"]}
"""Whose weights are copies in bf16 of fp32 ones."""
MIXING = {"single_muon": {"kind": "single"}, "fsdp_muon": FSDP}
"""Muon's update of a weight depends on the whole matrix."""
PLANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gradients_of_zeros_count": ("ddp", {}),
    "gradients_of_zeros_reach_deepspeed": ("zero2", {}),
    "zeros_are_not_restored": ("ddp", {"optimizer": {"kind": "muon"}}),
}


def case(name: str, parallel: dict[str, Any], folder: Path, **rest: Any) -> dict[str, Any]:
    world = 1 if parallel["kind"] == "single" else 2
    family = rest.pop("family", "gpt2")
    sharing = world // parallel.get("stages", 1) // parallel.get("tensor", 1)
    job = {"micro_batch": 8 if sharing == 2 else 16, "gradient_accumulation_steps": None, "global_batch": 16}
    if parallel.get("stages"):
        job["micro_batch"] = 4
    pruned = str(folder / family)
    run = {
        "parallel": parallel,
        "job": job,
        "model": {"weights": pruned} if family == "gpt2" else {"name": pruned},
        "sparsity": {"keep": True},
        **rest.pop("run", {}),
    }
    lr = 1e-3 if family == "llama" else 3e-3
    file = str(folder / family / "model.safetensors")
    return {"name": name, "family": family, "world": world, "steps": STEPS, "run": run, "lr": lr, "zeros": file, **rest}


def prune(source: Path, folder: Path) -> None:
    """Copy a model folder; set a random half of its blocks' matrices to zero, all but one."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    torch.manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.split(".")[-2] in LINEAR and (".0." not in name or "down_proj" not in name):
            tensor[torch.rand(tensor.shape) < 0.5] = 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


LINEAR = ("c_attn", "c_fc", "c_proj", *(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")))


@pytest.fixture(scope="module")
def answers(run_cases: Any, weights: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers of all ranks, by the case's name."""
    folder: Path = tmp_path_factory.mktemp("kept_zeros")
    for family, source in weights.items():
        prune(Path(source), folder / family)
    single, saved = {"kind": "single"}, str(folder / "saved")
    cases = [case("single", single, folder)]
    cases += [case(f"single_{name}", single, folder, family=name) for name in ("llama",)]
    for name, parallel in STRATEGIES.items():
        saving = {"save": saved} if name == "zero3" else {}
        cases.append(case(name, parallel, folder, **saving))
    cases.append(case("tensor", {**FSDP, "tensor": 2}, folder, family="llama"))
    for name, parallel in HALF.items():
        cases.append(case(name, parallel, folder, run={"precision": {"kind": "bf16"}}))
    for name, parallel in MIXING.items():
        cases.append(case(name, parallel, folder, run={"optimizer": {"kind": "muon", "lr": 3e-3}}))
    cases.append(case("single_8bit", single, folder, run={"optimizer": {"kind": "adamw_8bit", "lr": 3e-3}}))
    cases += [case(f"{name}_resumed", STRATEGIES[name], folder, load=saved, steps=0) for name in ("zero3", "pipeline")]
    cases.append(case("dense", single, folder, run={"sparsity": {"keep": False}}))
    cases += [case(plant, STRATEGIES[name], folder, run=run, plant=plant) for plant, (name, run) in PLANTS.items()]
    run_cases(cases, folder)
    return {
        each["name"]: [
            json.loads((folder / f"{each['name']}.{rank}.json").read_text()) for rank in range(each["world"])
        ]
        for each in cases
    }


def revived(ranks: list[dict[str, Any]]) -> int:
    """Return how many weights are not zero any more; every matrix is on some rank."""
    found: dict[str, list[int]] = {}
    for answer in ranks:
        found |= answer["zeros"]
    assert len(found) in (16, 28), sorted(found)
    assert sum(zeros for zeros, _ in found.values()) > 0.4 * 4 * 64 * 64 * 12 / 2
    return sum(alive for _, alive in found.values())


def same(one: list[dict[str, Any]], other: list[dict[str, Any]], rel: float = 1e-5) -> None:
    assert losses(one[0]) == pytest.approx(losses(other[0]), rel=rel)
    norms = [[step["grad_norm"] for step in each[0]["steps"]] for each in (one, other)]
    assert norms[0] == pytest.approx(norms[1], rel=10 * rel)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_keeps_zeros_and_equals_one_process(answers: dict[str, Any], name: str) -> None:
    assert revived(answers[name]) == 0
    same(answers[name], answers["single"])


def test_slices_of_matrices_keep_zeros(answers: dict[str, Any]) -> None:
    assert revived(answers["tensor"]) == revived(answers["single_llama"]) == 0
    same(answers["tensor"], answers["single_llama"])


@pytest.mark.parametrize("name", [*HALF, *MIXING, "single_8bit"])
def test_zeros_stay_whatever_the_format_and_the_optimizer(answers: dict[str, Any], name: str) -> None:
    assert revived(answers[name]) == 0
    if name in MIXING:
        same(answers[name], answers["single_muon"], rel=2e-5)  # its iteration rounds to bf16


def test_other_weights_learn(answers: dict[str, Any]) -> None:
    found = losses(answers["single"][0])
    assert found[-1] < found[0]
    assert revived(answers["dense"]) > 0


@pytest.mark.parametrize("name", ["zero3_resumed", "pipeline_resumed"])
def test_zeros_stay_after_a_resume(answers: dict[str, Any], name: str) -> None:
    assert revived(answers[name]) == 0
    expected = [step["loss"] for step in answers["zero3"][0]["after"]]
    assert losses(answers[name][0], "after") == pytest.approx(expected, rel=1e-5)


def test_every_rank_counts_the_same_zeros(answers: dict[str, Any]) -> None:
    texts = {text for name in ("single", *STRATEGIES) for answer in answers[name] for text in [answer["report"]]}
    (text,) = texts
    assert text.startswith("sparsity: the zeros of 16 matrices are kept, 50.")
    llama = answers["tensor"][0]["report"]
    assert llama == answers["single_llama"][0]["report"]
    assert llama.endswith("; without zeros, and trained as they are: model.layers.0.mlp.down_proj.weight")


def test_planted_errors_are_seen(answers: dict[str, Any]) -> None:
    count = answers["gradients_of_zeros_count"]
    assert revived(count) == 0
    with pytest.raises(AssertionError):
        same(count, answers["single"])
    assert revived(answers["gradients_of_zeros_reach_deepspeed"]) > 0
    assert revived(answers["zeros_are_not_restored"]) > 0


def test_a_model_without_zeros_is_refused() -> None:
    matrix = torch.randn(4, 500)
    matrix[0, 0] = 0.0  # by chance: one of 2,000
    shard = Shard(name="a", shape=(4, 500), region=FlatRange(0, 2000), dtype=torch.float32, read=matrix.flatten)
    engine: Any = SimpleNamespace(linear_matrices=lambda: {"a": None}, shards=lambda: [shard])
    with pytest.raises(ConfigError, match=r"no linear layer of the model is pruned: at most 0\.0005"):
        report_kept_zeros(engine)
    matrix[:2] = 0.0
    assert report_kept_zeros(engine) == "sparsity: the zeros of 1 matrices are kept, 50.0% of 2,000 weights"

"""DeepSpeed's pipeline takes the steps that one process takes: fp32, five steps, from the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import losses

STEPS = 5
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2": (2, {"stages": 2}),
    "pp4": (4, {"stages": 4}),
    "pp2_dp2": (4, {"stages": 2}),
}
SAVED = {"gpt2_pp2_dp2": (4, {}), "zero0": (2, {"stage": 0})}
"""Cases whose checkpoints are loaded, by themselves and by one process, whose own they load then."""
FAMILIES = {"gpt2": 3e-3, "llama": 1e-3}
"""Learning rates. The one family ties its head to the embedding, the other does not. At 3e-3 the small Llama is so
unstable that one process taking 2 sequences a pass instead of 16 strays by 1.4e-5, as all pipelines do."""
SEQUENCES_A_PASS = 2
FEW = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "blocks": {"partition": "blocks"},
    "one_stage": {"stages": 1},
}
PLANTS: dict[str, dict[str, Any]] = {
    "tied_gradients_stay_apart": {},
    "micro_batches_weigh_the_same": {},
    "tied_weight_counts_twice": {},
}


def case(name: str, world: int, parallel: dict[str, Any], *, family: str = "gpt2", **rest: Any) -> dict[str, Any]:
    groups = {group: rest.pop(group) for group in ("model", "activation", "attention", "precision") if group in rest}
    passes = 16 // SEQUENCES_A_PASS // (world // parallel.get("stages", 2))
    job = {"micro_batch": SEQUENCES_A_PASS, "gradient_accumulation_steps": passes}
    run = {"parallel": {"kind": "deepspeed_pipeline", **parallel}, "job": job, **groups}
    return {"name": name, "world": world, "steps": STEPS, "lr": FAMILIES[family], "family": family, "run": run, **rest}


def single(name: str, *, family: str = "gpt2", **rest: Any) -> dict[str, Any]:
    groups = {group: rest.pop(group) for group in ("model", "job") if group in rest}
    run = {"parallel": {"kind": "single"}, "job": {"micro_batch": 16}, **groups}
    shared = {"world": 1, "steps": STEPS, "lr": FAMILIES[family], "family": family, "generate": True}
    return {"name": name, **shared, "run": run, **rest}


@pytest.fixture(scope="module")
def answers(run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run all cases of this module on four processes."""
    folder: Path = tmp_path_factory.mktemp("pipeline")
    saved = {name: str(folder / f"saved_{name}") for name in ("single", *SAVED)}
    cases = [single("gpt2_single", save=saved["single"]), single("llama_single", family="llama")]
    for family in FAMILIES:
        for name, (world, parallel) in LAYOUTS.items():
            more = {"save": saved[f"{family}_{name}"]} if f"{family}_{name}" in SAVED else {}
            cases.append(case(f"{family}_{name}", world, parallel, family=family, held_out=3, generate=True, **more))
        cases.append(single(f"{family}_evaluated", family=family, held_out=3, job={"micro_batch": 2}, steps=0))
    for name, parallel in VARIANTS.items():
        cases.append(case(name, 2, parallel, steps=FEW, **({"save": saved[name]} if name in SAVED else {})))
    for name, (world, parallel) in SAVED.items():
        cases.append(case(f"{name}_resumed", world, parallel, load=[saved[name], saved["single"]], steps=0))
    cases += [
        case("recomputed", 2, {}, activation={"kind": "full"}, steps=FEW),
        case("eager", 2, {}, attention={"kind": "eager"}, steps=FEW),
        case("bf16", 2, {}, precision={"kind": "bf16"}, steps=FEW),
        case("random", 2, {}, model={"weights": "random"}, steps=FEW),
        single("random_single", model={"weights": "random"}, steps=FEW),
        single("reader", load=[saved[name] for name in SAVED], steps=0),
    ]
    cases += [case(plant, 2, parallel, plant=plant, steps=FEW) for plant, parallel in PLANTS.items()]
    found: dict[str, Any] = run_cases(cases, folder)
    for one in cases:
        parts = [json.loads((folder / f"{one['name']}.{rank}.json").read_text()) for rank in range(one["world"])]
        found[one["name"]]["held_out"] = [sum(numbers) for numbers in zip(*(p["held_out"] for p in parts), strict=True)]
        found[one["name"]]["agreed"] = all(part["steps"] == parts[0]["steps"] for part in parts)
    return found


def same(answer: Any, reference: Any) -> bool:
    return losses(answer) == pytest.approx(losses(reference), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pipeline_equals_one_process(answers: dict[str, Any], layout: str, family: str) -> None:
    ours, single = answers[f"{family}_{layout}"], answers[f"{family}_single"]
    assert same(ours, single)
    for one, other in zip(ours["steps"], single["steps"], strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["tokens"] == other["tokens"]
        assert not one["skipped"]
    assert ours["agreed"], "all ranks report the same step"
    assert ours["generated"] == single["generated"]


@pytest.mark.parametrize("name", [*VARIANTS, "recomputed", "eager"])
def test_no_option_changes_the_steps(answers: dict[str, Any], name: str) -> None:
    for one, other in zip(answers[name]["steps"], answers["gpt2_single"]["steps"], strict=False):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert len(answers[name]["steps"]) == FEW


def test_weights_that_each_rank_draws_for_itself_are_those_of_one_process(answers: dict[str, Any]) -> None:
    assert same(answers["random"], answers["random_single"])


def test_bf16_is_close(answers: dict[str, Any]) -> None:
    full = losses(answers["gpt2_single"])[:FEW]
    assert losses(answers["bf16"]) == pytest.approx(full, rel=5e-3)
    assert losses(answers["bf16"]) != full


@pytest.mark.parametrize("name", SAVED)
def test_a_loaded_checkpoint_continues_to_the_bit(answers: dict[str, Any], name: str) -> None:
    assert answers[name]["after"]
    assert answers[f"{name}_resumed"]["after"] == answers[name]["after"]


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_one_process_continues_in_stages_and_back(answers: dict[str, Any], name: str) -> None:
    single = answers["gpt2_single"]
    assert losses(answers[f"{name}_resumed"], "after1") == pytest.approx(losses(single, "after"), rel=1e-6)
    read = losses(answers["reader"], f"after{[*SAVED].index(name) or ''}")
    assert read == pytest.approx(losses(answers[name], "after"), rel=1e-6)


def test_planted_errors_are_seen(answers: dict[str, Any]) -> None:
    true = answers["gpt2_single"]["steps"][:FEW]
    for plant in PLANTS:
        steps = answers[plant]["steps"]
        assert steps[0]["loss"] == pytest.approx(true[0]["loss"], rel=1e-5)
        norms = [step["grad_norm"] for step in steps]
        assert norms != pytest.approx([step["grad_norm"] for step in true], rel=1e-4), plant
        assert losses(answers[plant]) != pytest.approx([step["loss"] for step in true], rel=1e-5), plant


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_counts_once_in_an_evaluation(answers: dict[str, Any], family: str) -> None:
    loss, tokens = answers[f"{family}_evaluated"]["held_out"]
    for layout in ("pp2", "pp4"):
        assert answers[f"{family}_{layout}"]["held_out"] == [pytest.approx(loss, rel=1e-5), tokens]
    assert answers[f"{family}_pp2_dp2"]["held_out"][1] > tokens, "two pipelines see different sequences"
